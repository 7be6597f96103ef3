"""AIMNet2: neutral and charged molecules of 14 elements, HDF5 grouped by number of atoms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rung.data.fidelity import Fidelity, unknown_fidelity
from rung.data.sources.common import formulas, gathered, labelled, of_one_size
from rung.data.sources.hdf5 import Group, dataset, naming, part_rows, row_parts
from rung.data.sources.source import Part, Source, SourceInfo, existing
from rung.data.table import StructureTable

LEVELS = {
    level.name: level
    for level in (
        Fidelity("wb97m_def2tzvpp", "wB97M", "def2-TZVPP", code="ORCA 5.0.3"),
        Fidelity("b973c", "B97-3c", "def2-mTZVP", code="ORCA 5.0.3"),
    )
}
_MARKS = {"wb97m": "wb97m_def2tzvpp", "b973c": "b973c"}  # what in a file's name, without hyphens, tells its level


@dataclass(frozen=True)
class Aimnet2(Source):
    """The reader of the training sets of AIMNet2, and of any file in the layout of AIMNet2's `SizeGroupedDataset`.

    A file does not say its level of theory: `level` does.
    """

    level: str = "wb97m_def2tzvpp"

    info: ClassVar[SourceInfo] = SourceInfo(
        name="aimnet2",
        title="Training datasets for AIMNet2 machine-learned neural network potential",
        files="the .h5 file of one level of theory (wB97M/def2-TZVPP or B97-3c)",
        layout=(
            "HDF5, one group per number of atoms n: numbers [structures, n], coord [structures, n, 3] in angstrom, "
            "charge [structures], energy [structures] in eV, forces [structures, n, 3] in eV/angstrom, optionally "
            "mult [structures]; other properties are not read"
        ),
        url="https://doi.org/10.1184/R1/27629937.v2",
        doi="10.1039/D4SC08572H",
        citation="D. M. Anstine, R. Zubatyuk, O. Isayev, Chem. Sci. 16, 10228 (2025)",
        fidelities=tuple(LEVELS.values()),
    )

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown_fidelity(self.level, LEVELS)

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        return {self.level: LEVELS[self.level]}

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are structures, counted through the groups in order.

        Raises ValueError also for a file whose name says another level than `level`.
        """
        return [part for path in existing(paths, self.info) for part in self._parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        yield from gathered(self._tables(part))

    def _parts(self, path: Path) -> list[Part]:
        said = {level for mark, level in _MARKS.items() if mark in path.stem.lower().replace("-", "")}
        if said and self.level not in said:
            raise ValueError(f"{path}: expected a file of level '{self.level}', found one of {said}; choose that level")
        return row_parts(path, "coord")

    def _tables(self, part: Part) -> Iterator[StructureTable]:
        for name, group, rows in part_rows(part, "coord"):
            yield labelled(_table(group, rows, f"{part.path.stem}-{name}", self.level), [self.level])


def _table(group: Group, rows: slice, key: str, level: str) -> StructureTable:
    positions = dataset(group, "coord", (None, None, 3))
    M, n, _ = positions.shape
    numbers = dataset(group, "numbers", (M, n), "iu")[rows]
    charge = dataset(group, "charge", (M,), "iuf")[rows]
    multiplicity = dataset(group, "mult", (M,), "iuf")[rows] if "mult" in group else 1
    labels = {
        f"energy.{level}": dataset(group, "energy", (M,))[rows],
        f"forces.{level}": dataset(group, "forces", (M, n, 3))[rows],
    }
    with naming(group):
        return of_one_size(
            key,
            rows.start,
            formulas(numbers),
            numbers,
            positions[rows],
            labels,
            charge=charge,
            multiplicity=multiplicity,
        )
