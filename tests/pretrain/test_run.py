"""Whole runs: joint and Reptile, stopped and resumed, and what the output folder holds."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rung.model.checkpoint import load_checkpoint
from rung.model.config import read_config
from rung.pretrain.config import PretrainConfig

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's ZeRO uses parts of torch that this torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning"),
]

REPTILE = ["mode=reptile", "reptile={inner_steps: 1, tasks_per_outer: 2, outer_rate: 0.8}"]
MODES = {
    "joint": ["mode=joint"],
    "serial": [*REPTILE, "world.groups=1"],
    "rounded": [*REPTILE, "reptile.exchange=bfloat16"],
    "groups": [
        *REPTILE,
        "reptile.inner_state=task",
        "reptile.outer_optimizer=nesterov",
        "reptile.overlap=true",
        "reptile.exchange=bfloat16",
    ],
    "zero muon": ["optimizer={name: muon, zero_stage: 1, gradient_clipping: 0, warmup_steps: 2}"],
    "zero groups": [*REPTILE, "reptile.outer_optimizer=momentum", "optimizer={name: adamw, zero_stage: 2}"],
}


def train(words: Sequence[str], resume: bool = False) -> tuple[bool, list[Any]]:
    """Run on this rank; return whether it finished, and keys and fidelities of every batch."""
    from rung.pretrain import rounds
    from rung.pretrain.loop import pretrain

    keys = []
    next_batch = rounds._next

    def recording(*arguments: Any) -> Any:
        batch = next_batch(*arguments)
        keys.append(tuple(zip(batch.keys, batch.fidelity.tolist(), strict=True)))
        return batch

    rounds._next = recording
    return pretrain(read_config(PretrainConfig, None, words), resume=resume), keys


def assert_same_state(first: Path, second: Path) -> None:
    """Weights, averages and streams are equal bit by bit."""
    assert (first / "latest").read_text() == (second / "latest").read_text()
    for folder in (first / (first / "latest").read_text().strip()).parent.glob("step_*"):
        other = second / folder.name
        for path in folder.glob("*.safetensors"):
            tensors, others = load_file(path), load_file(other / path.name)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensors[key], others[key]) for key in tensors), path.name
        for path in folder.glob("rank_*.json"):
            assert path.read_text() == (other / path.name).read_text()


@pytest.mark.parametrize("mode", ["joint", "serial", "groups", "zero muon", "zero groups"])
def test_stopped_and_resumed_is_uninterrupted(
    mode: str, config_words: list[str], run_ranks: Any, tmp_path: Path
) -> None:
    words = [*config_words, *MODES[mode]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(train, 2, [*words, f"output={whole}"])
    stopped = run_ranks(train, 2, [*words, f"output={parts}", "stop_at=2"])
    resumed = run_ranks(train, 2, [*words, f"output={parts}"], True)
    for rank in range(2):
        assert (expected[rank][0], stopped[rank][0], resumed[rank][0]) == (True, False, True)
        assert len(stopped[rank][1]) == (1 if "groups" in mode else 2)
        assert stopped[rank][1] + resumed[rank][1] == expected[rank][1]
    assert expected[0][1] != expected[1][1]
    assert_same_state(whole / "state", parts / "state")
    records = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    logged = [2, 4, 6] if "mode=reptile" in words else [2, 3, 4, 6]  # rounds of two steps, or of one
    assert [record["step"] for record in records if record["kind"] == "train"] == logged


WORLDS = [
    ("joint", 1, 3), ("groups", 2, 4), ("rounded", 1, 2), ("rounded", 2, 1), ("zero groups", 4, 2),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "before", "after"), WORLDS)
def test_another_number_of_ranks_goes_on(
    mode: str, before: int, after: int, config_words: list[str], run_ranks: Any, tmp_path: Path
) -> None:
    """It goes on and ends; what becomes of the optimizer's state is in `test_engine`, of the epochs in tests/data."""
    words = [*config_words, *MODES[mode], f"output={tmp_path / 'run'}", "evaluation.max_structures=0"]
    stopped = run_ranks(train, before, [*words, "stop_at=2"])
    resumed = run_ranks(train, after, words, True)
    assert [finished for finished, _ in stopped + resumed] == [False] * before + [True] * after
    batches = [batch for _, rank in stopped for batch in rank] + [rank[0] for _, rank in resumed]
    seen = [sample for batch in batches for sample in batch]
    # A block that was begun stays whole, so with less than one block some ranks go on in the next epoch.
    assert max(Counter(seen).values()) <= 2
    state = tmp_path / "run" / "state" / "step_000000006"
    assert len(list(state.glob("rank_*.safetensors"))) == after


def train_with(backend: str, words: Sequence[str]) -> str:
    """Run with a backend on this rank; return the run's table of losses."""
    from rung.kernels import use_backend

    with use_backend(backend):
        train(words)
    output = next(word.removeprefix("output=") for word in words if word.startswith("output="))
    return (Path(output) / "train.csv").read_text()


@pytest.mark.parametrize("mode", ["joint", "serial"])
def test_native_kernels_train_as_the_reference_does(
    mode: str, config_words: list[str], run_ranks: Any, tmp_path: Path
) -> None:
    words = [*config_words, *MODES[mode], "log_every=1"]
    losses = []
    for backend in ("native", "reference"):
        text = run_ranks(train_with, 2, backend, [*words, f"output={tmp_path / backend}"])[0]
        losses.append([float(row["loss"]) for row in csv.DictReader(text.splitlines())])
    native, reference = losses
    assert native[0] == pytest.approx(reference[0], rel=1e-5)
    # An adaptive optimizer's first updates have the size of the learning rate however small the gradient is.
    assert len(native) >= 3 and native == pytest.approx(reference, rel=5e-3)


def test_a_killed_run_repeats_its_steps_and_its_records(
    config_words: list[str], run_ranks: Any, tmp_path: Path
) -> None:
    """A run that dies after step 6 goes on from the state of step 4."""
    words = [*config_words, f"output={tmp_path / 'run'}"]
    run_ranks(train, 1, words)
    state = tmp_path / "run" / "state"
    shutil.copytree(state, tmp_path / "whole")
    shutil.rmtree(state / "step_000000006")
    (state / "latest").write_text("step_000000004\n")
    run_ranks(train, 1, words, True)
    assert_same_state(tmp_path / "whole", state)
    rows = list(csv.DictReader((tmp_path / "run" / "train.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records].count(("train", 6)) == 1


def error_of(words: Sequence[str], resume: bool) -> str:
    try:
        train(words, resume)
    except (ValueError, OSError, FloatingPointError) as error:
        return str(error)
    return "no error"


def test_a_state_is_refused_when_it_does_not_fit(config_words: list[str], run_ranks: Any, tmp_path: Path) -> None:
    words = [*config_words, f"output={tmp_path / 'run'}", "optimizer.max_skipped=0"]
    state = tmp_path / "run" / "state"
    assert "no state in" in run_ranks(error_of, 1, words, True)[0]
    run_ranks(train, 1, [*words, "stop_at=2"])
    assert "holds a run: go on with --resume" in run_ranks(error_of, 1, words, False)[0]
    assert "optimizer" in run_ranks(error_of, 1, [*words, "optimizer.lr=1"], True)[0]
    model = state / "step_000000002" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "model.safetensors is damaged" in run_ranks(error_of, 1, words, True)[0]
    model.unlink()
    assert "model.safetensors is missing" in run_ranks(error_of, 1, words, True)[0]


def test_the_output_is_a_checkpoint_with_its_evaluation(
    config_words: list[str], run_ranks: Any, tmp_path: Path, dataset: Path
) -> None:
    run_ranks(train, 1, [*config_words, f"output={tmp_path / 'run'}"])
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert checkpoint.potential.config.fidelities == ("low", "high")
    assert checkpoint.info["training"]["steps"] == 6
    assert checkpoint.info["datasets"][0]["name"] == "emt"
    assert set(checkpoint.evaluation) == {"emt/low", "emt/high"}
    assert checkpoint.evaluation["emt/low"]["num_energies"] == 8
    assert checkpoint.evaluation["emt/high"]["num_energies"] == 6
    assert checkpoint.raw_state is not None
    served = checkpoint.potential.state_dict()
    assert served.keys() == checkpoint.raw_state.keys()
    assert any(not torch.equal(served[name], raw) for name, raw in checkpoint.raw_state.items())
    assert list((tmp_path / "run" / "tensorboard").iterdir())
