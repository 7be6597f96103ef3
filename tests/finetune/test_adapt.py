"""Strategies: the step-0 identity, what each may change, and the pull to the pretrained weights."""

from __future__ import annotations

import pytest
import torch

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.finetune.adapt import STRATEGIES, Adaptation
from rung.finetune.config import TrainingConfig
from rung.finetune.dataset import absolute_rows
from rung.finetune.train import Target, Trained, train
from rung.model.potential import Potential

both_conditionings = pytest.mark.parametrize("potential", ["film", "heads"], indirect=True)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture
def started(potential: Potential) -> Potential:
    potential.add_fidelity("high", "low")
    return potential


@pytest.fixture
def batch(started: Potential, shifted: list[Structure]) -> Batch:
    index = {name: row for row, name in enumerate(started.config.fidelities)}
    fidelities = [("low", "other", "high")[i % 3] for i in range(len(shifted))]
    return collate(shifted, fidelities=fidelities, fidelity_index=index, cutoff=started.config.cutoff)


def adapt(started: Potential, structures: list[Structure], strategy: str) -> Trained:
    target = Target("high", absolute_rows(structures, "high"), [], use_forces=False)
    training = TrainingConfig(steps=5, batch_size=8, learning_rate=0.01, rank=2)
    return train(started, Adaptation(started, ["high"], strategy, rank=2), target, training)


@both_conditionings
@every_strategy
def test_an_adaptation_starts_as_the_pretrained_potential(started: Potential, batch: Batch, strategy: str) -> None:
    adaptation = Adaptation(started, ["high"], strategy)
    prediction, expected = adaptation(adaptation.weights(), batch, True), started(batch)
    assert torch.equal(prediction.energy, expected.energy)
    assert prediction.forces is not None and expected.forces is not None
    torch.testing.assert_close(prediction.forces, expected.forces)


@both_conditionings
@every_strategy
def test_rows_of_other_fidelities_never_move(started: Potential, harder: list[Structure], strategy: str) -> None:
    before = {name: value.clone() for name, value in started.named_parameters()}
    after = dict(adapt(started, harder, strategy).potential.named_parameters())
    for name, _ in started.fidelity_parameters():
        assert torch.equal(after[name][:2], before[name][:2])
        assert not torch.equal(after[name][2], before[name][2])


@both_conditionings
def test_embedding_trains_nothing_shared(started: Potential, harder: list[Structure]) -> None:
    before = {name: value.clone() for name, value in started.named_parameters()}
    stacked = {name for name, _ in started.fidelity_parameters()}
    after = dict(adapt(started, harder, "embedding").potential.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before if name not in stacked)


def test_adapter_changes_matrices_by_low_rank_and_vectors_not(started: Potential, harder: list[Structure]) -> None:
    before = {name: value.clone() for name, value in started.named_parameters()}
    stacked = {name for name, _ in started.fidelity_parameters()}
    # The served weights average several products; the adapted weights themselves are pretrained plus one product.
    adaptation = Adaptation(started, ["high"], "adapter", rank=2)
    target = Target("high", absolute_rows(harder, "high"), [], False)
    train(started, adaptation, target, TrainingConfig(steps=5, learning_rate=0.01))
    moved = adaptation.weights()
    for name in before.keys() - stacked:
        if before[name].dim() < 2:
            assert name not in moved
            continue
        change = (moved[name] - before[name]).detach().double().flatten(0, -2)
        singular = torch.linalg.svdvals(change)
        assert bool((singular[2:] < 1e-6).all())  # rounding of weights of order one


def test_full_trains_every_shared_weight(started: Potential, harder: list[Structure]) -> None:
    before = {name: value.clone() for name, value in started.named_parameters()}
    after = dict(adapt(started, harder, "full").potential.named_parameters())
    assert not [name for name in before if torch.equal(after[name], before[name])]


def test_training_leaves_the_start_as_it_was(started: Potential, harder: list[Structure]) -> None:
    before = {name: value.clone() for name, value in started.state_dict().items()}
    adapt(started, harder, "full")
    for name, value in started.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in started.parameters())


def test_pull_is_half_the_squared_distance_and_its_gradient_the_distance(started: Potential) -> None:
    adaptation = Adaptation(started, ["high"], "full")
    weights = adaptation.weights()
    assert adaptation.pull(weights).item() == 0
    generator = torch.Generator().manual_seed(0)
    steps = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in weights.items()}
    moved = {name: (value + steps[name]).detach().requires_grad_() for name, value in weights.items()}
    pull = adaptation.pull(moved)
    expected = 0.5 * sum(float(step.double().square().sum()) for step in steps.values())
    assert pull.item() == pytest.approx(expected, rel=1e-5)
    gradients = torch.autograd.grad(pull, list(moved.values()))
    for gradient, step in zip(gradients, steps.values(), strict=True):
        torch.testing.assert_close(gradient, step, rtol=1e-4, atol=1e-6)


def test_unknown_strategy_is_named(started: Potential) -> None:
    with pytest.raises(ValueError, match="strategy: expected one of embedding, adapter, full, found 'ridge'"):
        Adaptation(started, ["high"], "ridge")
