"""What readers of HDF5 share: files and datasets whose errors name them, the cut into parts, tables of a good size.

Two layouts are common. Many groups of one molecule with few conformers each: `cut_groups` makes parts of whole groups,
`gathered` joins what they hold into tables. Few groups with very many structures each: `cut_rows` makes parts of the
groups laid end to end, `pieces` says which rows of which groups a part is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula

from rung.data.sources.source import PART_STRUCTURES, TABLE_STRUCTURES, Part, cut
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import LABEL_KINDS, Array, Strings, StructureTable

Group: TypeAlias = Any  # h5py ships no types
Dataset: TypeAlias = Any

_KINDS = {"f": "floats", "iu": "integers", "iuf": "numbers", "SO": "texts"}


@contextmanager
def opened(path: Path) -> Iterator[Group]:
    """Open a file for reading; what HDF5 cannot read, now or later, becomes a ValueError that names the file."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, KeyError) as error:  # KeyError: a name is listed, but its object cannot be opened
        raise ValueError(f"{path}: not a readable HDF5 file ({error}); damaged or truncated, fetch it again") from error


@contextmanager
def naming(group: Group) -> Iterator[None]:
    """Prefix a ValueError with the file and the group that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where(group)}: {error}") from error


def where(group: Group) -> str:
    """Return the file and the path of a group, for errors."""
    return f"{group.file.filename}: {group.name}"


def names_in(group: Group) -> list[str]:
    """Return the names in a group in their fixed order; raise ValueError when there are none."""
    names: list[str] = list(group)
    if not names:
        raise ValueError(f"{where(group)}: expected groups of molecules, found an empty group")
    if foreign := [name for name in names if not isinstance(name, str)]:  # h5py leaves what is not UTF-8 as bytes
        raise ValueError(
            f"{where(group)}: expected names in UTF-8, found {foreign[0]!r}; damaged, fetch the file again"
        )
    return names


def child(group: Group, name: str) -> Group:
    """Return a group in a group; raise ValueError naming the place when there is none."""
    found = _item(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{where(group)}: expected a group '{name}', found {_found(group, found)}")
    return found


def is_group(group: Group, name: str) -> bool:
    """Return whether `name` is a group in `group`."""
    return group.get(name, getclass=True) is h5py.Group


def dataset(group: Group, name: str, shape: tuple[int | None, ...], kinds: str = "f") -> Dataset:
    """Return a dataset of `shape` (None: any length) and of numpy dtype kinds "f", "iu", "iuf" or "SO" (texts).

    Raises ValueError naming file, group and dataset, what was expected and what was found.
    """
    found = _item(group, name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where(group)}: expected a dataset '{name}', found {_found(group, found)}")
    fits = len(shape) == found.ndim and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    dtype = _dtype(group, found)
    if not fits or dtype.kind not in kinds:
        lengths = ", ".join("any" if n is None else str(n) for n in shape)
        expected = f"{_KINDS[kinds]} of shape ({lengths})"
        raise ValueError(f"{where(group)}: {name}: expected {expected}, found {dtype} {found.shape}")
    return found


def row_counts(file: Group, positions: str) -> list[int]:
    """Return the number of structures in each group of a file, by the length of its positions [M, n, 3]."""
    return [len(dataset(child(file, name), positions, (None, None, 3))) for name in names_in(file)]


def cut_groups(path: Path, counts: Sequence[int]) -> list[Part]:
    """Return parts over groups start..stop of a file, in order, with about PART_STRUCTURES of `counts` each."""
    first = np.cumsum([0, *counts])
    edges = np.flatnonzero(np.diff(first[:-1] // PART_STRUCTURES)) + 1
    bounds = [0, *edges.tolist(), len(counts)]
    size = path.stat().st_size / max(int(first[-1]), 1)
    return [
        Part(path, start, stop, int(size * (first[stop] - first[start])))
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def cut_rows(path: Path, counts: Sequence[int]) -> list[Part]:
    """Return parts of PART_STRUCTURES structures over groups of `counts` structures laid end to end."""
    total = sum(counts)
    size = path.stat().st_size / max(total, 1)
    parts = cut(path, total, PART_STRUCTURES)
    return [dataclasses.replace(part, bytes=int(size * (part.stop - part.start))) for part in parts]


def span(part: Part, count: int) -> range:
    """Return the items of a part of a file that holds `count`."""
    return range(part.start, count if part.stop < 0 else min(part.stop, count))


def pieces(counts: Sequence[int], items: range) -> Iterator[tuple[int, slice]]:
    """Yield (group, rows) that cover `items` of groups laid end to end, at most TABLE_STRUCTURES rows at once."""
    first = 0
    for index, count in enumerate(counts):
        stop = min(items.stop - first, count)
        for start in range(max(items.start - first, 0), stop, TABLE_STRUCTURES):
            yield index, slice(start, min(start + TABLE_STRUCTURES, stop))
        first += count


def slices(count: int) -> list[slice]:
    """Return consecutive slices of at most TABLE_STRUCTURES that cover `count` rows."""
    return [rows for _, rows in pieces([count], range(count))]


def gathered(tables: Iterable[StructureTable]) -> Iterator[StructureTable]:
    """Yield the same structures in the same order in fewer tables, joined up to TABLE_STRUCTURES; drop empty ones."""
    waiting: list[StructureTable] = []
    held = 0
    for table in tables:
        if waiting and held + len(table) > TABLE_STRUCTURES:
            yield StructureTable.concatenate(waiting)
            waiting, held = [], 0
        if len(table):
            waiting.append(table)
            held += len(table)
    if waiting:
        yield StructureTable.concatenate(waiting)


def labelled(table: StructureTable, fidelities: Iterable[str]) -> StructureTable:
    """Return the structures of a table that carry a label at any of `fidelities`."""
    names = list(fidelities)
    carried = np.zeros(len(table), np.bool_)
    for kind in LABEL_KINDS:  # energies first: where each structure has one, the long arrays need no look
        for name in names:
            carried |= table.has(kind, name)
        if carried.all():
            return table
    return table.where(carried)


def repeated(text: str, count: int) -> Strings:
    """Return `count` times the same text, such as the group of all conformers of a molecule."""
    buffer = np.frombuffer(text.encode(), np.uint8)
    return Strings(np.tile(buffer, count), np.arange(count + 1) * len(buffer))


def formulas(numbers_Mn: Array) -> list[str]:
    """Return the formula (Hill order) of each row of atomic numbers [M, n]; raise ValueError for what is no element."""
    if numbers_Mn.size and not 1 <= numbers_Mn.min() <= numbers_Mn.max() <= MAX_ATOMIC_NUMBER:
        found = f"{numbers_Mn.min()}..{numbers_Mn.max()}"
        raise ValueError(f"expected atomic numbers 1..{MAX_ATOMIC_NUMBER}, found {found}")
    n = numbers_Mn.shape[1]
    atoms = np.sort(numbers_Mn.astype(np.uint8), axis=1).tobytes()
    return [_hill(atoms[start : start + n]) for start in range(0, len(atoms), n)]


@lru_cache(maxsize=65536)
def _hill(numbers: bytes) -> str:
    return Formula.from_list([chemical_symbols[z] for z in numbers]).format("hill")


def _item(group: Group, name: str) -> Group | Dataset | None:
    return group[name] if name in group else None  # noqa: SIM401 (get hides an object that cannot be opened)


def _dtype(group: Group, found: Dataset) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = found.dtype
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where(group)}: {found.name}: a type that numpy does not have ({error}); damaged?"
        ) from error
    return dtype


def _found(group: Group, item: Group | Dataset | None) -> str:
    if item is not None:
        return "a dataset" if isinstance(item, h5py.Dataset) else "a group"
    return ", ".join(map(str, list(group)[:30])) or "nothing"
