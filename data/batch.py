"""Structures concatenated for one training step or one prediction, with their neighbour graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """M structures with N atoms and E directed edges i <- j; labels that are absent are NaN.

    Edges are sorted by receiver; `row_ptr` delimits each receiver's edges (CSR) and `reverse[e]` is the edge j <- i
    of edge i <- j (the neighbour list is full and symmetric). The vector of edge e, in angstrom, is
    positions[senders] - positions[receivers] + shifts @ cell[structure[receivers]].
    """

    keys: tuple[str, ...]  # names of the structures, for error messages and tests
    numbers: Tensor  # int64 [N], atomic numbers
    positions: Tensor  # float32 [N, 3], angstrom
    structure: Tensor  # int64 [N], index of each atom's structure
    cell: Tensor  # float32 [M, 3, 3], rows are lattice vectors, zeros for molecules
    charge: Tensor  # int64 [M]
    multiplicity: Tensor  # int64 [M]
    fidelity: Tensor  # int64 [M], row in the model's list of fidelities
    receivers: Tensor  # int32 [E]
    senders: Tensor  # int32 [E]
    row_ptr: Tensor  # int32 [N + 1]
    reverse: Tensor  # int32 [E]
    shifts: Tensor  # float32 [E, 3], whole lattice vectors
    energy: Tensor  # float64 [M], eV
    forces: Tensor  # float32 [N, 3], eV/angstrom
    stress: Tensor  # float32 [M, 3, 3], eV/angstrom^3
    energy_weight: Tensor  # float32 [M], weight of the structure's energy term (its task's weight)
    forces_weight: Tensor  # float32 [M]

    @property
    def num_structures(self) -> int:
        return len(self.charge)

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    @property
    def num_edges(self) -> int:
        return len(self.senders)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on `device`; `dtype` (float32 or float64) recasts what the network computes with.

        The energy stays float64 whatever `dtype` is.
        """
        moved: dict[str, Tensor] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, Tensor):
                continue
            recast = dtype is not None and value.is_floating_point() and item.name != "energy"
            moved[item.name] = value.to(device, dtype if recast else value.dtype, non_blocking=True)
        return dataclasses.replace(self, **moved)
