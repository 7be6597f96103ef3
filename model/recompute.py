"""Activation checkpointing that survives being differentiated twice, as the loss of forces asks.

`torch.utils.checkpoint` gives the right numbers here but saves no memory: its first backward pass, which makes the
forces, recomputes the activations and then keeps them, because that pass is recorded for the loss's own gradient. So
the backward pass is an operation of its own below, which keeps its inputs alone, too, and computes everything again
when it is differentiated. A training step then runs a layer's forward pass four times instead of once and its backward
pass twice, of which the second is part of every step with forces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rung.kernels import Edges
from rung.kernels.registration import needed
from rung.model.layers import ElementGroups

Tensors = Sequence[Tensor | None]
Function = Callable[..., tuple[Tensor | None, ...]]  # of tensors (or None) alone


def recompute(function: Function, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return function(*inputs), of which only the inputs are kept for backward passes; differentiable twice.

    `function` must do the same whenever it is called, and every tensor that a gradient is wanted of must be among the
    inputs. Raises NotImplementedError when the result is differentiated a third time.
    """
    outputs: tuple[Tensor | None, ...] = _Recomputed.apply(*inputs, function)  # type: ignore[no-untyped-call]
    return outputs


def recompute_layer(
    layer: nn.Module,
    h_NC: Tensor,
    v_N3C: Tensor | None,
    elements: ElementGroups,
    radial_ER: Tensor,
    harmonics_EL: Tensor,
    edges: Edges,
) -> tuple[Tensor, Tensor | None]:
    """Return what an `Interaction` returns (shapes as there), keeping its inputs alone."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(
        h_NC: Tensor, v_N3C: Tensor | None, radial_ER: Tensor, harmonics_EL: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (h_NC, v_N3C, elements, radial_ER, harmonics_EL, edges)
        outputs: tuple[Tensor, Tensor | None]
        outputs = functional_call(layer, dict(zip(names, weights, strict=True)), arguments)
        return outputs

    h_new_NC, v_new_N3C = recompute(function, h_NC, v_N3C, radial_ER, harmonics_EL, *parameters)
    assert h_new_NC is not None
    return h_new_NC, v_new_N3C


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *inputs, ctx.function = arguments
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outputs: tuple[Tensor | None, ...] = ctx.function(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = needed(ctx, inputs)
        gradients: tuple[Tensor | None, ...]
        gradients = _Gradient.apply(*cotangents, *inputs, ctx.function, wanted)  # type: ignore[no-untyped-call]
        return *gradients, None


class _Gradient(torch.autograd.Function):
    """(cotangents, inputs) -> the gradients of <cotangents, function(inputs)>, None for an input not wanted."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, function, wanted = arguments
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.function, ctx.wanted = function, wanted
        cotangents, inputs = _split(tensors, len(wanted))
        with torch.enable_grad():
            leaves = _leaves(inputs, wanted)
            return _gradients(function(*leaves), leaves, wanted, cotangents)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        results: tuple[Tensor | None, ...]
        arguments = (*seconds, *tensors, ctx.function, ctx.wanted, needed(ctx, tensors))
        results = _SecondGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        return *results, None, None


class _SecondGradient(torch.autograd.Function):
    """(seconds, cotangents, inputs) -> the gradients of <seconds, _Gradient(cotangents, inputs)> that are asked for."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *given, function, wanted, asked = arguments
        seconds, tensors = _split(given, len(asked))
        _, asked_inputs = _split(asked, len(wanted))
        either = [a or b for a, b in zip(asked_inputs, wanted, strict=True)]
        with torch.enable_grad():
            leaves = _leaves(tensors, [*asked[: -len(wanted)], *either])
            cotangents, inputs = _split(leaves, len(wanted))
            gradients = _gradients(function(*inputs), inputs, wanted, cotangents, create_graph=True)
            return _gradients(gradients, leaves, asked, seconds)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "checkpoint_layers: layers can be differentiated twice, not three times; switch it off"
        )


def _split(values: Sequence[Any], num_inputs: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what belongs to the cotangents and what to the inputs."""
    return values[:-num_inputs], values[-num_inputs:]


def _leaves(tensors: Tensors, require: Sequence[bool]) -> list[Tensor | None]:
    """Return the tensors cut off from their graph, those that `require` gradients ready for them."""
    pairs = zip(tensors, require, strict=True)
    return [None if tensor is None else tensor.detach().requires_grad_(asked) for tensor, asked in pairs]


def _gradients(
    outputs: Tensors, inputs: Tensors, wanted: Sequence[bool], cotangents: Tensors, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of <cotangents, outputs>, one for each input; None where nothing depends on it."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if tensor is not None and want]
    if not pairs or not asked:
        return (None,) * len(inputs)
    dependent, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(dependent, asked, weights, allow_unused=True, create_graph=create_graph))
    return tuple(next(found) if t is not None and want else None for t, want in zip(inputs, wanted, strict=True))
