"""The edge basis on the CPU: calls into the library built from cpu.cpp. Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.library import pointer


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Build or load the library; return what it is. Raises Unavailable."""
    library.load("edge_basis", R=num_radial, L=l_max)
    return library.description()


def _call(name: str, num_radial: int, l_max: int, cutoff: float, vectors: Tensor, *others: Tensor | None) -> None:
    signature = "qti" + "p" * (1 + len(others))
    function = library.load("edge_basis", R=num_radial, L=l_max)(name, vectors.dtype, signature)
    function(vectors.shape[0], cutoff, torch.get_num_threads(), pointer(vectors), *map(pointer, others))


def forward(vectors: Tensor, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
    """Return the radial functions [E, R] and the harmonics [E, L] of vectors [E, 3]."""
    radial = vectors.new_empty(vectors.shape[0], num_radial)
    harmonics = vectors.new_empty(vectors.shape[0], (l_max + 1) ** 2)
    _call("rung_edge_basis", num_radial, l_max, cutoff, vectors, radial, harmonics)
    return radial, harmonics


def backward(
    vectors: Tensor, g_radial: Tensor | None, g_harmonics: Tensor | None, cutoff: float, num_radial: int, l_max: int
) -> Tensor:
    """Return the gradient of the vectors [E, 3]; no cotangent (None) means zero."""
    g_vectors = torch.empty_like(vectors)
    _call("rung_edge_basis_backward", num_radial, l_max, cutoff, vectors, g_radial, g_harmonics, g_vectors)
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
    """Return the gradients of g_radial, g_harmonics and, if needed, vectors for `backward`'s cotangent t [E, 3]."""
    d_g_radial = vectors.new_empty(vectors.shape[0], num_radial)
    d_g_harmonics = vectors.new_empty(vectors.shape[0], (l_max + 1) ** 2)
    d_vectors = torch.empty_like(vectors) if need_vectors else None
    cotangents = (g_radial, g_harmonics, t, d_g_radial, d_g_harmonics, d_vectors)
    _call("rung_edge_basis_backward2", num_radial, l_max, cutoff, vectors, *cotangents)
    return d_g_radial, d_g_harmonics, d_vectors
