"""A .tar.gz read as a stream: members one after the other, nothing written to disk, bounded memory, damage named."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_CHUNK = 1 << 20  # bytes


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged or truncated file raises into ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        message = f"{path}: not readable ({type(error).__name__}: {error}); damaged or truncated? Fetch it again"
        raise ValueError(message) from error


def tar_members(path: Path, suffix: str) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and content of the regular files of a .tar.gz whose names end in `suffix`, in its order.

    Links, devices and hidden files are no data and are passed over. A content must be read before the next one.
    Raises what `damage_named` turns into ValueError.
    """
    with gzip.open(path, "rb") as raw:
        with tarfile.open(fileobj=raw, mode="r|") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps a record of each of millions
                file = member.name.rpartition("/")[2]
                if not member.isfile() or file.startswith(".") or not file.endswith(suffix):
                    continue
                content = archive.extractfile(member)
                if content is not None:
                    yield member.name, member.size, content
        while raw.read(_CHUNK):  # tarfile stops before the end, where gzip holds its checksum
            pass
