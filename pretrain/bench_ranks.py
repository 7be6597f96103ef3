"""What benchmarks of several ranks need: ranks in processes of their own, taking turns, and an eye on the machine."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import psutil
import torch
import torch.distributed

from rung.kernels.memory import keep_freed_memory
from rung.pretrain.engine import disconnect
from rung.pretrain.ranks import Ranks

TIMEOUT = timedelta(minutes=5)
Times = dict[str, list[tuple[float, float]]]  # of what took turns: seconds of the clock and of the processor


class RankPool:
    """Ranks in processes of their own with one thread each, which call functions that they are given, all together."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        self._folder = TemporaryDirectory()  # where they meet: a free port might be another's by then
        self._processes = [
            context.Process(target=_serve, args=(rank, size, f"{self._folder.name}/store", pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pairs)
        ]
        for process, (_, pipe) in zip(self._processes, pairs, strict=True):
            process.start()
            pipe.close()  # so that a rank that dies is an EOFError here
        self.pids = [process.pid for process in self._processes]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what function(kept, *arguments) returns on each rank; `kept` is the rank's own dictionary.

        Raises RuntimeError with the traceback of a rank on which it fails, EOFError when one dies.
        """
        self.begin(function, *arguments)
        return self.results()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let every rank begin to call the function."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def results(self) -> list[Any]:
        """Wait for what `begin` began."""
        answers = [pipe.recv() for pipe in self._pipes]
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise RuntimeError(f"rank {rank}:\n{failure}")
        return [result for result, _ in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the ranks end; after an error they may wait for one another, and are killed."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if error is None:
                pipe.send(None)
            else:
                process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.dup2(2, 1)  # standard output is for the lines
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.distributed.init_process_group(init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    kept: dict[str, Any] = {}
    while (message := pipe.recv()) is not None:
        function, arguments = message
        try:
            pipe.send((function(kept, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    disconnect()


def take_turns(ranks: Ranks, functions: Mapping[str, Callable[[], object]], turns: int) -> Times:
    """Return the times of functions that all ranks call together, in an order that is reversed at every turn."""
    times: Times = {name: [] for name in functions}
    for turn in range(turns):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            ranks.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


class Company:
    """The share of the machine's processor time that others took than this process and the ranks of these pools."""

    def __init__(self, *pools: RankPool) -> None:
        self._ours = [psutil.Process(), *(psutil.Process(pid) for pool in pools for pid in pool.pids)]
        self.others_share = float("nan")

    def __enter__(self) -> Self:
        self._begin = self._times()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            total, busy, ours = (now - before for now, before in zip(self._times(), self._begin, strict=True))
            self.others_share = round(max(0.0, busy - ours) / max(total, 1e-9), 3)

    def _times(self) -> tuple[float, float, float]:
        """Return the seconds of all cores: all, those in which they worked, and those in which they did for us."""
        machine = psutil.cpu_times()._asdict()
        total = sum(seconds for name, seconds in machine.items() if "guest" not in name)  # which are in user and nice
        ours = [process.cpu_times() for process in self._ours]
        idle = machine["idle"] + machine.get("iowait", 0.0)
        return total, total - idle, sum(times.user + times.system for times in ours)
