"""What a run writes down while it goes: TensorBoard events, a CSV table, a JSONL record, and a bar or plain lines."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from rung.pretrain.evaluation import Metrics, table

LOSSES = ("loss", "energy_loss", "forces_loss")
COLUMNS = ("step", *LOSSES, "grad_norm", "learning_rate", "skipped", "structures_per_second")


class MetricsWriter:
    """Writes on rank 0 what every rank knows; on other ranks every method does nothing.

    folder/metrics.jsonl holds training and evaluation records, folder/train.csv the training records alone,
    folder/tensorboard the same scalars. A resumed run drops the records after the step that it goes on from.
    """

    def __init__(self, folder: Path, rank: int, start_step: int, total_steps: int) -> None:
        self._active = rank == 0
        if not self._active:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = _open_after(folder / "metrics.jsonl", lambda line: int(json.loads(line)["step"]) <= start_step)
        self._csv_file = _open_after(
            folder / "train.csv", lambda line: line.startswith("step") or int(line.split(",", 1)[0]) <= start_step
        )
        self._csv = csv.DictWriter(self._csv_file, COLUMNS)
        if self._csv_file.tell() == 0:
            self._csv.writeheader()
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)
        self._last_record = time.perf_counter()

    def train(self, step: int, structures: int, values: Mapping[str, float]) -> None:
        """Write one training record: `values` at `step`, and the speed, from the structures since the record before."""
        if not self._active:
            return
        now = time.perf_counter()
        speed = structures / (now - self._last_record)
        self._last_record = now
        record = {"step": step, **values, "structures_per_second": round(speed, 1)}
        self._write_record({"kind": "train", **record})
        self._csv.writerow(record)
        self._csv_file.flush()
        for name in COLUMNS[1:]:
            self._tensorboard.add_scalar(f"train/{name}", record[name], step)
        self.print(f"step {step}  " + "  ".join(f"{name} {record[name]:.4g}" for name in COLUMNS[1:]))

    def evaluation(self, step: int, metrics: Mapping[str, Metrics]) -> None:
        """Write the evaluation at `step`, task name -> metrics."""
        if not self._active or not metrics:
            return
        self._write_record({"kind": "evaluation", "step": step, "tasks": metrics})
        for task, values in metrics.items():
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{task}/{name}", value, step)
        self._tensorboard.flush()
        self.print(f"step {step}: errors of the averaged weights\n{table(dict(metrics))}")

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        if self._active:
            self._bar.update(steps)

    def print(self, text: str) -> None:
        """Print on rank 0 without breaking the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._tensorboard.close()
            self._csv_file.close()
            self._jsonl.close()

    def _write_record(self, record: Mapping[str, object]) -> None:
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()


def _open_after(path: Path, keep: Callable[[str], bool]) -> TextIO:
    """Open a file for appending after dropping the lines that `keep` refuses, and a last line that is not whole."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and keep(line)), encoding="utf-8")
    return path.open("a", encoding="utf-8", newline="")
