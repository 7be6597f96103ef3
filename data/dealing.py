"""Dealing: which labelled structures of a split each consumer reads, and in what order; arithmetic without any reading.

A split has `total` positions, one for each structure that carries the fidelity; an epoch is one order of them. Every
consumer gets an equal, contiguous range of positions, reads it in blocks and shuffles each block. What is left to do is
therefore a few ranges, and it can be dealt again to another number of consumers at any moment: nothing is seen twice
in an epoch and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Work(NamedTuple):
    """Positions start..stop of an epoch, of whose first block `offset` structures are done."""

    epoch: int
    start: int
    stop: int
    offset: int = 0


class Segment(NamedTuple):
    """Structures first..last, in shuffled order, of the block that is made of positions start..stop of an epoch."""

    epoch: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Position:
    """Where a consumer stands: what it has left of the epochs up to and including `epoch`."""

    epoch: int
    todo: tuple[Work, ...]


@dataclass(frozen=True)
class Dealing:
    """The share of consumer `rank` of `world` in the epochs of `total` positions, read in blocks of `block`."""

    total: int
    block: int
    rank: int
    world: int

    def start(self) -> Position:
        """Return the position before the first structure."""
        return Position(0, (self._share(0),))

    def advance(self, position: Position, count: int) -> tuple[Position, list[Segment]]:
        """Return the position after the next `count` structures, and the segments that they are."""
        epoch, todo = position.epoch, list(position.todo)
        segments: list[Segment] = []
        while count:
            if not todo:
                epoch += 1
                todo.append(self._share(epoch))
            work = todo.pop(0)
            stop = min(work.start + self.block, work.stop)
            last = min(work.offset + count, stop - work.start)
            segments.append(Segment(work.epoch, work.start, stop, work.offset, last))
            count -= last - work.offset
            if work.start + last < stop:
                todo.insert(0, work._replace(offset=last))
            elif stop < work.stop:
                todo.insert(0, Work(work.epoch, stop, work.stop))
        return Position(epoch, tuple(todo)), segments

    def redeal(self, positions: Sequence[Position]) -> Position:
        """Return this consumer's part of what other consumers have left: `positions` holds theirs, by their ranks.

        It goes up to the latest epoch that any of them has begun. A block that is begun stays whole.
        """
        epoch = max(position.epoch for position in positions)
        left = sorted(
            work
            for rank, position in enumerate(positions)
            for work in replace(self, rank=rank, world=len(positions))._up_to(epoch, position)
        )
        size = sum(work.stop - work.start - work.offset for work in left)
        begin, end = size * self.rank // self.world, size * (self.rank + 1) // self.world
        mine, at = [], 0
        for work in left:
            length = work.stop - work.start - work.offset
            if work.offset:
                mine += [work] if begin <= at < end else []
            elif (first := max(begin - at, 0)) < (last := min(end - at, length)):
                mine.append(Work(work.epoch, work.start + first, work.start + last))
            at += length
        return Position(epoch, tuple(mine))

    def _share(self, epoch: int) -> Work:
        return Work(epoch, self.total * self.rank // self.world, self.total * (self.rank + 1) // self.world)

    def _up_to(self, epoch: int, position: Position) -> list[Work]:
        """Return what is left up to the end of `epoch`, blocks that are begun apart from the rest."""
        left = []
        for work in [*position.todo, *(self._share(later) for later in range(position.epoch + 1, epoch + 1))]:
            stop = min(work.start + self.block, work.stop) if work.offset else work.start
            left += [work._replace(stop=stop)] if work.offset else []
            left += [Work(work.epoch, stop, work.stop)] if stop < work.stop else []
        return left
