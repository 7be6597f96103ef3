"""Predictions come back per structure in order, and the error metrics are what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk

from rung.data.batch import Budget, collate
from rung.data.graph import structure_graph
from rung.data.reaction import Reaction
from rung.data.structure import Labels, Structure
from rung.model.potential import Potential
from rung.model.predict import (
    ErrorSums,
    choose_fidelity,
    error_sums,
    evaluate,
    known_structures,
    predict,
    reaction_energies,
    to_device,
    widened,
)


@pytest.fixture
def potential(make_potential: Callable[..., Potential]) -> Potential:
    return make_potential().double()


def test_predictions_do_not_depend_on_the_batches(potential: Potential, molecules: list[Structure]) -> None:
    together = predict(potential, molecules, "low")
    one_by_one = predict(potential, molecules, "low", budget=Budget(max_atoms=9, max_edges=1000))
    index = {"low": 0, "high": 1}
    assert [prediction.key for prediction in together] == [structure.key for structure in molecules]
    for structure, first, second in zip(molecules, together, one_by_one, strict=True):
        batch = collate([structure], fidelities=["low"], fidelity_index=index, cutoff=potential.config.cutoff)
        direct = potential(batch.to("cpu", torch.float64))
        for prediction in (first, second):
            assert prediction.energy == pytest.approx(direct.energy.item(), abs=1e-9)
            np.testing.assert_allclose(prediction.forces, direct.forces.numpy(), atol=1e-9)
            assert prediction.atomic_energies.shape == (structure.num_atoms,)
            assert prediction.atomic_energies.sum() == pytest.approx(prediction.energy, abs=1e-9)
            assert prediction.stress is None


def test_what_is_not_asked_for_is_none(potential: Potential, molecules: list[Structure]) -> None:
    [prediction] = predict(potential, molecules[:1], "low", forces=False)
    assert prediction.forces is None
    assert predict(potential, [], "low") == []


def test_the_mode_of_the_potential_is_restored(potential: Potential, molecules: list[Structure]) -> None:
    potential.train()
    predict(potential, molecules, "low")
    assert potential.training


def test_metrics_in_closed_form(potential: Potential, molecules: list[Structure]) -> None:
    energy_errors, force_error = [0.002, -0.004, 0.003], 0.05  # eV/atom, eV/angstrom
    labelled = []
    for structure, prediction, error in zip(
        molecules, predict(potential, molecules, "low"), energy_errors, strict=True
    ):
        assert prediction.forces is not None
        labels = Labels(
            energy=prediction.energy - error * structure.num_atoms,
            forces=(prediction.forces + force_error).astype(np.float32),
        )
        labelled.append(dataclasses.replace(structure, labels={"low": labels}))
    only_energy = dataclasses.replace(labelled[0].labels["low"], forces=None)
    labelled[0] = dataclasses.replace(labelled[0], labels={"low": only_energy})
    assert evaluate(potential, labelled, "low") == {
        "num_energies": 3,
        "energy_mae_mev_per_atom": pytest.approx(3.0, rel=1e-6),
        "energy_rmse_mev_per_atom": pytest.approx(np.sqrt((4 + 16 + 9) / 3), rel=1e-6),
        "num_forces": 2,
        "force_mae_mev_per_angstrom": pytest.approx(50.0, rel=1e-4),
        "force_rmse_mev_per_angstrom": pytest.approx(50.0, rel=1e-4),
    }


def test_sums_of_parts_add_up_to_the_whole(potential: Potential, molecules: list[Structure]) -> None:
    parts = error_sums(potential, molecules[:1], "low") + error_sums(potential, molecules[1:], "low")
    whole = evaluate(potential, molecules, "low")
    assert parts.metrics() == {key: pytest.approx(value, rel=1e-9) for key, value in whole.items()}


def test_absent_labels_have_no_error(potential: Potential, molecules: list[Structure]) -> None:
    metrics = evaluate(potential, [molecules[1]], "high")  # an energy without forces
    assert metrics["num_energies"] == 1 and metrics["energy_mae_mev_per_atom"] is not None
    assert metrics["num_forces"] == 0 and metrics["force_mae_mev_per_angstrom"] is None
    assert ErrorSums().metrics()["energy_rmse_mev_per_atom"] is None


def test_what_the_potential_does_not_know_is_named(potential: Potential, molecules: list[Structure]) -> None:
    with pytest.raises(ValueError, match="unknown fidelity 'hig'; known: low, high; did you mean 'high'"):
        predict(potential, molecules, "hig")
    with pytest.raises(ValueError, match="structure 'H2O': fidelity 'high' was not trained on O; known elements: H, C"):
        predict(potential, molecules, "high")
    charged = dataclasses.replace(molecules[0], charge=-1)
    with pytest.raises(ValueError, match="structure 'H2O': charge -1 is not known; known charges: 0, 1"):
        predict(potential, [charged], "low")
    with pytest.raises(ValueError, match="structure 'CH3CH2OH': 9 atoms .* exceed the budget of 5 atoms"):
        predict(potential, molecules, "low", budget=Budget(max_atoms=5, max_edges=1000))


def test_reaction_energies_evaluate_every_structure_once(
    potential: Potential, molecules: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    water, methane, ethanol = molecules
    reactions = [
        Reaction("mixed", "", (ethanol, water, methane), (1.0, -1.0, -0.5), 0.0),
        Reaction("twice", "", (water, methane), (2.0, 1 / 3), 0.0),
        Reaction.absolute(water, 0.0),
    ]
    seen: list[str] = []
    check = potential.check_domain

    def noted(numbers: list[int], *rest: Any) -> None:
        seen.append("".join(sorted(map(str, numbers))))
        check(numbers, *rest)

    monkeypatch.setattr(potential, "check_domain", noted)
    energies = reaction_energies(potential, reactions, "low")
    assert sorted(seen) == ["111111668", "11116", "118"]
    e = {one.key: one.energy for one in predict(potential, molecules, "low")}
    expected = [e["CH3CH2OH"] - e["H2O"] - e["CH4"] / 2, 2 * e["H2O"] + e["CH4"] / 3, e["H2O"]]
    assert energies.dtype == np.float64
    np.testing.assert_allclose(energies, expected, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="structure 'CH3CH2OH': fidelity 'high' was not trained on O"):
        reaction_energies(potential, reactions, "high")


def test_unknown_structures_are_told_apart(potential: Potential, molecules: list[Structure]) -> None:
    known, reasons = known_structures(potential, molecules, "high")
    assert [structure.key for structure in known] == ["CH4"]
    assert [reason.split(":")[0] for reason in reasons] == ["structure 'H2O'", "structure 'CH3CH2OH'"]


def test_a_budget_is_widened_to_the_largest_structure(potential: Potential, molecules: list[Structure]) -> None:
    budget = widened(Budget(max_atoms=5, max_edges=5), molecules, potential.config.cutoff)
    assert budget.max_atoms == 9 and budget.max_edges > 5
    assert len(predict(potential, molecules, "low", budget=budget)) == 3
    enough = Budget(max_atoms=100, max_edges=10000)
    assert widened(enough, molecules, potential.config.cutoff) == enough
    diamond = periodic((True, True, True))  # fewer pairs of atoms than the budget, but many of images
    assert widened(Budget(100, 64), [diamond], cutoff=4.0) == Budget(100, 8 * (4 + 12 + 12 + 6 + 12))  # five shells


def periodic(pbc: tuple[bool, bool, bool], cubic: bool = True) -> Structure:
    """Return diamond, of which only some directions may be periodic; the others then have no lattice vector."""
    atoms = bulk("C", cubic=cubic)
    cell = np.where(np.array(pbc)[:, None], atoms.cell.array, 0.0).astype(np.float32)
    positions = atoms.positions.astype(np.float32)
    return Structure("C", "C", atoms.numbers.astype(np.uint8), positions, cell, np.array(pbc))


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, True, False), (False, False, False)])
def test_a_budget_is_widened_to_crystals_surfaces_and_wires(pbc: tuple[bool, bool, bool], cubic: bool) -> None:
    structure = periodic(pbc, cubic)
    for cutoff in (1.6, 3.0, 5.0, 8.0):
        edges = structure_graph(structure, cutoff).num_edges
        for enough in range(1, edges + 2, max(1, edges // 50)):
            assert widened(Budget(8, enough), [structure], cutoff).max_edges == max(edges, enough)


def test_without_a_budget_any_structure_fits(
    potential: Potential, molecules: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    water, methane, ethanol = molecules
    several = [water, methane, ethanol, water, methane]
    expected = predict(potential, several, "low")
    monkeypatch.setattr("rung.model.predict.DEFAULT_BUDGET", Budget(max_atoms=4, max_edges=8))
    monkeypatch.setattr("rung.model.predict.CHUNK", 2)  # so that it is widened on the way
    found = predict(potential, iter(several), "low")
    assert [one.key for one in found] == [structure.key for structure in several]
    np.testing.assert_allclose([one.energy for one in found], [one.energy for one in expected], rtol=0, atol=1e-9)
    assert evaluate(potential, molecules, "low")["num_energies"] == 3
    assert len(reaction_energies(potential, [Reaction.absolute(ethanol, 0.0)], "low")) == 1
    with pytest.raises(ValueError, match="structure 'CH3CH2OH': 9 atoms .* exceed the budget of 8 atoms"):
        evaluate(potential, molecules, "low", budget=Budget(max_atoms=8, max_edges=1000))


def test_edges_of_small_structures_are_not_counted(
    potential: Potential, molecules: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("rung.model.predict.edge_counts", refused)
    assert len(predict(potential, [*molecules, periodic((True, True, True), cubic=False)], "low")) == 4


def test_a_device_by_its_name(potential: Potential) -> None:
    assert to_device(potential, "cpu") is potential
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(to_device(potential).parameters()).device.type == expected
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"device '{name}': "):
            to_device(potential, name)


def test_a_fidelity_must_be_named_when_there_are_several() -> None:
    assert choose_fidelity(None, ["low"]) == "low"
    assert choose_fidelity("high", ["low", "high"]) == "high"
    with pytest.raises(ValueError, match="this potential knows 2, so name one: low, high"):
        choose_fidelity(None, ["low", "high"])
