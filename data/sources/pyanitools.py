"""ANI-1 and COMP6: HDF5 files of `pyanitools`, molecules of H, C, N, O at wB97X/6-31G(d)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from ase.data import atomic_numbers

from rung.data.sources.ani1x import WB97X_631GD, WB97X_631GD_ATOMS
from rung.data.sources.common import gathered, labelled, of_one_size, slices
from rung.data.sources.hdf5 import Group, child, dataset, is_group, names_in, naming, opened, where
from rung.data.sources.source import Part, Source, SourceInfo, cut_groups, existing, span
from rung.data.table import Array, StructureTable
from rung.data.units import HARTREE

LEVEL = WB97X_631GD.name


@dataclass(frozen=True)
class PyAniTools(Source):
    """The reader of `pyanitools` files; `high_energy` also reads the conformers that ANI-1 stores apart."""

    high_energy: bool = False

    info: ClassVar[SourceInfo] = SourceInfo(
        name="pyanitools",
        title="ANI-1: 20 million off-equilibrium conformations of organic molecules; COMP6 benchmark",
        files="ani_gdb_s01.h5 ... ani_gdb_s08.h5; the .h5 files of COMP6v1",
        layout=(
            "HDF5, nested groups with one molecule each: species [n] (symbols), coordinates [conformers, n, 3] in "
            "angstrom, energies [conformers] in Hartree, where computed forces [conformers, n, 3] in Hartree/angstrom, "
            "in ANI-1 smiles (characters) and coordinatesHE, energiesHE of the conformers of high energy; other "
            "datasets are not read"
        ),
        url="https://doi.org/10.6084/m9.figshare.c.3846712",
        doi="10.1038/sdata.2017.193",
        citation="J. S. Smith, O. Isayev, A. E. Roitberg, Sci. Data 4, 170193 (2017); COMP6: J. S. Smith, B. Nebgen, "
        "N. Lubbers, O. Isayev, A. E. Roitberg, J. Chem. Phys. 148, 241733 (2018)",
        fidelities=(WB97X_631GD,),
        structures=22_057_374,
        e0={LEVEL: WB97X_631GD_ATOMS},
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are molecules."""
        return [part for path in existing(paths, self.info) for part in self._parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        with opened(part.path) as file:
            names = _molecules(file)
            chosen = [names[index] for index in span(part, len(names))]
            yield from gathered(table for name in chosen for table in self._molecule(file, name, part.path.stem))

    def _parts(self, path: Path) -> list[Part]:
        with opened(path) as file:
            shapes = [self._shape(child(file, name)) for name in _molecules(file)]
        return cut_groups(path, [M for M, _ in shapes], [n for _, n in shapes])

    def _shape(self, group: Group) -> tuple[int, int]:
        """Return how many conformers of how many atoms a molecule has."""
        M, n, _ = dataset(group, "coordinates", (None, None, 3)).shape
        return M + (_high_energy(group) if self.high_energy else 0), n

    def _molecule(self, file: Group, name: str, stem: str) -> Iterator[StructureTable]:
        group = child(file, name)
        numbers = _numbers(group)
        identity = "".join(_texts(group, "smiles")) if "smiles" in group else ""
        yield from _conformers(group, "", numbers, f"{stem}-{name}", identity or name)
        if self.high_energy and _high_energy(group):
            yield from _conformers(group, "HE", numbers, f"{stem}-{name}-he", identity or name)


def _conformers(group: Group, suffix: str, numbers: Array, key: str, identity: str) -> Iterator[StructureTable]:
    n = len(numbers)
    coordinates = dataset(group, f"coordinates{suffix}", (None, n, 3))
    energies = dataset(group, f"energies{suffix}", (len(coordinates),))
    forces = None
    if not suffix and "forces" in group:
        forces = dataset(group, "forces", (len(coordinates), n, 3))
    for rows in slices(len(coordinates)):
        labels = {f"energy.{LEVEL}": energies[rows].astype(np.float64) * HARTREE}
        if forces is not None:
            labels[f"forces.{LEVEL}"] = forces[rows] * HARTREE
        with naming(group):
            table = of_one_size(key, rows.start, identity, numbers, coordinates[rows], labels)
        yield labelled(table, [LEVEL])


def _molecules(group: Group, prefix: str = "") -> list[str]:
    """Return the paths of the groups that hold molecules; only the first of siblings is opened, for speed."""
    names = names_in(group)
    first = child(group, names[0])
    if "coordinates" in first:
        return [prefix + name for name in names]
    if "species" in first or not any(is_group(first, item) for item in first):
        dataset(first, "coordinates", (None, None, 3))  # raises, and says what is there
    return [path for name in names for path in _molecules(child(group, name), f"{prefix}{name}/")]


def _high_energy(group: Group) -> int:
    if "coordinatesHE" not in group:
        raise ValueError(
            f"{where(group)}: high_energy: expected a dataset 'coordinatesHE', found {', '.join(names_in(group))}"
        )
    return len(group["coordinatesHE"])  # where there are none the file may have an empty list, without the other axes


def _numbers(group: Group) -> Array:
    symbols = _texts(group, "species")
    for symbol in symbols:
        if not atomic_numbers.get(symbol):  # ASE's "X" is 0
            raise ValueError(f"{where(group)}: species: expected symbols of elements, found {symbol!r}")
    return np.array([atomic_numbers[symbol] for symbol in symbols], np.uint8)


def _texts(group: Group, name: str) -> list[str]:
    values = dataset(group, name, (None,), "SO")[()].tolist()
    with naming(group):
        return [value.decode() for value in values]  # h5py gives texts of either kind as bytes
