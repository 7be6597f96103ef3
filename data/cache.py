"""The fetched shards that this machine keeps: whole, held to their digests, bounded, shared by its processes.

`<sha256>.tar` is a whole shard, `<sha256>.<bytes>.partial` one that is arriving and the space promised to it.
`<sha256>.lock` is held while a shard is opened or fetched, so the processes of a node fetch it once; `space.lock`
while files are counted, evicted and renamed. The kernel frees the locks of a killed process; who comes next continues
its partial file.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rung.data.shard import ShardInfo, file_sha256

_FILE = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d+)\.partial)")

_log = logging.getLogger(__name__)
_verified: set[tuple[str, int, int]] = set()  # (digest, device, inode) of cached files that this process has hashed


class Partial:
    """A shard that is arriving: its bytes so far and their digest. What has arrived is kept for the next try."""

    def __init__(self, path: Path, shard: ShardInfo) -> None:
        self.path, self._shard = path, shard
        self._file = path.open("r+b", buffering=0)
        self._hash = hashlib.file_digest(self._file, "sha256")
        self.size, self.validator = self._file.tell(), ""  # validator: what the server calls this version of the file

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.size:
            self.path.unlink(missing_ok=True)

    @property
    def total(self) -> int:
        """Bytes of the whole shard, by the manifest."""
        return self._shard.bytes

    @property
    def fault(self) -> str:
        """How this is not the manifest's shard; empty when it is."""
        if self.size != self.total:
            return f"expected {self.total} bytes, found {self.size}"
        found = self._hash.hexdigest()
        return "" if found == self._shard.sha256 else f"expected SHA-256 {self._shard.sha256}, found {found}"

    def write(self, data: bytes) -> None:
        """Append `data`; when the disk does not take it, drop everything, so that a full disk is not left full."""
        self._hash.update(data)
        self.size += len(data)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError:
            self.restart()
            raise

    def restart(self) -> None:
        """Drop what has arrived."""
        self._file.seek(0)
        self._file.truncate()
        self._hash, self.size, self.validator = hashlib.sha256(), 0, ""

    def finish(self, path: Path) -> BinaryIO:
        """Flush to disk, move to `path` and return the file opened for reading."""
        os.fsync(self._file.fileno())
        file = self.path.open("rb")  # before it can be evicted
        _verified.add(_identity(self._shard, os.fstat(file.fileno())))
        with _locked(path.with_name("space.lock")):
            os.replace(self.path, path)
        return file


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards of at most `limit` bytes; the least recently used make room for others."""

    folder: Path
    limit: int

    def open(self, shard: ShardInfo, fill: Callable[[Partial], None]) -> BinaryIO:
        """Return the shard opened for reading; `fill` makes it whole when it is not here.

        The file stays readable when it is evicted. Raises OSError for a folder that cannot be written, and what `fill`
        raises.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{shard.sha256}.tar"
        with _locked(self._lock_of(shard.sha256)):
            if file := _open_whole(path, shard):
                return file
            with Partial(self._reserve(shard), shard) as partial:
                fill(partial)
                return partial.finish(path)

    def _reserve(self, shard: ShardInfo) -> Path:
        """Return the shard's partial file, made when it and all that is kept fit into `limit`."""
        path = self.folder / f"{shard.sha256}.{shard.bytes}.partial"
        # Who waits holds no space, and who holds space does not wait: no two processes can wait for each other.
        while busy := self._make_room(path, shard):
            with _locked(busy):
                pass
        return path

    def _make_room(self, path: Path, shard: ShardInfo) -> Path | None:
        """Evict least recently used files and make `path`; when downloads hold the space, return the lock of one."""
        busy = None
        with _locked(self.folder / "space.lock"):
            entries = self._entries()
            excess = sum(entry.bytes for entry in entries) - self.limit
            excess += 0 if path.exists() else shard.bytes
            for entry in entries:
                if excess <= 0:
                    break
                if entry.path == path:
                    continue
                if entry.path.suffix == ".tar" or entry.digest == shard.sha256:  # whose lock is ours
                    entry.path.unlink(missing_ok=True)
                elif not self._removed(entry):
                    busy = self._lock_of(entry.digest)
                    continue
                excess -= entry.bytes
            if excess > 0 and busy and not path.exists():
                return busy
            path.touch()
        return None

    def _entries(self) -> list[_Entry]:
        """Return what the folder holds, least recently used first."""
        entries = []
        for path in self.folder.iterdir():
            if match := _FILE.fullmatch(path.name):
                try:
                    status = path.stat()
                except FileNotFoundError:  # a failed download was deleted meanwhile
                    continue
                entries.append(_Entry(status.st_mtime_ns, path, match[1], int(match[2] or status.st_size)))
        return sorted(entries)

    def _removed(self, entry: _Entry) -> bool:
        """Remove a partial file unless a process is filling it."""
        with _locked(self._lock_of(entry.digest), wait=False) as free:
            if free:
                entry.path.unlink(missing_ok=True)
            return free

    def _lock_of(self, digest: str) -> Path:
        return self.folder / f"{digest}.lock"


class _Entry(NamedTuple):
    """A file of the cache and the bytes that it holds or was promised."""

    used: int  # ns
    path: Path
    digest: str
    bytes: int


def _open_whole(path: Path, shard: ShardInfo) -> BinaryIO | None:
    """Open a cached shard and mark it as used; None when there is none, or a damaged one, which is deleted."""
    try:
        identity = _identity(shard, path.stat())
        if identity not in _verified and (found := file_sha256(path)) != shard.sha256:
            _log.warning("%s: damaged in the cache (found SHA-256 %s); fetching '%s' again", path, found, shard.file)
            path.unlink()
            return None
        _verified.add(identity)
        os.utime(path)
        return path.open("rb")
    except FileNotFoundError:  # never there, or evicted meanwhile
        return None


def _identity(shard: ShardInfo, status: os.stat_result) -> tuple[str, int, int]:
    return shard.sha256, status.st_dev, status.st_ino


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock against other processes and threads; with `wait` false give False at once when another holds it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a forked child shares the file
