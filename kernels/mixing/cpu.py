"""Dense mixing on the CPU: calls into the library built from cpu.cpp. Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.invariants.table import DEGREE_OF_SIZE
from rung.kernels.library import pointer


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Build or load the library; return what it is. Raises Unavailable."""
    library.load("mixing")
    return library.description()


def mix(A: Tensor, weights: Tensor, transposed: bool) -> Tensor:
    """Return A [N, L, C] times weights [l, C, C], or their transposes, by degree."""
    out = torch.empty_like(A)
    function = library.load("mixing")("rung_mix", A.dtype, "qqiippip")
    sizes = (A.shape[0], A.shape[2], DEGREE_OF_SIZE[A.shape[1]], torch.get_num_threads())
    function(*sizes, pointer(A), pointer(weights), transposed, pointer(out))
    return out


def mix_weights(A: Tensor, g: Tensor) -> Tensor:
    """Return sum over atoms and orders of A^T g by degree [l, C, C]."""
    l_max = DEGREE_OF_SIZE[A.shape[1]]
    out = A.new_empty(l_max + 1, A.shape[2], A.shape[2])
    function = library.load("mixing")("rung_mix_weights", A.dtype, "qqiippp")
    function(A.shape[0], A.shape[2], l_max, torch.get_num_threads(), pointer(A), pointer(g), pointer(out))
    return out


def matmul(x: Tensor, weights: Tensor, transposed: bool) -> Tensor:
    """Return x [N, K] @ weights [K, C], or, transposed, x [N, C] @ weights^T."""
    K, C = weights.shape
    out = x.new_empty(x.shape[0], K if transposed else C)
    sizes = (x.shape[0], K, C, torch.get_num_threads())
    if transposed:
        function = library.load("mixing")("rung_matmul_transposed", x.dtype, "qqqippp")
        function(*sizes, pointer(x), pointer(weights), pointer(out))
    else:
        function = library.load("mixing")("rung_matmul", x.dtype, "qqqipppp")
        function(*sizes, pointer(x), pointer(weights), None, pointer(out))
    return out


def matmul_weights(x: Tensor, g: Tensor) -> Tensor:
    """Return x^T g [K, C] of x [N, K] and g [N, C]."""
    out = x.new_empty(x.shape[1], g.shape[1])
    function = library.load("mixing")("rung_matmul_weights", x.dtype, "qqqippp")
    function(x.shape[0], x.shape[1], g.shape[1], torch.get_num_threads(), pointer(x), pointer(g), pointer(out))
    return out
