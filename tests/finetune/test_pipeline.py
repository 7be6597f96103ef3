"""Whole runs on tiny sets: the files, the numbers in them, what is refused, and that replay protects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import ase.io
import ase.units
import pytest
import torch

from rung.data.structure import Structure
from rung.finetune.adapt import Adaptation
from rung.finetune.config import FinetuneConfig, SplitConfig, TrainingConfig
from rung.finetune.dataset import absolute_rows
from rung.finetune.pipeline import finetune
from rung.finetune.replay import ReplayTask
from rung.finetune.train import Target, train
from rung.launch.cli import main
from rung.model.checkpoint import load_checkpoint
from rung.model.potential import Potential
from rung.model.predict import evaluate

WriteExtxyz = Callable[..., str]
SHORT = TrainingConfig(steps=20, batch_size=8, evaluate_every=10, learning_rate=0.01)
ENERGY, FORCE = "energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"
E0 = {1: -13.0, 6: -1030.0, 8: -2040.0}
SHIFT = {1: 0.5, 6: -8.0, 8: 12.0}


def test_command_line_from_file_to_report(
    checkpoint: str,
    harder: list[Structure],
    write_extxyz: WriteExtxyz,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, test = write_extxyz(harder[:24], "train.extxyz"), write_extxyz(harder[24:], "test.extxyz", forces=True)
    out = tmp_path / "out"
    words = ["--from", checkpoint, "--data", train, "--test", test, "--fidelity", "high", "--out", str(out)]
    words += ["--baseline", "scratch", "split.folds=0", "training.steps=40", "training.evaluate_every=20"]
    words += ["scratch.steps=20", "method=CCSD(T)"]
    assert main(["finetune", *words]) == 0

    report = json.loads((out / "report.json").read_text())
    assert report["parent"] == "low"
    assert report["labels"] == 24
    assert report["measured_on"] == "8 test structures, not trained on"
    assert set(report["target"]) == {"before", "ridge", "after", "scratch"}
    assert report["target"]["after"]["num_forces"] == 8
    assert report["target"]["after"][ENERGY] < report["target"]["scratch"][ENERGY]
    assert set(report["drift"]) == {"low", "other", "high"}
    printed = capsys.readouterr().out
    assert printed == (out / "report.txt").read_text()
    assert "trained on energies only" in printed
    assert "from scratch, same labels" in printed
    for name in ("learning_curve", "parity_energy", "parity_forces"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    made = load_checkpoint(out / "checkpoint")
    assert made.potential.config.fidelities == ("low", "other", "high")
    assert made.fidelities["high"].method == "CCSD(T)"
    digest = hashlib.sha256(Path(train).read_bytes()).hexdigest()
    assert {"name": train, "fidelity": "high", "sha256": digest} in made.info["datasets"]
    source_digest = hashlib.sha256((Path(checkpoint) / "SHA256SUMS").read_bytes()).hexdigest()
    assert made.info["training"]["source"]["sha256"] == source_digest
    assert evaluate(made.potential, harder[24:], "high")[ENERGY] == pytest.approx(
        report["target"]["after"][ENERGY], rel=1e-3
    )


def test_embedding_forgets_nothing(
    checkpoint: str, harder: list[Structure], write_extxyz: WriteExtxyz, tmp_path: Path
) -> None:
    data = write_extxyz(harder, "data.extxyz")
    split = SplitConfig(folds=0)
    config = FinetuneConfig(
        checkpoint, data, "high", strategy="embedding", out=str(tmp_path / "out"), split=split, training=SHORT
    )
    drift = finetune(config).metrics["drift"]
    assert drift["low"] == drift["other"] == {"energy_rms_mev_per_atom": 0.0, "force_rms_mev_per_angstrom": 0.0}
    assert drift["high"]["energy_rms_mev_per_atom"] > 0


def test_a_small_set_is_cross_validated(
    checkpoint: str, harder: list[Structure], write_extxyz: WriteExtxyz, tmp_path: Path
) -> None:
    data = write_extxyz(harder[:16], "data.extxyz")
    split = SplitConfig(folds=2)
    config = FinetuneConfig(checkpoint, data, "high", out=str(tmp_path / "out"), split=split, training=SHORT)
    metrics = finetune(config).metrics
    assert metrics["measured_on"].startswith("2-fold cross-validation")
    assert metrics["target"]["after"]["num_energies"] == 16
    assert set(metrics["history"]) == {"fine-tuned", "fold 1", "fold 2"}


def test_equal_seeds_give_equal_numbers(
    checkpoint: str, harder: list[Structure], write_extxyz: WriteExtxyz, tmp_path: Path
) -> None:
    data = write_extxyz(harder, "data.extxyz")
    results = []
    for name in ("a", "b"):
        config = FinetuneConfig(
            checkpoint, data, "high", out=str(tmp_path / name), split=SplitConfig(folds=0), training=SHORT
        )
        results.append(finetune(config))
    weights = [load_checkpoint(result.checkpoint).potential.state_dict() for result in results]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=0, equal_nan=True)


def test_replay_reduces_forgetting(potential: Potential, harder: list[Structure]) -> None:
    """The `low` labels are the pretrained potential's own predictions, so its error before fine-tuning is zero."""
    potential.add_fidelity("high", "low", {z: e0 + SHIFT[z] for z, e0 in E0.items()})
    task = ReplayTask("memory", "low", harder, harder, weight=0.003)
    target = Target("high", absolute_rows(harder, "high"), [], use_forces=False)
    errors = []
    for replay in ([], [task]):
        adaptation = Adaptation(potential, ["high", "low"], "full")
        training = TrainingConfig(steps=60, batch_size=8, learning_rate=0.01, replay_ratio=2.0, l2_pull=0.0)
        trained = train(potential, adaptation, target, training, replay=replay)
        errors.append(evaluate(trained.potential, harder, "low"))
    assert errors[1][ENERGY] < 0.75 * errors[0][ENERGY]
    assert errors[1][FORCE] < 0.75 * errors[0][FORCE]


def test_forces_are_trained_on_only_when_asked(
    checkpoint: str, harder: list[Structure], write_extxyz: WriteExtxyz, tmp_path: Path
) -> None:
    data = write_extxyz(harder, "data.extxyz", forces=True)
    notes = []
    for use_forces in (False, True):
        config = FinetuneConfig(
            checkpoint,
            data,
            "high",
            use_forces=use_forces,
            out=str(tmp_path / str(use_forces)),
            split=SplitConfig(folds=0),
            training=SHORT,
        )
        notes.append(" ".join(finetune(config).metrics["notes"]))
    assert "the forces of 24 structures were not used (--use-forces trains on them)" in notes[0]
    assert "trained on energies and on the forces of 24 of 24 structures" in notes[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parent", "lwo"], "unknown fidelity 'lwo'; known: low, other; did you mean 'low'?"),
        (["--fidelity", "low"], "the checkpoint already has the fidelity 'low'"),
        (["--use-forces"], "use_forces: expected forces at 'high', found none"),
        (["training.setps=3"], "unknown key 'training.setps'; did you mean 'steps'?"),
        (["--replay", "builtin:hihg"], "unknown fidelity 'hihg'"),
        (["--from", "nowhere"], "checkpoint nowhere does not exist"),
        (["device=foo"], "device 'foo'"),
    ],
)
def test_bad_input_is_named(
    checkpoint: str,
    shifted: list[Structure],
    write_extxyz: WriteExtxyz,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    data = write_extxyz(shifted, "data.extxyz")
    assert main(["finetune", "--from", checkpoint, "--data", data, "--fidelity", "high", *words]) == 2
    assert message in capsys.readouterr().err


def test_kcal_given_as_ev_stops_the_run(
    checkpoint: str, shifted: list[Structure], write_extxyz: WriteExtxyz, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_extxyz(shifted, "data.extxyz")
    frames = ase.io.read(data, ":")
    for atoms in frames:
        atoms.info["REF_energy"] *= ase.units.mol / ase.units.kcal
    ase.io.write(data, frames, format="extxyz")
    assert main(["finetune", "--from", checkpoint, "--data", data, "--fidelity", "high"]) == 2
    error = capsys.readouterr().err
    assert "suspicious labels" in error
    assert "look like kcal/mol, expected eV" in error


def test_the_checkpoint_to_start_from_is_not_replaced(
    checkpoint: str, shifted: list[Structure], write_extxyz: WriteExtxyz, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(checkpoint).rename(Path(checkpoint).with_name("checkpoint"))
    words = ["--from", str(folder), "--data", write_extxyz(shifted, "data.extxyz"), "--fidelity", "high"]
    assert main(["finetune", *words, "--out", str(folder.parent)]) == 2
    assert "is the checkpoint to start from; choose another folder" in capsys.readouterr().err
