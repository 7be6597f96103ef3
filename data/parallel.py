"""Work on one process, on several, or on the ranks of `mpirun`: the same function over the same items, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # set by Open MPI, MPICH and Intel MPI, Hydra


class Map(Protocol):
    """Calls a function (importable, so that it can be sent) on every item and yields the results in their order.

    What runs on other processes can be closed, which drops what is queued and waits for what has begun.
    """

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]: ...


def under_mpi() -> bool:
    """Return whether `mpirun` started this process as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZES)


@contextmanager
def workers(processes: int = 1) -> Iterator[Map | None]:
    """Give the map of this many processes; under `mpirun` that of its ranks, of which rank 0 only hands out the work.

    Gives None on the other ranks of `mpirun`: when they get it, all work is done. Raises ValueError for fewer than one
    process and for both at once, and ChildProcessError when a worker process is killed.
    """
    if processes < 1:
        raise ValueError(f"processes: expected a whole number >= 1, found {processes}")
    if under_mpi():
        if processes > 1:
            raise ValueError(f"processes: under mpirun its ranks do the work; leave out -j {processes}")
        from ase import parallel
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        parallel.world.comm = parallel.DummyMPI()  # ASE would let rank 0 read for all, and wait until all ask for it
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            if executor is None:
                yield None
            else:
                with _cancelling(executor):
                    yield _map_of(executor)
    elif processes == 1:
        yield map
    else:
        # A fresh interpreter for each: forked children would share open HDF5 files and the locks of other threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _start_worker) as pool, _cancelling(pool):
            yield _map_of(pool)


@contextmanager
def _cancelling(executor: Executor | Any) -> Iterator[None]:
    """Drop what is queued when the work is broken off: it would run to its end otherwise."""
    try:
        yield
    except BaseException:  # also Ctrl-C
        executor.shutdown(cancel_futures=True)
        raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: end at once and without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: a killed build must leave nobody who still writes in its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _map_of(executor: Executor | Any) -> Map:
    def run(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        futures = [executor.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker process was killed; out of memory? Use fewer processes") from error
        finally:  # also when the caller stops, and closes this generator
            wait([future for future in futures if not future.cancel()])

    return run
