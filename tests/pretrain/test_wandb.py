"""Weights & Biases: a stand-in package that records calls, and the package itself, offline, where it is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rung.pretrain.config import WandbConfig
from rung.pretrain.metrics import MetricsWriter, TaskRecord, TrainRecord

EVALUATION = {"emt/low": {"energy_mae_mev_per_atom": 1.5, "force_mae_mev_per_angstrom": None}}


def record(step: int) -> TrainRecord:
    tasks = {"emt/low": TaskRecord(structures=40)}
    return TrainRecord(step, 0.25, 0.25, 0.5, 2.0, 1e-3, skipped=0, structures_per_second=100.0, tasks=tasks)


STAND_IN = """
calls = []

class errors:
    class Error(Exception):
        pass

class Settings:
    def __init__(self, **values):
        pass

class Run:
    failing = False
    def define_metric(self, *arguments, **options):
        calls.append(("define_metric", arguments, options))
    def log(self, values):
        if self.failing:
            raise errors.Error("service is gone")
        calls.append(("log", values))
    def finish(self, exit_code):
        calls.append(("finish", exit_code))

run = Run()

def init(**options):
    calls.append(("init", options))
    return run
"""


@pytest.fixture()
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of the same name that records calls."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    package = importlib.import_module("wandb")

    yield package
    sys.modules.pop("wandb", None)


def test_wandb_gets_the_scalars_when_asked(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    MetricsWriter(folder, 0, 0, 10).close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    MetricsWriter(folder, 0, 0, 10, wandb=WandbConfig("online")).close()
    monkeypatch.delenv("WANDB_MODE")
    MetricsWriter(folder, 1, 0, 10, wandb=WandbConfig("offline")).close()
    assert wandb.calls == []
    with MetricsWriter(folder, 0, 0, 10, wandb=WandbConfig("offline", "potentials"), config={"a": 1}) as writer:
        writer.train(record(4))
        writer.evaluation(4, EVALUATION, 0.5)
    names = [name for name, *_ in wandb.calls]
    assert names == ["init", "define_metric", "define_metric", "log", "log", "finish"]
    options = wandb.calls[0][1]
    assert (options["mode"], options["project"], options["config"]) == ("offline", "potentials", {"a": 1})
    train, evaluation = wandb.calls[3][1], wandb.calls[4][1]
    assert (train["step"], train["train/loss"], train["task/emt/low/structures"]) == (4, 0.25, 40)
    assert evaluation == {"step": 4, "evaluation/criterion": 0.5, "evaluation/emt/low/energy_mae_mev_per_atom": 1.5}
    assert capsys.readouterr().err == ""


def test_wandb_run_is_resumed_with_the_training_run(wandb: Any, tmp_path: Path) -> None:
    for start in (0, 4, 0):
        MetricsWriter(tmp_path / "run", 0, start, 10, wandb=WandbConfig("online")).close()
    first, resumed, fresh = (options["id"] for name, options, *_ in wandb.calls if name == "init")
    assert first == resumed != fresh


def test_wandb_failing_does_not_stop_a_run(
    wandb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsWriter(tmp_path / "run", 0, 0, 10, wandb=WandbConfig("online")) as writer:
        monkeypatch.setattr(wandb.run, "failing", True)
        writer.train(record(2))
        writer.train(record(4))
    assert capsys.readouterr().err.count("service is gone") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_wandb_settings_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb.mode: expected off, offline or online, found on"):
        WandbConfig("on")  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_MODE", "maybe")
    with pytest.raises(ValueError, match="WANDB_MODE: expected"):
        MetricsWriter(tmp_path, 0, 0, 10)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rung\[wandb\]'"):
        MetricsWriter(tmp_path, 0, 0, 10)


def write_to_wandb(folder: Path) -> None:
    with MetricsWriter(folder, 0, 0, 10, wandb=WandbConfig("offline")) as writer:
        writer.train(record(4))


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_ranks(write_to_wandb, 1, tmp_path)
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in run.read_bytes()
