"""Mixing: which task each structure of a batch comes from."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.batch import DRAWN, Samples
from rung.data.dealing import Position
from rung.data.fetch import RemoteConfig
from rung.data.manifest import read_manifest
from rung.data.stream import ShardStream
from rung.data.table import StructureTable

STATE_VERSION = 2
_CHUNK = 1024  # choices drawn at a time; part of the order, so a change needs a new STATE_VERSION
_PURPOSE = zlib.crc32(b"mixing")


@dataclass(frozen=True)
class Task:
    """One (dataset, fidelity) pair, its share of the mix and the weights of its loss terms."""

    dataset: str  # folder, dataset.yaml or "builtin"
    fidelity: str
    weight: float = 1.0  # relative number of structures
    energy_weight: float = 1.0
    forces_weight: float = 1.0
    shard_url: str = ""  # see ShardStream
    remote: RemoteConfig = RemoteConfig()  # how its shards are fetched when they are not here


def mixing_weights(counts: Sequence[int], temperature: float) -> list[float]:
    """Return normalised weights counts^(1/temperature): 1 draws every label equally often, infinity every task.

    Raises ValueError for a task without labels and for a temperature below 1, which would starve the small tasks.
    """
    if not temperature >= 1:
        raise ValueError(f"temperature: expected >= 1 (1: by label count, inf: all tasks alike), found {temperature}")
    if not counts or min(counts) < 1:
        raise ValueError(f"mixing: expected at least one label in every task, found counts {list(counts)}")
    shares = (np.array(counts, np.float64) / max(counts)) ** (1 / temperature)
    return [float(share) for share in shares / shares.sum()]


def label_counts(tasks: Sequence[Task], split: str = "train") -> list[int]:
    """Return how many structures of `split` carry an energy or forces at each task's fidelity, from the manifests."""
    entries = [read_manifest(task.dataset).entry(task.fidelity) for task in tasks]
    return [max(entry.num_energies.get(split, 0), entry.num_forces.get(split, 0)) for entry in entries]


def open_tasks(
    tasks: Sequence[Task], split: str = "train", *, seed: int, rank: int = 0, world: int = 1, max_bad: int = 0
) -> MixedStream:
    """Open one stream per task and mix them by the tasks' weights; arguments as for `ShardStream`."""
    streams = [
        ShardStream(
            task.dataset,
            task.fidelity,
            split,
            seed=seed,
            rank=rank,
            world=world,
            max_bad=max_bad,
            shard_url=task.shard_url,
            remote=task.remote,
        )
        for task in tasks
    ]
    return MixedStream(
        streams,
        [task.weight for task in tasks],
        seed,
        energy_weights=[task.energy_weight for task in tasks],
        forces_weights=[task.forces_weight for task in tasks],
    )


class MixedStream:
    """Endless iterator of Samples; the task of the n-th draw is a pure function of (seed, rank, n), by `weights`.

    Draws come in chunks. A structure that cannot be read (see `max_bad`) is a draw that gives no sample.
    """

    def __init__(
        self,
        streams: Sequence[ShardStream],
        weights: Sequence[float],
        seed: int,
        *,
        energy_weights: Sequence[float] | None = None,
        forces_weights: Sequence[float] | None = None,
    ) -> None:
        ones = [1.0] * len(streams)
        energy_weights = list(ones if energy_weights is None else energy_weights)
        forces_weights = list(ones if forces_weights is None else forces_weights)
        if not streams:
            raise ValueError("mixing: expected at least one stream, found none")
        for values in (weights, energy_weights, forces_weights):
            if len(values) != len(streams):
                raise ValueError(f"mixing: expected one weight per stream ({len(streams)}), found {len(values)}")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"mixing: weight: expected positive numbers, found {list(weights)}; leave the task out")
        self._streams = list(streams)
        self._fidelities = tuple(stream.fidelity for stream in streams)
        self._energy_weights = np.array(energy_weights, np.float32)
        self._forces_weights = np.array(forces_weights, np.float32)
        self._shares = np.array(weights, np.float64) / np.sum(weights)
        self._seed = seed
        self._starts: list[Position]  # of the streams, before the chunk last given
        self._tasks: NDArray[np.int64]  # of each of its draws
        self._samples: NDArray[np.int64]  # those of its draws that gave a sample
        self._begin(0)

    def __iter__(self) -> Iterator[Samples]:
        return self

    def __next__(self) -> Samples:
        """Return the samples of the next chunk, or of the rest of the chunk in which the last state was saved."""
        self._begin(self._drawn + len(self._tasks))
        chunk, done = divmod(self._drawn, _CHUNK)
        random = np.random.default_rng([self._seed, _PURPOSE, self._streams[0].rank, chunk])
        self._tasks = random.choice(len(self._streams), size=_CHUNK, p=self._shares)[done:]
        tables = []
        row = np.full(len(self._tasks), -1)  # of each draw among the tables
        first = 0
        for task, stream in enumerate(self._streams):
            draws = np.flatnonzero(self._tasks == task)
            if len(draws):
                table, found = stream.take(len(draws))
                tables.append(table.renamed(stream.fidelity, DRAWN))
                row[draws[found]] = first + np.arange(len(table))
                first += len(table)
        self._samples = np.flatnonzero(row >= 0)
        tasks = self._tasks[self._samples]
        return Samples(
            table=StructureTable.concatenate(tables).take(row[self._samples]),
            fidelities=self._fidelities,
            fidelity=tasks,
            energy_weight=self._energy_weights[tasks],
            forces_weight=self._forces_weights[tasks],
        )

    def state(self, used: int | None = None) -> dict[str, Any]:
        """Return the state after the first `used` samples of the chunk last given (None: all); fit for JSON."""
        draws = len(self._tasks) if used is None or used == len(self._samples) else int(self._samples[used])
        counts = np.bincount(self._tasks[:draws], minlength=len(self._streams)).tolist()
        streams = [
            stream.state(stream.dealing.advance(start, count)[0])
            for stream, start, count in zip(self._streams, self._starts, counts, strict=True)
        ]
        return {"version": STATE_VERSION, "seed": self._seed, "drawn": self._drawn + draws, "streams": streams}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved by another mix."""
        self._check(state)
        for stream, saved in zip(self._streams, state["streams"], strict=True):
            stream.load_state(saved)
        self._begin(state["drawn"])

    def redeal(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Continue with this consumer's part of what the consumers of another world had left; see `ShardStream`."""
        for state in states:
            if state is not None:
                self._check(state)
        for index, stream in enumerate(self._streams):
            stream.redeal([None if state is None else state["streams"][index] for state in states])
        drawn = max(0 if state is None else state["drawn"] for state in states)
        self._begin(-(-drawn // _CHUNK) * _CHUNK)  # no consumer draws a chunk that its rank has drawn before

    def _begin(self, drawn: int) -> None:
        """Stand before draw number `drawn`, with nothing given since."""
        self._drawn = drawn
        self._starts = [stream.position for stream in self._streams]
        self._tasks = self._samples = np.zeros(0, np.int64)

    def _check(self, state: Mapping[str, Any]) -> None:
        for name, expected in (("version", STATE_VERSION), ("seed", self._seed)):
            if state.get(name) != expected:
                raise ValueError(f"mixing state: {name}: expected {expected}, found {state.get(name)}")
        if len(state["streams"]) != len(self._streams):
            raise ValueError(f"mixing state: expected {len(self._streams)} tasks, found {len(state['streams'])}")
