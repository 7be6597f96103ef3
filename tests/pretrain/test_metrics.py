"""What a run writes: read back by other readers, after crashes, on a full disk, without its terminal."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import resource
import signal
import sys
import termios
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from rung.pretrain.metrics import (
    COLUMNS,
    MetricsWriter,
    TaskRecord,
    TrainRecord,
    peak_memory_mb,
    train_line,
)

EVALUATION = {"emt/low": {"energy_mae_mev_per_atom": 1.5, "force_mae_mev_per_angstrom": None}}


def record(step: int, **changes: Any) -> TrainRecord:
    values = {"loss": 1 / step, "energy_loss": 0.25, "forces_loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3}
    task = TaskRecord(structures=10 * step, energy_mae_mev_per_atom=3.5)
    speeds = {"structures_per_second": 100.0, "communication_share": 0.125, "tasks": {"emt/low": task}}
    return TrainRecord(**({"step": step, "skipped": 0} | values | speeds | changes))  # type: ignore[arg-type]


def documents(folder: Path) -> list[dict[str, Any]]:
    """The records, read as strict JSON."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """A tag's values as TensorBoard's own reader has them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_a_record_is_in_every_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, 0, 10) as writer:
        writer.train(record(4, grad_norm=math.nan))
        writer.evaluation(4, EVALUATION, 0.75)
        train, evaluation = documents(tmp_path)
        assert (train["kind"], train["step"], train["loss"], train["grad_norm"]) == ("train", 4, 0.25, None)
        assert train["tasks"]["emt/low"]["structures"] == 40
        assert evaluation == {"kind": "evaluation", "step": 4, "criterion": 0.75, "tasks": EVALUATION}
        (row,) = rows(tmp_path)
        assert tuple(row) == COLUMNS and "tasks" not in row
        assert (row["step"], row["loss"], row["grad_norm"], row["memory_mb"]) == ("4", "0.25", "nan", "")
        assert scalars(tmp_path, "train/loss") == [(4, 0.25)]
        assert scalars(tmp_path, "task/emt/low/energy_mae_mev_per_atom") == [(4, 3.5)]
        assert scalars(tmp_path, "evaluation/emt/low/energy_mae_mev_per_atom") == [(4, 1.5)]
        assert scalars(tmp_path, "evaluation/criterion") == [(4, 0.75)]
        assert scalars(tmp_path, "train/memory_mb") == []


def test_a_resumed_run_goes_on_after_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, 0, 0, 10) as writer:
        for step in (2, 4, 6):
            writer.train(record(step, loss=1.0))
            writer.evaluation(step, EVALUATION)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # a crash in the middle of a line
    with MetricsWriter(tmp_path, 0, 4, 10) as writer:
        writer.train(record(6, loss=2.0))
    assert [(line["kind"], line["step"]) for line in documents(tmp_path)] == [
        *[(kind, step) for step in (2, 4) for kind in ("train", "evaluation")],
        ("train", 6),
    ]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("2", "1.0"), ("4", "1.0"), ("6", "2.0")]
    assert scalars(tmp_path, "train/loss") == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert capsys.readouterr().err == ""


def test_damaged_and_older_files_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 2}\n\x00\x00\xff\n[1]\n{"step": 3}\n')
    (tmp_path / "train.csv").write_text("step,loss,gone\n2,0.5,7\nbad,,\n\n3,0.25,7\n9,0.125,7\n")
    with MetricsWriter(tmp_path, 0, 3, 10) as writer:
        writer.train(record(4))
    assert [line["step"] for line in documents(tmp_path)] == [2, 3, 4]
    table = rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in table] == [("2", "0.5"), ("3", "0.25"), ("4", "0.25")]
    assert table[0]["grad_norm"] == "" and table[2]["grad_norm"] == "2.0" and "gone" not in table[0]


def write_and_die(folder: Path) -> None:
    writer = MetricsWriter(folder, 0, 0, 10)
    for step in (1, 2, 3):
        writer.train(record(step))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_run_has_lost_nothing(tmp_path: Path, run_ranks: Any) -> None:
    with pytest.raises(AssertionError, match="died without a result"):
        run_ranks(write_and_die, 1, tmp_path / "run")
    assert [line["step"] for line in documents(tmp_path / "run")] == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]
    assert [step for step, _ in scalars(tmp_path / "run", "train/loss")] == [1, 2, 3]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Refuse every write that makes a file larger, as a full disk does: in part at first, then wholly."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def write_on_a_full_disk(folder: Path, errors: Path, freed: bool) -> list[list[int]]:
    """Write records while the files cannot grow, then, if the disk is freed, one more; return what the files had."""
    sys.stderr = errors.open("w")
    found = []
    writer = MetricsWriter(folder, 0, 0, 10)
    writer.train(record(1))
    full = (folder / "metrics.jsonl").stat().st_size + 100  # in the middle of a line
    with file_size_limit(full):
        for step in (2, 3):
            writer.train(record(step))
            writer.evaluation(step, EVALUATION)
        found.append([line["step"] for line in documents(folder)])
        if not freed:
            writer.close()
    if freed:
        writer.train(record(4))
        writer.close()
        found.append([line["step"] for line in documents(folder)])
    sys.stderr.close()
    return found


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_records_wait(tmp_path: Path, run_ranks: Any) -> None:
    (found,) = run_ranks(write_on_a_full_disk, 1, tmp_path / "run", tmp_path / "errors", True)
    assert found == [[1], [1, 2, 2, 3, 3, 4]]
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
    assert {step for step, _ in scalars(tmp_path / "run", "train/loss")} == {1, 2, 3, 4}
    errors = (tmp_path / "errors").read_text()
    for name in ("metrics.jsonl", "tensorboard"):
        assert errors.count(f"rank 0: warning: {name} cannot be written (") == 1
        assert errors.count(f"rank 0: warning: {name} is written again") == 1
    assert "File too large" in errors


@pytest.mark.slow
def test_records_that_could_not_be_written_are_counted(tmp_path: Path, run_ranks: Any) -> None:
    (found,) = run_ranks(write_on_a_full_disk, 1, tmp_path / "run", tmp_path / "errors", False)
    assert found == [[1]]
    assert "rank 0: warning: metrics.jsonl: 4 record(s) could not be written" in (tmp_path / "errors").read_text()


def write_to_a_closed_pipe(folder: Path, errors: Path) -> list[int]:
    sys.stderr = errors.open("w")
    reader, writer_end = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer_end, "w")
    with MetricsWriter(folder, 0, 0, 10) as writer:
        for step in (1, 2, 3):
            writer.train(record(step))
        print("anything else, such as DeepSpeed's messages")
    sys.stdout.close()  # flushes, as Python does in the end
    sys.stderr.close()
    return [line["step"] for line in documents(folder)]


@pytest.mark.slow
def test_a_closed_pipe_is_named_once_and_the_run_goes_on(tmp_path: Path, run_ranks: Any) -> None:
    (found,) = run_ranks(write_to_a_closed_pipe, 1, tmp_path / "run", tmp_path / "errors")
    assert found == [1, 2, 3]
    errors = (tmp_path / "errors").read_text()
    assert errors.count("stdout cannot be written (") == 1 and errors.count("\n") == 1


def write_to_a_terminal(folder: Path, output: Path, columns: int) -> str:
    terminal, screen = os.openpty()
    termios.tcsetwinsize(screen, (24, columns))
    sys.stderr, sys.stdout = os.fdopen(screen, "w"), output.open("w")
    with MetricsWriter(folder, 0, 2, 10) as writer:
        writer.advance(2)
        writer.train(record(4, loss=0.0625, structures_per_second=321.0))
        writer.evaluation(4, EVALUATION)
    sys.stdout.close()
    print(file=sys.stderr, flush=True)  # something to read at least
    return os.read(terminal, 100_000).decode()


@pytest.mark.slow
def test_a_terminal_gets_a_bar(tmp_path: Path, run_ranks: Any) -> None:
    (shown,) = run_ranks(write_to_a_terminal, 1, tmp_path / "run", tmp_path / "output", 120)
    assert "4/10" in shown and "loss=0.0625" in shown and "structures_s=321" in shown
    printed = (tmp_path / "output").read_text()
    assert "errors of the averaged weights" in printed and "loss 0.0625" not in printed


@pytest.mark.slow
def test_a_terminal_without_a_width_gets_plain_lines(tmp_path: Path, run_ranks: Any) -> None:
    (shown,) = run_ranks(write_to_a_terminal, 1, tmp_path / "run", tmp_path / "output", 0)
    assert shown.strip() == ""
    assert "loss 0.0625" in (tmp_path / "output").read_text()


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, 0, 0, 10) as writer:
        writer.advance(4)
        writer.train(record(4, memory_mb=512.4))
        writer.evaluation(4, EVALUATION, 0.5)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == (
        "step 4  loss 0.25  energy_loss 0.25  forces_loss 0.5  grad_norm 2  learning_rate 0.001  skipped 0  "
        "100 structures/s  communication 12.5 %  512 MB"
    )
    assert captured.out.splitlines()[1] == "  training errors (meV/atom, meV/angstrom): emt/low 3.50, -"
    assert "criterion 0.5" in captured.out and "emt/low" in captured.out.splitlines()[-1]
    assert captured.err == ""
    assert "\n" not in train_line(record(4, tasks={}))


def test_other_ranks_print_and_write_nothing_but_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("rung.data.stream")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with MetricsWriter(tmp_path / "run", 3, 0, 10) as writer:
            writer.train(record(4))
            writer.evaluation(4, EVALUATION)
            writer.advance(4)
            writer.print("hello")
            writer.warn("two\nlines")
            warnings.warn("of a module", UserWarning, stacklevel=1)
            log.warning("skipped %d packs", 2)
            log.info("not shown")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.startswith("rank 3: warning: ") for line in lines] == [True] * 4
    assert lines[:2] == ["rank 3: warning: two", "rank 3: warning: lines"]
    assert lines[2].endswith("UserWarning: of a module") and lines[3].endswith("skipped 2 packs")
    assert not (tmp_path / "run").exists()
    assert not logging.getLogger("rung").handlers


def test_peak_memory_is_that_of_the_process() -> None:
    block = torch.ones(16_000_000)
    now = psutil.Process().memory_info().rss / 1e6
    assert block.nbytes / 1e6 < 0.95 * now < peak_memory_mb(torch.device("cpu")) < psutil.virtual_memory().total / 1e6
