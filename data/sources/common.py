"""What readers share: tables of a good size, of labelled structures alone, with keys and formulas made one way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from numpy.typing import ArrayLike

from rung.data.sources import source
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import LABEL_KINDS, Array, Mask, Strings, StructureTable, joined

_ENOUGH = 512  # structures of a table that is worth handling on its own

Item = TypeVar("Item")


def of_one_size(
    key: str,
    first: int,
    group: str | Sequence[str],
    numbers: Array,
    positions: Array,
    labels: Mapping[str, ArrayLike],
    *,
    charge: ArrayLike = 0,
    multiplicity: ArrayLike = 1,
) -> StructureTable:
    """Return a table of structures with n atoms each: positions [M, n, 3], numbers [n] or [M, n], labels [M, ...].

    Keys are `key` and the row, from `first`. Raises what `StructureTable.make` raises.
    """
    M, n, _ = positions.shape
    return StructureTable.make(
        numbered(key, first, first + M),
        repeated(group, M) if isinstance(group, str) else group,
        np.full(M, n),
        np.tile(numbers, M) if numbers.ndim == 1 else numbers,
        positions,
        charge=charge,
        multiplicity=multiplicity,
        labels=labels,
    )


def numbered(stem: str, start: int, stop: int) -> list[str]:
    """Return the keys of structures start..stop of a molecule or a file."""
    return [f"{stem}-{row:06d}" for row in range(start, stop)]


def repeated(text: str, count: int) -> Strings:
    """Return `count` times the same text, such as the group of all conformers of a molecule."""
    encoded = text.encode()
    return Strings(np.frombuffer(encoded * count, np.uint8), np.arange(count + 1) * len(encoded))


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


def pieces(counts: Sequence[int], items: range) -> Iterator[tuple[int, slice]]:
    """Yield (group, rows) that cover `items` of groups laid end to end, at most TABLE_STRUCTURES rows at once."""
    first, step = 0, source.TABLE_STRUCTURES
    for index, count in enumerate(counts):
        stop = min(items.stop - first, count)
        for start in range(max(items.start - first, 0), stop, step):
            yield index, slice(start, min(start + step, stop))
        first += count


def slices(count: int) -> list[slice]:
    """Return consecutive slices of at most TABLE_STRUCTURES that cover `count` rows."""
    return [rows for _, rows in pieces([count], range(count))]


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists of TABLE_STRUCTURES, the last shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, source.TABLE_STRUCTURES)):
        yield batch


def gathered(tables: Iterable[StructureTable]) -> Iterator[StructureTable]:
    """Yield the same structures in the same order in fewer tables, joined up to TABLE_STRUCTURES; drop empty ones."""
    return joined(tables, source.TABLE_STRUCTURES, enough=_ENOUGH)


def formula(numbers: Array) -> str:
    """Return the formula (Hill order) of atomic numbers [n]; raises what `formulas` raises."""
    return formulas(numbers[None])[0]


def formulas(numbers_Mn: Array, present_Mn: Mask | None = None) -> list[str]:
    """Return the formula (Hill order) of each row of atomic numbers [M, n], of the atoms that are present.

    Raises ValueError for what is no element.
    """
    M, n = numbers_Mn.shape
    found = numbers_Mn if present_Mn is None else numbers_Mn[present_Mn]
    if found.size and not 1 <= found.min() <= found.max() <= MAX_ATOMIC_NUMBER:
        raise ValueError(f"expected atomic numbers 1..{MAX_ATOMIC_NUMBER}, found {found.min()}..{found.max()}")
    if n == 0:
        return [""] * M
    atoms = numbers_Mn if present_Mn is None else np.where(present_Mn, numbers_Mn, 0)
    rows = np.sort(atoms.astype(np.uint8), axis=1).tobytes()
    return [_hill(rows[start : start + n]) for start in range(0, M * n, n)]


@lru_cache(maxsize=65536)
def _hill(numbers: bytes) -> str:
    return str(Formula.from_list([chemical_symbols[z] for z in numbers if z]).format("hill"))
