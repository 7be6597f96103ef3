"""Neighbour graphs in the order the kernels read: sorted by receiver, with the reverse edges.

Small molecules are done many at a time, by all their pairs: a neighbour list of its own costs a molecule more in calls
than in distances. Periodic and large structures go to vesin one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rung.data.structure import Structure
from rung.data.table import StructureTable, offsets_of, ragged_index

ALL_PAIRS_ATOMS = 192  # a molecule up to this size is done by all its pairs (at 160 atoms: 0.7 ms, vesin's list 1.1 ms)
_CHUNK_PAIRS = 1 << 17  # pairs at a time: the arrays stay in a core's cache


class Graph(NamedTuple):
    """E directed edges i <- j between n atoms; full and symmetric, periodic self-images included.

    The vector of edge e, in angstrom, is positions[senders] - positions[receivers] + shifts @ cell.
    """

    receivers: NDArray[np.int32]  # [E], ascending; ties by sender, then by shift
    senders: NDArray[np.int32]  # [E]
    row_ptr: NDArray[np.int32]  # [n + 1], atom i receives edges row_ptr[i]..row_ptr[i + 1]
    reverse: NDArray[np.int32]  # [E], edge j <- i of edge i <- j
    shifts: NDArray[np.float32]  # [E, 3], whole lattice vectors

    @property
    def num_edges(self) -> int:
        return len(self.senders)


class _Piece(NamedTuple):
    """The edges of some structures of a table, in their order; `reverse` counts within the piece."""

    structures: NDArray[np.int64]
    num_edges: NDArray[np.int64]  # of each
    receivers: NDArray[np.integer]  # atoms of the table
    senders: NDArray[np.integer]
    reverse: NDArray[np.integer]
    shifts: NDArray[np.float32] | None  # None: all zero


def structure_graph(structure: Structure, cutoff: float) -> Graph:
    """Return the neighbour graph of a structure; raise ValueError naming it when it has none, as below."""
    try:
        return neighbour_graph(structure.positions, structure.cell, structure.pbc, cutoff)
    except ValueError as error:
        raise ValueError(f"structure '{structure.key}': {error}") from error


def table_graph(table: StructureTable, cutoff: float) -> Graph:
    """Return the graph of all structures of a table as one: atoms are the table's, structures do not see each other.

    `cutoff` is in angstrom. Raises ValueError naming the structure that has no graph, as `neighbour_graph` does.
    """
    pieces = list(_pieces(table, cutoff))
    num_edges = np.zeros(len(table), np.int64)
    for piece in pieces:
        num_edges[piece.structures] = piece.num_edges
    starts = offsets_of(num_edges)
    receivers, senders, reverse = (np.empty(starts[-1], np.int32) for _ in range(3))
    shifts = np.zeros((starts[-1], 3), np.float32)
    for piece in pieces:
        place = ragged_index(starts[piece.structures], piece.num_edges)
        receivers[place], senders[place] = piece.receivers, piece.senders
        reverse[place] = place[piece.reverse]
        if piece.shifts is not None:
            shifts[place] = piece.shifts
    row_ptr = offsets_of(np.bincount(receivers, minlength=len(table.numbers))).astype(np.int32)
    return Graph(receivers, senders, row_ptr, reverse, shifts)


def edgeless(table: StructureTable) -> Graph:
    """Return the graph of a table's atoms without any edge."""
    none = np.zeros(0, np.int32)
    return Graph(none, none, np.zeros(len(table.numbers) + 1, np.int32), none, np.zeros((0, 3), np.float32))


def edge_counts(table: StructureTable, cutoff: float) -> NDArray[np.int64]:
    """Return the number of edges of each structure; raises ValueError as `table_graph` does."""
    counts = np.zeros(len(table), np.int64)
    for structures, within in _all_pairs(table, cutoff):
        counts[structures] = np.count_nonzero(within, axis=(1, 2))
    for index in np.flatnonzero(~_by_all_pairs(table)):
        counts[index] = structure_graph(table[int(index)], cutoff).num_edges
    return counts


def neighbour_graph(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], cutoff: float
) -> Graph:
    """Return every pair of atoms closer than `cutoff`.

    positions [n, 3] and cell [3, 3] (rows are lattice vectors) are in angstrom, pbc is bool [3], cutoff in angstrom.
    Raises ValueError when the cut-off is not positive, there is no atom, two atoms share one position, or the lattice
    vectors of the periodic directions are not independent.
    """
    if len(positions) == 0:
        raise ValueError("positions: expected at least one atom, found none")
    if len(positions) <= ALL_PAIRS_ATOMS and not pbc.any():
        within = _within(positions[None], cutoff, lambda _, i, j: _same_place(i, j))
        _, i, j, reverse = _edges(within)
        row_ptr = offsets_of(np.count_nonzero(within[0], axis=1)).astype(np.int32)
        return Graph(i, j, row_ptr, reverse, np.zeros((len(i), 3), np.float32))
    _check_cutoff(cutoff)
    from vesin import NeighborList  # here, because it imports torch, which the building of molecules does not need

    # One thread: the list is small, and the loader's workers share the cores with training.
    neighbours = NeighborList(cutoff=cutoff, full_list=True, sorted=False, n_threads=1)
    try:
        pairs, shift, distance = neighbours.compute(
            positions.astype(np.float64), cell.astype(np.float64), pbc, "PSd", copy=False
        )
    except RuntimeError as error:
        raise ValueError(f"cell: {error}; expected independent lattice vectors, found {cell.tolist()}") from error
    i, j = pairs.astype(np.int32).T
    if len(distance) and distance.min() == 0.0:
        edge = int(distance.argmin())
        raise _same_place(int(i[edge]), int(j[edge]))
    order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], j, i))
    i, j, shift = i[order], j[order], shift[order]
    # The k-th edge in the order of (sender, receiver, -shift) is the reverse of the k-th in the order kept.
    swapped = np.lexsort((-shift[:, 2], -shift[:, 1], -shift[:, 0], i, j))
    reverse = np.empty(len(i), np.int32)
    reverse[swapped] = np.arange(len(i), dtype=np.int32)
    row_ptr = np.searchsorted(i, np.arange(len(positions) + 1)).astype(np.int32)
    return Graph(i, j, row_ptr, reverse, shift.astype(np.float32))


def _pieces(table: StructureTable, cutoff: float) -> Iterator[_Piece]:
    atoms = table.offsets
    for structures, within in _all_pairs(table, cutoff):
        structure, i, j, reverse = _edges(within)
        first = atoms[structures[structure]]
        yield _Piece(structures, np.count_nonzero(within, axis=(1, 2)), first + i, first + j, reverse, None)
    for index in np.flatnonzero(~_by_all_pairs(table)):
        graph = structure_graph(table[int(index)], cutoff)
        first, counts = atoms[index], np.array([graph.num_edges])
        edges = graph.receivers + first, graph.senders + first, graph.reverse, graph.shifts
        yield _Piece(np.array([index]), counts, *edges)


def _by_all_pairs(table: StructureTable) -> NDArray[np.bool_]:
    return ~table.pbc.any(axis=1) & (table.num_atoms <= ALL_PAIRS_ATOMS)


def _all_pairs(table: StructureTable, cutoff: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield (structures [k], which of their pairs are closer than the cut-off [k, n, n]), k of one size at a time."""
    chosen = np.flatnonzero(_by_all_pairs(table))
    sizes, first_atom = table.num_atoms[chosen], table.offsets[chosen]
    for n in np.unique(sizes).tolist():
        alike = sizes == n
        members, first = chosen[alike], first_atom[alike]
        per_chunk = max(1, _CHUNK_PAIRS // n**2)
        for start in range(0, len(members), per_chunk):
            part = slice(start, start + per_chunk)
            positions = table.positions[first[part, None] + np.arange(n)]
            yield members[part], _within(positions, cutoff, partial(_named, table, members[part]))


def _within(
    positions: NDArray[np.floating], cutoff: float, fault: Callable[[int, int, int], ValueError]
) -> NDArray[np.bool_]:
    """Return which pairs of each of k structures are closer than `cutoff`, from [k, n, 3]; [k, n, n].

    Raises `fault(structure, i, j)` for two atoms at one place.
    """
    _check_cutoff(cutoff)
    atoms = np.arange(positions.shape[1])
    squared = _squared_distances(positions)
    squared[:, atoms, atoms] = np.inf
    if squared.size and squared.min() == 0.0:
        raise fault(*np.argwhere(squared == 0.0)[0].tolist())
    if squared.dtype != np.float32:
        exact: NDArray[np.bool_] = squared < cutoff**2
        return exact
    # Twice as fast, and as exact: a difference of float32 numbers is off by at most 6e-8 of itself, so only pairs that
    # close to the cut-off need another look.
    within: NDArray[np.bool_] = squared < cutoff**2 * (1 + 1e-6)
    surely = squared < cutoff**2 * (1 - 1e-6)
    if np.count_nonzero(within) != np.count_nonzero(surely):
        k, i, j = np.nonzero(within & ~surely)
        vectors = positions[k, j].astype(np.float64) - positions[k, i]
        within[k, i, j] = (vectors**2).sum(1) < cutoff**2
    return within


def _edges(within: NDArray[np.bool_]) -> tuple[NDArray[np.int32], ...]:
    """Return structure, receiver and sender (within it) and reverse edge of the pairs that hold in [k, n, n]."""
    number = (np.cumsum(within.ravel(), dtype=np.int32) - 1).reshape(within.shape)
    structure, i, j = (index.astype(np.int32) for index in np.nonzero(within))
    return structure, i, j, number.transpose(0, 2, 1)[within]


def _squared_distances(positions: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return |r_j - r_i|^2 of the atoms of k structures, from [k, n, 3], in its dtype; [k, n, n]."""
    total: NDArray[np.floating] | None = None
    for x in np.ascontiguousarray(positions.transpose(2, 0, 1)):
        difference = x[:, None, :] - x[:, :, None]
        difference *= difference
        total = difference if total is None else np.add(total, difference, out=total)
    assert total is not None
    return total


def _check_cutoff(cutoff: float) -> None:
    if not cutoff > 0:
        raise ValueError(f"cutoff: expected a positive length in angstrom, found {cutoff}")


def _named(table: StructureTable, members: NDArray[np.int64], k: int, i: int, j: int) -> ValueError:
    return ValueError(f"structure '{table.keys[int(members[k])]}': {_same_place(i, j)}")


def _same_place(i: int, j: int) -> ValueError:
    return ValueError(f"positions: atoms {i} and {j} are at the same place; remove one of them")
