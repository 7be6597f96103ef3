"""The invariants on NVIDIA GPUs: launches of the kernels in cuda.cu. Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.kernels import nvrtc
from rung.kernels.invariants.table import DEGREE_OF_SIZE, NUM_INVARIANTS

_THREADS = 128  # of a block: THREADS in cuda.cu


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Return what compiles the kernels; raise Unavailable when nothing can."""
    return nvrtc.prepare(device)


def _launch(name: str, *tensors: Tensor) -> None:
    A = tensors[0]
    N, L, C = A.shape
    l_max = DEGREE_OF_SIZE[L]
    macros = {"REAL": nvrtc.REAL[A.dtype], "C": C, "L": l_max, "K": NUM_INVARIANTS[l_max]}
    kernels = nvrtc.load("invariants", A.device, macros)
    kernels.launch(name, (-(-N * C // _THREADS),), _THREADS, N, *tensors)


def forward(A: Tensor) -> Tensor:
    """Return the invariants [N, K, C] of A [N, L, C]."""
    values = A.new_empty(A.shape[0], NUM_INVARIANTS[DEGREE_OF_SIZE[A.shape[1]]], A.shape[2])
    _launch("forward", A, values)
    return values


def backward(A: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of A for the cotangent g [N, K, C] of the invariants."""
    gA = torch.empty_like(A)
    _launch("backward", A, g, gA)
    return gA


def backward2(A: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of g and A for the cotangent u [N, L, C] of `backward`'s result."""
    dg, dA = torch.empty_like(g), torch.empty_like(A)
    _launch("backward2", A, g, u, dg, dA)
    return dg, dA
