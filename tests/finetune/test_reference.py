"""Parents, the shift of the reference energies, and the step-0 identity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rung.data.structure import Structure
from rung.finetune import reference
from rung.finetune.dataset import absolute_rows
from rung.model.potential import Potential
from rung.model.predict import evaluate

SHIFT = {1: 0.5, 6: -8.0, 8: 12.0}


def test_a_shift_per_element_is_recovered_and_leaves_no_error(potential: Potential, shifted: list[Structure]) -> None:
    parent = reference.choose_parent(potential, absolute_rows(shifted, "high"), ["low"])[0]
    assert parent.shift.per_element == pytest.approx(SHIFT, abs=1e-4)
    assert parent.shift.rms_mev_per_atom < 0.01
    assert parent.shift.note == ""
    started = reference.with_new_fidelity(potential, "high", parent)
    error = evaluate(started, shifted, "high")["energy_mae_mev_per_atom"]
    assert error is not None and error < 0.01


def test_a_shift_of_a_thousand_ev_is_not_shrunk(shifted: list[Structure]) -> None:
    elements = [1, 6, 8]
    rows = absolute_rows(shifted, "high")
    energies = reference.composition(rows, elements) @ np.array([-3.0, 1000.0, -2000.0])
    assert reference.fit_shift(rows, energies).per_element[8] == pytest.approx(-2000, abs=1e-3)


def test_elements_that_cannot_be_separated_are_explained(shifted: list[Structure]) -> None:
    methane = absolute_rows([s for s in shifted if s.group == "CH4"], "high")
    shift = reference.fit_shift(methane, np.full(len(methane), 5.0))
    assert np.abs(shift.residual_per_atom).max() < 1e-6
    assert "rank 1 for 2 elements" in shift.note


def test_the_parent_is_the_fidelity_that_fits(potential: Potential, shifted: list[Structure]) -> None:
    candidates = reference.choose_parent(potential, absolute_rows(shifted, "high"), ["low", "other"])
    assert [parent.fidelity for parent in candidates] == ["low", "other"]
    assert candidates[0].shift.rms_mev_per_atom < candidates[1].shift.rms_mev_per_atom


def test_a_fidelity_that_does_not_know_an_element_is_no_parent(potential: Potential, shifted: list[Structure]) -> None:
    potential.set_reference("low", {1: 0.0, 6: 0.0})
    assert [
        p.fidelity for p in reference.choose_parent(potential, absolute_rows(shifted, "high"), ["low", "other"])
    ] == ["other"]
    with pytest.raises(ValueError, match="low: fidelity 'low' was not trained on O; known elements: H, C"):
        reference.choose_parent(potential, absolute_rows(shifted, "high"), ["low"])


def test_identity_holds_at_the_start_and_is_checked(potential: Potential, harder: list[Structure]) -> None:
    parent = reference.choose_parent(potential, absolute_rows(harder, "high"), ["low"])[0]
    started = reference.with_new_fidelity(potential, "high", parent)
    assert reference.check_identity(started, harder, "high", parent) < reference.IDENTITY_TOLERANCE
    shift = dataclasses.replace(parent.shift, per_element=parent.shift.per_element | {8: 12.5})
    with pytest.raises(RuntimeError, match="step-0 identity: expected 'high' to equal 'low' plus the shift"):
        reference.check_identity(started, harder, "high", dataclasses.replace(parent, shift=shift))


def test_the_new_fidelity_knows_only_the_elements_of_its_data(potential: Potential, shifted: list[Structure]) -> None:
    hydrocarbons = [s for s in shifted if 8 not in s.numbers]
    parent = reference.choose_parent(potential, absolute_rows(hydrocarbons, "high"), ["low"])[0]
    started = reference.with_new_fidelity(potential, "high", parent)
    started.check_domain([1, 6], "high")
    with pytest.raises(ValueError, match="'high' was not trained on O"):
        started.check_domain([8], "high")


def test_test_elements_without_a_training_structure_are_named(shifted: list[Structure]) -> None:
    hydrocarbons = [s for s in shifted if 8 not in s.numbers]
    everything, some = absolute_rows(shifted, "high"), absolute_rows(hydrocarbons, "high")
    reference.check_covered(everything, some, "high")
    message = r"test structures contain O, but no structure to train on at 'high' does \(first: H2O-0\)"
    with pytest.raises(ValueError, match=message):
        reference.check_covered(some, everything, "high")
