"""Where the packs of a shard lie: a strict walk over the headers of a local tar, which reads no contents.

Shards come from anywhere. What Rung, Python's `tarfile` and the tar of GNU and BSD write of plain files is accepted
(magic 'ustar' of POSIX or of GNU); links, folders, devices and extension headers are refused before anything of theirs
is read, and so is a tar that is cut, padded with something else, or damaged in a header.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_MEMBERS = 100_000
MAX_PADDING = 1 << 20  # bytes after the end mark: writers fill up a record, 10,240 bytes unless told otherwise

_BLOCK = 512
_SUFFIX = ".safetensors"
_ZEROS = bytes(_BLOCK)
_POSIX, _GNU = b"ustar\x0000", b"ustar  \x00"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"g": "a global pax extension header",
    b"x": "a pax extension header",
    b"K": "a GNU long-link extension header",
    b"L": "a GNU long-name extension header",
    b"S": "a GNU sparse file",
}
_DAMAGED = "fetch or build it again"
_FOREIGN = "expected a tar of packs as 'rung data build' writes it"


class Member(NamedTuple):
    """A pack in a shard: `size` bytes of the file from `offset` on."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, source: str) -> list[Member]:
    """Return the members of a tar in order; `file` must be seekable and `source` names it in errors.

    Raises ValueError for anything but regular files with distinct relative names ending in '.safetensors', whole,
    followed by the end-of-archive mark and zeros.
    """
    return list(walk(file, source))


def walk(file: BinaryIO, source: str) -> Iterator[Member]:
    """Yield the members of a tar in order; raise ValueError, as `members` does, where it stops being one of packs."""
    end = file.seek(0, os.SEEK_END)
    names: set[str] = set()
    offset = 0
    try:
        while True:
            file.seek(offset)
            header = file.read(_BLOCK)
            if header == _ZEROS:
                _check_end(file, end - offset - _BLOCK)
                return
            member = _member(header, offset + _BLOCK, end)
            if member.name in names:
                raise ValueError(f"a second member of the name {member.name!r}; {_FOREIGN}")
            if len(names) == MAX_MEMBERS:
                raise ValueError(f"more than {MAX_MEMBERS} members; {_FOREIGN}")
            names.add(member.name)
            yield member
            offset = member.offset + -(-member.size // _BLOCK) * _BLOCK
    except ValueError as error:
        raise ValueError(f"{source}: member {len(names)}, at byte {offset}: {error}") from None


def _member(header: bytes, start: int, end: int) -> Member:
    """Return what a header describes, if it is a regular file that ends before `end`; raise ValueError otherwise."""
    if len(header) < _BLOCK:
        raise ValueError(f"truncated: the file ends before the end-of-archive mark; {_DAMAGED}")
    stated = _octal("checksum", header[148:156])
    if stated != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):  # itself counts as blanks
        raise ValueError(f"damaged header: its checksum does not fit; {_DAMAGED}")
    name = _name(header)
    kind = header[156:157]
    if kind not in (b"0", b"\0"):
        raise ValueError(f"{name!r} is {_KINDS.get(kind, f'of the unknown type {kind!r}')}; {_FOREIGN}")
    _check_name(name)
    size = _octal("size", header[124:136])
    if start + size > end:
        raise ValueError(f"truncated: {name!r} states {size} bytes, {end - start} are left; {_DAMAGED}")
    return Member(name, start, size)


def _name(header: bytes) -> str:
    magic, prefix = header[257:265], header[345:500].rstrip(b"\0")
    if magic not in (_POSIX, _GNU):
        raise ValueError(f"unknown tar format (magic {magic!r}); {_FOREIGN}")
    name = header[:100].rstrip(b"\0")
    if prefix:
        if magic == _GNU:  # times and sparse maps to one reader, a part of the name to another
            raise ValueError(f"{name!r} has a GNU extension in its header; {_FOREIGN}")
        name = prefix + b"/" + name
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name {name!r} is not UTF-8; {_FOREIGN}") from None


def _check_name(name: str) -> None:
    """Raise ValueError unless `name` is that of a pack, and of nothing outside a folder it would be unpacked into."""
    fault = ""
    if not name.isprintable():
        fault = "control characters"
    elif "\\" in name:
        fault = "a back-slash"
    elif name.startswith("/"):
        fault = "an absolute path"
    elif ".." in name and ".." in name.split("/"):
        fault = "'..'"
    elif not name.endswith(_SUFFIX):
        fault = f"no ending '{_SUFFIX}'"
    if fault:
        raise ValueError(f"the name {name!r} has {fault}; {_FOREIGN}")


def _octal(what: str, field: bytes) -> int:
    """Return the value of an octal field; raise ValueError for others, such as the base-256 of GNU beyond 8 GiB."""
    digits = field.strip(b"\0 ")
    if not digits or digits.strip(b"01234567"):  # int() would take signs and underscores
        raise ValueError(f"{what}: expected octal digits, found {field!r}; {_DAMAGED}")
    return int(digits, 8)


def _check_end(file: BinaryIO, left: int) -> None:
    """Raise ValueError unless a first block of zeros is followed by another and by nothing but zeros."""
    if left < _BLOCK:
        raise ValueError(f"truncated: half an end-of-archive mark; {_DAMAGED}")
    if left > MAX_PADDING:
        raise ValueError(f"{left} bytes after the end-of-archive mark, more than {MAX_PADDING}; {_FOREIGN}")
    if file.read(left).strip(b"\0"):
        raise ValueError(f"something else than zeros after the end-of-archive mark; {_FOREIGN}")
