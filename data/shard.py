"""Shards: tar files of packs, written deterministically and moved into place only when complete."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rung.data.fidelity import check_name
from rung.data.graph import structure_graph
from rung.data.pack import encode
from rung.data.structure import Structure

EDGE_CUTOFF = 5.0  # angstrom; the cut-off at which a manifest counts edges, so that budgets can be planned
PACK_SUFFIX = ".safetensors"
_END_OF_TAR = bytes(1024)  # POSIX: a tar ends with two zero blocks of 512 bytes


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

    def __post_init__(self) -> None:
        # Manifests come from anywhere: a path or a command must not reach what opens shards.
        if not re.fullmatch(r"[A-Za-z0-9_.-]+\.tar", self.file):
            raise ValueError(f"shard '{self.file}': expected the plain name of a .tar file in the dataset's folder")


def write_shards(
    structures: Iterable[Structure],
    folder: Path,
    prefix: str,
    *,
    pack_atoms: int = 16384,
    shard_bytes: int = 100_000_000,
) -> list[ShardInfo]:
    """Write `<prefix>-000000.tar`, ... into `folder`, in the order given, and return what was written.

    `prefix` is the name of the split. A pack closes before it exceeds `pack_atoms` (a larger structure is a pack of its
    own), a shard once it exceeds `shard_bytes`. The same structures give the same bytes.
    Raises ValueError for a structure that `validate` refuses.
    """
    check_name(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    infos: list[ShardInfo] = []
    members: list[tuple[str, bytes]] = []
    contents: list[Structure] = []
    for index, pack in enumerate(_packs(structures, pack_atoms)):
        members.append((f"{prefix}-{index:06d}{PACK_SUFFIX}", encode(pack)))
        contents.extend(pack)
        if sum(len(data) for _, data in members) >= shard_bytes:
            infos.append(_write_shard(folder, prefix, len(infos), members, contents))
            members, contents = [], []
    if members:
        infos.append(_write_shard(folder, prefix, len(infos), members, contents))
    return infos


def read_packs(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (member name, bytes) of each pack of a local shard, in order.

    Raises ValueError naming the file for a truncated or foreign tar and for a member that is no plain pack name.
    """
    with path.open("rb") as file:
        if path.stat().st_size < len(_END_OF_TAR) or not _ends_complete(file):
            raise ValueError(f"{path}: truncated: the tar has no end-of-archive mark; fetch or build it again")
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    check_member(member.name, str(path))
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise ValueError(f"{path}: member '{member.name}': expected a regular file")
                    yield member.name, content.read()
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a readable tar ({error}); fetch or build it again") from error


def check_member(name: str, source: str) -> None:
    """Raise ValueError unless a tar member's name is that of a pack inside the shard (no path that could escape it)."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != PACK_SUFFIX:
        raise ValueError(f"{source}: member '{name}': expected a relative name ending in '{PACK_SUFFIX}', without '..'")


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


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Return an uncompressed tar of (name, content): no owners, no times, so that the bytes depend on these alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def _packs(structures: Iterable[Structure], pack_atoms: int) -> Iterator[list[Structure]]:
    pack: list[Structure] = []
    atoms = 0
    for structure in structures:
        if pack and atoms + structure.num_atoms > pack_atoms:
            yield pack
            pack, atoms = [], 0
        pack.append(structure)
        atoms += structure.num_atoms
    if pack:
        yield pack


def _write_shard(
    folder: Path, prefix: str, index: int, members: list[tuple[str, bytes]], contents: list[Structure]
) -> ShardInfo:
    file = f"{prefix}-{index:06d}.tar"
    edges = sum(structure_graph(structure, EDGE_CUTOFF).num_edges for structure in contents)
    data = tar_bytes(members)
    write_beside(folder / file, data)
    return ShardInfo(
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        packs=len(members),
        structures=len(contents),
        atoms=sum(s.num_atoms for s in contents),
        edges=edges,
        split=prefix,
    )


def _ends_complete(file: io.BufferedReader) -> bool:
    file.seek(-len(_END_OF_TAR), os.SEEK_END)
    complete = file.read() == _END_OF_TAR
    file.seek(0)
    return complete
