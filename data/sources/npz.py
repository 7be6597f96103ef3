"""Arrays of `.npz` archives and `.npy` files by rows, without unpickling and without reading more than is asked for."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rung.data.sources.common import slices

_LOCAL_HEADER = 30  # bytes before a member's name (APPNOTE.TXT 4.3.7)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError)  # RuntimeError: encrypted
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """What a file says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    compressed: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_headers(path: Path) -> dict[str, Header]:
    """Return name -> header of every array, without the data; raise ValueError for a file that is no npz."""
    with _opened(path) as archive:
        found = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise ValueError(f"{path}: expected arrays (members *.npy), found '{name}'; unpack an archive of files")
            with archive.open(info) as stream:
                found[name] = _header(stream, f"{path}: {info.filename}", info.compress_type != zipfile.ZIP_STORED)[0]
    return found


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Return a small array whole; raise ValueError for one of Python objects, which would have to be unpickled."""
    with _opened(path) as archive, archive.open(f"{name}.npy") as stream:
        try:
            return np.asarray(npy.read_array(stream, allow_pickle=False))
        except ValueError as error:
            raise ValueError(f"{path}: array '{name}' cannot be read: {error}") from error


def read_rows(path: Path, names: Sequence[str], start: int, stop: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield rows start..stop of arrays, TABLE_STRUCTURES at a time; those not compressed are sought, not read over.

    Raises ValueError naming the file and the array for data that ends early or is stored column by column.
    """
    with ExitStack() as stack:
        archive = stack.enter_context(_opened(path))
        streams = {}
        for name in names:
            stream, header = _at_first_row(archive, f"{name}.npy", path)
            streams[name] = stack.enter_context(stream), header
            stream.seek(start * _row_bytes(header), 1)
        for rows in slices(stop - start):
            count = rows.stop - rows.start
            yield {name: _take(stream, header, count, f"{path}: {name}") for name, (stream, header) in streams.items()}


def read_npy_header(path: Path) -> Header:
    """Return the header of an npy file; raise ValueError for another file and for one with more or less data."""
    with path.open("rb") as stream:
        return _npy_header(stream, path)


def read_npy_rows(path: Path, rows: range, total: int, width: int, kinds: str) -> NDArray[Any]:
    """Return consecutive rows of an npy file that holds `total` of `width` numbers each, whatever their shape.

    Raises what `read_npy_header` raises, and ValueError for another size or kind of numbers (numpy's "f", "iu").
    """
    with path.open("rb") as stream:
        header = _npy_header(stream, path)
        size = math.prod(header.shape)
        if header.dtype.kind not in kinds or header.shape[:1] != (total,) or size != total * width:
            raise ValueError(f"{path}: expected numbers ({total}, {width}), found {header}")
        stream.seek(rows.start * _row_bytes(header), 1)
        return _take(stream, header, len(rows), str(path))


def _npy_header(stream: IO[bytes], path: Path) -> Header:
    header, length = _header(stream, str(path))
    _check_size(header, os.fstat(stream.fileno()).st_size - length, str(path))
    return header


def check_header(
    path: Path, headers: Mapping[str, Header], name: str, kinds: str, *shapes: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of an array; -1 in `shapes` stands for any length but 0, `kinds` are numpy's ("f", "iu").

    Raises ValueError unless the array is there with one of the shapes and kinds.
    """
    if name not in headers:
        raise ValueError(f"{path}: expected an array '{name}', found {', '.join(sorted(headers)) or 'none'}")
    header = headers[name]
    if header.dtype.kind not in kinds or not any(_fits(header.shape, shape) for shape in shapes):
        lengths = " or ".join(str(shape).replace("-1", "any") for shape in shapes)
        expected = "floating point" if kinds == "f" else "whole numbers"
        raise ValueError(f"{path}: {name}: expected {expected} {lengths}, found {header}")
    return header.shape


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(n and m in (n, -1) for n, m in zip(shape, wanted, strict=True))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable npz ({error}); damaged or truncated? fetch it again") from error


def _header(stream: IO[bytes], name: str, compressed: bool = False) -> tuple[Header, int]:
    """Return the header at the stream's start and its length in bytes; the stream is left at the first row."""
    try:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"npy format {version}, expected {' or '.join(map(str, _HEADERS))}")
        shape, by_column, dtype = _HEADERS[version](stream)
        if by_column and sum(length > 1 for length in shape) > 1:
            raise ValueError("stored column by column (Fortran order), expected row by row")
    except ValueError as error:
        raise ValueError(f"{name}: not a readable array ({error}); damaged or truncated?") from error
    return Header(shape, dtype, compressed), stream.tell()


def _check_size(header: Header, size: int, name: str) -> None:
    if header.dtype.hasobject:
        raise ValueError(f"{name}: expected numbers, found Python objects, which Rung does not unpickle")
    if math.prod(header.shape) * header.dtype.itemsize != size:
        raise ValueError(f"{name}: expected {header}, found {size} bytes of data; damaged or truncated?")


def _at_first_row(archive: zipfile.ZipFile, member: str, path: Path) -> tuple[IO[bytes], Header]:
    info = archive.getinfo(member)
    with archive.open(info) as stream:
        header, length = _header(stream, f"{path}: {info.filename}", info.compress_type != zipfile.ZIP_STORED)
    _check_size(header, info.file_size - length, f"{path}: {member}")
    if header.compressed:
        stream = archive.open(info)
        stream.seek(length)
        return stream, header
    raw = path.open("rb")  # zipfile reads over what it seeks past, and checks sums
    raw.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", raw.read(_LOCAL_HEADER))
    raw.seek(name_length + extra_length + length, 1)
    return raw, header


def _row_bytes(header: Header) -> int:
    return header.dtype.itemsize * math.prod(header.shape[1:])


def _take(stream: IO[bytes], header: Header, count: int, name: str) -> NDArray[Any]:
    data = stream.read(count * _row_bytes(header))
    if len(data) != count * _row_bytes(header):
        raise ValueError(f"{name}: the data end early; truncated? fetch the file again")
    return np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
