"""DeePMD-kit `npy` systems: folders of frames with the same number of atoms, in eV and angstrom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from ase.formula import Formula
from numpy.typing import NDArray

from rung.data.fidelity import Fidelity
from rung.data.sources.npz import read_npy_header, read_npy_rows
from rung.data.sources.source import PART_STRUCTURES, TABLE_STRUCTURES, Part, Source, SourceInfo, cut, existing
from rung.data.table import StructureTable

Array = NDArray[Any]

_READ = ("coord", "box", "energy", "force", "virial", "real_atom_types")
_LABELS = ("energy", "force", "virial")


class FrameSet(NamedTuple):
    """One `set.*` folder of a system, or some of its frames."""

    system: Path
    name: str  # of the system, in keys
    folder: Path
    first: int  # of the first frame, within the system
    total: int  # frames of the set
    start: int  # within the set
    stop: int


@dataclass(frozen=True)
class DeepMD(Source):
    """Every system below a folder, at one level of theory.

    A system is a folder with `type.raw`. `type_map` names the elements of its types where `type_map.raw` is missing.
    Arrays that Rung does not read (`fparam`, `aparam`, `atom_ener`, ...) are refused unless `ignore` names them.
    Stress is minus the virial over the volume, as in dpdata. The group of a frame is its formula.
    """

    fidelity: str
    method: str = ""
    basis: str = ""
    dispersion: str = ""
    code: str = ""
    description: str = ""
    type_map: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    charge: int = 0
    multiplicity: int = 1
    info: ClassVar[SourceInfo] = SourceInfo(
        name="deepmd",
        title="DeePMD-kit npy systems, standard and mixed type",
        files="folders with type.raw, type_map.raw and set.*/*.npy at any depth",
        layout=(
            "type.raw [n], type_map.raw; set.*/coord.npy [M, 3 n] angstrom, box.npy [M, 9] angstrom unless there is a "
            "file 'nopbc', energy.npy [M] eV, force.npy [M, 3 n] eV/angstrom, virial.npy [M, 9] eV; mixed type: "
            "real_atom_types.npy [M, n], -1 for no atom"
        ),
        url="https://docs.deepmodeling.com/projects/deepmd/en/stable/data/system.html",
        doi="10.1016/j.cpc.2018.03.016",
        citation="H. Wang, L. Zhang, J. Han, W. E, DeePMD-kit, Comput. Phys. Commun. 228, 178 (2018)",
    )

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        fidelity = Fidelity(
            self.fidelity, self.method or self.fidelity, self.basis, self.dispersion, self.code, self.description
        )
        return {fidelity.name: fidelity}

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts of PART_STRUCTURES frames over all systems of each folder, in the order of their paths."""
        parts = []
        for path in existing(paths, self.info):
            sets = _frame_sets(path)
            for frame_set in sets:
                self._check(frame_set)
            parts += cut(path, sum(frame_set.total for frame_set in sets), PART_STRUCTURES)
        return parts

    def read(self, part: Part) -> Iterator[StructureTable]:
        waiting: list[StructureTable] = []
        held = 0
        for piece in _pieces(_frame_sets(part.path), part.start, part.stop):
            table = self._table(piece)
            if waiting and held + len(table) > TABLE_STRUCTURES:
                yield StructureTable.concatenate(waiting)
                waiting, held = [], 0
            waiting.append(table)
            held += len(table)
        if held:
            yield StructureTable.concatenate(waiting)

    def _check(self, frames: FrameSet) -> None:
        names = {file.stem for file in frames.folder.glob("*.npy")}
        if unread := sorted(names - {*_READ, *self.ignore}):
            raise ValueError(
                f"{frames.folder}: expected no arrays but {', '.join(_READ)}, found {', '.join(unread)}; name them in "
                "'ignore' to read the set without them"
            )
        if not names & {*_LABELS} - {*self.ignore}:
            found = ", ".join(sorted(names))
            raise ValueError(f"{frames.folder}: expected a label ({', '.join(_LABELS)}), found {found}")

    def _table(self, frames: FrameSet) -> StructureTable:
        types, elements = _frame_types(frames), self._elements(frames.system)
        count, n = types.shape
        present = types >= 0
        if types.min() < -1 or types.max() >= len(elements):
            expected = f"types 0..{len(elements) - 1}, which the type map names (-1: no atom)"
            raise ValueError(f"{frames.folder}: expected {expected}, found {types.min()}..{types.max()}")
        periodic = not (frames.system / "nopbc").exists()
        cell = _array(frames, "box", 9).reshape(count, 3, 3) if periodic else None
        numbers = elements[types]
        first = frames.first + frames.start
        return _labelled(
            StructureTable.make(
                keys=[f"{frames.name}-{index:06d}" for index in range(first, first + count)],
                groups=_formulas(numbers, present),
                num_atoms=present.sum(axis=1),
                numbers=numbers[present],
                positions=_atoms(_array(frames, "coord", 3 * n), present),
                cell=cell,
                pbc=[periodic] * 3,
                charge=self.charge,
                multiplicity=self.multiplicity,
                labels=self._labels(frames, present, cell),
            ),
            self.fidelity,
        )

    def _labels(self, frames: FrameSet, present: NDArray[np.bool_], cell: Array | None) -> dict[str, Array]:
        count, n = present.shape
        has = {name for name in _LABELS if (frames.folder / f"{name}.npy").exists()} - {*self.ignore}
        labels: dict[str, Array] = {}
        if "energy" in has:
            labels[f"energy.{self.fidelity}"] = _array(frames, "energy", 1).reshape(count)
        if "force" in has:
            labels[f"forces.{self.fidelity}"] = _atoms(_array(frames, "force", 3 * n), present)
        if "virial" in has:
            if cell is None:
                raise ValueError(f"{frames.folder}: expected no virial without a box; name it in 'ignore' to leave it")
            volume = np.abs(np.linalg.det(cell.astype(np.float64)))[:, None, None]
            labels[f"stress.{self.fidelity}"] = -_array(frames, "virial", 9).reshape(count, 3, 3) / volume
        return labels

    def _elements(self, system: Path) -> NDArray[np.uint8]:
        """Return the atomic number of each type."""
        path = system / "type_map.raw"
        names = tuple(path.read_text().split()) if path.is_file() else self.type_map
        if not names:
            raise FileNotFoundError(f"{path}: no such file; give the elements of the types in 'type_map'")
        if unknown := [name for name in names if not atomic_numbers.get(name)]:
            raise ValueError(f"{path}: expected symbols of elements, found {', '.join(unknown)}")
        return np.array([atomic_numbers[name] for name in names], np.uint8)


def _frame_sets(root: Path) -> list[FrameSet]:
    """Return the sets of all systems at and below a folder, reading headers only."""
    systems = sorted(path.parent for path in root.rglob("type.raw"))
    if not systems:
        raise ValueError(f"{root}: expected a system (a folder with type.raw) at or below it, found none")
    found = []
    for system in systems:
        name = (Path(root.resolve().name) / system.relative_to(root)).as_posix()
        first = 0
        folders = sorted(system.glob("set.*"))
        if not folders:
            raise ValueError(f"{system}: expected folders set.*, found none; a system of .raw files must be converted")
        for folder in folders:
            count = _count(folder / "coord.npy")
            found.append(FrameSet(system, name, folder, first, count, 0, count))
            first += count
    return found


def _pieces(sets: Sequence[FrameSet], start: int, stop: int) -> Iterator[FrameSet]:
    """Yield frames start..stop of all sets together, at most TABLE_STRUCTURES of one set at a time."""
    before = 0
    for frames in sets:
        begin, end = max(start - before, 0), min(stop - before, frames.total)
        for first in range(begin, end, TABLE_STRUCTURES):
            yield frames._replace(start=first, stop=min(first + TABLE_STRUCTURES, end))
        before += frames.total


def _frame_types(frames: FrameSet) -> NDArray[np.int64]:
    """Return the type of each atom of each frame, -1 for none; [M, n]."""
    types = _types(frames.system)
    path = frames.folder / "real_atom_types.npy"
    if not path.exists():
        return np.broadcast_to(types, (frames.stop - frames.start, len(types)))
    real = _array(frames, path.stem, len(types), kinds="iuf")  # dpdata wrote it as floats once
    if (np.rint(real) != real).any():
        raise ValueError(f"{path}: expected whole numbers, found {real.dtype} with others")
    return real.reshape(-1, len(types)).astype(np.int64)


def _types(system: Path) -> NDArray[np.int64]:
    path = system / "type.raw"
    try:
        types = np.array([int(word) for word in path.read_text().split()], np.int64)
    except ValueError as error:
        raise ValueError(f"{path}: expected whole numbers, one per atom ({error})") from error
    if not len(types) or types.min() < 0:
        raise ValueError(f"{path}: expected types from 0, one per atom, found {types.tolist()[:8]}")
    return types


def _count(path: Path) -> int:
    """Return the number of frames of an array."""
    with _naming_what_is_missing(path):
        header = read_npy_header(path)
    if not header.shape or not header.shape[0]:
        raise ValueError(f"{path}: expected at least one frame, found {header}")
    return header.shape[0]


def _array(frames: FrameSet, name: str, width: int, kinds: str = "f") -> Array:
    """Return the chosen frames of an array of `width` numbers a frame."""
    path = frames.folder / f"{name}.npy"
    with _naming_what_is_missing(path):
        return read_npy_rows(path, range(frames.start, frames.stop), frames.total, width, kinds)


@contextmanager
def _naming_what_is_missing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        message = f"{path}: no such file; a set has coord.npy, and box.npy unless its system has 'nopbc'"
        raise FileNotFoundError(message) from error


def _atoms(array: Array, present: NDArray[np.bool_]) -> Array:
    """Return the rows [N, 3] of the atoms that are there, of an array of three numbers for each place."""
    rows = array.reshape(-1, 3)
    return rows if present.all() else rows[present.reshape(-1)]


def _formulas(numbers: NDArray[np.uint8], present: NDArray[np.bool_]) -> list[str]:
    """Return the formula of each frame; [M]."""
    n = numbers.shape[1]
    rows = np.sort(np.where(present, numbers, 0).astype(np.uint8), axis=1).tobytes()
    return [_formula(rows[start : start + n]) for start in range(0, len(rows), n)]


@lru_cache(maxsize=65536)
def _formula(numbers: bytes) -> str:
    """Return the formula, in Hill order, of atomic numbers; 0 is no atom."""
    return str(Formula.from_list([chemical_symbols[number] for number in numbers if number]).format("hill"))


def _labelled(table: StructureTable, fidelity: str) -> StructureTable:
    if any(np.isnan(array).any() for array in table.labels.values()):
        return table.where(table.carries(fidelity))
    return table
