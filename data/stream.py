"""Streams: the endless, resumable sequence of one task's structures on one consumer; one finite pass for evaluation.

A consumer is one loader worker of one data-parallel rank; `rank` and `world` number the consumers, not the processes of
the launcher. Who reads what is decided in `dealing.py`, from the manifests alone: the environment, which WebDataset's
own splitter asks, knows nothing of process groups.

Order. An epoch's positions are the labelled structures of the shards, the shards permuted and the whole rotated by a
random number, so that a consumer meets another part of a small split in every epoch. A consumer reads its positions in
blocks and shuffles each. All of it is a pure function of (seed, epoch, task, rank, world): the state is a few integers
and resuming reads one block.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rung.data.dealing import Dealing, Position, Segment, Work
from rung.data.fetch import RemoteConfig, ShardSource
from rung.data.manifest import read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.shard import ShardInfo, check_pack
from rung.data.structure import Structure
from rung.data.table import StructureTable, offsets_of
from rung.data.tar import Member, walk

STATE_VERSION = 2
BLOCK_ATOMS = 1 << 18  # structures are shuffled within blocks of about this many atoms ...
MAX_BLOCK = 8192  # ... and at most this many structures

_log = logging.getLogger(__name__)


@dataclass
class _OpenShard:
    """The shard that was read last: streams read forwards, so the next structures are mostly in it."""

    index: int
    file: BinaryIO
    members: list[Member]
    fault: str  # of the tar, after these members
    pack: int = -1  # the pack that was decoded last
    table: StructureTable | None = None  # None: unreadable


class LabelReader:
    """Reads the structures of one split that carry `fidelity`, with the labels of no other, by their number.

    Unreadable packs are logged and listed in `bad`; one more than `max_bad` is a ValueError.
    """

    _open: _OpenShard | None = None

    def __init__(
        self,
        dataset: str | Path,
        fidelity: str,
        split: str,
        *,
        max_bad: int = 0,
        shard_url: str = "",
        remote: RemoteConfig = RemoteConfig(),  # noqa: B008 (frozen)
    ) -> None:
        # Only the user may name a URL or a command: a manifest comes from anywhere and names plain files.
        self._source = ShardSource(shard_url or f"{resolve_dataset(dataset).absolute()}/{{file}}", remote)
        manifest = read_manifest(dataset)
        manifest.entry(fidelity)
        self.dataset, self.fidelity, self.split, self.max_bad = manifest.name, fidelity, split, max_bad
        self.shards: list[ShardInfo] = [s for s in manifest.shards_of(split) if sum(s.labels.get(fidelity, ()))]
        self._packs = [offsets_of(np.array(shard.labels[fidelity])) for shard in self.shards]
        self.counts = np.array([packs[-1] for packs in self._packs], np.int64)  # labelled structures of each shard
        self.bad: dict[str, str] = {}  # unreadable pack -> reason

    def __del__(self) -> None:
        self.close()

    def __str__(self) -> str:
        return f"dataset '{self.dataset}', fidelity '{self.fidelity}', split '{self.split}'"

    def read(self, shard: int, start: int, stop: int) -> tuple[StructureTable, NDArray[np.bool_]]:
        """Return labelled structures start..stop of a shard, and which of them could be read; [stop - start]."""
        offsets = self._packs[shard]
        found = np.zeros(stop - start, np.bool_)
        tables = []
        first = int(np.searchsorted(offsets, start, "right")) - 1
        for pack in range(first, int(np.searchsorted(offsets, stop, "left"))):
            low, high = max(start, int(offsets[pack])), min(stop, int(offsets[pack + 1]))
            table = self._pack(shard, pack) if low < high else None
            if table is not None:
                tables.append(table.part(low - int(offsets[pack]), high - int(offsets[pack])))
                found[low - start : high - start] = True
        return StructureTable.concatenate(tables), found

    def every(self, step: int, first: int = 0) -> Iterator[StructureTable]:
        """Yield labelled structures first, first + step, ... in the order of the shards, reading only their packs."""
        begin = 0  # of the pack, among all labelled structures
        for shard, offsets in enumerate(self._packs):
            for pack, count in enumerate(np.diff(offsets).tolist()):
                rows = np.arange((first - begin) % step if begin > first else first - begin, count, step)
                begin += count
                table = self._pack(shard, pack) if len(rows) else None
                if table is not None:
                    yield table.take(rows)

    def _pack(self, shard: int, pack: int) -> StructureTable | None:
        opened = self._open_shard(shard)
        if opened.pack != pack:
            info = self.shards[shard]
            opened.pack, opened.table = pack, None
            if pack >= len(opened.members):
                self._count_bad(f"{info.file}: pack {pack} of {info.packs}", opened.fault or "the tar ends early")
                return None
            member = opened.members[pack]
            try:
                opened.table = self._decode(info, member, opened.file, pack)
            except ValueError as error:
                self._count_bad(f"{info.file}: {member.name}", str(error))
        return opened.table

    def _decode(self, info: ShardInfo, member: Member, file: BinaryIO, pack: int) -> StructureTable:
        file.seek(member.offset)
        data = file.read(member.size)
        check_pack(member.name, data, info.file)
        table = decode(data, f"{info.file}: {member.name}").at(self.fidelity)
        if len(table) != (stated := info.labels[self.fidelity][pack]):
            raise ValueError(f"manifest says {stated} structures with labels at '{self.fidelity}', found {len(table)}")
        return table

    def _open_shard(self, shard: int) -> _OpenShard:
        if self._open is None or self._open.index != shard:
            self.close()
            info = self.shards[shard]
            file = self._source.open(info)
            self._open = _OpenShard(shard, file, *_readable_members(file, info.file))
        return self._open

    def close(self) -> None:
        """Close the shard that is open; the next read opens one again."""
        if self._open is not None:
            self._open.file.close()
            self._open = None

    def _count_bad(self, pack: str, reason: str) -> None:
        if pack not in self.bad:
            _log.warning("%s: skipped unreadable pack: %s: %s", self, pack, reason)
        self.bad[pack] = reason
        if len(self.bad) > self.max_bad:
            listed = "; ".join(f"{name}: {why}" for name, why in self.bad.items())
            raise ValueError(
                f"{self}: {len(self.bad)} unreadable pack(s), max_bad is {self.max_bad}: {listed}; "
                "run 'rung data verify' and fetch or build the shards again"
            )


@dataclass
class _Block:
    """The block that was read last, in shuffled order; streams deal a block in many portions."""

    place: tuple[int, int, int] = (-1, -1, -1)  # epoch and positions
    table: StructureTable = field(default_factory=lambda: StructureTable.of([]))
    row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # of each structure; -1: unreadable


class ShardStream:
    """Endless stream of the structures of one split that carry a label at `fidelity`; see the top of this file."""

    def __init__(
        self,
        dataset: str | Path,
        fidelity: str,
        split: str = "train",
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        max_bad: int = 0,
        shard_url: str = "",
        remote: RemoteConfig = RemoteConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """`dataset` is a folder, its dataset.yaml or 'builtin'; `world` counts consumers and `rank` is one of them.

        `shard_url` is where the shards are when they do not lie beside the manifest, with {file} for their name:
        'https://host/set/{file}' or 'pipe:aws s3 cp s3://bucket/set/{file} -'; see `rung.data.fetch`.
        Raises ValueError for an unknown fidelity or split, and when there are fewer labels than consumers.
        """
        _check_rank(rank, world)
        if seed < 0:
            raise ValueError(f"stream: seed: expected a whole number >= 0, found {seed}")
        self.rank, self.world, self.seed = rank, world, seed
        self._shuffle = shuffle
        self._reader = reader = LabelReader(
            dataset, fidelity, split, max_bad=max_bad, shard_url=shard_url, remote=remote
        )
        total = int(reader.counts.sum())
        if total < world:
            raise ValueError(
                f"{reader}: {total} labelled structures for consumer {rank} of {world} (data-parallel ranks x loader "
                "workers); use fewer ranks or workers, or a split with more labels at this fidelity"
            )
        atoms = sum(shard.atoms for shard in reader.shards) / sum(shard.structures for shard in reader.shards)
        self.dealing = Dealing(total, min(MAX_BLOCK, max(1, round(BLOCK_ATOMS / atoms))), rank, world)
        self.position = self.dealing.start()
        self._task = zlib.crc32(f"{reader.dataset}/{fidelity}/{split}".encode())
        content = zlib.crc32("".join(shard.sha256 for shard in reader.shards).encode())
        # What the order depends on, beside the position.
        self._identity = {"version": STATE_VERSION, "seed": seed, "task": self._task, "content": content}
        self._identity |= {"shuffle": int(shuffle), "world": world, "rank": rank}
        self._block = _Block()
        self._lost = 0  # structures in a row that could not be read
        self._order: tuple[int, NDArray[np.int64], NDArray[np.int64], int] | None = None

    @property
    def fidelity(self) -> str:
        return self._reader.fidelity

    @property
    def bad(self) -> Mapping[str, str]:
        """Unreadable packs met so far, with the reason."""
        return self._reader.bad

    def take(self, count: int) -> tuple[StructureTable, NDArray[np.bool_]]:
        """Return the next `count` structures, and which of them could be read; [count]."""
        position, segments = self.dealing.advance(self.position, count)
        tables, found = [], []
        for segment in segments:
            block = self._read(segment)
            row = block.row[segment.first : segment.last]
            found.append(row >= 0)
            tables.append(block.table.take(row[row >= 0]))
        readable = np.concatenate([np.zeros(0, np.bool_), *found])
        self._lost = 0 if readable.any() else self._lost + count
        if self._lost > self.dealing.total:  # a whole epoch: the next would be no better
            raise ValueError(f"{self._reader}: none of its {self.dealing.total} labelled structures can be read")
        self.position = position  # not before the reading has succeeded
        return StructureTable.concatenate(tables), readable

    def __iter__(self) -> Iterator[Structure]:
        """Yield structures one by one, without end; the position is always right after the last one."""
        while True:
            table, _ = self.take(1)
            yield from table

    def state(self, position: Position | None = None) -> dict[str, Any]:
        """Return where the next structure is, or the state of another position; fit for JSON.

        `load_state` continues there in a new stream of the same arguments.
        """
        position = position or self.position
        return self._identity | {"epoch": position.epoch, "todo": [list(work) for work in position.todo]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved under another order."""
        self.position = self._position(state, self._identity)

    def redeal(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Continue with this consumer's part of what the consumers of another world had left; by their ranks.

        None stands for a consumer that had not begun. Raises ValueError as `load_state` does, but for the world.
        """
        if not states:
            raise ValueError(f"stream states of {self._reader}: expected one for each consumer, found none")
        positions = []
        for rank, state in enumerate(states):
            identity = self._identity | {"world": len(states), "rank": rank}
            before = Dealing(self.dealing.total, self.dealing.block, rank, len(states))
            positions.append(before.start() if state is None else self._position(state, identity))
        self.position = self.dealing.redeal(positions)

    def _position(self, state: Mapping[str, Any], identity: Mapping[str, int]) -> Position:
        for name, value in identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"stream state of {self._reader}: {name}: expected {value}, found {state.get(name)}; "
                    "resume with the dataset, seed, ranks and loader workers it was saved with, or deal it again"
                )
        return Position(state["epoch"], tuple(Work(*work) for work in state["todo"]))

    def _read(self, segment: Segment) -> _Block:
        """Return the block of a segment, from memory when it was the last one."""
        place = (segment.epoch, segment.start, segment.stop)
        if self._block.place != place:
            tables, found = zip(*self._positions(segment.epoch, segment.start, segment.stop), strict=True)
            readable = np.concatenate(found)
            row = np.where(readable, np.cumsum(readable) - 1, -1)
            if self._shuffle:
                row = self._random(segment.epoch, segment.start, segment.stop).permutation(row)
            self._block = _Block(place, StructureTable.concatenate(tables), row)
        return self._block

    def _positions(self, epoch: int, start: int, stop: int) -> Iterator[tuple[StructureTable, NDArray[np.bool_]]]:
        """Yield the structures at positions start..stop of an epoch, a shard at a time."""
        shards, ends, rotation = self._epoch_order(epoch)
        total = self.dealing.total
        at = (start + rotation) % total
        left = stop - start
        while left:
            index = int(np.searchsorted(ends, at, "right")) - 1
            count = min(left, int(ends[index + 1]) - at)
            first = at - int(ends[index])
            yield self._reader.read(int(shards[index]), first, first + count)
            at, left = (at + count) % total, left - count

    def _epoch_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the order of the shards, where each begins (and the last ends), and the rotation."""
        if self._order is None or self._order[0] != epoch:
            shards, rotation = np.arange(len(self._reader.shards)), 0
            if self._shuffle:
                random = self._random(epoch)
                shards, rotation = random.permutation(shards), int(random.integers(self.dealing.total))
            self._order = epoch, shards, offsets_of(self._reader.counts[shards]), rotation
        return self._order[1:]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self._task, *key])


def epoch_structures(
    dataset: str | Path,
    fidelity: str,
    split: str,
    *,
    every: int = 1,
    rank: int = 0,
    world: int = 1,
    max_bad: int = 0,
    shard_url: str = "",
    remote: RemoteConfig = RemoteConfig(),  # noqa: B008 (frozen)
) -> Iterator[Structure]:
    """Yield each `every`-th structure of a split that carries `fidelity`, once, in the order of the shards.

    Of `world` callers each gets its own structures (maybe none) and together they get all.
    """
    _check_rank(rank, world)
    if every < 1:
        raise ValueError(f"epoch_structures: every: expected a whole number >= 1, found {every}")
    reader = LabelReader(dataset, fidelity, split, max_bad=max_bad, shard_url=shard_url, remote=remote)
    for table in reader.every(every * world, every * rank):
        yield from table


def _readable_members(file: BinaryIO, source: str) -> tuple[list[Member], str]:
    """Return the members of a tar up to where it is damaged, and how it is."""
    found: list[Member] = []
    try:
        for member in walk(file, source):
            found.append(member)
    except ValueError as error:
        return found, str(error)
    return found, ""


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"stream: rank: expected 0..{world - 1}, found {rank}")
