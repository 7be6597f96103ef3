"""The convolution on the CPU: calls into the library built from cpu.cpp. Arguments are checked and contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.edges import Edges
from rung.kernels.library import pointer

_FORWARD = "qqi" + 10 * "p"
_BACKWARD = "qqi" + 18 * "p"
_BACKWARD2 = "qqi" + 23 * "p"


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Build or load the library; return what it is. Raises Unavailable."""
    library.load("convolution", R=num_radial, L=l_max)
    return library.description()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], torch.get_num_threads()


def _library(weights: Tensor) -> library.Library:
    return library.load("convolution", R=weights.shape[0], L=weights.shape[1] - 1)


def forward(
    radial: Tensor,
    harmonics: Tensor,
    x: Tensor,
    weights: Tensor,
    w: Tensor | None,
    axial: Tensor | None,
    identity: Tensor | None,
    edges: Edges,
) -> Tensor:
    """Return A [N, L, C]."""
    A = x.new_empty(x.shape[0], harmonics.shape[1], x.shape[1])
    inputs = (radial, harmonics, x, weights, w, axial, identity)
    function = _library(weights)("rung_convolve", x.dtype, _FORWARD)
    function(*_sizes(x), pointer(edges.row_ptr), pointer(edges.senders), *map(pointer, inputs), pointer(A))
    return A


def backward(
    gA: Tensor,
    radial: Tensor,
    harmonics: Tensor,
    x: Tensor,
    weights: Tensor,
    w: Tensor | None,
    axial: Tensor | None,
    identity: Tensor | None,
    edges: Edges,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of radial, harmonics, x, weights, w, axial and identity, None where not needed."""
    inputs = (radial, harmonics, x, weights, w, axial, identity)
    outputs = tuple(map(_output, inputs, _in_groups(need)))
    function = _library(weights)("rung_convolve_backward", x.dtype, _BACKWARD)
    arrays = (edges.row_ptr, edges.senders, edges.reverse, gA, *inputs, *outputs)
    function(*_sizes(x), *map(pointer, arrays))
    return outputs


def backward2(
    gA: Tensor,
    radial: Tensor,
    harmonics: Tensor,
    x: Tensor,
    weights: Tensor,
    w: Tensor | None,
    axial: Tensor | None,
    identity: Tensor | None,
    t_radial: Tensor | None,
    t_harmonics: Tensor | None,
    t_x: Tensor | None,
    t_w: Tensor | None,
    edges: Edges,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of gA and of the seven inputs for cotangents of `backward`'s radial, harmonics, x and w."""
    inputs = (radial, harmonics, x, weights, w, axial, identity)
    outputs = tuple(map(_output, (gA, *inputs), (need[0], *_in_groups(need[1:]))))
    function = _library(weights)("rung_convolve_backward2", x.dtype, _BACKWARD2)
    cotangents = (t_radial, t_harmonics, t_x, t_w)
    arrays = (edges.row_ptr, edges.senders, edges.reverse, gA, *inputs, *cotangents, *outputs)
    function(*_sizes(x), *map(pointer, arrays))
    return outputs


def _in_groups(need: Sequence[bool]) -> tuple[bool, ...]:
    """Return `need` as the library takes it: both parts of the edge basis, and all weights, come together."""
    basis, weights = need[0] or need[1], need[3] or need[5] or need[6]
    return basis, basis, need[2], weights, need[4], weights, weights


def _output(like: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(like) if wanted and like is not None else None
