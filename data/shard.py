"""Shards: tar files of packs, written deterministically and moved into place only when complete."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rung.data.graph import edge_counts
from rung.data.pack import encode
from rung.data.table import StructureTable
from rung.data.tar import members

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


def write_shard(table: StructureTable, path: Path, split: str, *, pack_atoms: int = PACK_ATOMS) -> ShardInfo:
    """Write the structures of `table`, in order, as one shard and return what a manifest says of it.

    A pack closes before it exceeds `pack_atoms`; a larger structure is a pack of its own. The same structures give the
    same bytes. Raises ValueError for atoms at one place; see `rung.data.table.faults` for what else must be right.
    """
    packs = list(cut_packs(table, pack_atoms))
    contents = []
    for index, pack in enumerate(packs):
        data = encode(pack)
        contents.append((f"{path.stem}-{index:06d}-{zlib.crc32(data):08x}{PACK_SUFFIX}", data))
    data = tar_bytes(contents)
    write_beside(path, data)
    return ShardInfo(
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        packs=len(packs),
        structures=len(table),
        atoms=len(table.numbers),
        edges=int(edge_counts(table, EDGE_CUTOFF).sum()),
        split=split,
        labels=labels_per_pack(packs),
    )


def labels_per_pack(packs: Iterable[StructureTable]) -> dict[str, list[int]]:
    """Return fidelity -> number of structures that carry it in each pack."""
    packs = list(packs)
    fidelities = sorted({fidelity for pack in packs for fidelity in pack.fidelities})
    counts = {name: [int(np.count_nonzero(pack.carries(name))) for pack in packs] for name in fidelities}
    return {name: found for name, found in counts.items() if any(found)}


def cut_packs(table: StructureTable, pack_atoms: int) -> Iterator[StructureTable]:
    """Yield consecutive structures of at most `pack_atoms` atoms in all, or one larger structure."""
    offsets, start = table.offsets, 0
    while start < len(table):
        stop = int(np.searchsorted(offsets, offsets[start] + pack_atoms, "right")) - 1
        yield table.part(start, max(start + 1, stop))
        start = max(start + 1, stop)


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
    """Write `data` to a neighbour of `path`, flush it to disk and move it into place: no reader sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def tar_bytes(contents: Iterable[tuple[str, bytes]]) -> bytes:
    """Return an uncompressed tar of (name, content): no owners, no times, so that the bytes depend on these alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in contents:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()
