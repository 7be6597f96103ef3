"""The loader: an endless, exactly resumable sequence of batches, built in-process or by worker processes."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rung.data.batch import Batch, Batcher, Budget
from rung.data.mixing import MixedStream

STATE_VERSION = 2
_SECONDS_TO_OUTLIVE = 20

ConsumerState = dict[str, Any] | None  # state of one MixedStream; None before its first batch


class _Consumers(IterableDataset[tuple[Batch, ConsumerState]]):
    """The consumers of one rank: a worker process plays one and yields each batch with the state after it."""

    def __init__(
        self,
        make_stream: Callable[[int, int], MixedStream],
        batcher: Callable[[], Batcher],
        rank: int,
        world: int,
    ) -> None:
        self._make_stream = make_stream
        self._batcher = batcher
        self._rank = rank
        self._world = world
        self.start: list[ConsumerState] = []  # where each consumer begins
        self.next_consumer = 0  # the one that yields the first batch

    def open(self, consumer: int) -> MixedStream:
        """Return the stream of one consumer, at its start."""
        num_consumers = len(self.start)
        stream = self._make_stream(self._rank * num_consumers + consumer, self._world * num_consumers)
        saved = self.start[consumer]
        if saved is not None:
            stream.load_state(saved)
        return stream

    def __iter__(self) -> Iterator[tuple[Batch, ConsumerState]]:
        worker = get_worker_info()
        # DataLoader always asks worker 0 first, so after a resume worker 0 plays the consumer whose turn it is.
        offset = 0 if worker is None else worker.id
        stream = self.open((self.next_consumer + offset) % len(self.start))
        batcher = self._batcher()
        for samples in stream:
            for batch, used in batcher.add(samples):
                yield batch, stream.state(used)


class BatchLoader:
    """Endless iterator of Batch for one data-parallel rank.

    `make_stream(consumer, num_consumers)` opens the structures of one consumer; with `num_workers` > 0 every worker
    process is a consumer of its own, else the rank is. `prefetch` batches per worker are made ahead. `cutoff` is in
    angstrom. `pin_memory` puts batches into page-locked memory and needs a GPU.

    `state()` belongs to the batches handed out, whatever was made ahead; `load_state` continues with the very next one.
    """

    def __init__(
        self,
        make_stream: Callable[[int, int], MixedStream],
        fidelity_index: Mapping[str, int],
        cutoff: float,
        budget: Budget,
        *,
        num_workers: int = 0,
        prefetch: int = 4,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"loader: expected num_workers >= 0 and prefetch >= 1, found {num_workers} and {prefetch}")
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("loader: pin_memory needs a GPU, and torch sees none; set pin_memory to false")
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._consumers = _Consumers(make_stream, lambda: Batcher(fidelity_index, cutoff, budget), rank, world)
        self._iterator: Iterator[tuple[Batch, ConsumerState]] | None = None
        self._states: list[ConsumerState] = []
        self._next_consumer = 0
        self._set([None] * max(1, num_workers), 0)
        atexit.register(_close, weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch, state = next(self._iterator)
        except BaseException:
            self.close()  # a generator that has raised would say that there is nothing more
            raise
        self._states[self._next_consumer] = state
        self._next_consumer = (self._next_consumer + 1) % len(self._states)
        return batch

    def state(self) -> dict[str, Any]:
        """Return where the next batch begins: integers in dictionaries and lists, fit for JSON."""
        return {
            "version": STATE_VERSION,
            "num_workers": self._num_workers,
            "next_consumer": self._next_consumer,
            "consumers": list(self._states),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved by another set-up."""
        for name, expected in (("version", STATE_VERSION), ("num_workers", self._num_workers)):
            if state.get(name) != expected:
                raise ValueError(
                    f"loader state: {name}: expected {expected}, found {state.get(name)}; "
                    "resume with the set-up that it was saved with"
                )
        self.close()
        before = list(self._states), self._next_consumer
        self._set(state["consumers"], state["next_consumer"])
        try:
            for consumer in range(len(self._states)):
                self._consumers.open(consumer)  # a state that does not fit is an error here, not later in a worker
        except ValueError:
            self._set(*before)
            raise

    def redeal(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue with this rank's part of what another number of ranks or workers had left; `states` by rank.

        No structure is seen twice in an epoch and none is left out, up to the latest epoch that a consumer had begun.
        Raises ValueError naming what differs when the states are of other data or another seed.
        """
        for state in states:
            if state.get("version") != STATE_VERSION:
                raise ValueError(f"loader state: version: expected {STATE_VERSION}, found {state.get('version')}")
        before = [consumer for state in states for consumer in state["consumers"]]
        self.close()
        self._set([None] * len(self._states), 0)
        dealt = []
        for consumer in range(len(self._states)):
            stream = self._consumers.open(consumer)
            stream.redeal(before)
            dealt.append(stream.state())
        self._set(dealt, 0)

    def close(self) -> None:
        """Stop the worker processes; the next batch starts them again where the loader stands."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            # Dropping the iterator is not enough: the traceback of an error that a worker sent keeps it alive.
            self._iterator._shutdown_workers()
        self._iterator = None
        self._set(self._states, self._next_consumer)

    def _set(self, states: Sequence[ConsumerState], next_consumer: int) -> None:
        self._states = list(states)
        self._next_consumer = next_consumer
        self._consumers.start = list(states)
        self._consumers.next_consumer = next_consumer

    def _start(self) -> Iterator[tuple[Batch, ConsumerState]]:
        if self._num_workers == 0:
            batches = iter(self._consumers)
            return ((batch.pin_memory(), state) for batch, state in batches) if self._pin_memory else batches
        loader = DataLoader(
            self._consumers,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_the_step,
            pin_memory=self._pin_memory,
            multiprocessing_context="fork",  # the streams are opened by closures, which no other start method can send
            generator=torch.Generator(),  # else DataLoader draws its seed from the generator that training resumes
        )
        return iter(loader)


def _close(loader: weakref.ref[BatchLoader]) -> None:
    if (found := loader()) is not None:
        found.close()


def _as_it_is(item: Any) -> Any:
    return item


def _outlive_the_step(worker: int) -> None:
    """Leave stopping to the main process: it finishes its step, closes the loader and saves.

    Launchers signal all processes at once, and a worker that died first would make that last step fail. SIGTERM is only
    put off, because it is also how Python ends workers that are still there when it exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_TO_OUTLIVE))
