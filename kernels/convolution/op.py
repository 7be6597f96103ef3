"""The convolution as a torch operation, on the native kernels or on the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rung.kernels import backend
from rung.kernels.check import check_edges, check_floating, check_l_max, check_tensor
from rung.kernels.convolution import reference
from rung.kernels.convolution.reference import VectorMessage
from rung.kernels.edges import Edges
from rung.kernels.registration import needed, no_third_derivative, register


def convolve(
    radial_ER: Tensor,
    harmonics_EL: Tensor,
    x_NC: Tensor,
    weights_RlC: Tensor,
    edges: Edges,
    vectors: VectorMessage | None = None,
) -> Tensor:
    """Return A [N, L, C], the neighbours' features resolved by harmonics (DESIGN.md section 5, without n^-1/2).

        A[i,lm,c]  = sum_j Y_lm(u_ij) ( P0_lc(d) x[j,c] + P1_lc(d) u_ij . w[j,c] )
        A[i,1m,c] += sum_j P2_c(d) w[j,m,c]
        P*_lc(d)   = sum_nu W*[nu,l,c] s_nu(d)

    float32 or float64 (the reference: any floating dtype); differentiable twice (the reference: any number of times)
    with respect to every tensor but the graph's. The values of the graph are not checked.

    Raises ValueError, naming the argument, for a tensor that is not contiguous or of another size, dtype or device than
    the others, and for vectors with l_max = 0.
    """
    check_arguments(radial_ER, harmonics_EL, x_NC, weights_RlC, edges, vectors)
    R, num_degrees, C = weights_RlC.shape
    if num_degrees > 1 and backend.native("convolution", x_NC, channels=C, num_radial=R, l_max=num_degrees - 1):
        message = (None, None, None) if vectors is None else vectors
        A_NLC: Tensor = torch.ops.rung.convolve(radial_ER, harmonics_EL, x_NC, weights_RlC, *message, *edges)
        return A_NLC
    return reference.convolve(radial_ER, harmonics_EL, x_NC, weights_RlC, edges, vectors)


def check_arguments(
    radial_ER: Tensor,
    harmonics_EL: Tensor,
    x_NC: Tensor,
    weights_RlC: Tensor,
    edges: Edges,
    vectors: VectorMessage | None,
) -> None:
    """Raise ValueError that names the first argument that does not fit the others."""
    check_floating("convolve", "x", x_NC, ("N", "C"))
    N, C = x_NC.shape
    check_tensor("convolve", "harmonics", harmonics_EL, ("E", "L"), x_NC)
    E = harmonics_EL.shape[0]
    num_degrees = check_l_max("convolve", "harmonics", harmonics_EL, "[E, L]") + 1
    check_tensor("convolve", "weights", weights_RlC, ("R", num_degrees, C), x_NC)
    R = weights_RlC.shape[0]
    check_tensor("convolve", "radial", radial_ER, (E, R), x_NC)
    check_edges("convolve", edges, E, N, x_NC.device)
    if vectors is not None:
        if num_degrees == 1:
            raise ValueError("convolve: vectors: expected l_max >= 1, found l_max = 0")
        check_tensor("convolve", "vectors.w", vectors.w, (N, 3, C), x_NC)
        check_tensor("convolve", "vectors.axial_weights", vectors.axial_weights, (R, num_degrees, C), x_NC)
        check_tensor("convolve", "vectors.identity_weights", vectors.identity_weights, (R, C), x_NC)


# The seven differentiable inputs: radial, harmonics, x, weights, w, axial, identity.
_INPUTS = (
    "Tensor radial, Tensor harmonics, Tensor x, Tensor weights, Tensor? w, Tensor? axial, Tensor? identity, "
    "Tensor receivers, Tensor senders, Tensor row_ptr, Tensor reverse"
)
_WEIGHTS = (3, 5, 6)  # of the inputs


def _forward_on(module: Any, *arguments: Any) -> Tensor:
    A: Tensor = module.forward(*arguments[:7], Edges(*arguments[7:]))
    return A


def _backward_on(module: Any, gA: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, edges, need = arguments[:7], Edges(*arguments[7:11]), arguments[11]
    return _filled(module.backward(gA, *inputs, edges, need), gA)


def _backward2_on(module: Any, gA: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, edges, cotangents, need = arguments[:7], Edges(*arguments[7:11]), arguments[11:15], arguments[15]
    return _filled(module.backward2(gA, *inputs, *cotangents, edges, need), gA)


def _filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return a scalar, which nobody reads, for each result that was not needed: an operation cannot return None."""
    return tuple(like.new_zeros(()) if result is None else result for result in results)


def _fake(radial: Tensor, harmonics: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], harmonics.shape[1], x.shape[1])


def _like(inputs: Sequence[Tensor | None], need: Sequence[bool], gA: Tensor) -> tuple[Tensor, ...]:
    pairs = zip(inputs, need, strict=True)
    return _filled([torch.empty_like(t) if wanted and t is not None else None for t, wanted in pairs], gA)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gA: Tensor) -> tuple[Tensor | None, ...]:
    arguments = ctx.saved_tensors
    need = needed(ctx, arguments[:7])
    results = torch.ops.rung.convolve_backward(gA.contiguous(), *arguments, need)
    return *_wanted(results, need), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.need = inputs[12]
    ctx.set_materialize_grads(False)


def _backward2(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of <cotangents, convolve_backward(gA, inputs)> with respect to gA and the inputs."""
    gA, *arguments = ctx.saved_tensors
    need = needed(ctx, (gA, *arguments[:7]))
    t = [
        tensor.contiguous() if tensor is not None and asked else None
        for tensor, asked in zip(cotangents, ctx.need, strict=True)
    ]
    parts = []
    if any(t[k] is not None for k in (0, 1, 2, 4)):
        results = torch.ops.rung.convolve_backward2(gA, *arguments, t[0], t[1], t[2], t[4], need)
        parts.append(_wanted(results, need))
    if any(t[k] is not None for k in _WEIGHTS):
        parts.append(_from_weight_cotangents(gA, arguments, t, need))
    totals = [_add(values) for values in zip(*parts, strict=True)] if parts else [None] * 8
    return *totals, None, None, None, None, None


def _from_weight_cotangents(
    gA: Tensor, arguments: Sequence[Any], t: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor | None]:
    """Return the part of the weight gradients' cotangents: they enter as the weights themselves do, linearly."""
    replaced = list(arguments)
    for k in _WEIGHTS:
        cotangent = t[k]
        if cotangent is not None:
            replaced[k] = cotangent
        elif arguments[k] is not None:
            replaced[k] = torch.zeros_like(arguments[k])
    d_gA = torch.ops.rung.convolve(*replaced) if need[0] else None
    needs = [wanted and k not in _WEIGHTS for k, wanted in enumerate(need[1:])]
    return [d_gA, *_wanted(torch.ops.rung.convolve_backward(gA, *replaced, needs), needs)]


def _wanted(results: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [result if wanted else None for result, wanted in zip(results, need, strict=True)]


def _add(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return sum(present[1:], present[0]) if present else None


register(f"convolve({_INPUTS}) -> Tensor", "convolution", _forward_on, fake=_fake, save=_save, backward=_backward)
register(
    f"convolve_backward(Tensor gA, {_INPUTS}, bool[7] need) -> ({', '.join(['Tensor'] * 7)})",
    "convolution",
    _backward_on,
    fake=lambda gA, *arguments: _like(arguments[:7], arguments[-1], gA),
    save=_save_backward,
    backward=_backward2,
)
register(
    f"convolve_backward2(Tensor gA, {_INPUTS}, Tensor? t_radial, Tensor? t_harmonics, Tensor? t_x, Tensor? t_w, "
    f"bool[8] need) -> ({', '.join(['Tensor'] * 8)})",
    "convolution",
    _backward2_on,
    fake=lambda gA, *arguments: _like((gA, *arguments[:7]), arguments[-1], gA),
    backward=no_third_derivative("convolve"),
)
