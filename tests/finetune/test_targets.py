"""Whole runs on the kinds of targets: relative energies, mixed sets, several new fidelities, new elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.data.reaction import Reaction
from rung.data.reaction_file import write_reactions
from rung.data.structure import Labels, Structure
from rung.finetune.config import FinetuneConfig, ScratchConfig, SplitConfig, TrainingConfig
from rung.finetune.dataset import absolute_rows
from rung.finetune.pipeline import FinetuneResult, finetune
from rung.model.checkpoint import load_checkpoint
from rung.model.potential import Potential
from rung.model.predict import evaluate, reaction_energies
from rung.model.uncertainty import Ensemble, LastLayer

WriteExtxyz = Callable[..., str]
SHORT = TrainingConfig(steps=20, batch_size=8, evaluate_every=10)
E0 = {1: -13.0, 6: -1030.0, 8: -2040.0}


@pytest.fixture
def run(checkpoint: str, tmp_path: Path) -> Callable[..., FinetuneResult]:
    """Return a function that fine-tunes with short settings and some others."""

    def run(data: str, **settings: Any) -> FinetuneResult:
        values: dict[str, Any] = {"strategy": "ridge", "split": SplitConfig(folds=0), "training": SHORT} | settings
        return finetune(FinetuneConfig(checkpoint, data, "high", out=str(tmp_path / "out"), **values))

    return run


@pytest.fixture
def isomers(harder: list[Structure]) -> list[Reaction]:
    """Differences between geometries of a molecule at `high`: relative energies that say nothing about totals."""
    rows = absolute_rows(harder, "high")
    return [
        Reaction(f"{a.key}-{b.key}", a.group, (b.structures[0], a.structures[0]), (1.0, -1.0), b.energy - a.energy)
        for i, a in enumerate(rows)
        for b in rows[i + 1 :]
        if a.group == b.group
    ]


def test_relative_energies_alone_are_learned_and_leave_totals_to_the_parent(
    run: Callable[..., FinetuneResult], isomers: list[Reaction], potential: Potential, tmp_path: Path
) -> None:
    held = [row for row in isomers if row.group == "CH3OH"]
    write_reactions(tmp_path / "train.yaml", [row for row in isomers if row.group != "CH3OH"], unit="kcal/mol")
    write_reactions(tmp_path / "test.yaml", held)
    result = run(str(tmp_path / "train.yaml"), test=str(tmp_path / "test.yaml"))
    target = result.metrics["target"]
    assert target["after"]["num_relative"] == len(held) == 6
    assert target["after"]["relative_mae_kcal_per_mol"] < 0.7 * target["before"]["relative_mae_kcal_per_mol"]
    assert "absolute energies at the new fidelity remain the parent's" in " ".join(result.metrics["notes"])
    assert max(map(abs, result.metrics["e0_shift_ev"].values())) < 1e-6
    tuned = load_checkpoint(result.checkpoint).potential
    labels = np.array([row.energy for row in held])
    found = np.abs(reaction_energies(tuned, held, "high") - labels).mean() / 0.0433641
    assert found == pytest.approx(target["after"]["relative_mae_kcal_per_mol"], rel=1e-3)


def test_total_and_relative_energies_train_together(
    run: Callable[..., FinetuneResult],
    isomers: list[Reaction],
    harder: list[Structure],
    write_extxyz: WriteExtxyz,
    tmp_path: Path,
) -> None:
    write_reactions(tmp_path / "relative.yaml", isomers)
    data, test = write_extxyz(harder[:8], "data.extxyz"), write_extxyz(harder[24:], "test.extxyz")
    few = run(data, test=test).metrics
    more = run(data, test=test, relative=(str(tmp_path / "relative.yaml"),)).metrics
    assert more["labels"] == few["labels"] + len(isomers) == 8 + 48
    assert "num_relative" not in more["target"]["after"]  # the test set has totals only
    key = "energy_mae_mev_per_atom"
    assert more["target"]["after"][key] < few["target"]["after"][key]
    training = dataclasses.replace(SHORT, steps=40, batch_size=16, learning_rate=2e-3)
    for strategy in ("embedding", "full"):
        relative = (str(tmp_path / "relative.yaml"),)
        mixed = run(data, test=test, relative=relative, strategy=strategy, start="parent", training=training)
        first, *_, last = [row["loss"] for row in mixed.metrics["history"]["fine-tuned"] if "loss" in row]
        assert last < first


def test_a_new_element_is_learned_and_stays_unknown_to_old_fidelities(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    fluorides = []
    for structure in harder:
        numbers = np.where(structure.numbers == 8, 9, structure.numbers).astype(np.uint8)
        energy = structure.labels["high"].energy
        assert energy is not None
        labels = {"high": Labels(energy - 700.0 * int((numbers == 9).sum()))}
        fluorides.append(dataclasses.replace(structure, key=f"f{structure.key}", numbers=numbers, labels=labels))
    data = write_extxyz([*harder[:16], *fluorides], "data.extxyz")
    with pytest.raises(ValueError, match="the checkpoint does not know F; .* Pass --new-elements"):
        run(data)
    result = run(data, new_elements=True, strategy="embedding")
    assert "new element F: starts as O" in " ".join(result.metrics["notes"])
    assert result.metrics["target"]["after"]["energy_mae_mev_per_atom"] < 50  # the reference energy was found
    made = load_checkpoint(result.checkpoint)
    made.potential.check_domain([1, 9], "high")
    with pytest.raises(ValueError, match="'low' was not trained on F"):
        made.potential.check_domain([1, 9], "low")


def test_two_new_fidelities_are_learned_together(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    data, other = write_extxyz(harder, "high.extxyz"), write_extxyz(harder, "higher.extxyz")
    result = run(data, also=(f"{other}:higher",), strategy="embedding")
    made = load_checkpoint(result.checkpoint)
    assert made.potential.config.fidelities == ("low", "other", "high", "higher")
    errors = {name: evaluate(made.potential, _named(harder, name), name) for name in ("high", "higher", "low")}
    key = "energy_mae_mev_per_atom"
    high, higher, low = (errors[name][key] for name in ("high", "higher", "low"))
    assert high is not None and higher is not None and low is not None
    assert higher < 3 * high and low < 1e-2  # `low` labels are the checkpoint's own
    (row,) = [row for row in result.metrics["forgetting"] if row["fidelity"] == "higher"]
    assert row["after"][key] < row["before"][key]
    with pytest.raises(ValueError, match="also .*: expected a new fidelity, found one of low, other, high"):
        run(data, also=(f"{other}:low",))


def _named(structures: list[Structure], fidelity: str) -> list[Structure]:
    """Return the structures with their labels at `high` under another name; those at `low` as they are."""
    if fidelity == "low":
        return structures
    return [dataclasses.replace(s, labels={fidelity: s.labels["high"]}) for s in structures]


def test_auto_takes_the_simplest_of_the_best_and_says_why(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    metrics = run(write_extxyz(harder, "data.extxyz"), strategy="auto", split=SplitConfig(folds=2)).metrics
    (reason,) = [note for note in metrics["notes"] if note.startswith("strategy ")]
    assert metrics["strategy"] == reason.split()[1].rstrip(":")
    assert all(f"{name} " in reason for name in ("ridge", "embedding", "adapter", "full"))
    assert "in 2-fold cross-validation" in reason


@pytest.mark.parametrize(("kind", "expected"), [("last_layer", LastLayer), ("ensemble", Ensemble)])
def test_uncertainty_is_published_and_calibrated(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz, kind: str, expected: type
) -> None:
    result = run(write_extxyz(harder, "data.extxyz"), uncertainty=kind, split=SplitConfig(folds=3))
    uncertainty = load_checkpoint(result.checkpoint).uncertainty["high"]
    assert isinstance(uncertainty, expected)
    found = result.metrics["uncertainty"]
    assert found["kind"] == kind and found["factor"] == uncertainty.factor > 0
    assert found["calibration"]["rms_error_over_std"] == pytest.approx(1)
    if isinstance(uncertainty, Ensemble):
        assert len(uncertainty.members) == 3


def test_lbfgs_reaches_a_smaller_loss_than_few_steps_of_soap(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    data = write_extxyz(harder, "data.extxyz")
    losses = {}
    for optimizer in ("lbfgs", "soap"):
        training = TrainingConfig(steps=20, evaluate_every=10, optimizer=optimizer)
        history = run(data, strategy="embedding", start="parent", training=training).metrics["history"]
        losses[optimizer] = history["fine-tuned"][-1]["loss"]
    assert losses["lbfgs"] < losses["soap"]


def test_training_ends_when_too_much_is_forgotten(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    data = write_extxyz(harder, "high.extxyz")
    wrong = [dataclasses.replace(s, labels={"low": s.labels["low"]}) for s in harder]
    low = write_extxyz(wrong, "low.extxyz", fidelity="low", forces=True)
    training = TrainingConfig(
        steps=60, evaluate_every=5, learning_rate=0.02, max_forgetting=1.0, replay_weight=0.0, replay_ratio=0.2
    )
    scratch = ScratchConfig(steps=1)
    result = run(data, strategy="full", replay=(f"{low}:low",), training=training, baseline="scratch", scratch=scratch)
    metrics = result.metrics
    history = metrics["history"]["fine-tuned"]
    forces = [row["low.force_mae_mev_per_angstrom"] for row in history]
    assert history[-1]["step"] < 60 and forces[-1] > 2 * forces[0]
    assert metrics["steps"] < history[-1]["step"]


def test_labels_that_break_training_are_named(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    training = dataclasses.replace(SHORT, optimizer="adamw", learning_rate=1e12)
    with pytest.raises(ValueError, match=r"expected a finite loss and gradient, .* on the batch of .*take a smaller"):
        run(write_extxyz(harder, "data.extxyz"), strategy="full", start="parent", training=training)


def test_labels_of_another_new_fidelity_are_checked_too(
    run: Callable[..., FinetuneResult], harder: list[Structure], write_extxyz: WriteExtxyz
) -> None:
    in_kcal = []
    for structure in harder:
        energy = structure.labels["high"].energy
        assert energy is not None
        in_kcal.append(dataclasses.replace(structure, labels={"high": Labels(energy * 23.0605)}))
    other = write_extxyz(in_kcal, "other.extxyz")
    with pytest.raises(ValueError, match="other.extxyz look like kcal/mol, expected eV"):
        run(write_extxyz(harder, "data.extxyz"), also=(f"{other}:higher",))


def test_reactions_that_are_trained_on_are_no_test(
    run: Callable[..., FinetuneResult], isomers: list[Reaction], tmp_path: Path
) -> None:
    write_reactions(tmp_path / "all.yaml", isomers)
    with pytest.raises(ValueError, match="test reaction .* is training reaction"):
        run(str(tmp_path / "all.yaml"), test=str(tmp_path / "all.yaml"))


def test_total_energies_in_a_table_are_total_energies(
    run: Callable[..., FinetuneResult], harder: list[Structure], tmp_path: Path
) -> None:
    rows = absolute_rows(harder, "high")
    write_reactions(tmp_path / "train.yaml", rows[:24])
    write_reactions(tmp_path / "test.yaml", rows[24:])
    errors = run(str(tmp_path / "train.yaml"), test=str(tmp_path / "test.yaml")).metrics["target"]["after"]
    assert errors["num_energies"] == 8
    assert errors["energy_mae_mev_per_atom"] == pytest.approx(errors["row_mae_mev_per_atom"])
