"""Shards: tar files of packs, written deterministically and moved into place only when complete."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rung.data.graph import edge_counts
from rung.data.pack import encode
from rung.data.table import StructureTable
from rung.data.tar import MAX_MEMBERS, members

EDGE_CUTOFF = 5.0  # angstrom; the cut-off at which a manifest counts edges, so that budgets can be planned
PACK_ATOMS = 16384
SHARD_BYTES = 100_000_000
PACK_SUFFIX = ".safetensors"
_CHECKED_NAME = re.compile(rf"-([0-9a-f]{{8}}){re.escape(PACK_SUFFIX)}")


@dataclass(frozen=True)
class ShardInfo:
    """What a manifest says of one shard."""

    file: str  # name inside the dataset's folder
    sha256: str
    bytes: int
    packs: int
    structures: int
    atoms: int
    edges: int  # directed, at the manifest's cut-off
    split: str
    labels: dict[str, list[int]]  # fidelity -> structures that carry it, in each pack

    def __post_init__(self) -> None:
        # Manifests come from anywhere: a path or a command must not reach what opens shards.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar", self.file):
            raise ValueError(f"shard '{self.file}': expected the plain name of a .tar file in the dataset's folder")


def write_shard(packs: Iterable[StructureTable], path: Path, split: str) -> ShardInfo:
    """Write one shard, a pack from each table, and return what a manifest says of it.

    The same structures give the same bytes. Raises ValueError for atoms at one place; see `rung.data.table.faults` for
    what else must be right.
    """
    seen = _Seen(defaultdict(list))

    def contents() -> Iterator[tuple[str, bytes]]:
        for index, pack in enumerate(packs):
            if index == MAX_MEMBERS:
                raise ValueError(f"{path.name}: more than {MAX_MEMBERS} packs; lower shard_bytes or raise pack_atoms")
            data = encode(pack)
            seen.add(pack, index)
            yield f"{path.stem}-{index:06d}-{zlib.crc32(data):08x}{PACK_SUFFIX}", data

    with writing_beside(path) as file:
        write_tar(file, contents())
    return ShardInfo(
        file=path.name,
        sha256=file.digest.hexdigest(),
        bytes=file.size,
        packs=seen.packs,
        structures=seen.structures,
        atoms=seen.atoms,
        edges=seen.edges,
        split=split,
        labels={name: [*counts, *[0] * (seen.packs - len(counts))] for name, counts in sorted(seen.labels.items())},
    )


@dataclass
class _Seen:
    """What the packs of a shard hold."""

    labels: defaultdict[str, list[int]]
    packs: int = 0
    structures: int = 0
    atoms: int = 0
    edges: int = 0

    def add(self, pack: StructureTable, index: int) -> None:
        self.packs = index + 1
        self.structures += len(pack)
        self.atoms += len(pack.numbers)
        self.edges += int(edge_counts(pack, EDGE_CUTOFF).sum())
        for name in pack.fidelities:
            if count := int(np.count_nonzero(pack.carries(name))):
                self.labels[name] += [0] * (index - len(self.labels[name])) + [count]


def read_packs(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (member name, bytes) of each pack of a local shard, in order.

    Raises ValueError naming the file for a tar that `rung.data.tar.members` refuses and for a pack whose checksum is
    not that of its name.
    """
    with path.open("rb") as file:
        for member in members(file, str(path)):
            file.seek(member.offset)
            data = file.read(member.size)
            check_pack(member.name, data, str(path))
            yield member.name, data


def check_pack(name: str, data: bytes, source: str) -> None:
    """Raise ValueError when a member's name ends in a CRC-32 that is not that of `data`."""
    stated = _CHECKED_NAME.search(name)
    if stated and int(stated[1], 16) != zlib.crc32(data):
        raise ValueError(f"{source}: {name}: damaged: its CRC-32 is {zlib.crc32(data):08x}; fetch or build it again")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_beside(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `writing_beside` does."""
    with writing_beside(path) as file:
        file.write(data)


class HashedFile:
    """A file that is being written, with the digest and the size of what is in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


@contextmanager
def writing_beside(path: Path) -> Iterator[HashedFile]:
    """Give a neighbour of `path` to write; flush it to disk and move it into place: no reader sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_tar(file: HashedFile, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write an uncompressed tar of (name, content): no owners, no times, so that the bytes depend on these alone."""
    for name, data in contents:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.write(data)
        file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
    file.write(bytes(-file.size % tarfile.RECORDSIZE))


def tar_bytes(contents: Iterable[tuple[str, bytes]]) -> bytes:
    """Return what `write_tar` writes."""
    buffer = io.BytesIO()
    write_tar(HashedFile(buffer), contents)
    return buffer.getvalue()
