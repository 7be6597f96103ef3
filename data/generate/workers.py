"""A pool of worker processes that survives what quantum chemistry codes do: crash, be killed for memory, or hang.

`concurrent.futures` cannot say which task killed its worker and cannot stop a hanging one, so each worker here has its
own pipe: a dead or overdue worker is replaced, its task is tried once more, and then reported as lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

MAX_ATTEMPTS = 2
# One thread per worker: the pool is the parallelism. Children read these when they import their libraries.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_AT_WORK = object()


@dataclass(frozen=True)
class Lost(Generic[TaskT]):
    """A task whose worker died or hung at every attempt, and how."""

    task: TaskT
    reason: str


@dataclass
class _Worker(Generic[TaskT]):
    process: Any
    connection: Connection
    task: TaskT | None = None
    attempt: int = 0
    started: float = 0.0


def run_parallel(
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], *, jobs: int, timeout: float
) -> Iterator[ResultT | Lost[TaskT]]:
    """Yield `function(task)` for every task, as they finish, from `jobs` processes.

    `function` must be importable and must not raise: an exception in it ends the run with that exception. A task is
    given `timeout` seconds per attempt. Closing the iterator stops the workers.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least one process, found {jobs}")
    waiting: deque[tuple[TaskT, int]] = deque((task, 1) for task in tasks)
    workers = [_start_worker(function) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.task is not None for worker in workers):
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task, worker.attempt = waiting.popleft()
                    worker.started = time.monotonic()
                    with suppress(BrokenPipeError):  # it died between tasks; _collect replaces it
                        worker.connection.send(worker.task)
            deadline = min(w.started for w in workers if w.task is not None) + timeout
            wait([w.connection for w in workers if w.task is not None], max(0.0, deadline - time.monotonic()))
            for index, worker in enumerate(workers):
                if worker.task is None:
                    continue
                outcome = _collect(worker, timeout)
                if outcome is _AT_WORK:
                    continue
                if isinstance(outcome, Lost):
                    _stop_worker(worker)
                    workers[index] = _start_worker(function)
                    if worker.attempt < MAX_ATTEMPTS:
                        waiting.appendleft((worker.task, worker.attempt + 1))
                        continue
                worker.task = None
                yield outcome
    finally:
        for worker in workers:
            _stop_worker(worker)


def _collect(worker: _Worker[TaskT], timeout: float) -> Any:
    """The worker's result, Lost if it died or is overdue, _AT_WORK if it is neither done nor dead."""
    assert worker.task is not None
    try:
        if worker.connection.poll():
            error, result = worker.connection.recv()
            if error is not None:
                raise error
            return result
    except (EOFError, ConnectionResetError):
        worker.process.join(1.0)
        return Lost(worker.task, f"worker process died (exit code {worker.process.exitcode})")
    if time.monotonic() - worker.started > timeout:
        return Lost(worker.task, f"calculation exceeded {timeout:g} s")
    return _AT_WORK


def _start_worker(function: Callable[[TaskT], ResultT]) -> _Worker[TaskT]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and the parent's database
    ours, theirs = context.Pipe()
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    theirs.close()
    return _Worker(process, ours)


def _stop_worker(worker: _Worker[TaskT]) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The worker's loop; it ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        reply: tuple[Exception | None, Any]
        try:
            reply = (None, function(task))
        except Exception as error:  # sent to the parent, which raises it
            reply = (error, None)
        try:
            connection.send(reply)
        except BrokenPipeError:
            return
