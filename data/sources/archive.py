"""Many small files from a folder, a zip or a tar archive, without unpacking to disk.

A folder and a zip have an index and are read in parts (`text_parts`, `read_texts`). A tar is read as a stream, from its
start and once (`tar_members`): one member is in memory at a time, and what compresses it is held to its checksum.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rung.data.sources.source import Part, cut_groups, span, whole

_CHUNK = 1 << 20  # bytes
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
_COMPRESSED: dict[bytes, Callable[..., Any]] = {  # by how a file begins
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged or truncated file raises into ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: not readable ({reason}); damaged or truncated? fetch it again") from error


def text_parts(path: Path, suffix: str, per_file: int = 1) -> list[Part]:
    """Return parts whose items are files with names that end in `suffix`, of some `per_file` structures; a tar is one.

    Raises ValueError for a file of another kind and for a folder or zip without such a file.
    """
    with damage_named(path):
        if not path.is_dir() and not zipfile.is_zipfile(path):
            if not tarfile.is_tarfile(path):
                expected = f"expected a folder, a zip or a tar archive of *{suffix} files"
                raise ValueError(f"{path}: {expected}, found {path.stat().st_size} bytes of something else; truncated?")
            return [whole(path)]
        if names := _names(path, suffix):
            return cut_groups(path, [per_file] * len(names), [0] * len(names))
    raise ValueError(f"{path}: expected *{suffix} files, found none")


def read_texts(part: Part, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (stem, text) of the files of a part, in order; raise ValueError naming a file that cannot be read."""
    path = part.path
    with damage_named(path):
        files: Iterator[tuple[str, bytes]]
        if path.is_dir():
            files = ((name, (path / name).read_bytes()) for name in _chosen(part, suffix))
        elif zipfile.is_zipfile(path):
            files = _zip_members(part, suffix)
        else:
            files = ((name, content.read()) for name, _, content in tar_members(path, suffix))
        empty = True
        for name, data in files:
            empty = False
            yield Path(name).stem, _decoded(data, path, name)
    if empty:
        raise ValueError(f"{path}: expected *{suffix} files, found none")


def tar_members(path: Path, suffix: str) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and content of the regular files of a tar whose names end in `suffix`, in its order.

    Links, devices and hidden files are no data and are passed over. A content must be read before the next one.
    Raises what `damage_named` turns into ValueError.
    """
    with _decompressed(path) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps a record of each of millions
            content = archive.extractfile(member) if member.isreg() and _wanted(member.name, suffix) else None
            if content is not None:
                yield member.name, member.size, content
        while raw.read(_CHUNK):  # tarfile stops before the end, where a checksum is
            pass


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        start = file.read(max(map(len, _COMPRESSED)))
    opener = next((opener for mark, opener in _COMPRESSED.items() if start.startswith(mark)), io.open)
    return cast(IO[bytes], opener(path, "rb"))


def _chosen(part: Part, suffix: str) -> list[str]:
    names = _names(part.path, suffix)
    return [names[index] for index in span(part, len(names))]


def _names(path: Path, suffix: str) -> list[str]:
    if path.is_dir():
        files = (file.relative_to(path).as_posix() for file in path.rglob(f"*{suffix}"))
        return sorted(name for name in files if _wanted(name, suffix))
    with zipfile.ZipFile(path) as archive:
        return sorted(name for name in archive.namelist() if _wanted(name, suffix))


def _wanted(name: str, suffix: str) -> bool:
    """Return whether a file is data; macOS puts hidden files of the same suffix beside them."""
    return name.endswith(suffix) and not name.rpartition("/")[2].startswith(".")


def _zip_members(part: Part, suffix: str) -> Iterator[tuple[str, bytes]]:
    names = _chosen(part, suffix)
    with zipfile.ZipFile(part.path) as archive:
        for name in names:
            yield name, archive.read(name)


def _decoded(data: bytes, path: Path, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {name}: expected UTF-8 text ({error})") from error
