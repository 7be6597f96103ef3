"""JSON files larger than memory, read value by value.

A value is decoded as a whole, so memory holds one record and a piece of the file. Errors name the file and the place.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

PIECE = 1 << 22  # characters read at a time
MAX_VALUE = 1 << 28  # characters of one record; beyond it the file is damaged
_OVERLAP = 512  # characters kept while searching, longer than any match
_BLANK = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


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
