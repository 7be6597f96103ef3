"""QM7-X: equilibrium and displaced structures of small molecules at PBE0+MBD, in eight HDF5 files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from rung.data.fidelity import Fidelity
from rung.data.sources.common import batches, gathered, labelled, repeated
from rung.data.sources.hdf5 import Group, child, dataset, names_in, naming, opened, small
from rung.data.sources.source import LevelsSource, Part, SourceInfo, cut_groups, existing, span
from rung.data.table import Array, StructureTable


class Level(NamedTuple):
    """Where a level of theory is in the files."""

    fidelity: Fidelity
    energy: str  # eV
    forces: str = ""  # eV/angstrom
    dipole: str = ""  # e angstrom


_AIMS = "FHI-aims"
LEVELS = {
    level.fidelity.name: level
    for level in (
        Level(Fidelity("pbe0_mbd", "PBE0", "tight", "MBD", _AIMS), "ePBE0+MBD", "totFOR", "vDIP"),
        Level(Fidelity("pbe0", "PBE0", "tight", code=_AIMS), "ePBE0", "pbe0FOR", "vDIP"),
        Level(Fidelity("dftb3_mbd", "DFTB3", dispersion="MBD", code="DFTB+"), "eDFTB+MBD"),
    )
}


@dataclass(frozen=True)
class QM7X(LevelsSource):
    """Read `1000.hdf5` ... `8000.hdf5`.

    Some conformers occur twice under other names; `duplicates` is the published list of them (`DupMols.dat`), whose
    conformers are left out with their displaced structures. Without it all structures are given.
    """

    info: ClassVar[SourceInfo] = SourceInfo(
        name="qm7x",
        title="QM7-X, quantum-mechanical properties spanning the chemical space of small organic molecules",
        files="1000.hdf5, 2000.hdf5, ... 8000.hdf5, unpacked from 1000.xz ... 8000.xz",
        layout="HDF5, molecule ('1') / structure ('Geom-m1-i1-c1-opt', 'Geom-m1-i1-c1-d1'): atNUM [n], atXYZ [n, 3] "
        "(angstrom), ePBE0+MBD, ePBE0, eDFTB+MBD [1] (eV), totFOR, pbe0FOR [n, 3] (eV/angstrom), vDIP [3] (e angstrom)"
        "; neutral singlets; other properties are not read",
        url="https://zenodo.org/records/4288677",
        doi="10.5281/zenodo.4288677",
        licence="CC-BY-4.0",
        citation="Hoja, Medrano Sandonas, Ernst, Vazquez-Mayagoitia, DiStasio, Tkatchenko, QM7-X, a comprehensive "
        "dataset of quantum-mechanical properties spanning the chemical space of small organic molecules, Scientific "
        "Data 8, 43 (2021), 10.1038/s41597-021-00812-2",
        fidelities=tuple(level.fidelity for level in LEVELS.values()),
        structures=4_195_237,
    )
    levels: tuple[str, ...] = ("pbe0_mbd",)
    duplicates: str = ""

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are molecules."""
        _duplicated(self.duplicates)
        return [part for path in existing(paths, self.info) for part in _parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        duplicated = _duplicated(self.duplicates)
        with opened(part.path) as file:
            names = names_in(file)
            chosen = (names[index] for index in span(part, len(names)))
            yield from gathered(table for name in chosen for table in self._tables(child(file, name), name, duplicated))

    def _tables(self, group: Group, name: str, duplicated: frozenset[str]) -> Iterator[StructureTable]:
        """Yield the structures of one molecule; they all have the same number of atoms."""
        kept = [key for key in names_in(group) if key.rpartition("-")[0] not in duplicated]
        for keys in batches(kept):
            n = len(dataset(child(group, keys[0]), "atNUM", (None,), "iu"))
            numbers = _stacked(group, keys, "atNUM", (n,), np.int64)
            with naming(group):
                table = StructureTable.make(
                    keys,
                    repeated(name, len(keys)),
                    np.full(len(keys), n),
                    numbers,
                    _stacked(group, keys, "atXYZ", (n, 3)),
                    labels=self._labels(group, keys, n),
                )
            yield labelled(table, self.levels)

    def _labels(self, group: Group, keys: Sequence[str], n: int) -> dict[str, Array]:
        labels = {}
        for name in self.levels:
            _, energy, forces, dipole = LEVELS[name]
            labels[f"energy.{name}"] = _stacked(group, keys, energy, (1,))
            if forces:
                labels[f"forces.{name}"] = _stacked(group, keys, forces, (n, 3))
            if dipole:
                labels[f"dipole.{name}"] = _stacked(group, keys, dipole, (3,))
        return labels


def _parts(path: Path) -> list[Part]:
    if path.suffix == ".xz":
        raise ValueError(f"{path}: expected HDF5, found a compressed file; unpack it first (xz --decompress)")
    with opened(path) as file:
        counts = [len(child(file, name)) for name in names_in(file)]
    return cut_groups(path, counts, [0] * len(counts))


def _duplicated(path: str) -> frozenset[str]:
    """Return the conformers (such as Geom-m1-i1-c1) that a list of duplicates names by their optimised structures."""
    if not path:
        return frozenset()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; option 'duplicates' expects the published DupMols.dat")
    lines = Path(path).read_text(encoding="utf-8").split()
    for line in lines:
        if not (line.startswith("Geom-") and line.endswith("-opt")):
            raise ValueError(f"{path}: expected names such as Geom-m1-i1-c1-opt, found '{line}'")
    return frozenset(line.removesuffix("-opt") for line in lines)


def _stacked(
    group: Group, keys: Sequence[str], name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float64
) -> Array:
    """Return one dataset of many structures as [M, *shape]."""
    return np.array([small(group, [key, name], shape, dtype) for key in keys])
