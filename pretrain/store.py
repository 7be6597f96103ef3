"""Storage of training state: all ranks write one state together, in the background, and find the newest whole one.

Every rank writes its files in a thread of its own and reports their digests through the run's key-value store; rank 0
collects the reports, moves the state into its place (state_folder.py has the layout), and tells the others. Writing
uses no collective, so a state is saved while the training groups go on with theirs.
"""

from __future__ import annotations

import atexit
import errno
import json
import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from rung.pretrain.ranks import Ranks
from rung.pretrain.state_folder import STATE_FILE, STATE_VERSION, Content, Digests, StateFolder, settle, write_file
from rung.pretrain.state_search import find_state

KEYS_AT_ONCE = 256  # in one question to the key-value store
QUESTIONS_PER_SECOND = 10_000  # of all ranks together, at most: the store is served by one thread of rank 0
LONGEST_PAUSE = 1.0  # seconds between two looks into the key-value store


@dataclass(frozen=True)
class Snapshot:
    """What one rank contributes to a state: file name -> tensors by name (on the host), file name -> JSON value.

    A file belongs to one rank, so the names of different ranks differ. Raises ValueError for a name that is not
    `*.safetensors` or `*.json`, and for a tensor on a device.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names, suffix in ((self.tensors, ".safetensors"), (self.documents, ".json")):
            for name in names:
                if Path(name).name != name or Path(name).suffix != suffix or name == STATE_FILE:
                    raise ValueError(f"snapshot: expected a file name *{suffix} other than {STATE_FILE}, found {name}")
        for name, tensors in self.tensors.items():
            for key, tensor in tensors.items():
                if tensor.device.type != "cpu":
                    raise ValueError(
                        f"snapshot: {name}: {key}: expected a tensor on the host, found {tensor.device}; call to_host"
                    )


@dataclass(frozen=True)
class Outcome:
    """How a save ended: its place, or the error that all ranks share; `seconds` is this rank's time in it."""

    step: int
    place: Path | None
    error: OSError | None
    seconds: float


@dataclass(frozen=True)
class _Attempt:
    """One save; its tag is that of no other save of any run, so that a late rank meets nobody else's files and keys."""

    step: int
    tag: str
    files: Mapping[str, Content]
    best: bool

    @property
    def partial(self) -> str:
        return f".{StateFolder.name(self.step)}.{self.tag}.partial"

    @property
    def outcome_key(self) -> str:
        return f"state/{self.tag}/outcome"

    def report_key(self, rank: int) -> str:
        return f"state/{self.tag}/report/{rank}"


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the host, which later steps do not change; waits for the device once, at the end."""
    copies, devices = {}, set()
    for name, tensor in tensors.items():
        on_gpu = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=on_gpu)
        if on_gpu:
            devices.add(tensor.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


class StateStore:
    """The states of a run under `folder`, of which the `keep` newest, the latest and the best stay.

    Every rank constructs it and calls `save` and `find`, in the same order; `poll`, `wait` and `close` are its own
    affair. `timeout` (default: that of `ranks`) is how long rank 0, its own files written, waits for the other ranks.
    `tell` prints, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        keep: int,
        *,
        timeout: timedelta | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ValueError(f"state: keep: expected at least 1 state, found {keep}")
        self.folder = StateFolder(folder)
        self.ranks = ranks
        self.keep = keep
        self._seconds = (timeout or ranks.timeout).total_seconds()
        self._tell = tell
        # A relaunched run may meet the key-value store of the run before, with its keys.
        token = secrets.randbits(62) if ranks.rank == 0 else 0
        self._token = int(ranks.sum_all_(torch.tensor([token], device=ranks.device)).item())
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Outcome] = deque()
        self._closing = threading.Event()
        self._connection = ranks.store()  # of the threads; made now, because it cannot be made once rank 0 is lost
        self._told_key = ""
        self._asked: float | None = None  # when the thread last began to ask rank 0 for its conclusion
        atexit.register(self.close)  # a thread in the midst of C++ while the interpreter ends can abort the process

    # Saving

    def save(self, step: int, snapshot: Snapshot, document: Mapping[str, Any], *, best: bool = False) -> None:
        """Begin to write the state of `step` and return; waits only for the save before it.

        `document` is what rank 0 adds to state.json. The tensors must not change until the save has ended; `poll` and
        `wait` tell how it did. A failed one leaves the states before it as they were.
        """
        head = {"version": STATE_VERSION, "world": self.ranks.world.size, "step": step}
        if taken := head.keys() & document.keys():
            raise ValueError(f"state: document: expected other keys than {', '.join(sorted(taken))} of the store's own")
        files: dict[str, Content] = dict(snapshot.tensors)
        files |= {name: json.dumps(value).encode() for name, value in snapshot.documents.items()}
        if self.ranks.rank == 0:
            files[STATE_FILE] = json.dumps({**head, **document}, indent=2).encode()
        self._join()
        self._saves += 1
        attempt = _Attempt(step, f"{self._token:x}-{self._saves}", files, best)
        self._thread = threading.Thread(target=self._run, args=(attempt,), name=f"state of step {step}", daemon=True)
        self._thread.start()

    def poll(self) -> Outcome | None:
        """Return how a save ended that was not told of before, or None; never waits and never raises.

        Ranks learn it at different steps: decide nothing by it that the ranks must do together.
        """
        return self._outcomes.popleft() if self._outcomes else None

    def wait(self) -> Outcome | None:
        """Wait for the save in progress and return how it ended; None: nothing ended that was not told of before.

        An earlier save that failed and was not told of is only told.

        Raises:
            OSError: it failed; names the rank and the file. TimeoutError, which is one: a rank did not answer.
        """
        self._join()
        outcome = self._outcomes.pop() if self._outcomes else None
        while (earlier := self.poll()) is not None:
            if earlier.error is not None and self.ranks.rank == 0:
                self._tell(f"{earlier.error}; a later one was begun since")
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        return outcome

    def close(self, seconds: float = 5.0) -> None:
        """End, however the run ended: a save in progress has `seconds` to finish, then it is abandoned."""
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.join(seconds)
            self._closing.set()
            self._thread.join(2 * LONGEST_PAUSE)

    def write_file(self, path: Path, content: Content) -> None:
        """Write one file of this rank, in the thread."""
        write_file(path, content)

    def _join(self) -> None:
        """Wait for the thread; raises TimeoutError when rank 0, whose store the thread asks, stands still."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LONGEST_PAUSE)
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self._seconds + 2 * LONGEST_PAUSE:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"rank 0 has not answered for {self._seconds:g} s while a state was being written"
                )

    def _run(self, attempt: _Attempt) -> None:
        """Take part in one save: the body of the thread."""
        begin = time.perf_counter()
        place, error = None, None
        self._asked = None
        try:
            report = self._write(attempt)
            if self.ranks.rank == 0:
                self._conclude(attempt, self._connection, report)
            else:
                self._attend(attempt, self._connection, report)
            place = self.folder.path / StateFolder.name(attempt.step)
        except Exception as raised:  # raised again by wait()
            error = _as_os_error(raised, f"state of step {attempt.step} is not saved: ")
        self._outcomes.append(Outcome(attempt.step, place, error, time.perf_counter() - begin))

    def _write(self, attempt: _Attempt) -> dict[str, Any]:
        """Write this rank's files; return the report for rank 0: their digests, or an error."""
        digests = {}
        path = partial = self.folder.path / attempt.partial
        try:
            partial.mkdir(parents=True, exist_ok=True)
            for name, content in attempt.files.items():
                path = partial / name
                self.write_file(path, content)
                digests[name] = settle(path)
        except Exception as error:  # goes to rank 0, and from there to wait() on every rank
            where = f"rank {self.ranks.rank} ({socket.gethostname()}) could not write {path.name} in {path.parent}: "
            return _message(_as_os_error(error, where))
        return {"files": digests}

    def _attend(self, attempt: _Attempt, store: Store, report: Mapping[str, Any]) -> None:
        """Hand this rank's report to rank 0 and take its conclusion; raises OSError if the save failed."""
        key = attempt.report_key(self.ranks.rank)
        self._asked = time.monotonic()
        store.set(key, json.dumps(report))
        patience = 2 * self._seconds  # rank 0 may be the last to write, and waits for others itself
        if not self._await(store, [attempt.outcome_key], time.monotonic() + patience):
            raise TimeoutError(errno.ETIMEDOUT, f"rank 0 did not conclude it within {patience:g} s")
        conclusion = json.loads(store.get(attempt.outcome_key))
        store.delete_key(key)
        if "error" in conclusion:
            raise _error(conclusion)

    def _conclude(self, attempt: _Attempt, store: Store, own: Mapping[str, Any]) -> None:
        """Collect all reports, put the state into its place and tell the others; raises OSError if anything failed."""
        partial, name = self.folder.path / attempt.partial, StateFolder.name(attempt.step)
        conclusion: dict[str, Any] = {}
        try:
            digests = self._collect(attempt, store, own)
            if self._told_key:  # every rank has read it, or it would not have taken part in this save
                store.delete_key(self._told_key)
            self.folder.publish(partial, name, digests, best=attempt.best)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            conclusion = _message(_as_os_error(error, ""))
            raise
        finally:
            store.set(attempt.outcome_key, json.dumps(conclusion))
            self._told_key = attempt.outcome_key
        try:
            self.folder.prune(self.keep, name)
        except OSError as error:  # the new state is whole all the same
            self._tell(f"state: older states than {name} could not be removed: {error}")

    def _collect(self, attempt: _Attempt, store: Store, own: Mapping[str, Any]) -> Digests:
        """Return the digests of all ranks' files; raises OSError if a rank failed or did not report in time."""
        end = time.monotonic() + self._seconds
        reports = {0: own}
        others = range(1, self.ranks.world.size)
        for first in range(0, len(others), KEYS_AT_ONCE):
            some = others[first : first + KEYS_AT_ONCE]
            keys = [attempt.report_key(rank) for rank in some]
            if not self._await(store, keys, end):
                missing = [rank for rank in others[first:] if not store.check([attempt.report_key(rank)])]
                raise TimeoutError(
                    errno.ETIMEDOUT, f"{_ranks(missing)} did not finish writing within {self._seconds:g} s of rank 0"
                )
            reports |= {rank: json.loads(text) for rank, text in zip(some, store.multi_get(keys), strict=True)}
        failed = [rank for rank, report in reports.items() if "error" in report]
        if failed:
            error = _error(reports[failed[0]])
            rest = f"; so did {_ranks(failed[1:])}" if failed[1:] else ""
            raise OSError(error.errno, f"{error.strerror}{rest}") if error.errno else OSError(f"{error}{rest}")
        return _joined(reports)

    def _await(self, store: Store, keys: list[str], end: float) -> bool:
        """Return whether the keys are there before `end`. Not by the store's own wait, which nothing interrupts."""
        begin = time.monotonic()
        shortest = max(0.01, self.ranks.world.size / QUESTIONS_PER_SECOND)
        while not store.check(keys):
            now = time.monotonic()
            self._asked = None if self._asked is None else now
            if now >= end:
                return False
            pause = min(LONGEST_PAUSE, shortest + 0.1 * (now - begin), end - now)
            if self._closing.wait(pause):
                raise OSError(errno.ECANCELED, "the run ended before every rank had written its files")
        return True

    # Finding

    def find(self) -> Path:
        """Return the newest state that is whole, as `find_state` does; all ranks call it."""
        self._join()
        return find_state(self.folder, self.ranks, self._tell)


def _joined(reports: Mapping[int, Mapping[str, Any]]) -> Digests:
    """Return the files of all reports; raises OSError for a file that two ranks wrote."""
    digests: Digests = {}
    writers: dict[str, int] = {}
    for rank, report in reports.items():
        for name, digest in report["files"].items():
            if name in digests:
                raise OSError(errno.EEXIST, f"{name}: expected one rank to write it, found {writers[name]} and {rank}")
            digests[name], writers[name] = digest, rank
    return digests


def _as_os_error(error: Exception, prefix: str) -> OSError:
    """Return the error as an OSError, with its number if it has one, of `prefix` and its first line."""
    if isinstance(error, OSError):
        text = f"{prefix}{error.strerror or error}"
        return OSError(error.errno, text) if error.errno else OSError(text)
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.distributed.DistError):
        return OSError(f"{prefix}the key-value store of the run does not answer: {first}")
    return OSError(f"{prefix}{type(error).__name__}: {first}")


def _message(error: OSError) -> dict[str, Any]:
    return {"error": error.strerror or str(error), "errno": error.errno}


def _error(message: Mapping[str, Any]) -> OSError:
    return OSError(message["errno"], message["error"]) if message["errno"] else OSError(message["error"])


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"{len(numbers)} ranks ({shown})"
