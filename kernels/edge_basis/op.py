"""The edge basis as a torch operation, on the native kernels or on the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung.kernels import backend
from rung.kernels.check import check_floating
from rung.kernels.edge_basis import reference
from rung.kernels.harmonics import MAX_DEGREE
from rung.kernels.registration import needed, no_third_derivative, register


def edge_basis(vectors_E3: Tensor, *, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
    """Return the radial functions [E, R] and the real harmonics [E, L] of edge vectors in angstrom.

    Radial: sqrt(2/r_c) sin(nu pi d/r_c)/d, nu = 1..R, times a polynomial that goes to zero at the cut-off with two
    continuous derivatives (arXiv:2003.03123, equations 7 and 8). Harmonics: e3nn's order, `component` normalised.
    Vectors must not be zero; beyond the cut-off the radial functions are zero. float32 or float64 (the reference: any
    floating dtype); differentiable twice (the reference: any number of times).

    Raises ValueError when the vectors are not contiguous [E, 3], the cut-off is not positive, num_radial is not
    positive or l_max is not in 0..3.
    """
    check_floating("edge_basis", "vectors", vectors_E3, ("E", 3))
    if not 0 <= l_max <= MAX_DEGREE:
        raise ValueError(f"edge_basis: l_max: expected 0..{MAX_DEGREE}, found {l_max}")
    if not cutoff > 0:
        raise ValueError(f"edge_basis: cutoff: expected a positive length in angstrom, found {cutoff}")
    if num_radial < 1:
        raise ValueError(f"edge_basis: num_radial: expected at least 1, found {num_radial}")
    if backend.native("edge_basis", vectors_E3, num_radial=num_radial, l_max=l_max):
        radial_ER, harmonics_EL = torch.ops.rung.edge_basis(vectors_E3, cutoff, num_radial, l_max)
        return radial_ER, harmonics_EL
    return reference.edge_basis(vectors_E3, cutoff=cutoff, num_radial=num_radial, l_max=l_max)


def _fake(vectors: Tensor, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
    num_edges = vectors.shape[0]
    return vectors.new_empty(num_edges, num_radial), vectors.new_empty(num_edges, (l_max + 1) ** 2)


def _fake_backward2(
    vectors: Tensor,
    g_radial: Tensor | None,
    g_harmonics: Tensor | None,
    t: Tensor,
    cutoff: float,
    num_radial: int,
    l_max: int,
    need_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_vectors = torch.empty_like(vectors) if need_vectors else vectors.new_zeros(())
    return *_fake(vectors, cutoff, num_radial, l_max), d_vectors


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    vectors, *ctx.options = inputs
    ctx.save_for_backward(vectors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_radial: Tensor | None, g_harmonics: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    (vectors,) = ctx.saved_tensors
    if g_radial is None and g_harmonics is None:
        return None, None, None, None
    cotangents = (None if g is None else g.contiguous() for g in (g_radial, g_harmonics))
    return torch.ops.rung.edge_basis_backward(vectors, *cotangents, *ctx.options), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward2(ctx: Any, t: Tensor) -> tuple[Tensor | None, ...]:
    vectors, g_radial, g_harmonics = ctx.saved_tensors
    need = needed(ctx, (vectors, g_radial, g_harmonics))
    arguments = (vectors, g_radial, g_harmonics, t.contiguous(), *ctx.options, need[0])
    d_g_radial, d_g_harmonics, d_vectors = torch.ops.rung.edge_basis_backward2(*arguments)
    results = (d_vectors, d_g_radial, d_g_harmonics)
    return *(result if wanted else None for result, wanted in zip(results, need, strict=True)), None, None, None


def _call_backward2(module: Any, vectors: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return a scalar, which nobody reads, for a gradient that is not needed: an operation cannot return None."""
    d_g_radial, d_g_harmonics, d_vectors = module.backward2(vectors, *arguments)
    return d_g_radial, d_g_harmonics, vectors.new_zeros(()) if d_vectors is None else d_vectors


_OPTIONS = "float cutoff, int num_radial, int l_max"
_COTANGENTS = "Tensor? g_radial, Tensor? g_harmonics"
register(
    f"edge_basis(Tensor vectors, {_OPTIONS}) -> (Tensor, Tensor)",
    "edge_basis",
    lambda module, *arguments: module.forward(*arguments),
    fake=_fake,
    save=_save,
    backward=_backward,
)
register(
    f"edge_basis_backward(Tensor vectors, {_COTANGENTS}, {_OPTIONS}) -> Tensor",
    "edge_basis",
    lambda module, *arguments: module.backward(*arguments),
    fake=lambda vectors, *_: torch.empty_like(vectors),
    save=_save_backward,
    backward=_backward2,
)
register(
    f"edge_basis_backward2(Tensor vectors, {_COTANGENTS}, Tensor t, {_OPTIONS}, bool need_vectors) "
    "-> (Tensor, Tensor, Tensor)",
    "edge_basis",
    _call_backward2,
    fake=_fake_backward2,
    backward=no_third_derivative("edge_basis"),
)
