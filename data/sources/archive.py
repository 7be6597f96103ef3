"""Many small text files from a folder, a zip or a tar archive, without unpacking to disk."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rung.data.sources.source import PART_STRUCTURES, Part, cut

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


def text_parts(path: Path, suffix: str, per_part: int = PART_STRUCTURES) -> list[Part]:
    """Return parts of `per_part` files whose names end in `suffix`; a tar, which must be read from its start, is one.

    Raises ValueError for a file of another kind and for a folder or zip without such a file.
    """
    if not path.is_dir() and not zipfile.is_zipfile(path):
        if not _is_tar(path):
            expected = f"expected a folder, a zip or a tar archive of *{suffix} files"
            raise ValueError(f"{path}: {expected}, found {path.stat().st_size} bytes of something else")
        return [Part(path, bytes=path.stat().st_size)]
    if names := _names(path, suffix):
        return cut(path, len(names), per_part)
    raise ValueError(f"{path}: expected *{suffix} files, found none")


def read_texts(part: Part, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (stem, text) of the files of a part, in order; raise ValueError naming a file that cannot be read."""
    path = part.path
    if path.is_dir():
        for name in _names(path, suffix)[part.start : part.stop]:
            yield Path(name).stem, _decoded((path / name).read_bytes(), path, name)
        return
    reading = _zip_members(part, suffix) if zipfile.is_zipfile(path) else _tar_members(path, suffix)
    while (member := _next(reading, path)) is not None:
        yield Path(member[0]).stem, _decoded(member[1], path, member[0])


def _names(path: Path, suffix: str) -> list[str]:
    if path.is_dir():
        return sorted(
            file.relative_to(path).as_posix() for file in path.rglob(f"*{suffix}") if _wanted(file.name, suffix)
        )
    with zipfile.ZipFile(path) as archive:
        return sorted(name for name in archive.namelist() if _wanted(name, suffix))


def _wanted(name: str, suffix: str) -> bool:
    """Return whether a file is data; macOS puts hidden files of the same suffix beside them."""
    return name.endswith(suffix) and not name.rpartition("/")[2].startswith(".")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _zip_members(part: Part, suffix: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(part.path) as archive:
        for name in _names(part.path, suffix)[part.start : part.stop]:
            yield name, archive.read(name)


def _tar_members(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    found = False
    with tarfile.open(path) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps a record of every member read
            content = archive.extractfile(member) if member.isreg() and _wanted(member.name, suffix) else None
            if content is not None:
                found = True
                yield member.name, content.read()
    if not found:
        raise ValueError(f"{path}: expected *{suffix} files, found none")


def _next(members: Iterator[tuple[str, bytes]], path: Path) -> tuple[str, bytes] | None:
    try:
        return next(members, None)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path}: not a readable archive ({reason}); damaged or truncated? fetch it again")


def _decoded(data: bytes, path: Path, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {name}: expected UTF-8 text ({error})") from error
