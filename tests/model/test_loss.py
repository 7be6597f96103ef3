"""The loss against closed forms, with absent labels, and split over ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.loss import LossConfig, LossTerms, loss_terms, total
from rung.model.potential import Potential, Prediction

SCALE = 2.0


@pytest.fixture
def batch(molecules: list[Structure]) -> Batch:
    """Return water and methane, labelled at low, in float64: 3 and 5 atoms."""
    pair = molecules[:2]
    return collate(
        pair, fidelities=["low", "low"], fidelity_index={"low": 0}, cutoff=3.0, energy_weights=[1.0, 3.0]
    ).to("cpu", torch.float64)


def off_by(batch: Batch, energy_per_atom: list[float], force: float) -> Prediction:
    """Return a prediction that misses each label by known amounts, in units of the scale."""
    num_atoms = torch.bincount(batch.structure)
    energy = batch.energy + SCALE * num_atoms * torch.tensor(energy_per_atom, dtype=torch.float64)
    energy = torch.where(batch.energy.isnan(), 7.0, energy).requires_grad_()
    forces = torch.where(batch.forces.isnan(), 7.0, batch.forces + SCALE * force).requires_grad_()
    return Prediction(energy, forces, None, torch.zeros(batch.num_atoms, dtype=torch.float64))


def loss(prediction: Prediction, batch: Batch, config: LossConfig) -> Tensor:
    terms = loss_terms(prediction, batch, config, SCALE)
    return total(terms, terms.statistics(), config)


def test_l2_is_half_the_weighted_mean_square(batch: Batch) -> None:
    config = LossConfig("l2", energy_weight=2.0, forces_weight=5.0)
    value = loss(off_by(batch, [0.1, -0.2], 0.3), batch, config)
    expected = 2.0 * (1.0 * 0.1**2 + 3.0 * 0.2**2) / 2 / 2 + 5.0 * 0.3**2 / 2
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_huber_is_quadratic_inside_and_linear_outside(batch: Batch) -> None:
    config = LossConfig("huber", huber_delta=0.1)
    value = loss(off_by(batch, [0.05, -0.4], 0.2), batch, config)
    energy = (0.05**2 / 2 + 3.0 * 0.1 * (0.4 - 0.05)) / 2
    assert value.item() == pytest.approx(energy + 0.1 * (0.2 - 0.05), rel=1e-9)


def test_rmse_mae_is_root_mean_square_plus_mean_absolute(batch: Batch) -> None:
    ones = dataclasses.replace(batch, energy_weight=torch.ones(2))
    value = loss(off_by(ones, [0.1, -0.3], -0.2), ones, LossConfig("rmse_mae", energy_weight=2.0))
    energy = math.sqrt((0.1**2 + 0.3**2) / 2) + (0.1 + 0.3) / 2
    assert value.item() == pytest.approx(2.0 * energy + (0.2 + 0.2), rel=1e-9)


@pytest.mark.parametrize("kind", ["huber", "l2", "rmse_mae"])
def test_an_absent_label_adds_nothing_to_the_loss_or_to_gradients(
    batch: Batch, molecules: list[Structure], kind: Any
) -> None:
    config = LossConfig(kind)
    forces = batch.forces.clone()
    forces[:3] = math.nan  # water has neither label
    partial = dataclasses.replace(batch, energy=batch.energy * torch.tensor([math.nan, 1.0]), forces=forces)
    prediction = off_by(partial, [0.1, -0.2], 0.3)
    value = loss(prediction, partial, config)
    assert prediction.forces is not None
    energy_gradient, forces_gradient = torch.autograd.grad(value, [prediction.energy, prediction.forces])
    methane = collate(
        molecules[1:2], fidelities=["low"], fidelity_index={"low": 0}, cutoff=3.0, energy_weights=[3.0]
    ).to("cpu", torch.float64)
    torch.testing.assert_close(value, loss(off_by(methane, [-0.2], 0.3), methane, config))
    assert energy_gradient[0] == 0 and energy_gradient[1] != 0
    assert (forces_gradient[:3] == 0).all() and (forces_gradient[3:] != 0).all()


@pytest.mark.parametrize("kind", ["huber", "l2", "rmse_mae"])
def test_no_labels_or_no_error_give_a_finite_gradient(batch: Batch, kind: Any) -> None:
    nothing = dataclasses.replace(batch, energy=batch.energy * math.nan, forces=batch.forces * math.nan)
    for labels in (nothing, batch):
        prediction = off_by(labels, [0.0, 0.0], 0.0)
        value = loss(prediction, labels, LossConfig(kind))
        assert value.item() == pytest.approx(0, abs=1e-9)
        value.backward()
        assert prediction.energy.grad is not None and prediction.energy.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["huber", "l2", "rmse_mae"])
def test_the_shares_of_two_ranks_add_up_to_the_loss_of_one(
    molecules: list[Structure], make_potential: Callable[..., Potential], kind: Any
) -> None:
    config = LossConfig(kind)
    potential = make_potential().double().train()

    def terms(part: list[Structure], fidelities: list[str]) -> LossTerms:
        index = {"low": 0, "high": 1}
        batch = collate(part, fidelities=fidelities, fidelity_index=index, cutoff=potential.config.cutoff)
        batch = batch.to("cpu", torch.float64)
        return loss_terms(potential(batch), batch, config, potential.scale)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(potential.parameters()))])

    together = terms(molecules, ["low", "high", "low"])
    whole = total(together, together.statistics(), config)
    ranks = [terms(molecules[:1], ["low"]), terms(molecules[1:], ["high", "low"])]  # unequal label counts
    statistics = ranks[0].statistics() + ranks[1].statistics()
    parts = total(ranks[0], statistics, config) + total(ranks[1], statistics, config)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts), gradient(whole))


def test_energies_are_subtracted_in_float64(batch: Batch) -> None:
    single = batch.to("cpu", torch.float32)
    huge = dataclasses.replace(single, energy=single.energy - 1e6)  # float32 resolves 0.06 eV here
    prediction = off_by(huge, [1e-4, 1e-4], 0.0)
    value = loss(prediction, huge, LossConfig("l2"))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(4 * 1e-8 / 2 / 2, rel=1e-3)


def test_forces_that_count_must_be_predicted(batch: Batch) -> None:
    prediction = dataclasses.replace(off_by(batch, [0.1, 0.1], 0.0), forces=None)
    with pytest.raises(ValueError, match="loss.forces_weight is not 0: expected predicted forces, found none"):
        loss(prediction, batch, LossConfig())
    value = loss(prediction, batch, LossConfig("l2", forces_weight=0.0))
    assert value.item() == pytest.approx((1 + 3) * 0.01 / 2 / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "l1"}, "loss.kind: expected huber, l2 or rmse_mae, found l1"),
        ({"huber_delta": 0.0}, "loss.huber_delta: expected a positive number"),
        ({"energy_weight": -1.0}, "loss.energy_weight: expected a number >= 0"),
        ({"energy_weight": 0.0, "forces_weight": 0.0}, "nothing to train on"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)
