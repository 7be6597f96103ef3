"""The edge basis on NVIDIA GPUs: launches of the kernels in cuda.cu. Arguments are checked and contiguous."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rung.kernels import nvrtc
from rung.kernels.nvrtc import aligned

_THREADS = 128  # of a block, one for each edge: THREADS in cuda.cu
_C_REAL: dict[torch.dtype, type[ctypes.c_float | ctypes.c_double]] = {
    torch.float32: ctypes.c_float,
    torch.float64: ctypes.c_double,
}


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Return what compiles the kernels; raise Unavailable when nothing can."""
    return nvrtc.prepare(device)


def _launch(name: str, num_radial: int, l_max: int, cutoff: float, vectors: Tensor, *tensors: Tensor | None) -> None:
    macros = {"REAL": nvrtc.REAL[vectors.dtype], "R": num_radial, "L": l_max}
    kernels = nvrtc.load("edge_basis", vectors.device, macros)
    E, real = len(vectors), _C_REAL[vectors.dtype]
    kernels.launch(name, (-(-E // _THREADS),), _THREADS, E, real(cutoff), vectors, *tensors)


def forward(vectors: Tensor, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
    """Return the radial functions [E, R] and the harmonics [E, L] of vectors [E, 3]."""
    radial = vectors.new_empty(vectors.shape[0], num_radial)
    harmonics = vectors.new_empty(vectors.shape[0], (l_max + 1) ** 2)
    _launch("forward", num_radial, l_max, cutoff, vectors, radial, harmonics)
    return radial, harmonics


def backward(
    vectors: Tensor, g_radial: Tensor | None, g_harmonics: Tensor | None, cutoff: float, num_radial: int, l_max: int
) -> Tensor:
    """Return the gradient of the vectors [E, 3]; no cotangent (None) means zero."""
    g_vectors = torch.empty_like(vectors)
    _launch("backward", num_radial, l_max, cutoff, vectors, aligned(g_radial), aligned(g_harmonics), g_vectors)
    return g_vectors


def backward2(
    vectors: Tensor,
    g_radial: Tensor | None,
    g_harmonics: Tensor | None,
    t: Tensor,
    cutoff: float,
    num_radial: int,
    l_max: int,
    need_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of g_radial, g_harmonics and (if needed) vectors for the cotangent t of `backward`."""
    d_g_radial = vectors.new_empty(vectors.shape[0], num_radial)
    d_g_harmonics = vectors.new_empty(vectors.shape[0], (l_max + 1) ** 2)
    d_vectors = torch.empty_like(vectors) if need_vectors else None
    tensors = (aligned(g_radial), aligned(g_harmonics), t, d_g_radial, d_g_harmonics, d_vectors)
    _launch("backward2", num_radial, l_max, cutoff, vectors, *tensors)
    return d_g_radial, d_g_harmonics, d_vectors
