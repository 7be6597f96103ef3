"""Ranks that die, stand still, meet bad numbers, bad shards or a full disk: what is said, and how the run goes on."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import _get_build_directory

from rung.model.checkpoint import load_checkpoint
from rung.pretrain import rounds
from rung.pretrain.state_folder import state_document, state_files
from rung.pretrain.step import StepModule
from rung.pretrain.store import StateStore

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's ZeRO uses parts of torch that this torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning"),
]

SCRIPT = Path(__file__).parent / "faulty_run.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faulty_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faulty_run"] = module
    spec.loader.exec_module(module)
    return module


faulty_run = _load_script()
Fault = faulty_run.Fault

REPTILE = ["mode=reptile", "reptile.inner_steps=2", "reptile.tasks_per_outer=2", "steps=24", "save_every=8"]
OVERLAP = ["reptile.overlap=true", "reptile.exchange=bfloat16", "reptile.outer_optimizer=nesterov"]
# Name -> ranks, words. Six rounds each, a state after every second one, evaluations between.
MODES: dict[str, tuple[int, list[str]]] = {
    "joint": (2, ["steps=6", "save_every=2"]),
    "zero": (2, ["steps=6", "save_every=2", "optimizer={name: adamw, zero_stage: 1, warmup_steps: 2}"]),
    "reptile": (4, [*REPTILE, "evaluation.every=12"]),
    "overlap": (2, [*REPTILE, *OVERLAP, "evaluation.every=12", "reptile.inner_state=task"]),
}


class Runs:
    """Starts ranks of one run after another, and keeps what they printed."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder = folder
        self.words = list(words)
        self.said: list[str] = []  # by the ranks of the last one

    def __call__(
        self,
        world: int,
        output: Path,
        *more: str,
        prepare: Callable[[int], None] = lambda rank: None,
        stopped: int | None = None,
    ) -> list[int]:
        """Run on `world` ranks, going on if there is a state, and return how each ended.

        The rank `stopped`, which stands still, is killed when all others have ended.
        """
        resume = ["--resume"] if (output / "state" / "latest").exists() else []
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        words = [str(self.folder / "config.yaml"), *self.words, f"output={output}", *more, *resume]
        pids = faulty_run.fork_ranks(world, words, prepare, logs)
        ended = {rank: faulty_run.wait_for([pid])[0] for rank, pid in enumerate(pids) if rank != stopped}
        if stopped is not None:
            os.kill(pids[stopped], signal.SIGKILL)
            ended[stopped] = faulty_run.wait_for([pids[stopped]])[0]
        self.said = [(logs / f"rank_{rank}.log").read_text() for rank in range(world)]
        return [ended[rank] for rank in range(world)]


def faults_on(fault: Any) -> Callable[[int], None]:
    return lambda rank: faulty_run.arm(fault) if rank == fault.rank else None


@pytest.fixture()
def runs(config_words: list[str], tmp_path: Path) -> Runs:
    return Runs(*_config(config_words, tmp_path))


def _config(config_words: list[str], folder: Path) -> tuple[Path, list[str]]:
    whole = [word for word in config_words if "." not in word.split("=")[0]]
    (folder / "config.yaml").write_text("\n".join(word.replace("=", ": ", 1) for word in whole))
    return folder, ["data.max_atoms=24", "data.max_edges=512", "optimizer.warmup_steps=2"]


def final_state(output: Path) -> dict[str, str]:
    """Return the digests of all that a run ended with: weights, averages, optimizer, streams; the checkpoint."""
    place = output / "state" / (output / "state" / "latest").read_text().strip()
    files = {name: digest for name, digest in state_files(place).items() if name != "state.json"}
    document = state_document(place)
    told = {name: str(document[name]) for name in ("step", "ema_updates", "skipped", "best")}
    weights = {
        f"{path.parent.name}/{path.name}": faulty_run.sha256(path)
        for path in sorted(output.glob("checkpoint*/*.safetensors"))
    }
    assert weights
    return files | told | weights


# Deaths


PLACES = {
    "joint": [("inner", 1, 1), ("inner", 0, 2), ("save", 1, 3), ("save", 0, 3), ("point", 0, 3), ("export", 1, 0)],
    "zero": [("inner", 1, 3), ("save", 0, 4)],
    "reptile": [("inner", 3, 2), ("exchange", 0, 3), ("save", 2, 4), ("exchange", 3, 5)],
    "overlap": [("exchange", 0, 1), ("inner", 1, 3), ("save", 1, 3), ("exchange", 1, 4), ("save", 0, 5)],
}


@pytest.mark.parametrize("mode", MODES)
def test_killed_ranks_end_where_undisturbed_ones_do(mode: str, runs: Runs, tmp_path: Path) -> None:
    """One death after another, each followed by a relaunch; at the end all is equal bit by bit."""
    world, words = MODES[mode]
    assert runs(world, tmp_path / "whole", *words) == [0] * world
    output = tmp_path / "killed"
    for place in PLACES[mode]:
        fault = Fault(*place)
        ended = runs(world, output, *words, prepare=faults_on(fault))
        assert ended[fault.rank] == -signal.SIGKILL, runs.said
        assert all(status == 1 for rank, status in enumerate(ended) if rank != fault.rank), runs.said
    assert runs(world, output, *words) == [0] * world, runs.said
    assert final_state(output) == final_state(tmp_path / "whole")
    if mode == "overlap":  # each group has its own optimizer's state and not a copy of the other's
        place = output / "state" / "step_000000024"
        first, second = (load_file(place / f"rank_{rank:05d}.safetensors") for rank in range(2))
        names = {name for name in (*first, *second) if name.startswith("optimizer/")}
        assert any(name not in first or name not in second for name in names) or any(
            not torch.equal(first[name], second[name]) for name in names
        )


def test_a_supervisor_brings_a_run_to_its_end(runs: Runs, tmp_path: Path) -> None:
    """Two groups, overlap and bfloat16; three deaths, the first one before there is a state."""
    world, words = MODES["overlap"]
    assert runs(world, tmp_path / "whole", *words) == [0] * world
    output, faults = tmp_path / "run", tmp_path / "faults.json"
    faulty_run.write_faults(faults, [Fault("inner", 1, 1), Fault("exchange", 1, 4), Fault("save", 0, 3)])
    ranks = [sys.executable, str(SCRIPT), str(faults), str(world), str(tmp_path / "config.yaml"), *runs.words, *words]
    supervise = [sys.executable, "-m", "rung.launch.supervise", "--output", str(output), "--wait", "0", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*supervise, *ranks, f"output={output}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    attempts = [line for line in done.stderr.splitlines() if line.startswith("supervise: $ ")]
    assert [line.endswith("--resume") for line in attempts] == [False, False, True, True]
    assert json.loads(faults.read_text()) == []
    assert final_state(output) == final_state(tmp_path / "whole")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_ends_the_others_who_name_it(victim: int, runs: Runs, tmp_path: Path) -> None:
    """Rank 0 serves the key-value store, which then is silent, too."""
    fault = Fault("inner", victim, 1, signal.SIGSTOP)
    words = ["steps=6", "world.timeout_minutes=0.05"]
    ended = runs(2, tmp_path / "run", *words, prepare=faults_on(fault), stopped=victim)
    assert ended[1 - victim] == 1, runs.said
    assert f"rank(s) {victim} of 2 do not answer: dead, or standing still for more than 3 s" in runs.said[1 - victim]


def test_rank_0_standing_still_in_the_last_save_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    """No collective is due any more that could time out."""
    fault = Fault("save", 0, 0, signal.SIGSTOP)
    words = ["stop_at=2", "world.timeout_minutes=0.05", "evaluation.max_structures=0"]
    assert runs(2, tmp_path / "run", *words, prepare=faults_on(fault), stopped=0)[1] == 1, runs.said
    assert "rank 0 has not answered for 3 s while a state was being written" in runs.said[1]


# Numbers that are not finite


def spoil(what: str, victim: int, first: int, last: int) -> Callable[[int], None]:
    """Let the victim's batches `first` to `last` have an infinite label, or give its gradient a NaN after them."""

    def prepare(rank: int) -> None:
        next_batch, taken = rounds._next, 0

        def spoiled(*arguments: Any) -> Any:
            nonlocal taken
            batch, now = next_batch(*arguments), taken
            taken += 1
            if not first <= now <= last:
                return batch
            return replace(batch, energy=torch.full_like(batch.energy, math.inf))

        def of_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(self: Any, *arguments: Any) -> Any:
                loss, totals = forward(self, *arguments)
                if first < taken <= last + 1:
                    loss.register_hook(lambda gradient: gradient * math.nan)
                return loss, totals

            return wrapper

        if rank == victim and what == "label":
            rounds._next = spoiled
        if rank == victim and what == "gradient":
            rounds._next = lambda *arguments: _count(next_batch(*arguments))
            StepModule.forward = of_loss(StepModule.forward)  # type: ignore[method-assign]

        def _count(batch: Any) -> Any:
            nonlocal taken
            taken += 1
            return batch

    return prepare


def train_records(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def weights(output: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(output / "state" / f"step_{step:09d}" / f"{name}.safetensors")


@pytest.mark.parametrize(("what", "victim"), [("label", 1), ("gradient", 0)])
def test_skipped_steps_are_counted_and_too_many_stop_with_the_last_good_state(
    what: str, victim: int, runs: Runs, tmp_path: Path
) -> None:
    """Bad from step 4 on, two may be skipped: the run stops at step 6, and all states have the weights of step 3."""
    words = ["steps=8", "save_every=1", "log_every=1", "optimizer.max_skipped=2", "keep_states=9"]
    output = tmp_path / "run"
    assert runs(2, output, *words, prepare=spoil(what, victim, 3, 99)) == [3, 3], runs.said
    assert [record["skipped"] for record in train_records(output)] == [0, 0, 0, 1, 2, 3]
    assert all("step 6: 3 steps had a loss or gradient that is not finite" in said for said in runs.said)
    assert (output / "state" / "latest").read_text() == "step_000000005\n"
    good, last = weights(output, 3), weights(output, 5)
    assert all(torch.equal(good[name], last[name]) for name in good)
    assert any(not torch.equal(good[name], before) for name, before in weights(output, 2).items())
    for tensors in (last, weights(output, 5, "ema")):
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert runs(2, output, *words) == [0, 0], runs.said  # with good batches again


def test_only_the_group_with_a_bad_label_skips(runs: Runs, tmp_path: Path) -> None:
    """Two groups of two ranks: rank 3's label makes ranks 2 and 3 skip both inner steps of the second round."""
    world, words = MODES["reptile"]
    output = tmp_path / "run"
    more = ["steps=12", "log_every=4", "save_every=4", "keep_states=9", "evaluation.max_structures=0"]
    assert runs(world, output, *words, *more, prepare=spoil("label", 3, 2, 3)) == [0] * world, runs.said
    first, second, third = train_records(output)
    assert [record["skipped"] for record in (first, second, third)] == [0, 2, 2]
    assert [len(record["tasks"]) for record in (first, second, third)] == [2, 1, 2]
    (healthy,) = second["tasks"]
    before, after = weights(output, 4), weights(output, 8)
    stacked = [name for name, tensor in before.items() if name in _fidelity_names(output)]
    assert stacked
    row = ("emt/low", "emt/high").index(healthy)
    for name in stacked:  # the row of the fidelity that was skipped stays
        assert torch.equal(before[name][1 - row], after[name][1 - row])
    assert any(not torch.equal(before[name][row], after[name][row]) for name in stacked)
    assert all(tensor.isfinite().all() for tensor in weights(output, 12).values())


def _fidelity_names(output: Path) -> set[str]:
    potential = load_checkpoint(output / "checkpoint").potential
    return {name for name, _ in potential.fidelity_parameters()}


# Disks and shards


def fill_disk(victim: int, step: int) -> Callable[[int], None]:
    """Let the victim write no more than 4 KiB into a file while it saves the state of `step`."""

    def prepare(rank: int) -> None:
        write = StateStore._write

        def limited(self: StateStore, attempt: Any) -> Any:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if attempt.step == step else hard, hard))
            try:
                return write(self, attempt)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        if rank == victim:
            StateStore._write = limited  # type: ignore[method-assign]

    return prepare


def test_a_full_disk_costs_a_state_and_the_last_one_the_run(runs: Runs, tmp_path: Path) -> None:
    words = ["steps=6", "save_every=2", "log_every=1", "evaluation.max_structures=0", "keep_states=9"]
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert runs(2, whole, *words) == [0, 0]

    assert runs(2, output, *words, prepare=fill_disk(1, 4)) == [0, 0], runs.said
    assert "state of step 4 is not saved: rank 1 (" in runs.said[0] and "File too large" in runs.said[0]
    assert sorted(place.name for place in (output / "state").glob("step_*")) == ["step_000000002", "step_000000006"]
    assert final_state(output) == final_state(whole)

    shutil.rmtree(output)
    assert runs(2, output, *words, prepare=fill_disk(0, 6)) == [1, 1], runs.said
    for said in runs.said:
        assert "error: state of step 6 is not saved: rank 0 (" in said and "File too large" in said
    assert (output / "state" / "latest").read_text() == "step_000000004\n"
    assert runs(2, output, *words) == [0, 0], runs.said
    assert final_state(output) == final_state(whole)


@pytest.fixture()
def damaged(dataset: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """A copy of the dataset with one flipped byte in a training pack; its path, the shard's and the pack's name."""
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    shard = next(path for path in sorted(copy.rglob("*.tar")) if "train" in path.name)
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[0]
    data = bytearray(shard.read_bytes())
    data[member.offset_data + member.size // 2] ^= 0xFF
    shard.write_bytes(data)
    return copy, shard.name, member.name


def test_a_flipped_byte_in_a_shard_is_one_error_or_tolerated(
    damaged: tuple[Path, str, str], config_words: list[str], tmp_path: Path
) -> None:
    folder, shard, pack = damaged
    words = [word for word in config_words if not word.startswith("tasks=")]
    runs = Runs(*_config([f"tasks=[{{dataset: {folder}, fidelity: low}}]", *words], tmp_path))
    more = ["steps=20", "save_every=100", "evaluation.max_structures=0"]
    ended = runs(2, tmp_path / "run", *more)
    assert 2 in ended and set(ended) <= {1, 2}, runs.said
    for status, said in zip(ended, runs.said, strict=True):
        errors = [line for line in said.splitlines() if line.startswith("rung pretrain: error: ")]
        assert len(errors) == 1 and "Traceback" not in said
        if status == 2:
            assert shard in errors[0] and pack in errors[0] and "max_bad is 0" in errors[0]
        else:
            assert "do not answer" in errors[0]
    assert runs(2, tmp_path / "tolerant", *more, "data.max_bad=1") == [0, 0], runs.said


# Launchers that start one run as several


def test_ranks_that_do_not_see_each_other_are_refused(runs: Runs, tmp_path: Path) -> None:
    """An MPI of another kind than the library's makes every rank a world of its own: they would train apart."""
    assert runs(1, tmp_path / "run", "world.size=2") == [2]
    assert "world.size: expected 2 rank(s), found 1" in runs.said[0]
    assert not (tmp_path / "run" / "state").exists()


# Errors in Python, and helpers that die


def test_an_error_on_one_rank_ends_the_others_and_is_seen(runs: Runs, tmp_path: Path) -> None:
    """The time-out is half an hour: rank 0 hears of it at once."""

    def prepare(rank: int) -> None:
        def failing(*arguments: Any) -> Any:
            raise ValueError("nobody expects this structure")

        if rank == 1:
            rounds._next = failing

    assert runs(2, tmp_path / "run", "steps=6", prepare=prepare) == [1, 2], runs.said
    assert "error: nobody expects this structure" in runs.said[1]
    assert "error: rank(s) 1 of 2 do not answer" in runs.said[0]


def test_a_loader_process_that_dies_ends_the_run_which_can_go_on(runs: Runs, tmp_path: Path) -> None:
    words = ["steps=6", "save_every=2", "data.num_workers=1", "data.prefetch=1", "evaluation.max_structures=0"]
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert runs(2, whole, *words) == [0, 0]

    def prepare(rank: int) -> None:
        next_batch, taken = rounds._next, 0

        def killing(*arguments: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == 4:
                for child in multiprocessing.active_children():
                    child.kill()
            return next_batch(*arguments)

        if rank == 1:
            rounds._next = killing

    ended = runs(2, output, *words, prepare=prepare)
    assert ended == [1, 1], runs.said
    assert "DataLoader worker" in runs.said[1] and "is killed by signal" in runs.said[1]
    assert runs(2, output, *words) == [0, 0], runs.said
    assert final_state(output) == final_state(whole)


# Locks of builders that were killed


def test_a_leftover_lock_of_deepspeeds_builds_is_not_waited_for(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would wait for ever on the lock of an extension that it is asked to load: nothing may ask it."""
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    for name in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        folder = Path(_get_build_directory(name, verbose=False))
        assert folder.is_relative_to(extensions)
        (folder / "lock").touch()
    before = sorted(extensions.rglob("*"))
    for name, stage, clipping in (("soap", 0, 10), ("adamw", 1, 10), ("muon", 2, 0)):
        optimizer = f"optimizer={{name: {name}, zero_stage: {stage}, gradient_clipping: {clipping}}}"
        assert runs(1, tmp_path / name, "steps=2", optimizer, "evaluation.max_structures=0") == [0], runs.said
    assert sorted(extensions.rglob("*")) == before


def test_a_killed_builder_of_kernels_does_not_block_the_next(tmp_path: Path) -> None:
    """The compiler of the first builder waits for ever; the builder is killed, the compiler lives on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = tmp_path / "waiting-compiler"
    waiting.write_text(f"#!/bin/sh\necho $$ > {pipe}\nexec sleep 1000\n")
    waiting.chmod(0o755)
    environment = {**os.environ, "RUNG_CACHE": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}
    code = "from rung.kernels import library; print(library.load('edge_basis', R=4, L=2).path)"
    build = [sys.executable, "-c", code]
    reader = os.open(pipe, os.O_RDWR)
    with subprocess.Popen(build, env={**environment, "CXX": str(waiting)}) as builder:
        assert select.select([reader], [], [], 120)[0], "the compiler was not started"
        compiler = int(os.read(reader, 100))
        builder.kill()
    os.close(reader)
    try:
        assert list((tmp_path / "cache").glob("*.lock"))
        done = subprocess.run(build, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).exists()
    finally:
        os.kill(compiler, signal.SIGKILL)
