"""Where records go: a file of JSON lines, a CSV table, TensorBoard, Weights & Biases.

Every sink raises OSError when it cannot write, keeps what it could not write, and writes it first the next time: the
caller decides what a full disk means. What the two files got is with the operating system when `write` returns.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Scalar = float | int | None


class LineFile:
    """Appends whole lines: one that could be written in part only is taken back and tried again."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._pending = b""  # not bounded: a run whose disk stays full ends when it cannot save its state

    @property
    def pending(self) -> int:
        """Lines that are not in the file."""
        return self._pending.count(b"\n")

    def write(self, line: str) -> None:
        """Append a line, after those that are pending."""
        self._pending += line.encode() + b"\n"
        self.write_pending()

    def write_pending(self) -> None:
        """Append the lines that could not be written before."""
        end = os.fstat(self._file).st_size
        left = self._pending
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:  # a signal's, too
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            raise
        self._pending = b""

    def close(self) -> None:
        os.close(self._file)


class JsonLines:
    """One JSON document a line; numbers that are not finite are null, which JSON has no other word for."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Go on after `last_step`: later documents in the file, and lines that are none, are dropped."""
        lines = _whole_lines(path)
        _replace(path, "".join(line for line in lines if _json_step(line) <= last_step))
        self.lines = LineFile(path)

    def write(self, document: Mapping[str, Any]) -> None:
        self.lines.write(json.dumps(_finite(document), allow_nan=False))


class Table:
    """A CSV table whose first column is `step`; None is an empty field."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        """Go on after `last_step`; rows of a table with other columns keep those that are among `columns`."""
        self._columns = columns
        rows = [row for row in csv.DictReader(_whole_lines(path)) if _step(row.get("step")) <= last_step]
        _replace(path, "".join(_csv_line(line) + "\n" for line in (columns, *map(self._fields, rows))))
        self.lines = LineFile(path)

    def write(self, row: Mapping[str, Scalar]) -> None:
        self.lines.write(_csv_line(self._fields(row)))

    def _fields(self, row: Mapping[str, Any]) -> list[Any]:
        return [row.get(name) for name in self._columns]


class TensorBoard:
    """Scalars in TensorBoard's event files."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """TensorBoard hides what other event files in the folder have after `last_step`."""
        self._folder = folder
        self._writer = self._open(purge_step=last_step + 1)
        self._pending: list[tuple[str, float, int]] = []

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        self._pending += [(tag, value, step) for tag, value in scalars.items() if value is not None]
        try:
            # A writer that failed once raises its error for ever, so the next record gets a new one.
            self._writer = self._writer or self._open()
            for scalar in self._pending:
                self._writer.add_scalar(*scalar)
            self._writer.flush()
        except OSError:
            self.close()
            raise
        self._pending = []

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _open(self, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

        return SummaryWriter(str(self._folder), purge_step=purge_step)


class WeightsAndBiases:
    """Scalars in a run of Weights & Biases, resumed with the training run; the package is an optional one."""

    def __init__(self, folder: Path, mode: str, project: str, last_step: int, config: Mapping[str, Any]) -> None:
        """`mode` is online or offline. Raises ModuleNotFoundError when the package is not installed.

        The steps that a resumed run repeats are logged again: the run's step is a metric, not W&B's own counter, which
        refuses to go back.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            advice = "pip install 'rung[wandb]', or wandb.mode=off and no WANDB_MODE in the environment"
            raise ModuleNotFoundError(f"wandb: mode {mode} needs the package wandb ({error}): {advice}") from error
        place = folder / "wandb_run"
        if last_step == 0 or not place.exists():
            _replace(place, uuid.uuid4().hex[:8] + "\n")
        name = folder.resolve().name
        self._errors = (OSError, wandb.errors.Error)
        self._run = wandb.init(
            project=project, name=name, id=place.read_text().strip(), resume="allow", mode=mode, dir=str(folder),
            config=dict(config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        known = {tag: value for tag, value in scalars.items() if value is not None}
        self._call(lambda: self._run.log({"step": step, **known}))

    def close(self, exit_code: int = 0) -> None:
        self._call(lambda: self._run.finish(exit_code=exit_code))

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except self._errors as error:
            raise OSError(f"wandb: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_line(fields: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def _json_step(line: str) -> float:
    try:
        return _step(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _step(value: Any) -> float:
    """Return a record's step, infinity for what is none: a damaged record must not keep a run from going on."""
    try:
        return int(value)
    except (ValueError, TypeError):
        return math.inf


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, but not a last one that a crash cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _replace(path: Path, text: str) -> None:
    """Write a file beside and move it: a crash leaves the one before whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)
