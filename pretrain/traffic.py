"""What a rank hands to collectives, counted where it is handed over: by `ranks.py` its own, and DeepSpeed's here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed

# DeepSpeed's collectives: the argument whose bytes are counted (the whole of what is reduced or gathered), and where it
# and the group are when they come without their names.
COLLECTIVES = {
    "all_reduce": ("tensor", 0, 2),
    "reduce": ("tensor", 0, 3),
    "broadcast": ("tensor", 0, 2),
    "reduce_scatter_tensor": ("input_tensor", 1, 3),
    "all_gather_into_tensor": ("output_tensor", 0, 2),
}


@dataclass
class Traffic:
    """What one rank has handed to collectives, by purpose: `inner` within the task group, `outer` across groups.

    `bytes` counts the tensors as they are handed over, once each; what travels on the wire depends on the algorithm (a
    ring all-reduce of n ranks sends 2 (n - 1) / n times as much per rank). `seconds` is the time the host spent waiting
    in them, which on a GPU, where collectives run on the device's own stream, is nearly nothing.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    deepspeeds: str = "inner"  # the purpose of DeepSpeed's collectives at present

    @contextmanager
    def waiting(self, purpose: str) -> Iterator[None]:
        """Add the time of the block to the time spent in collectives."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - begin

    @contextmanager
    def collective(self, purpose: str, size: int) -> Iterator[None]:
        """Count one collective of `size` bytes and the time in it."""
        self.bytes[purpose] = self.bytes.get(purpose, 0) + size
        with self.waiting(purpose):
            yield

    @contextmanager
    def deepspeeds_for(self, purpose: str) -> Iterator[None]:
        """Count DeepSpeed's collectives within the block for this purpose."""
        before, self.deepspeeds = self.deepspeeds, purpose
        try:
            yield
        finally:
            self.deepspeeds = before

    def count_deepspeeds(self, backend: Any) -> None:
        """Count the collectives of DeepSpeed's backend object, the one place that they all go through."""
        for name in COLLECTIVES:
            setattr(backend, name, self._counted(name, getattr(type(backend), name).__get__(backend)))

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        argument, place, group_place = COLLECTIVES[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            group = args[group_place] if len(args) > group_place else kwargs.get("group")
            if torch.distributed.get_world_size(group) == 1:
                return collective(*args, **kwargs)
            tensor = args[place] if len(args) > place else kwargs[argument]
            with self.collective(self.deepspeeds, tensor.nbytes):
                return collective(*args, **kwargs)

        return counted


@dataclass(frozen=True)
class Pending:
    """A collective that is under way."""

    work: torch.distributed.Work
    traffic: Traffic

    def wait(self) -> None:
        """Wait until its tensor may be used."""
        with self.traffic.waiting("outer"):
            self.work.wait()
