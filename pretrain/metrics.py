"""What a run writes down while it goes: files, TensorBoard, Weights & Biases, and a bar or plain lines.

Metrics never stop a run, and never fail in silence: a place that cannot be written to (a full disk, a closed pipe) is
named once on stderr and gets what it missed as soon as it can be written to again. Whether a run can go on with a full
disk is decided where its state is saved.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from tqdm import tqdm

from rung.pretrain.config import WandbConfig
from rung.pretrain.console import RankWarnings, on_terminal, stdout_is_gone
from rung.pretrain.sinks import JsonLines, Scalar, Table, TensorBoard, WeightsAndBiases

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class TaskRecord:
    """One task's part of a log interval, over all ranks; None: no such labels, or not counted."""

    structures: int = 0
    loss: float | None = None  # of its structures alone
    energy_mae_mev_per_atom: float | None = None  # of the training batches, before each step
    force_mae_mev_per_angstrom: float | None = None


@dataclass(frozen=True)
class TrainRecord:
    """One log interval: sums and means over its steps and all ranks. None: nothing to tell."""

    step: int  # the last of the interval
    loss: float
    energy_loss: float
    forces_loss: float
    grad_norm: float
    learning_rate: float
    skipped: int  # since the start of the run
    structures_per_second: float
    atoms_per_second: float | None = None
    edges_per_second: float | None = None
    data_wait_share: float | None = None  # of the interval's time: waiting for batches
    communication_share: float | None = None  # in collectives, as the host sees it
    bytes_per_inner_step: float | None = None  # handed to collectives by a rank, see `ranks.Traffic`
    bytes_per_outer_step: float | None = None
    memory_mb: float | None = None  # the largest peak of any rank, see `peak_memory_mb`
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)

    def scalars(self) -> dict[str, Scalar]:
        """Return the values of the whole run by name, the step first."""
        return {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(item.name for item in fields(TrainRecord) if item.name != "tasks")


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory this process has used, in MB: of the GPU, or of the process where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class MetricsWriter:
    """Writes on rank 0 what every rank knows; on other ranks nothing but warnings.

    folder/metrics.jsonl holds training and evaluation records whole, folder/train.csv the training records without
    their tasks, folder/tensorboard the scalars, and so does W&B. A resumed run drops the records after the step that it
    goes on from. Warnings, of any module and on any rank, name the rank until `close`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        start_step: int,
        total_steps: int,
        *,
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 (frozen)
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`start_step` is the one of the state that the run goes on from; W&B shows `config`.

        Raises OSError when the folder cannot be written to, ModuleNotFoundError when W&B is asked for and not there.
        """
        self._active = rank == 0
        self._warnings = RankWarnings(rank)
        self._failing: set[str] = set()
        self._lines: dict[str, JsonLines | Table] = {}
        self._scalars: dict[str, TensorBoard | WeightsAndBiases] = {}
        self._stdout = True
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lines["metrics.jsonl"] = JsonLines(folder / "metrics.jsonl", start_step)
        self._lines["train.csv"] = Table(folder / "train.csv", COLUMNS, start_step)
        self._scalars["tensorboard"] = TensorBoard(folder / "tensorboard", start_step)
        if (mode := _wandb_mode(wandb)) != "off":
            self._scalars["wandb"] = WeightsAndBiases(folder, mode, wandb.project, start_step, config or {})
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not on_terminal(), dynamic_ncols=True
        )

    def train(self, record: TrainRecord) -> None:
        """Write one training record."""
        if not self._active:
            return
        scalars = record.scalars()
        self._write_line("metrics.jsonl", {"kind": "train", **asdict(record)})
        self._write_line("train.csv", scalars)
        tagged = {f"train/{name}": value for name, value in scalars.items() if name != "step"}
        for task, values in record.tasks.items():
            tagged |= {f"task/{task}/{name}": value for name, value in asdict(values).items()}
        self._write_scalars(record.step, tagged)
        if self._bar.disable:
            self.print(train_line(record))
        else:
            speed = f"{record.structures_per_second:.4g}"
            self._attempt("progress bar", lambda: self._bar.set_postfix(loss=f"{record.loss:.4g}", structures_s=speed))

    def evaluation(self, step: int, metrics: Mapping[str, Metrics], criterion: float | None = None) -> None:
        """Write the evaluation at `step`, task name -> metrics, and the criterion that chooses the best checkpoint."""
        if not self._active or not metrics:
            return
        self._write_line(
            "metrics.jsonl", {"kind": "evaluation", "step": step, "criterion": criterion, "tasks": metrics}
        )
        tagged: dict[str, Scalar] = {"evaluation/criterion": criterion}
        for task, values in metrics.items():
            tagged |= {f"evaluation/{task}/{name}": value for name, value in values.items()}
        self._write_scalars(step, tagged)
        said = "" if criterion is None else f"; criterion {criterion:.4g}"
        self.print(f"step {step}: errors of the averaged weights{said}\n{table(metrics)}")

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        if self._active:
            self._attempt("progress bar", lambda: self._bar.update(steps))

    def print(self, text: str) -> None:
        """Print on rank 0 without breaking the progress bar."""
        if self._active and self._stdout:
            self._attempt("stdout", lambda: self._print(text))

    def warn(self, text: str) -> None:
        """Print a warning on stderr, on any rank."""
        self._warnings.show(text)

    def close(self) -> None:
        """Write what is pending and close everything; warn of what could not be written."""
        if self._active:
            for name, sink in self._lines.items():
                if sink.lines.pending:
                    self._attempt(name, sink.lines.write_pending)
                if sink.lines.pending:
                    self.warn(f"{name}: {sink.lines.pending} record(s) could not be written")
                sink.lines.close()
            for name, closing in self._scalars.items():
                self._attempt(name, closing.close)
            self._attempt("progress bar", self._bar.close)
        self._active = False
        self._warnings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, name: str, values: Mapping[str, Any]) -> None:
        self._attempt(name, lambda: self._lines[name].write(values))

    def _write_scalars(self, step: int, tagged: Mapping[str, Scalar]) -> None:
        for name, sink in self._scalars.items():
            self._attempt(name, partial(sink.write, step, tagged))

    def _attempt(self, name: str, write: Callable[[], object]) -> None:
        """Write to the place called `name`; say once that it cannot be written to, and once that it can again."""
        try:
            write()
        except OSError as error:
            if name not in self._failing:
                self._failing.add(name)
                self.warn(f"{name} cannot be written ({error}); training goes on, and {name} follows when it can be")
        else:
            if name in self._failing:
                self._failing.remove(name)
                self.warn(f"{name} is written again")

    def _print(self, text: str) -> None:
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            self._stdout = False
            stdout_is_gone()
            raise


def train_line(record: TrainRecord) -> str:
    """Return a training record as lines for people."""
    words = [f"step {record.step}", *(f"{name} {getattr(record, name):.4g}" for name in COLUMNS[1:6])]
    words.append(f"skipped {record.skipped}")
    words.append(f"{record.structures_per_second:.4g} structures/s")
    for name, value in (("data wait", record.data_wait_share), ("communication", record.communication_share)):
        if value is not None:
            words.append(f"{name} {100 * value:.1f} %")
    if record.memory_mb is not None:
        words.append(f"{record.memory_mb:.0f} MB")
    lines = ["  ".join(words)]
    if record.tasks:
        errors = {name: (t.energy_mae_mev_per_atom, t.force_mae_mev_per_angstrom) for name, t in record.tasks.items()}
        shown = "; ".join(f"{name} {_number(energy)}, {_number(force)}" for name, (energy, force) in errors.items())
        lines.append(f"  training errors (meV/atom, meV/angstrom): {shown}")
    return "\n".join(lines)


def table(metrics: Mapping[str, Metrics]) -> str:
    """Return an evaluation as lines for people: MAE in meV/atom and meV/angstrom."""
    rows = [f"{'task':<40}{'energy MAE':>14}{'force MAE':>16}   (meV/atom, meV/angstrom)"]
    for name, values in metrics.items():
        energy, force = values["energy_mae_mev_per_atom"], values["force_mae_mev_per_angstrom"]
        rows.append(f"{name:<40}{_number(energy):>14}{_number(force):>16}")
    return "\n".join(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _wandb_mode(config: WandbConfig) -> str:
    """Return off, offline or online."""
    asked = os.environ.get("WANDB_MODE", "")
    mode = {"disabled": "off", "dryrun": "offline"}.get(asked, asked) or config.mode
    if mode not in ("off", "offline", "online"):
        raise ValueError(f"WANDB_MODE: expected offline, online or disabled, found {asked}")
    return mode
