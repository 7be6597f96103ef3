"""Streams: the endless, resumable sequence of one task's structures on one consumer; one finite pass for evaluation.

A consumer is one loader worker of one data-parallel rank; `rank` and `world` number the consumers, not the processes of
the launcher. WebDataset opens and reads the tars (local files, URLs, `pipe:` commands); who reads what is decided here,
because its own splitter asks the environment, which knows nothing of process groups.

Dealing. In every epoch the shards are permuted and their packs, in that order, are cut into one contiguous range per
consumer, so that a consumer opens only the shards it needs. A small or sparsely labelled split would leave consumers
with unequal shares, or none; there every consumer reads every pack and keeps each `world`-th labelled structure.

Order. A consumer reads its packs in blocks of BLOCK_PACKS and shuffles the structures of a block. The order is a pure
function of (seed, epoch, task, rank, world), so the state is a few integers and resuming reads one block.
"""

from __future__ import annotations

import dataclasses
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.gopen import gopen, set_options
from webdataset.tariterators import tar_file_iterator

from rung.data.manifest import read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.shard import ShardInfo, check_member
from rung.data.structure import Labels, Structure

STATE_VERSION = 1
BLOCK_PACKS = 16  # structures are shuffled within this many packs, about 260,000 atoms
CACHE_BYTES = 256_000_000  # per stream; a split that fits is read from disk once

# Packs are dealt whole when a consumer gets this many and each holds this many labels; else structures are dealt.
_MIN_PACKS_PER_CONSUMER = 8
_MIN_LABELS_PER_PACK = 8
_STRUCTURE_OVERHEAD = 1250  # bytes of the Python objects around the arrays of one structure (measured: 1,220)

_log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """The place of a pack in a split; it keeps its place when the pack turns out to be unreadable."""

    shard: int  # in the manifest's order
    member: int  # in the tar's order
    number: int  # in the split


class PackReader:
    """Reads the packs of one split and keeps the structures that carry `fidelity`, with the labels of no other.

    Unreadable packs are logged and listed in `bad`; one more than `max_bad` is a ValueError.
    """

    def __init__(
        self, dataset: str | Path, fidelity: str, split: str, *, max_bad: int = 0, shard_url: str = ""
    ) -> None:
        # Only the user may name a URL or a command: a manifest comes from anywhere and names plain files.
        self._shard_url = shard_url or f"{resolve_dataset(dataset).absolute()}/{{file}}"
        if "{file}" not in self._shard_url:
            raise ValueError(f"shard_url: expected '{{file}}' where the shard's name goes, found '{shard_url}'")
        manifest = read_manifest(dataset)
        entry = manifest.entry(fidelity)
        self.dataset, self.fidelity, self.split, self.max_bad = manifest.name, fidelity, split, max_bad
        self.shards: list[ShardInfo] = manifest.shards_of(split)
        # A structure may have either label alone, so the larger count is a lower bound.
        self.num_labels = max(entry.num_energies.get(split, 0), entry.num_forces.get(split, 0))
        self.bad: dict[str, str] = {}  # unreadable pack -> reason

    def __str__(self) -> str:
        return f"dataset '{self.dataset}', fidelity '{self.fidelity}', split '{self.split}'"

    def slots(self, shards: Sequence[int]) -> list[Slot]:
        """Return the places of all packs of the split, shard by shard in the order given."""
        first = np.cumsum([0, *(shard.packs for shard in self.shards)])
        return [Slot(s, member, int(first[s]) + member) for s in shards for member in range(self.shards[s].packs)]

    def read(self, slots: Sequence[Slot]) -> Iterator[list[Structure]]:
        """Yield the labelled structures of each pack, none for an unreadable one.

        `slots` of one shard are neighbours and ascend, so that every shard is opened once and read forwards.
        """
        for shard, group in groupby(slots, key=lambda slot: slot.shard):
            yield from self._read_shard(self.shards[shard], [slot.member for slot in group])

    def _read_shard(self, shard: ShardInfo, members: Sequence[int]) -> Iterator[list[Structure]]:
        with gopen(self._shard_url.replace("{file}", shard.file)) as file:
            # A command whose last bytes nobody reads ends badly without having failed; what is read is checked below.
            set_options(file, ignore_errors=True)
            packs = tar_file_iterator(file)
            num_read, fault = 0, ""
            for member in members:
                pack: dict[str, Any] | None = None
                try:
                    while num_read <= member and not fault:
                        pack = next(packs, None)
                        num_read += 1
                        if pack is None:
                            fault = "the tar ends early"
                except (tarfile.TarError, EOFError) as error:
                    pack, fault = None, f"the tar is damaged ({error})"
                if pack is None:
                    self._count_bad(f"{shard.file}: pack {member} of {shard.packs}", fault)
                    yield []
                else:
                    yield self._decode(shard.file, pack["fname"], pack["data"])

    def _decode(self, file: str, name: str, data: bytes) -> list[Structure]:
        source = f"{file}: {name}"
        try:
            check_member(name, file)
            structures = decode(data, source, self.fidelity)
        except ValueError as error:
            self._count_bad(source, str(error))
            return []
        return [_copy(structure) for structure in structures]

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


def _copy(structure: Structure) -> Structure:
    """Return the structure in memory of its own, so that one kept in a cache does not keep its whole pack alive."""

    def copy(array: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        return None if array is None else array.copy()

    return dataclasses.replace(
        structure,
        numbers=structure.numbers.copy(),
        positions=structure.positions.copy(),
        cell=structure.cell.copy(),
        pbc=structure.pbc.copy(),
        labels={
            name: Labels(labels.energy, copy(labels.forces), copy(labels.stress), copy(labels.dipole))
            for name, labels in structure.labels.items()
        },
    )


class ShardStream:
    """Endless iterator over the structures of one split that carry a label at `fidelity`; see the top of this file."""

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
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`dataset` is a folder, its dataset.yaml or 'builtin'; `world` counts consumers and `rank` is one of them.

        `shard_url` is where the shards are when they do not lie beside the manifest, with {file} for their name:
        'https://host/set/{file}' or 'pipe:aws s3 cp s3://bucket/set/{file} -'.
        Raises ValueError for an unknown fidelity or split, and when there are fewer labels than consumers.
        """
        _check_rank(rank, world)
        if seed < 0:
            raise ValueError(f"stream: seed: expected a whole number >= 0, found {seed}")
        self.rank, self.world, self.seed = rank, world, seed
        self._shuffle = shuffle
        self._reader = PackReader(dataset, fidelity, split, max_bad=max_bad, shard_url=shard_url)
        if self._reader.num_labels < world:
            raise ValueError(self._too_few(f"{self._reader.num_labels} labelled structures"))
        self._cache: dict[int, list[Structure]] = {}
        self._cache_room = cache_bytes
        num_packs = sum(shard.packs for shard in self._reader.shards)
        many_packs = num_packs >= _MIN_PACKS_PER_CONSUMER * world
        self._deal_packs = many_packs and self._reader.num_labels >= _MIN_LABELS_PER_PACK * num_packs
        self._task = zlib.crc32(f"{self._reader.dataset}/{fidelity}/{split}".encode())
        content = zlib.crc32("".join(shard.sha256 for shard in self._reader.shards).encode())
        # What the order depends on, beside the position.
        self._identity = {"version": STATE_VERSION, "world": world, "rank": rank, "seed": seed}
        self._identity |= {"task": self._task, "content": content, "shuffle": int(shuffle)}
        self._epoch = self._block = self._offset = 0
        self._structures = self._generate()

    @property
    def fidelity(self) -> str:
        return self._reader.fidelity

    @property
    def bad(self) -> Mapping[str, str]:
        """Unreadable packs met so far, with the reason."""
        return self._reader.bad

    def __iter__(self) -> Iterator[Structure]:
        return self

    def __next__(self) -> Structure:
        return next(self._structures)

    def state(self) -> dict[str, int]:
        """Return where the next structure is; `load_state` continues there in a new stream of the same arguments."""
        position = {"epoch": self._epoch, "block": self._block, "offset": self._offset}
        return self._identity | position

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue at `state`; raises ValueError naming what differs when it was saved under another order."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"stream state of {self._reader}: {name}: expected {value}, found {state.get(name)}; "
                    "resume with the dataset, seed, ranks and loader workers it was saved with"
                )
        self._epoch, self._block, self._offset = state["epoch"], state["block"], state["offset"]
        self._structures = self._generate()

    def _generate(self) -> Iterator[Structure]:
        while True:
            whole_epoch, empty = self._block == 0, True
            slots = self._deal()[self._block * BLOCK_PACKS :]
            unread = self._reader.read([slot for slot in slots if slot.number not in self._cache])
            for start in range(0, len(slots), BLOCK_PACKS):
                structures = [s for slot in slots[start : start + BLOCK_PACKS] for s in self._pack(slot, unread)]
                empty = empty and not structures
                order = np.arange(len(structures))
                if self._shuffle:
                    order = self._random(self.rank, self._block).permutation(order)
                for index in order[self._offset :]:
                    self._offset += 1
                    yield structures[index]
                self._block, self._offset = self._block + 1, 0
            if whole_epoch and empty:
                raise ValueError(self._too_few("no labelled structure in the share"))
            self._epoch, self._block = self._epoch + 1, 0

    def _deal(self) -> list[Slot]:
        """Return the packs that this consumer reads in the current epoch, in order."""
        shards = np.arange(len(self._reader.shards))
        if self._shuffle:
            shards = self._random().permutation(shards)
        slots = self._reader.slots(shards.tolist())
        if not self._deal_packs:
            return slots
        return slots[len(slots) * self.rank // self.world : len(slots) * (self.rank + 1) // self.world]

    def _pack(self, slot: Slot, unread: Iterator[list[Structure]]) -> list[Structure]:
        """Return this consumer's structures of one pack: from memory, else the next of `unread`."""
        if slot.number in self._cache:
            return self._cache[slot.number]
        structures = next(unread)
        if not self._deal_packs:
            # Counting from the pack's number deals the first structures of many sparse packs to different consumers.
            structures = structures[(self.rank - slot.number) % self.world :: self.world]
        size = sum(_STRUCTURE_OVERHEAD + 28 * structure.num_atoms for structure in structures)
        # Nothing is evicted: an epoch visits every pack once, and a full cache of recent packs would never hit.
        if size <= self._cache_room:
            self._cache[slot.number] = structures
            self._cache_room -= size
        return structures

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self._epoch, self._task, *key])

    def _too_few(self, found: str) -> str:
        return (
            f"{self._reader}: {found} for consumer {self.rank} of {self.world} (data-parallel ranks x loader workers); "
            "use fewer ranks or workers, or a split with more labels at this fidelity"
        )


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"stream: rank: expected 0..{world - 1}, found {rank}")


def epoch_structures(
    dataset: str | Path,
    fidelity: str,
    split: str,
    *,
    rank: int = 0,
    world: int = 1,
    max_bad: int = 0,
    shard_url: str = "",
) -> Iterator[Structure]:
    """Yield every structure of a split that carries `fidelity` once, in the order of the shards: for evaluation.

    Of `world` callers each gets its own structures (maybe none) and together they get all.
    """
    _check_rank(rank, world)
    reader = PackReader(dataset, fidelity, split, max_bad=max_bad, shard_url=shard_url)
    index = 0
    for structures in reader.read(reader.slots(range(len(reader.shards)))):
        for structure in structures:
            if index % world == rank:
                yield structure
            index += 1
