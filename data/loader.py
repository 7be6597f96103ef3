"""The loader: an endless, exactly resumable sequence of batches, built in-process or by worker processes."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rung.data.batch import Batch, Batcher, Budget
from rung.data.mixing import MixedStream

STATE_VERSION = 3
_SECONDS_TO_OUTLIVE = 20

MakeStream = Callable[[int, int], MixedStream]  # (consumer, number of consumers) -> its stream, at the start
ConsumerState = list[dict[str, Any] | None]  # state of each of its streams; None before the first batch


def only(number: int) -> int:
    """Take every batch from the first stream: the order of a loader that has one."""
    return 0


def all_of_them(stream: int) -> bool:
    """Say of every stream that the rank reads it."""
    return True


class _Consumers(IterableDataset[tuple[Batch, int, dict[str, Any]]]):
    """The consumers of one rank: a worker process plays one and yields batches, their streams and the states after."""

    def __init__(
        self,
        make_streams: Sequence[MakeStream],
        order: Callable[[int], int],
        batcher: Callable[[], Batcher],
        rank: int,
        world: int,
    ) -> None:
        self._make_streams = make_streams
        self._order = order
        self._batcher = batcher
        self._rank = rank
        self._world = world
        self.start: list[ConsumerState] = []  # where each consumer begins
        self.batches = 0  # number of the first batch; batch n comes from consumer n % len(start)

    def open(self, consumer: int, stream: int) -> MixedStream:
        """Return one stream of one consumer, where it begins."""
        num_consumers = len(self.start)
        opened = self._make_streams[stream](self._rank * num_consumers + consumer, self._world * num_consumers)
        saved = self.start[consumer][stream]
        if saved is not None:
            opened.load_state(saved)
        return opened

    def __iter__(self) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
        worker = get_worker_info()
        # DataLoader always asks worker 0 first, so after a resume worker 0 plays the consumer whose turn it is.
        first = self.batches + (0 if worker is None else worker.id)
        consumer = first % len(self.start)
        streams: dict[int, Iterator[tuple[Batch, dict[str, Any]]]] = {}  # opened when their first batch is due
        for number in count(first, len(self.start)):
            index = self._order(number)
            if index not in streams:
                streams[index] = self._batches(self.open(consumer, index))
            batch, state = next(streams[index])
            yield batch, index, state

    def _batches(self, stream: MixedStream) -> Iterator[tuple[Batch, dict[str, Any]]]:
        batcher = self._batcher()
        for samples in stream:
            for batch, used in batcher.add(samples):
                yield batch, stream.state(used)


class BatchLoader:
    """Endless iterator of Batch for one rank, from one stream or from several in a given order.

    `make_streams[i](consumer, num_consumers)` opens the i-th stream of one consumer; with `num_workers` > 0 every
    worker process is a consumer of its own, else the rank is. `reads(i)` says whether this rank ever reads the i-th
    stream. `order(n)` says which stream the rank's n-th batch comes from (a
    pure function: workers make batches ahead). `prefetch` batches per worker are made ahead. `cutoff` is in angstrom.
    `pin_memory` puts batches into page-locked memory and needs a GPU.

    `state()` belongs to the batches handed out, whatever was made ahead; `load_state` continues with the very next one.
    """

    def __init__(
        self,
        make_streams: Sequence[MakeStream],
        fidelity_index: Mapping[str, int],
        cutoff: float,
        budget: Budget,
        *,
        order: Callable[[int], int] = only,
        reads: Callable[[int], bool] = all_of_them,
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
        self.num_workers = num_workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._num_streams = len(make_streams)
        self._reads = reads
        self._consumers = _Consumers(make_streams, order, lambda: Batcher(fidelity_index, cutoff, budget), rank, world)
        self._iterator: Iterator[tuple[Batch, int, dict[str, Any]]] | None = None
        self._states: list[ConsumerState] = []
        self._batches = 0
        self._set(self._unbegun(), 0)
        atexit.register(_close, weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch, stream, state = next(self._iterator)
        except BaseException:
            self.close()  # a generator that has raised would say that there is nothing more
            raise
        self._states[self._batches % len(self._states)][stream] = state
        self._batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Return where the next batch begins: integers in dictionaries and lists, fit for JSON."""
        return {
            "version": STATE_VERSION,
            "num_workers": self.num_workers,
            "batches": self._batches,
            "consumers": [list(states) for states in self._states],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved by another set-up."""
        for name, expected in (("version", STATE_VERSION), ("num_workers", self.num_workers)):
            if state.get(name) != expected:
                raise ValueError(
                    f"loader state: {name}: expected {expected}, found {state.get(name)}; "
                    "resume with the set-up that it was saved with"
                )
        if found := [states for states in state["consumers"] if len(states) != self._num_streams]:
            raise ValueError(f"loader state: expected {self._num_streams} stream(s), found {len(found[0])}")
        self.close()
        before = self._states, self._batches
        self._set(state["consumers"], state["batches"])
        try:
            for consumer, states in enumerate(self._states):
                for stream, saved in enumerate(states):
                    if saved is not None:
                        self._consumers.open(consumer, stream)  # what does not fit is an error here, not in a worker
        except ValueError:
            self._set(*before)
            raise

    def redeal(
        self, states: Sequence[Mapping[str, Any]], batches: int, readers: Callable[[int], Sequence[int]] | None = None
    ) -> None:
        """Continue with this rank's part of what another number of ranks or workers had left; `states` by rank.

        `batches` is the number of the next batch, which `order` is asked for. `readers(i)` are the ranks of before that
        the i-th stream was dealt to (None: all). No structure is seen twice in an epoch and none is left out, up to the
        latest epoch that a consumer had begun.
        Raises ValueError naming what differs when the states are of other data or another seed.
        """
        for state in states:
            if state.get("version") != STATE_VERSION:
                raise ValueError(f"loader state: version: expected {STATE_VERSION}, found {state.get('version')}")
        self.close()
        self._set(self._unbegun(), batches)
        dealt = self._unbegun()
        for stream in range(self._num_streams):
            ranks = range(len(states)) if readers is None else readers(stream)
            saved = [consumer[stream] for rank in ranks for consumer in states[rank]["consumers"]]
            if self._reads(stream) and any(state is not None for state in saved):
                for consumer in range(len(dealt)):
                    opened = self._consumers.open(consumer, stream)
                    opened.redeal(saved)
                    dealt[consumer][stream] = opened.state()
        self._set(dealt, batches)

    def close(self) -> None:
        """Stop the worker processes; the next batch starts them again where the loader stands."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            # Dropping the iterator is not enough: the traceback of an error that a worker sent keeps it alive.
            self._iterator._shutdown_workers()
        self._iterator = None
        self._set(self._states, self._batches)

    def _unbegun(self) -> list[ConsumerState]:
        return [[None] * self._num_streams for _ in range(max(1, self.num_workers))]

    def _set(self, states: Sequence[ConsumerState], batches: int) -> None:
        self._states = [list(streams) for streams in states]
        self._batches = batches
        self._consumers.start = [list(streams) for streams in states]
        self._consumers.batches = batches

    def _start(self) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
        if self.num_workers == 0:
            batches = iter(self._consumers)
            if not self._pin_memory:
                return batches
            return ((batch.pin_memory(), stream, state) for batch, stream, state in batches)
        loader = DataLoader(
            self._consumers,
            batch_size=None,
            num_workers=self.num_workers,
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
