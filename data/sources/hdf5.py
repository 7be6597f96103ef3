"""What readers of HDF5 share: files and datasets whose errors name them, and the cut into parts.

Two layouts are common. Many groups of one molecule with few conformers each: `group_parts` makes parts of whole groups.
Few groups with very many structures each: `row_parts` makes parts of the groups laid end to end, `part_rows` reads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from numpy.typing import DTypeLike

from rung.data.sources.common import pieces
from rung.data.sources.source import Part, cut_groups, cut_rows, span
from rung.data.table import Array

Group: TypeAlias = Any  # h5py ships no types
Dataset: TypeAlias = Any

_KINDS = {"f": "floats", "iu": "integers", "iuf": "numbers", "SO": "texts"}
_CLASSES = {"f": h5py.h5t.FLOAT, "i": h5py.h5t.INTEGER, "O": h5py.h5t.STRING}  # of the kinds that `small` converts to
_NUMPY_KINDS = {"f": "f", "i": "iu", "O": "SO"}


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


def counts_and_sizes(file: Group, positions: str) -> tuple[list[int], list[int]]:
    """Return how many structures each group of a file has, and of how many atoms: its positions are [M, n, 3]."""
    shapes = [dataset(child(file, name), positions, (None, None, 3)).shape for name in names_in(file)]
    return [M for M, _, _ in shapes], [n for _, n, _ in shapes]


def group_parts(path: Path, positions: str) -> list[Part]:
    """Return parts of a file whose items are its groups, one molecule each."""
    with opened(path) as file:
        return cut_groups(path, *counts_and_sizes(file, positions))


def row_parts(path: Path, positions: str) -> list[Part]:
    """Return parts of a file whose items are structures, counted through its groups, one number of atoms each."""
    with opened(path) as file:
        return cut_rows(path, *counts_and_sizes(file, positions))


def part_rows(part: Part, positions: str) -> Iterator[tuple[str, Group, slice]]:
    """Yield name, group and rows that a part of `row_parts` covers, at most TABLE_STRUCTURES rows at once."""
    with opened(part.path) as file:
        names, (counts, _) = names_in(file), counts_and_sizes(file, positions)
        for index, rows in pieces(counts, span(part, sum(counts))):
            yield names[index], child(file, names[index]), rows


def small(group: Group, names: Sequence[str], shape: tuple[int | None, ...], dtype: DTypeLike) -> Array:
    """Return the dataset at a path of names below a group, of `shape` (None: any length), converted to `dtype`.

    `dtype` may be a float, a signed integer or `h5py.string_dtype()` (UTF-8 as bytes); the stored numbers are of the
    same kind. Half the time of h5py's objects, for datasets by the hundred thousand. Raises what `dataset` raises.
    """
    wanted = np.dtype(dtype)
    try:
        found = h5py.h5d.open(group.id, "/".join(names).encode())
        stored = found.shape
        fits = len(stored) == len(shape) and all(n in (None, m) for n, m in zip(shape, stored, strict=True))
        fits = fits and found.get_type().get_class() == _CLASSES[wanted.kind]
    except KeyError:
        fits = False
    if not fits:
        parent = group
        for name in names[:-1]:
            parent = child(parent, name)
        found = dataset(parent, names[-1], shape, _NUMPY_KINDS[wanted.kind]).id  # raises what is wrong
    out = np.empty(found.shape, wanted)
    found.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def _item(group: Group, name: str) -> Group | Dataset | None:
    try:
        return group[name]
    except KeyError:
        if name in group:  # an object that cannot be opened
            raise
        return None


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
