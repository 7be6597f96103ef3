"""ANI-2x: organic molecules of H, C, N, O, F, S, Cl, one HDF5 file per level of theory, grouped by number of atoms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.ani1x import WB97X_631GD
from rung.data.sources.common import formulas, gathered, labelled, of_one_size
from rung.data.sources.hdf5 import Group, dataset, naming, part_rows, row_parts
from rung.data.sources.source import LevelsSource, Part, SourceInfo, existing
from rung.data.table import StructureTable
from rung.data.units import HARTREE


class Level(NamedTuple):
    """The file that holds a level of theory; the energies of all include their dispersion."""

    fidelity: Fidelity
    file: str
    forces: bool


LEVELS = {
    level.fidelity.name: level
    for level in (
        Level(WB97X_631GD, "ANI-2x-wB97X-631Gd.h5", True),
        Level(Fidelity("wb97x_def2tzvpp", "wB97X", "def2-TZVPP"), "ANI-2x-wB97X-def2TZVPP.h5", False),
        Level(Fidelity("wb97md3bj_def2tzvpp", "wB97M", "def2-TZVPP", "D3(BJ)"), "ANI-2x-wB97MD3BJ-def2TZVPP.h5", False),
        Level(Fidelity("wb97mv_def2tzvpp", "wB97M-V", "def2-TZVPP", "VV10"), "ANI-2x-wB97MV-def2TZVPP.h5", False),
        Level(Fidelity("b973c", "B97-3c", "def2-mTZVP", "D3(BJ)"), "ANI-2x-B973c-def2mTZVP.h5", True),
    )
}


@dataclass(frozen=True)
class Ani2x(LevelsSource):
    """The reader of the files of LEVELS, told apart by their published names; `levels` says which to expect."""

    levels: tuple[str, ...] = ("wb97x_631gd",)

    info: ClassVar[SourceInfo] = SourceInfo(
        name="ani2x",
        title="ANI-2x release",
        files=", ".join(level.file for level in LEVELS.values()) + " (unpacked from their .tar.gz)",
        layout=(
            "HDF5, one group per number of atoms n: species [structures, n] (atomic numbers), coordinates "
            "[structures, n, 3] in angstrom, energies [structures] in Hartree, with some levels forces "
            "[structures, n, 3] in Hartree/angstrom; other datasets are not read"
        ),
        url="https://zenodo.org/records/10108942",
        doi="10.5281/zenodo.10108942",
        citation="C. Devereux, J. S. Smith, K. K. Huddleston, et al., J. Chem. Theory Comput. 16, 4192 (2020)",
        fidelities=tuple(level.fidelity for level in LEVELS.values()),
        structures=9_651_712,
        size="3.7 GB (wB97X/6-31G(d))",
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are structures, counted through the groups in order.

        Raises ValueError also for a file that is not named as published, or whose level is not among `levels`.
        """
        return [part for path in existing(paths, self.info) for part in self._parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        yield from gathered(self._tables(part, self._level(part.path)))

    def _parts(self, path: Path) -> list[Part]:
        self._level(path)
        return row_parts(path, "coordinates")

    def _level(self, path: Path) -> Level:
        for level in LEVELS.values():
            if level.file == path.name:
                if level.fidelity.name not in self.levels:
                    found = f"'{level.fidelity.name}'"
                    raise ValueError(f"{path}: expected a level of {self.levels}, found {found}; add it to `levels`")
                return level
        names = ", ".join(level.file for level in LEVELS.values())
        raise ValueError(f"{path}: the name says the level of theory: expected one of {names}, found '{path.name}'")

    def _tables(self, part: Part, level: Level) -> Iterator[StructureTable]:
        for name, group, rows in part_rows(part, "coordinates"):
            yield labelled(_table(group, rows, f"{part.path.stem}-{name}", level), [level.fidelity.name])


def _table(group: Group, rows: slice, key: str, level: Level) -> StructureTable:
    coordinates = dataset(group, "coordinates", (None, None, 3))
    M, n, _ = coordinates.shape
    numbers = dataset(group, "species", (M, n), "iu")[rows]
    name = level.fidelity.name
    labels = {f"energy.{name}": dataset(group, "energies", (M,))[rows].astype(np.float64) * HARTREE}
    if level.forces:
        labels[f"forces.{name}"] = dataset(group, "forces", (M, n, 3))[rows] * HARTREE
    with naming(group):
        return of_one_size(key, rows.start, formulas(numbers), numbers, coordinates[rows], labels)
