"""The neighbour graph of one structure that moves: built a little too large, then cut down while it holds.

Building a graph sorts its edges; cutting one down keeps their order and only numbers them again. Shape legend: n atoms,
C candidate edges, H = C / 2 pairs of a candidate and its reverse, E edges within the cut-off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.data.graph import structure_graph
from rung.data.structure import Structure

# Where candidates pay, by `benchmarks/dynamics.py`: always in periodic cells, whose graphs are vesin's; in molecules
# above this size, below which all pairs are faster than anything else.
ALL_PAIRS_ATOMS = 64
SKIN = 0.5  # angstrom
ROUNDING = 1e-9  # angstrom, of distances


@dataclass(frozen=True)
class Candidates:
    """The pairs of a structure that were closer than cut-off + skin, and where the atoms then were."""

    structure: Structure  # positions and cell in float64
    receivers_C: Tensor  # int32, ascending
    senders_C: Tensor  # int32
    shifts_C3: Tensor  # float32, whole lattice vectors
    row_ptr: Tensor  # int64 [n + 1]
    reverse_C: Tensor  # int64
    pair_C: Tensor  # int64, which pair a candidate is of
    sender_H: Tensor  # int32, of one candidate of each pair
    receiver_H: Tensor  # int32
    shift_H3: Tensor  # float64, whole lattice vectors

    @staticmethod
    def of(structure: Structure, cutoff: float, skin: float, device: torch.device) -> Candidates:
        """Find the candidates of a structure; raises ValueError as `structure_graph` does."""
        graph = structure_graph(structure, cutoff + skin)
        forward = np.flatnonzero(np.arange(graph.num_edges) < graph.reverse)
        pair = np.empty(graph.num_edges, np.int64)
        pair[forward] = pair[graph.reverse[forward]] = np.arange(len(forward))

        def put(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

        return Candidates(
            structure=structure,
            receivers_C=put(graph.receivers, torch.int32),
            senders_C=put(graph.senders, torch.int32),
            shifts_C3=put(graph.shifts, torch.float32),
            row_ptr=put(graph.row_ptr, torch.int64),
            reverse_C=put(graph.reverse, torch.int64),
            pair_C=put(pair, torch.int64),
            sender_H=put(graph.senders[forward], torch.int32),
            receiver_H=put(graph.receivers[forward], torch.int32),
            shift_H3=put(graph.shifts[forward], torch.float64),
        )

    def within(self, structure: Structure, cutoff: float) -> dict[str, Tensor]:
        """Return the graph of a geometry for which the candidates hold, as tensors named as in `Graph`.

        Raises ValueError naming the structure for two atoms at one place.
        """
        device = self.sender_H.device
        positions = torch.from_numpy(structure.positions).to(device)
        vectors_H3 = positions.index_select(0, self.sender_H)
        vectors_H3 -= positions.index_select(0, self.receiver_H)
        if structure.pbc.any():
            vectors_H3.addmm_(self.shift_H3, torch.from_numpy(structure.cell).to(device))
        squared_H = torch.einsum("hx,hx->h", vectors_H3, vectors_H3)
        if len(squared_H) and not bool(squared_H.min() > 0):
            structure_graph(structure, cutoff)  # names the two atoms
        within_C = (squared_H < cutoff**2).index_select(0, self.pair_C)
        kept_E = within_C.nonzero().squeeze(1)
        kept_before_C = torch.nn.functional.pad(within_C.cumsum(0, dtype=torch.int32), (1, 0))
        return {
            "receivers": self.receivers_C.index_select(0, kept_E),
            "senders": self.senders_C.index_select(0, kept_E),
            "row_ptr": kept_before_C.index_select(0, self.row_ptr),
            "reverse": kept_before_C.index_select(0, self.reverse_C.index_select(0, kept_E)),
            "shifts": self.shifts_C3.index_select(0, kept_E),
        }


def reach(old: Structure, new: Structure, cutoff: float) -> float:
    """Return the distance within which two atoms of `old` were that are now closer than the cut-off, at most.

    A cell that was strained by F and atoms that moved by u besides had two atoms at most |F^-1| d + 2 max |u| apart,
    d being their distance now. Infinite for other atoms or other periodic directions.
    """
    if not (np.array_equal(old.numbers, new.numbers) and np.array_equal(old.pbc, new.pbc)):
        return math.inf
    stretch, positions = 1.0, new.positions
    if not np.array_equal(old.cell, new.cell):
        if not new.pbc.all() or np.linalg.det(new.cell) == 0.0:
            return math.inf
        back = np.linalg.solve(new.cell, old.cell)
        stretch, positions = float(np.linalg.norm(back, 2)), positions @ back
    moved = positions - old.positions
    return stretch * cutoff + 2 * math.sqrt(float(np.einsum("nx,nx->n", moved, moved).max())) + ROUNDING


class Neighbours:
    """The graphs of one structure after another, from candidates where one follows from the last by a small move.

    A structure that is nothing like the last one costs what its graph costs; the candidates are looked for at the
    second of two that are alike, and again when they no longer hold.
    """

    def __init__(self, cutoff: float, skin: float | None, device: torch.device) -> None:
        """Keep a cut-off and a skin in angstrom; 0: no candidates, None: as was measured to pay (see SKIN).

        Raises ValueError for a skin that is not a finite length.
        """
        if skin is not None and not 0 <= skin < math.inf:
            raise ValueError(f"skin: expected a length >= 0 in angstrom, found {skin}")
        self._cutoff, self._skin, self._device = cutoff, skin, device
        self._last: Structure | None = None
        self._candidates: Candidates | None = None

    def edges(self, structure: Structure) -> dict[str, Tensor]:
        """Return the structure's graph as tensors on the device, named as in `Graph`.

        Raises ValueError naming a structure that has none, as `structure_graph` does.
        """
        skin = self._skin_for(structure)
        if skin == 0:
            return self._built(structure)
        double: np.dtype[Any] = np.dtype(np.float64)
        structure = replace(  # copies: it is kept, and whoever has the arrays may write to them
            structure,
            numbers=structure.numbers.copy(),
            positions=structure.positions.astype(double),
            cell=structure.cell.astype(double),
            pbc=structure.pbc.copy(),
        )
        last, self._last = self._last, structure
        if self._candidates is None or reach(self._candidates.structure, structure, self._cutoff) > self._cutoff + skin:
            self._candidates = None
            if last is None or reach(last, structure, self._cutoff) > self._cutoff + skin / 2:  # used once or twice
                return self._built(structure)
            self._candidates = Candidates.of(structure, self._cutoff, skin, self._device)
        return self._candidates.within(structure, self._cutoff)

    def _skin_for(self, structure: Structure) -> float:
        if self._skin is not None:
            return self._skin
        return SKIN if structure.pbc.any() or structure.num_atoms > ALL_PAIRS_ATOMS else 0.0

    def _built(self, structure: Structure) -> dict[str, Tensor]:
        graph = structure_graph(structure, self._cutoff)
        return {name: torch.from_numpy(array).to(self._device) for name, array in graph._asdict().items()}
