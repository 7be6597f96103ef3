"""Runs of real ranks in which a process dies or stands still at a chosen place: for tests and benchmarks.

As a program it is what a supervisor starts: `faulty_run.py FAULTS RANKS WORDS... [--resume]` forks the ranks of one
`python -m rung.pretrain WORDS...`. FAULTS is a JSON list; every attempt takes its first entry away and lets it happen.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what every run imports later anyway, once for all ranks
import torch.utils.tensorboard.writer

from rung.pretrain import loop, store
from rung.pretrain.cli import main as pretrain_main
from rung.pretrain.network import free_port
from rung.pretrain.ranks import Ranks
from rung.pretrain.reptile import Outer
from rung.pretrain.rounds import MODES
from rung.pretrain.state_folder import StateFolder
from rung.pretrain.step import StepModule

ROLL_CALL_SECONDS = 1.0  # the ranks are on one machine, and a test waits for it


@dataclass(frozen=True)
class Fault:
    """What `rank` does to itself when it comes to `place` in round `round` or a later one.

    inner      in an inner step, after the forward pass: the other ranks reduce gradients without it
    exchange   when it has begun the exchange of an outer step, or of rounds whose mode has none: never
    save       in the middle of writing its file of tensors
    point      when the state is in its place, and before `latest` names it (rank 0)
    export     when the last round is done
    """

    place: str
    rank: int
    round: int = 0
    signal: int = signal.SIGKILL

    def happen(self) -> None:
        os.kill(os.getpid(), self.signal)


def write_faults(path: Path, faults: Sequence[Fault]) -> None:
    path.write_text(json.dumps([asdict(fault) for fault in faults]))


def take_fault(path: Path) -> Fault | None:
    """Return the first fault of a file, and take it away."""
    first, *rest = json.loads(path.read_text()) or [None]
    path.write_text(json.dumps(rest))
    return Fault(**first) if first else None


def arm(fault: Fault) -> None:
    """Let the fault happen in this process."""
    now = -1

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, index: int, stop: bool) -> Any:
            nonlocal now
            now = index
            return run(self, index, stop)

        return counted

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if now >= fault.round:
                fault.happen()
            return function(*arguments, **options)

        return wrapper

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if now >= fault.round:
                fault.happen()
            return result

        return wrapper

    def halfway(write: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, path: Path, content: Any) -> None:
            write(self, path, content)
            if now >= fault.round and path.name.startswith("rank_") and path.suffix == ".safetensors":
                os.truncate(path, path.stat().st_size // 2)
                fault.happen()

        return wrapper

    for mode in MODES.values():
        mode.run = counting(mode.run)  # type: ignore[method-assign, assignment]
    owner: Any
    owner, name, wrap = {
        "inner": (StepModule, "forward", after),
        "exchange": (Outer, "_begin", after),
        "save": (store.StateStore, "write_file", halfway),
        "point": (StateFolder, "_point", before),
        "export": (loop.Run, "export", before),
    }[fault.place]
    setattr(owner, name, wrap(getattr(owner, name)))


def fork_ranks(world: int, words: Sequence[str], prepare: Callable[[int], None], logs: Path | None = None) -> list[int]:
    """Start the ranks of one run and return their process ids; each calls `prepare(rank)` first.

    `logs` is a folder for what they print, one file a rank; without it they print where this process does.
    """
    port = free_port()
    pids = []
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, world, port, words, prepare, logs)
        pids.append(pid)
    return pids


def _be_rank(
    rank: int, world: int, port: int, words: Sequence[str], prepare: Callable[[int], None], logs: Path | None
) -> None:
    status = 1
    try:
        if logs is not None:
            descriptor = os.open(logs / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        import faulthandler

        faulthandler.register(signal.SIGUSR2, all_threads=True)
        torch.set_num_threads(1)
        torch.seed()  # as processes begin; forked ones would all have the state of their parent
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        )  # fmt: skip
        Ranks.absent.__defaults__ = (ROLL_CALL_SECONDS,)
        prepare(rank)
        status = pretrain_main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's own clean-up belongs here


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for(pids: Sequence[int]) -> list[int]:
    """Return how each process ended: its exit status, or minus the signal's number."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> int:
    """Run one attempt; end with the first status that is not 0, as launchers do."""
    path, world, *words = sys.argv[1:]
    fault = take_fault(Path(path))

    def prepare(rank: int) -> None:
        if fault is not None and rank == fault.rank:
            arm(fault)

    statuses = wait_for(fork_ranks(int(world), words, prepare))
    bad = next((status for status in statuses if status), 0)
    return bad if bad >= 0 else 128 - bad


if __name__ == "__main__":
    sys.exit(main())
