"""From a batch to edge vectors, and from the energy's gradient with respect to them to forces and stress."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from rung.data.batch import Batch


def edge_vectors(batch: Batch) -> Tensor:
    """Return x_j - x_i + shift [E, 3] in angstrom."""
    positions_N3 = batch.positions
    vectors_E3 = positions_N3.index_select(0, batch.senders) - positions_N3.index_select(0, batch.receivers)
    if batch.num_structures == 1:  # no cell for each edge
        return torch.addmm(vectors_E3, batch.shifts, batch.cell[0])
    structure_E = batch.structure.index_select(0, batch.receivers)
    return vectors_E3 + torch.einsum("ea,eab->eb", batch.shifts, batch.cell.index_select(0, structure_E))


def forces_from(batch: Batch, gradient_E3: Tensor) -> Tensor:
    """Return the forces [N, 3], minus the gradient with respect to the positions.

    Atom i is where its own edges start and where their reverse edges end.
    """
    pull_E3 = gradient_E3 - _of_reverse_edges(gradient_E3, batch.reverse)
    return _segment_sum(pull_E3, batch.row_ptr.long())


def stress_from(batch: Batch, vectors_E3: Tensor, gradient_E3: Tensor) -> Tensor:
    """Return the stress [M, 3, 3] with ASE's sign; NaN for a structure without a cell.

    A strain e takes each edge vector r to (1 + e) r, so dE/de = sum over edges of r (x) dE/dr, here symmetrised.
    """
    virial_E33 = vectors_E3[:, :, None] * gradient_E3[:, None, :]
    ends_M = torch.bincount(batch.structure, minlength=batch.num_structures).cumsum(0)
    first_edge = batch.row_ptr.long()[torch.nn.functional.pad(ends_M, (1, 0))]
    virial_M33: Tensor = _segment_sum(virial_E33.flatten(1), first_edge).reshape(-1, 3, 3)
    volume_M = torch.linalg.det(batch.cell).abs()
    volume_M = torch.where(volume_M > 0, volume_M, math.nan)  # a molecule has no stress
    return (virial_M33 + virial_M33.transpose(1, 2)) / (2 * volume_M[:, None, None])


class _Reverse(torch.autograd.Function):
    """values[reverse], whose gradient is the same permutation: torch would add row by row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, reverse: Tensor) -> Tensor:
        ctx.save_for_backward(reverse)
        return values.index_select(0, reverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (reverse,) = ctx.saved_tensors
        return _of_reverse_edges(gradients[0], reverse), None


def _of_reverse_edges(values: Tensor, reverse: Tensor) -> Tensor:
    return cast(Tensor, _Reverse.apply(values, reverse))  # type: ignore[no-untyped-call]


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums [K, X] over offsets[k] .. offsets[k + 1] - 1 of the first axis of values [E, X].

    Repeatable on a GPU, and on a CPU ten times as fast as index_add.
    """
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)
