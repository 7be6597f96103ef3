"""The invariants as a torch operation, on the native kernels or on the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung.kernels import backend
from rung.kernels.check import check_floating, check_l_max
from rung.kernels.invariants import reference
from rung.kernels.invariants.table import DEGREE_OF_SIZE, NUM_INVARIANTS
from rung.kernels.registration import needed, no_third_derivative, register


def invariants(A_NLC: Tensor) -> Tensor:
    """Return the invariants [N, K, C] of each atom's and channel's tensors A [N, L, C], in the order of `INVARIANTS`.

    float32 or float64 (the reference: any floating dtype); differentiable twice (the reference: any number of times).
    Raises ValueError when A is not contiguous or L is not (l_max + 1)^2 with l_max in 0..3.
    """
    check_floating("invariants", "A", A_NLC, ("N", "L", "C"))
    l_max = check_l_max("invariants", "A", A_NLC, "[N, L, C]")
    if l_max > 0 and backend.native("invariants", A_NLC, channels=A_NLC.shape[2], l_max=l_max):
        values: Tensor = torch.ops.rung.invariants(A_NLC)
        return values
    return reference.invariants(A_NLC)


def _fake(A: Tensor) -> Tensor:
    return A.new_empty(A.shape[0], NUM_INVARIANTS[DEGREE_OF_SIZE[int(A.shape[1])]], A.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> Tensor:
    (A,) = ctx.saved_tensors
    gA: Tensor = torch.ops.rung.invariants_backward(A, g.contiguous())
    return gA


def _backward2(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
    A, g = ctx.saved_tensors
    need_A, need_g = needed(ctx, (A, g))
    dg, dA = torch.ops.rung.invariants_backward2(A, g, u.contiguous())
    return dA if need_A else None, dg if need_g else None


register(
    "invariants(Tensor A) -> Tensor",
    "invariants",
    lambda module, A: module.forward(A),
    fake=_fake,
    save=_save,
    backward=_backward,
)
register(
    "invariants_backward(Tensor A, Tensor g) -> Tensor",
    "invariants",
    lambda module, A, g: module.backward(A, g),
    fake=lambda A, g: torch.empty_like(A),
    save=_save,
    backward=_backward2,
)
register(
    "invariants_backward2(Tensor A, Tensor g, Tensor u) -> (Tensor, Tensor)",
    "invariants",
    lambda module, A, g, u: module.backward2(A, g, u),
    fake=lambda A, g, u: (torch.empty_like(g), torch.empty_like(A)),
    backward=no_third_derivative("invariants"),
)
