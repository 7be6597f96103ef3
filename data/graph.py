"""The neighbour list of one structure, in the order the kernels read: sorted by receiver, with the reverse edges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from vesin import NeighborList

from rung.data.structure import Structure


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


def structure_graph(structure: Structure, cutoff: float) -> Graph:
    """Return the neighbour graph of a structure; raise ValueError naming it when it has none, as below."""
    try:
        return neighbour_graph(structure.positions, structure.cell, structure.pbc, cutoff)
    except ValueError as error:
        raise ValueError(f"structure '{structure.key}': {error}") from error


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
    if not cutoff > 0:
        raise ValueError(f"cutoff: expected a positive length in angstrom, found {cutoff}")
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
        raise ValueError(f"positions: atoms {i[edge]} and {j[edge]} are at the same place; remove one of them")
    order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], j, i))
    i, j, shift = i[order], j[order], shift[order]
    # The k-th edge in the order of (sender, receiver, -shift) is the reverse of the k-th in the order kept.
    swapped = np.lexsort((-shift[:, 2], -shift[:, 1], -shift[:, 0], i, j))
    reverse = np.empty(len(i), np.int32)
    reverse[swapped] = np.arange(len(i), dtype=np.int32)
    row_ptr = np.searchsorted(i, np.arange(len(positions) + 1)).astype(np.int32)
    return Graph(i, j, row_ptr, reverse, shift.astype(np.float32))
