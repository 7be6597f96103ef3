"""The linear algebra of SOAP on stacks of equally shaped weights, and how its work is dealt to ranks and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# A QR decomposition in units of one matrix product of the same size; sets only how work is dealt to the ranks.
QR_COST = 10


def preconditioned_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of a weight that get a basis: none of a vector, and none of one entry."""
    return tuple(axis for axis, size in enumerate(shape) if size > 1) if len(shape) > 1 else ()


def refresh_cost(shape: Sequence[int]) -> float:
    """Return what new bases of a weight cost, in multiplications."""
    return float(QR_COST * sum(shape[axis] ** 3 for axis in preconditioned_axes(shape)))


def owner_cost(shape: Sequence[int], frequency: int) -> float:
    """Return what the owner of a weight does between two refreshments of its bases, in multiplications."""
    covariances = math.prod(shape) * sum(shape[axis] for axis in preconditioned_axes(shape))
    return refresh_cost(shape) + frequency * covariances + math.prod(shape)


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """Return for each item the hand it goes to, the dearest item first and always to the hand with the least."""
    loads = [0.0] * hands
    dealt = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        hand = loads.index(min(loads))
        dealt[item] = hand
        loads[hand] += costs[item]
    return dealt


def turn(stack: Tensor, bases: Sequence[tuple[int, Tensor]], *, back: bool = False) -> Tensor:
    """Turn axes of each entry of the stack into their bases [entries, size, size], or back out of them."""
    for axis, basis in bases:
        size = stack.shape[axis + 1]
        flat = stack.reshape(len(stack), math.prod(stack.shape[1 : axis + 1]), size, -1)
        if flat.shape[-1] == 1:
            turned = flat[..., 0] @ (basis.mT if back else basis)
        else:
            turned = (basis if back else basis.mT).unsqueeze(1) @ flat
        stack = turned.reshape(stack.shape)
    return stack


def covariance(stack: Tensor, axis: int) -> Tensor:
    """Return for each entry of the stack the sums of products between the slices along one of its axes."""
    size = stack.shape[axis + 1]
    rows = stack.movedim(axis + 1, 1).reshape(len(stack), size, -1)
    return rows @ rows.mT


def eigenbasis(matrices: Tensor) -> Tensor:
    """Return eigenvectors of symmetric matrices [..., size, size] as columns, in any order.

    Entries that are not finite count as zero; the identity where no eigenvectors are found.
    """
    matrices = torch.nan_to_num(matrices, nan=0.0, posinf=0.0, neginf=0.0)
    for dtype in (matrices.dtype, torch.float64):  # what float32 cannot separate, float64 often can
        try:
            vectors: Tensor = torch.linalg.eigh(matrices.to(dtype)).eigenvectors
        except LinAlgError:
            continue
        return vectors.to(matrices.dtype)
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)


def refreshed(matrices: Tensor, bases: Tensor) -> Tensor:
    """Return orthogonal bases nearer to the eigenvectors of the matrices; all [..., size, size].

    One power iteration, orthogonalised in the order of the eigenvalues, the largest first; every column then goes back
    to its old place, so that the second moments can stay where they are. A basis whose refreshment is not finite
    stays.
    """
    product = matrices @ bases
    order = (bases * product).sum(-2).argsort(dim=-1, descending=True)
    product = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    columns = torch.linalg.qr(product).Q
    columns = columns.gather(-1, order.argsort(dim=-1).unsqueeze(-2).expand_as(columns))
    finite = columns.isfinite().flatten(-2).all(-1)[..., None, None]
    return torch.where(finite, columns, bases)
