"""JSON files larger than memory, read value by value; and the records in them as arrays.

A value is decoded as a whole, so memory holds one record and a piece of the file. Errors name the file and the place.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from rung.data.sources.source import TABLE_STRUCTURES
from rung.data.structure import MAX_ATOMIC_NUMBER, Structure
from rung.data.table import StructureTable

PIECE = 1 << 22  # characters read at a time
MAX_VALUE = 1 << 28  # characters of one record; beyond it the file is damaged
_OVERLAP = 512  # characters kept while searching, longer than any match
_BLANK = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode
_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]  # xx, yy, zz, yz, xz, xy


def open_text(path: Path, encoding: str = "utf-8", start: int = 0) -> TextIO:
    """Open a plain, .gz or .xz file as text at byte `start`; line ends are left as they are.

    Raises ValueError for an empty file.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected JSON or text")
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding=encoding, newline=""))
    if path.suffix == ".xz":
        return cast(TextIO, lzma.open(path, "rt", encoding=encoding, newline=""))
    file = path.open(encoding=encoding, newline="")
    file.seek(start)
    return file


class JsonStream:
    """A cursor in JSON text that decodes one value at a time; every error is a ValueError that names `source`."""

    def __init__(self, file: TextIO, source: Path | str, start: int = 0) -> None:
        self.file, self.source = file, source
        self.text, self.at, self.before = "", 0, start  # text[0] is character `before` of the file

    @property
    def position(self) -> int:
        """Character of the file at the cursor; its byte where the encoding has one byte a character."""
        return self.before + self.at

    def peek(self) -> str:
        """Move over blanks and return the next character, "" at the end of the file."""
        while True:
            self.at = cast(re.Match[str], _BLANK.match(self.text, self.at)).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, *expected: str) -> str:
        """Return the next character, which must be one of `expected`, and move past it."""
        found = self.peek()
        if found not in expected:
            raise self.error(f"expected {' or '.join(map(repr, expected))}, found {found or 'the end of the file'!r}")
        self.at += 1
        return found

    def value(self) -> Any:
        """Return the object, list or text that comes next."""
        if self.peek() not in ("{", "[", '"'):
            raise self.error(f"expected an object, a list or a text, found {self.text[self.at : self.at + 20]!r}")
        while True:
            try:
                value, self.at = _decode(self.text, self.at)
                return value
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self.text) - self.at > MAX_VALUE or not self._more():
                    raise self.error(f"not readable JSON ({error}); damaged or truncated?") from error

    def elements(self) -> Iterator[Any]:
        """Yield the values of the list that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",", "]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; who asks for the next key must have read the value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            yield self.key()
            if self.take(",", "}") == "}":
                return

    def key(self) -> str:
        """Return the key that comes next and move to its value."""
        key = self.value()
        if not isinstance(key, str):
            raise self.error(f"expected a key, found {type(key).__name__}")
        self.take(":")
        return key

    def search(self, pattern: re.Pattern[str]) -> bool:
        """Move to the next match of `pattern`, of at most 512 characters; return False when there is none."""
        while not (match := pattern.search(self.text, self.at)):
            self.at = max(self.at, len(self.text) - _OVERLAP)
            if not self._more():
                return False
        self.at = match.start()
        return True

    def error(self, message: str) -> ValueError:
        """Return (not raise) an error that names the file and the place."""
        return ValueError(f"{self.source}: character {self.position}: {message}")

    def _more(self) -> bool:
        try:
            piece = self.file.read(max(PIECE, len(self.text) - self.at))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{self.source}: cannot be read ({error}); damaged or truncated?") from error
        self.before, self.text, self.at = self.position, self.text[self.at :] + piece, 0
        return bool(piece)


def tables(structures: Iterable[Structure], size: int = TABLE_STRUCTURES) -> Iterator[StructureTable]:
    """Yield tables of at most `size` structures, whose arrays must have their shapes, without the unlabelled ones."""
    structures = filter(_labelled, structures)
    while batch := list(islice(structures, size)):
        yield StructureTable.of(batch)


def crystal(structure: Any) -> dict[str, Any]:
    """Return numbers, positions, cell, pbc and charge of a pymatgen structure, as fields of `Structure`.

    Raises ValueError for another layout, a site with several species or with a vacancy, and an unknown element.
    """
    try:
        lattice, sites = structure["lattice"], structure["sites"]
        cell = array(lattice["matrix"], (3, 3), "lattice.matrix", np.float64)
        fractional = array([site["abc"] for site in sites], (len(sites), 3), "sites.abc", np.float64)
        symbols = [_whole_site(site["species"]) for site in sites]
    except (KeyError, TypeError) as error:
        expected = "a pymatgen structure {lattice: {matrix}, sites: [{species, abc}]}"
        raise ValueError(f"structure: expected {expected}, found {_found(structure)} ({error!r})") from error
    return {
        "numbers": numbers_of(symbols),
        "positions": (fractional @ cell).astype(np.float32),
        "cell": cell.astype(np.float32),
        "pbc": np.array(lattice.get("pbc", (True, True, True)), np.bool_),
        "charge": int(structure.get("charge") or 0),
    }


def numbers_of(symbols: Iterable[str]) -> NDArray[np.uint8]:
    """Return the atomic numbers of element symbols; D and T are hydrogen. Raises ValueError for an unknown one."""
    elements = _elements()
    try:
        return np.array([elements[symbol] for symbol in symbols], np.uint8)
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected symbols of elements, found {error}") from error


def array(value: Any, shape: tuple[int, ...], name: str, dtype: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """Return numbers in `shape`, which nested lists must have; raise ValueError naming `name` otherwise."""
    try:
        found = np.array(value, dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected numbers of shape {shape}, found {_found(value)} ({error})") from error
    if found.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {found.shape}")
    return found


def number(value: Any, name: str) -> float | None:
    """Return a number, None where it is null or NaN; raise ValueError naming `name` for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number or null, found {_found(value)}")
    return None if value != value else float(value)


def full_stress(stress: Any) -> NDArray[np.float32]:
    """Return [3, 3] of a stress in Voigt's order (xx, yy, zz, yz, xz, xy) or of nine numbers; others unchanged."""
    array = np.asarray(stress, np.float32)
    if array.shape == (6,):
        return array[_VOIGT]
    return array.reshape(3, 3) if array.shape == (9,) else array


def formula(numbers: NDArray[np.uint8]) -> str:
    """Return the chemical formula, elements in the order of their symbols, such as 'C2H6O'."""
    return _formula(np.sort(numbers).tobytes())


def _labelled(structure: Structure) -> bool:
    values = (value for labels in structure.labels.values() for value in vars(labels).values())
    return any(value is not None and not np.isnan(value).all() for value in values)


@lru_cache(maxsize=1)
def _elements() -> dict[str, int]:
    from ase.data import atomic_numbers

    return {**{s: z for s, z in atomic_numbers.items() if 1 <= z <= MAX_ATOMIC_NUMBER}, "D": 1, "T": 1}


@lru_cache(maxsize=4096)
def _formula(numbers: bytes) -> str:
    from ase.data import chemical_symbols

    counts = {chemical_symbols[z]: numbers.count(z) for z in set(numbers)}
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in sorted(counts.items()))


def _whole_site(species: Any) -> str:
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise ValueError(f"structure: expected one whole species on each site, found {species}")
    return str(species[0]["element"])


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(value)) or 'nothing'}"
    return f"{type(value).__name__} {value!r}"[:80]
