"""Fidelities of the potential: what a new row predicts, what one row touches, and errors that list the known ones."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.config import ModelConfig
from rung.model.potential import Potential

Make = Callable[..., Potential]
E0_LOW = {1: -13.6, 6: -1027.0, 8: -2040.0}
E0_NEW = {1: -13.9, 6: -1030.0, 8: -2044.0}


def to_batch(potential: Potential, structures: list[Structure], fidelity: str) -> Batch:
    index = {name: row for row, name in enumerate(potential.config.fidelities)}
    batch = collate(structures, fidelities=[fidelity] * len(structures), fidelity_index=index, cutoff=5.0)
    return batch.to("cpu", torch.float64)


@pytest.mark.parametrize("conditioning", ["film", "heads"])
def test_a_new_fidelity_predicts_what_its_parent_does_plus_the_shift_of_reference_energies(
    make_potential: Make, molecules: list[Structure], conditioning: str
) -> None:
    potential = make_potential(conditioning=conditioning).double()
    before = potential(to_batch(potential, molecules, "low"))
    potential.add_fidelity("ccsdt", parent="low", e0=E0_NEW)
    after = potential(to_batch(potential, molecules, "ccsdt"))
    shift = [sum(E0_NEW[z] - E0_LOW[z] for z in structure.numbers.tolist()) for structure in molecules]
    torch.testing.assert_close(after.energy, before.energy + torch.tensor(shift, dtype=torch.float64))
    assert torch.equal(after.forces, before.forces)
    assert torch.equal(potential(to_batch(potential, molecules, "low")).energy, before.energy)
    assert potential.config.fidelities == ("low", "high", "ccsdt")


def test_a_new_fidelity_inherits_reference_energies_and_frozen_parameters(make_potential: Make) -> None:
    potential = make_potential()
    potential.requires_grad_(False)
    potential.add_fidelity("ccsdt", parent="high")
    torch.testing.assert_close(potential.e0_FZ[2], potential.e0_FZ[1], equal_nan=True)
    assert not any(parameter.requires_grad for parameter in potential.parameters())


@pytest.mark.parametrize(("conditioning", "count"), [("film", 3), ("heads", 1)])
def test_stacked_parameters_have_one_row_for_each_fidelity(
    make_potential: Make, molecules: list[Structure], conditioning: str, count: int
) -> None:
    potential = make_potential(conditioning=conditioning).double().train()
    stacked = potential.fidelity_parameters()
    assert len(stacked) == count
    named = dict(potential.named_parameters())
    assert all(named[name] is parameter and len(parameter) == 2 for name, parameter in stacked)
    prediction = potential(to_batch(potential, molecules, "low"))
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    for name, parameter in stacked:
        assert parameter.grad[0].abs().max() > 0, name
        assert parameter.grad[1].abs().max() == 0, name  # the other fidelity is not touched


@pytest.mark.parametrize("conditioning", ["film", "heads"])
def test_a_row_of_each_stacked_parameter_changes_its_own_fidelity_only(
    make_potential: Make, molecules: list[Structure], conditioning: str
) -> None:
    potential = make_potential(conditioning=conditioning).double()
    batches = [to_batch(potential, molecules, name) for name in ("low", "high")]
    for name, parameter in potential.fidelity_parameters():
        before = [potential(batch).forces for batch in batches]
        with torch.no_grad():
            parameter[1] += 0.5
        after = [potential(batch).forces for batch in batches]
        assert torch.equal(after[0], before[0]), name
        assert (after[1] - before[1]).abs().max() > 1e-3, name


@pytest.mark.parametrize("conditioning", ["film", "heads"])
def test_fidelities_differ_once_their_rows_do(
    make_potential: Make, molecules: list[Structure], conditioning: str
) -> None:
    potential = make_potential(conditioning=conditioning).double()
    low, high = (potential(to_batch(potential, molecules, name)).forces for name in ("low", "high"))
    assert (low - high).abs().max() > 1e-3


def test_film_starts_without_any_difference_between_fidelities(molecules: list[Structure]) -> None:
    potential = Potential(ModelConfig(elements=(1, 6, 8), fidelities=("low", "high"), channels=8)).double()
    low, high = (potential(to_batch(potential, molecules, name)).forces for name in ("low", "high"))
    assert torch.equal(low, high)


def test_charge_and_multiplicity_matter(make_potential: Make, molecules: list[Structure]) -> None:
    potential = make_potential().double()
    batch = to_batch(potential, molecules, "low")
    neutral = potential(batch).energy
    for field in ("charge", "multiplicity"):
        other = batch.__class__(**{**vars(batch), field: getattr(batch, field) + 1})
        assert (potential(other).energy - neutral).abs().min() > 1e-3


def test_unknown_names_are_errors_that_list_the_known_ones(make_potential: Make) -> None:
    potential = make_potential()
    with pytest.raises(ValueError, match="unknown fidelity 'lo'; known: low, high; did you mean 'low'"):
        potential.check_domain([1], "lo")
    with pytest.raises(ValueError, match="unknown fidelity 'lo'"):
        potential.add_fidelity("new", parent="lo")
    with pytest.raises(ValueError, match="'high' exists already; known: low, high"):
        potential.add_fidelity("high", parent="low")
    with pytest.raises(ValueError, match="expected lower-case letters"):
        potential.add_fidelity("Not A Name", parent="low")
    assert potential.config.fidelities == ("low", "high")


def test_the_domain_is_checked(make_potential: Make) -> None:
    potential = make_potential()
    potential.check_domain([1, 6, 8], "low", charge=1, multiplicity=2)
    with pytest.raises(ValueError, match="'low' was not trained on N, S; known elements: H, C, O"):
        potential.check_domain([1, 16, 7], "low")
    with pytest.raises(ValueError, match="'high' was not trained on O; known elements: H, C$"):
        potential.check_domain([1, 8], "high")
    with pytest.raises(ValueError, match="charge -1 is not known; known charges: 0, 1"):
        potential.check_domain([1], "low", charge=-1)
    with pytest.raises(ValueError, match="multiplicity 3 is not known; known: 1, 2"):
        potential.check_domain([1], "low", multiplicity=3)


def test_inputs_outside_the_domain_never_pass_silently(make_potential: Make, molecules: list[Structure]) -> None:
    """Where nobody called check_domain: an untrained element gives NaN, an unknown row is out of range."""
    potential = make_potential().double()
    assert potential(to_batch(potential, molecules, "high")).energy.isnan().tolist() == [True, False, True]
    batch = to_batch(potential, molecules, "low")
    for field, value in (("numbers", 7), ("charge", -1), ("multiplicity", 3)):
        wrong = batch.__class__(**{**vars(batch), field: torch.full_like(getattr(batch, field), value)})
        with pytest.raises(IndexError, match="out of range"):
            potential(wrong)


def test_reference_energies_and_scale_are_checked(make_potential: Make) -> None:
    potential = make_potential()
    with pytest.raises(ValueError, match=re.escape("element N is not one of the model's: H, C, O")):
        potential.set_reference("low", {7: -1.0})
    with pytest.raises(ValueError, match="unknown fidelity 'hihg'"):
        potential.set_reference("hihg", {})
    for value in (0.0, float("nan"), -1.0):
        with pytest.raises(ValueError, match="scale: expected a positive number"):
            potential.set_scale(value)
