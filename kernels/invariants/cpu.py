"""The invariants on the CPU: calls into the library built from cpu.cpp. Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.invariants.table import DEGREE_OF_SIZE, NUM_INVARIANTS
from rung.kernels.library import pointer


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Build or load the library; return what it is. Raises Unavailable."""
    library.load("invariants", L=l_max)
    return library.description()


def _call(name: str, *tensors: Tensor) -> None:
    num_atoms, size, channels = tensors[0].shape
    function = library.load("invariants", L=DEGREE_OF_SIZE[size])(name, tensors[0].dtype, "qqi" + "p" * len(tensors))
    function(num_atoms, channels, torch.get_num_threads(), *map(pointer, tensors))


def forward(A: Tensor) -> Tensor:
    """Return the invariants [N, K, C] of A [N, L, C]."""
    values = A.new_empty(A.shape[0], NUM_INVARIANTS[DEGREE_OF_SIZE[A.shape[1]]], A.shape[2])
    _call("rung_invariants", A, values)
    return values


def backward(A: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of A for the cotangent g [N, K, C] of the invariants."""
    gA = torch.empty_like(A)
    _call("rung_invariants_backward", A, g, gA)
    return gA


def backward2(A: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of g and A for the cotangent u [N, L, C] of `backward`'s result."""
    dg, dA = torch.empty_like(g), torch.empty_like(A)
    _call("rung_invariants_backward2", A, g, u, dg, dA)
    return dg, dA
