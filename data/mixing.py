"""Mixing: which task each structure of a batch comes from."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rung.data.batch import Sample
from rung.data.manifest import read_manifest
from rung.data.stream import ShardStream

STATE_VERSION = 1
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
    """Endless iterator of Sample; the task of the n-th is a pure function of (seed, rank, n), drawn by `weights`."""

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
        self._streams = list(streams)
        self._energy_weights = list(ones if energy_weights is None else energy_weights)
        self._forces_weights = list(ones if forces_weights is None else forces_weights)
        if not streams:
            raise ValueError("mixing: expected at least one stream, found none")
        for values in (weights, self._energy_weights, self._forces_weights):
            if len(values) != len(streams):
                raise ValueError(f"mixing: expected one weight per stream ({len(streams)}), found {len(values)}")
        if not all(weight > 0 for weight in weights):
            raise ValueError(f"mixing: weight: expected positive numbers, found {list(weights)}; leave the task out")
        self._shares = np.array(weights, np.float64) / np.sum(weights)
        self._seed = seed
        self._drawn = 0
        self._choices = self._draw_chunk()

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        task = int(self._choices[self._drawn % _CHUNK])
        structure = next(self._streams[task])
        self._drawn += 1
        if self._drawn % _CHUNK == 0:
            self._choices = self._draw_chunk()
        fidelity = self._streams[task].fidelity
        return Sample(structure, fidelity, self._energy_weights[task], self._forces_weights[task])

    def state(self) -> dict[str, Any]:
        """Return the number drawn and every stream's state: integers in dictionaries, fit for JSON."""
        streams = [stream.state() for stream in self._streams]
        return {"version": STATE_VERSION, "seed": self._seed, "drawn": self._drawn, "streams": streams}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved by another mix."""
        for name, expected in (("version", STATE_VERSION), ("seed", self._seed)):
            if state.get(name) != expected:
                raise ValueError(f"mixing state: {name}: expected {expected}, found {state.get(name)}")
        if len(state["streams"]) != len(self._streams):
            raise ValueError(f"mixing state: expected {len(self._streams)} tasks, found {len(state['streams'])}")
        for stream, saved in zip(self._streams, state["streams"], strict=True):
            stream.load_state(saved)
        self._drawn = state["drawn"]
        self._choices = self._draw_chunk()

    def _draw_chunk(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        random = np.random.default_rng([self._seed, _PURPOSE, self._streams[0].rank, self._drawn // _CHUNK])
        return random.choice(len(self._streams), size=_CHUNK, p=self._shares)
