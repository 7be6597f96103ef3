"""Activation checkpointing: the same energies, forces and second derivatives, from fewer saved bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.kernels import use_backend
from rung.model.loss import LossConfig, loss_terms, total
from rung.model.potential import Potential
from rung.model.recompute import recompute

BACKENDS = ("native", "reference")
SIZES = {"channels": 16, "l_max": 2, "num_layers": 3}  # channels: the fewest that the native kernels take


def batch_of(structures: list[Structure], device: str = "cpu") -> Batch:
    index = {"low": 0, "high": 1}
    fidelities = ["high" if "high" in structure.labels else "low" for structure in structures]
    batch = collate(structures, fidelities=fidelities, fidelity_index=index, cutoff=5.0)
    return batch.to(device, torch.float64)


def loss_of(potential: Potential, batch: Batch, *, forces: bool = True) -> Tensor:
    config = LossConfig(kind="l2", forces_weight=float(forces))
    prediction = potential(batch, forces=forces)
    terms = loss_terms(prediction, batch, config, potential.scale)
    return total(terms, terms.statistics(), config)


def gradients(potential: Potential, batch: Batch, **options: Any) -> dict[str, Tensor]:
    potential.zero_grad(set_to_none=True)
    torch.autograd.backward(loss_of(potential, batch, **options))
    return {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-10 of the largest gradient: the sums are the same, in another order."""
    assert found.keys() == expected.keys() and expected
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"conditioning": "heads"}, {"l_hidden": 0}, {"num_layers": 1}], ids=str)
@pytest.mark.parametrize("forces", [True, False], ids=["forces", "energies"])
def test_gradients_of_a_loss_are_those_without_it(
    backend: str,
    changes: dict[str, Any],
    forces: bool,
    make_potential: Callable[..., Potential],
    molecules: list[Structure],
) -> None:
    potential, batch = make_potential(**(SIZES | changes)).double().train(), batch_of(molecules)
    with use_backend(backend):
        expected = gradients(potential, batch, forces=forces)
        potential.checkpoint_layers = True
        assert_equal(gradients(potential, batch, forces=forces), expected)


@pytest.mark.gpu
def test_gradients_on_a_gpu(make_potential: Callable[..., Potential], molecules: list[Structure]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    potential, batch = make_potential(**SIZES).double().train().to("cuda"), batch_of(molecules, "cuda")
    expected = gradients(potential, batch)
    potential.checkpoint_layers = True
    assert_equal(gradients(potential, batch), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_predictions_are_those_without_it(
    training: bool, make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    potential, batch = make_potential(**SIZES).double().train(training), batch_of(molecules)
    expected = potential(batch, stress=True)
    potential.checkpoint_layers = True
    found = potential(batch, stress=True)
    for name in ("energy", "forces", "stress", "atomic_energy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12, equal_nan=True
        )
    assert found.forces.requires_grad == training
    with torch.no_grad():
        torch.testing.assert_close(potential(batch, forces=False).energy, expected.energy.detach())


def test_frozen_parameters_stay_without_gradients(
    make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    potential, batch = make_potential(**SIZES).double().train(), batch_of(molecules)
    potential.layers[0].requires_grad_(False)
    potential.layers[2].mixing_lCC.requires_grad_(False)
    expected = gradients(potential, batch)
    potential.checkpoint_layers = True
    assert_equal(gradients(potential, batch), expected)


def test_a_parameters_gradient_is_complete_when_its_hook_runs(
    make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    """A layer's weights are used by its energies and by its forces; DeepSpeed reduces a gradient at the first call."""
    potential, batch = make_potential(**SIZES).double().train(), batch_of(molecules)
    potential.checkpoint_layers = True
    calls: list[int] = []
    for parameter in potential.parameters():
        hook: Any = parameter.register_post_accumulate_grad_hook
        hook(lambda parameter: calls.append(id(parameter)))
    found = gradients(potential, batch)
    assert len(calls) == len(set(calls)) == len(found)


class Kept:
    """What autograd holds in place of a tensor that it saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(potential: Potential, batch: Batch) -> int:
    """Return the bytes that the graph of the potential's energies and forces keeps: each storage once."""
    kept: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        prediction = potential(batch)
    alive = [holder.tensor.untyped_storage() for reference in kept if (holder := reference()) is not None]
    del prediction
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_keeps_only_its_inputs(
    backend: str, make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    """What a force loss keeps for each further layer is a handful of [N, C] arrays: scalars and vectors, twice."""
    batch = batch_of([structure for structure in molecules for _ in range(20)])
    row = 8 * batch.num_atoms * SIZES["channels"]
    rows = {}
    with use_backend(backend):
        for checkpointed in (False, True):
            kept = []
            for num_layers in (3, 4):
                potential = make_potential(**(SIZES | {"num_layers": num_layers})).double().train()
                potential.checkpoint_layers = checkpointed
                kept.append(saved_bytes(potential, batch) - sum(p.nbytes for p in potential.layers.parameters()))
            rows[checkpointed] = (kept[1] - kept[0]) / row
    assert rows[True] < 16 and rows[False] > 4 * rows[True]  # 4 + 4 of the layer, the rest of the read-out


def sine(x: Tensor, y: Tensor | None, z: Tensor) -> tuple[Tensor | None, ...]:
    """A function that is non-linear in x and z, uses y where it is there, and has an output that is None."""
    first = (x * z).sin() if y is None else (x * z).sin() + y
    return first, None, z.exp().sum() * x


@pytest.mark.parametrize("with_y", [True, False], ids=["three", "two"])
def test_first_and_second_derivatives_against_finite_differences(with_y: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    inputs = (x, y, z) if with_y else (x, z)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, none, last = recompute(sine, inputs[0], inputs[1] if with_y else None, inputs[-1])
        assert none is None and first is not None and last is not None
        return first, last

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_a_third_derivative_is_an_error() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (y,) = recompute(lambda x: (x.sin(),), x)
    assert y is not None
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not three times"):
        torch.autograd.grad(second.sum(), x)


def test_only_what_is_wanted_is_differentiated() -> None:
    """A force pass wants no gradients of weights: the function's graph is then cut at them."""
    seen: list[tuple[bool, bool]] = []

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        seen.append((x.requires_grad, weight.requires_grad))
        return (x * weight,)

    x, weight = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (y,) = recompute(function, x, weight)
    assert y is not None
    (force,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert seen[1:] == [(True, False)]
    torch.autograd.backward(force.square().sum())
    assert weight.grad is not None and torch.equal(weight.grad, torch.full_like(weight, 2.0))
