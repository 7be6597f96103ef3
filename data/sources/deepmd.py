"""DeePMD-kit `npy` systems: folders of frames with the same number of atoms, in eV and angstrom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from rung.data.sources.common import formulas, gathered, labelled, numbered, pieces
from rung.data.sources.npz import read_npy_header, read_npy_rows
from rung.data.sources.source import OneLevelSource, Part, SourceInfo, cut_rows, existing, span
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
class DeepMD(OneLevelSource):
    """Every system below a folder, at one level of theory.

    A system is a folder with `type.raw`. `type_map` names the elements of its types where `type_map.raw` is missing.
    Arrays that Rung does not read (`fparam`, `aparam`, `atom_ener`, ...) are refused unless `ignore` names them.
    Stress is minus the virial over the volume, as in dpdata. The group of a frame is its formula.
    """

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

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are frames of all systems of a folder, in the order of their paths."""
        parts = []
        for path in existing(paths, self.info):
            sets = _frame_sets(path)
            for frame_set in sets:
                self._check(frame_set)
            sizes = [len(_types(frame_set.system)) for frame_set in sets]
            parts += cut_rows(path, [frame_set.total for frame_set in sets], sizes)
        return parts

    def read(self, part: Part) -> Iterator[StructureTable]:
        yield from gathered(self._table(frames) for frames in _chosen(part))

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
        return labelled(
            StructureTable.make(
                keys=numbered(frames.name, first, first + count),
                groups=formulas(numbers, present),
                num_atoms=present.sum(axis=1),
                numbers=numbers[present],
                positions=_atoms(_array(frames, "coord", 3 * n), present),
                cell=cell,
                pbc=[periodic] * 3,
                charge=self.charge,
                multiplicity=self.multiplicity,
                labels=self._labels(frames, present, cell),
            ),
            [self.fidelity],
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


def _chosen(part: Part) -> Iterator[FrameSet]:
    """Yield the frames of a part, at most TABLE_STRUCTURES of one set at a time."""
    sets = _frame_sets(part.path)
    counts = [frames.total for frames in sets]
    for index, rows in pieces(counts, span(part, sum(counts))):
        yield sets[index]._replace(start=rows.start, stop=rows.stop)


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
