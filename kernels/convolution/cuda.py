"""The convolution on NVIDIA GPUs: launches of the kernels in cuda.cu. Arguments are checked and contiguous."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rung.kernels import nvrtc
from rung.kernels.edges import Edges
from rung.kernels.nvrtc import aligned

_WARP = 32
_MANY_WARPS = 8192  # a large GPU holds about 2000: that many, so that the last ones do not leave it empty for long
_MAX_PARTS = 4  # of a receiver's edges, where there are fewer receivers than that
_RECEIVERS = 4  # whose weight gradients are added up in one sum: enough sums to fill a GPU, and small rounding errors
_MAX_SUMS = 1024
_ROW_BLOCK = 128  # threads


def prepare(device: torch.device, num_radial: int | None, l_max: int | None) -> str:
    """Return what compiles the kernels; raise Unavailable when nothing can."""
    return nvrtc.prepare(device)


class _Call:
    """One operation's inputs, the kernels for them, and the launches."""

    def __init__(self, inputs: Sequence[Tensor | None], edges: Edges) -> None:
        self.inputs = (edges.row_ptr, edges.senders, *map(aligned, inputs))
        radial, harmonics, x, weights, w = inputs[:5]
        assert radial is not None and harmonics is not None and x is not None and weights is not None
        self.edges, self.x = edges, x
        self.N, self.C = x.shape
        self.E, self.R, self.L, self.degrees = radial.shape[0], radial.shape[1], harmonics.shape[1], weights.shape[1]
        self.has_vectors = w is not None
        # Channels of a lane: up to 16 bytes, less in the kernels that hold many numbers for each of them.
        most = 16 // x.element_size()
        wide = min(most, 1 if self.C <= _WARP else 2 if self.C <= 2 * _WARP else 4)
        narrow = min(most // 2, wide)
        if self.has_vectors and self.R > 8:
            wide = narrow
        middle = narrow if self.has_vectors or self.R > 8 else wide
        self.wide, self.middle, self.narrow = (-(-self.C // (_WARP * width)) for width in (wide, middle, narrow))
        macros = {"REAL": nvrtc.REAL[x.dtype], "C": self.C, "R": self.R, "L": self.degrees - 1}
        macros |= {"VECTORS": int(self.has_vectors), "WIDE": wide, "MIDDLE": middle, "NARROW": narrow}
        self.kernels = nvrtc.load("convolution", x.device, macros)

    def backward(self, name: str, blocks: int, *arguments: nvrtc.Argument) -> None:
        """Launch a kernel of one warp for each receiver or part of its edges, and each block of channels."""
        parts = min(_MAX_PARTS, -(-_MANY_WARPS // max(1, self.N * blocks)))
        self.kernels.launch(name, (self.N, blocks, parts), _WARP, self.inputs, *arguments)

    def backward2(self, name: str, *arguments: nvrtc.Argument) -> None:
        """Launch a kernel of one warp for each receiver and block of channels."""
        self.kernels.launch(name, (self.N, self.narrow), _WARP, self.inputs, *arguments)

    def rows(self, *width: int) -> Tensor:
        return self.x.new_empty(self.E, *width, self.C)

    def sum_rows(self, rows: Tensor | None) -> Tensor | None:
        """Return the sums [N, ...] of the rows [E, ...] over the edges of each sender."""
        if rows is None:
            return None
        sums = rows.new_empty(self.N, *rows.shape[1:])
        width = math.prod(rows.shape[1:])
        threads = self.N * width * rows.element_size() // 16
        arguments = (self.N, width, self.edges.row_ptr, self.edges.reverse, rows, sums)
        self.kernels.launch("sum_rows", (-(-threads // _ROW_BLOCK),), _ROW_BLOCK, *arguments)
        return sums

    def basis(self, blocks: int) -> tuple[Tensor, Tensor]:
        return self.x.new_empty(blocks, self.E, self.R), self.x.new_empty(blocks, self.E, self.L)

    def weight_sums(self, name: str, *arguments: nvrtc.Argument) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights, axial and identity."""
        blocks = min(_MAX_SUMS, -(-self.N // _RECEIVERS))
        weights = self.x.new_empty(blocks, self.R, self.degrees, self.C)
        axial = torch.empty_like(weights) if self.has_vectors else None
        identity = self.x.new_empty(blocks, self.R, self.C) if self.has_vectors else None
        block = _WARP * (self.degrees + self.has_vectors)
        sums = (weights, axial, identity)
        self.kernels.launch(name, (blocks, self.middle), block, self.inputs, *arguments, *sums)
        return tuple(None if parts is None else parts.sum(0) for parts in sums)


class _Weights(NamedTuple):
    weights: Tensor | None = None
    axial: Tensor | None = None
    identity: Tensor | None = None


def _total(parts: Tensor | None) -> Tensor | None:
    """Return the sum over channel blocks."""
    return None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


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
    call = _Call((radial, harmonics, x, weights, w, axial, identity), edges)
    A = x.new_empty(call.N, call.L, call.C)
    call.kernels.launch("forward", (call.N, call.middle), _WARP * call.degrees, call.inputs, A)
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
    call, B = _Call((radial, harmonics, x, weights, w, axial, identity), edges), aligned(gA)
    x_rows, w_rows = call.rows() if need[2] else None, call.rows(3) if need[4] and w is not None else None
    g_radial = g_harmonics = None
    if need[0] or need[1]:
        g_radial, g_harmonics = call.basis(call.wide)
        outputs = (g_radial, g_harmonics, x_rows, w_rows)
        call.backward("backward_basis", call.wide, call.E, B, outputs)
    elif need[2] or need[4]:
        call.backward("backward_rows", call.narrow, B, (None, None, x_rows, w_rows))
    sums = _Weights()
    if need[3] or need[5] or need[6]:
        sums = _Weights(*call.weight_sums("backward_weights", call.N, B))
    g_x, g_w = call.sum_rows(x_rows), call.sum_rows(w_rows)
    results = (_total(g_radial), _total(g_harmonics), g_x, sums.weights, g_w, sums.axial, sums.identity)
    return _needed(results, need)


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
    call, B = _Call((radial, harmonics, x, weights, w, axial, identity), edges), aligned(gA)
    cotangents = tuple(map(aligned, (t_radial, t_harmonics, t_x, t_w)))
    d_gA = torch.empty_like(gA) if need[0] else None
    x_rows, w_rows = call.rows() if need[3] else None, call.rows(3) if need[5] and w is not None else None
    d_radial = d_harmonics = None
    if need[1] or need[2]:
        d_radial, d_harmonics = call.basis(call.narrow)
        outputs = (d_radial, d_harmonics, x_rows, w_rows)
        call.backward2("backward2_basis", cotangents, call.E, B, d_gA, outputs)
    elif need[0] or need[3] or need[5]:
        call.backward2("backward2_rows", cotangents, B, d_gA, (None, None, x_rows, w_rows))
    sums = _Weights()
    if need[4] or need[6] or need[7]:
        sums = _Weights(*call.weight_sums("backward2_weights", cotangents, call.N, B))
    d_x, d_w = call.sum_rows(x_rows), call.sum_rows(w_rows)
    basis = (_total(d_radial), _total(d_harmonics))
    return _needed((d_gA, *basis, d_x, sums.weights, d_w, sums.axial, sums.identity), need)


def _needed(results: Sequence[Tensor | None], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(result if wanted else None for result, wanted in zip(results, need, strict=True))
