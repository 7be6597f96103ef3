"""Files over http(s): tried again when the connection breaks, continued where it broke, held to a SHA-256."""

from __future__ import annotations

import email.message
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rung.data.shard import file_sha256

RETRIES = 5  # after the first try, after 1, 2, 4, 8, 16 s
TIMEOUT_S = 30.0  # of a connection, and of silence after it
_CHUNK = 1 << 20  # bytes
_MAX_WAIT_S = 300.0  # where the server's Retry-After asks for more

T = TypeVar("T")

_log = logging.getLogger(__name__)


class NotThere(OSError):
    """The server has no such file, or does not show it to this user."""


class _Broken(Exception):
    """A try that may do better next time, after `wait_s` seconds or more."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _PastTheEnd(_Broken):
    """The file on the server ends before the byte that was asked for."""


@dataclass(frozen=True)
class Client:
    """Asks servers for files; `token` goes to the server that is asked, not to others that it points to."""

    token: str = ""
    wait: Callable[[float], object] = time.sleep  # between two tries, a number of seconds

    def read(self, url: str, retries: int = RETRIES) -> bytes:
        """Return a small file; raise NotThere, or OSError when it cannot be had."""
        return self._tried(lambda: b"".join(data for _, data in self._chunks(url, 0)), url, retries)

    def download(self, url: str, path: Path, digest: str) -> None:
        """Make `path` the file with that SHA-256, going on with what an earlier try left there.

        Raises NotThere, OSError when the file cannot be had, and ValueError when the server's has another digest: the
        message has both, and nothing stays at `path`.
        """
        for last in (False, True):  # what an earlier try left may be damaged, so wrong bytes are fetched once more
            if path.is_file() and file_sha256(path) == digest:
                return
            self._tried(lambda: self._append(url, path), url, RETRIES)
            if (found := file_sha256(path)) == digest:
                return
            path.unlink()
            if not last:
                _log.warning("%s: expected SHA-256 %s, found %s; fetching it again", url, digest, found)
        raise ValueError(
            f"{url}: {path.name}: expected SHA-256 {digest}, found {found}: the file on the server is not the one that "
            "was published, so it is not used; tell its owner, or name another revision"
        )

    def _tried(self, action: Callable[[], T], url: str, retries: int) -> T:
        for tries in range(1, retries + 2):
            try:
                return action()
            except _Broken as failure:
                if tries > retries:
                    message = f"{url}: {failure}, {tries} times; check the network, or the proxy in https_proxy"
                    raise OSError(message) from failure
                pause = max(2.0 ** (tries - 1), failure.wait_s)
                _log.warning("%s: %s; trying again in %.0f s", url, failure, pause)
                self.wait(pause)
        raise AssertionError("unreachable")

    def _append(self, url: str, path: Path) -> None:
        """Write what `path` lacks; a server without ranges sends all of it anew."""
        path.touch()
        with path.open("r+b") as file:
            try:
                for offset, data in self._chunks(url, file.seek(0, os.SEEK_END)):
                    if offset != file.tell():
                        file.seek(offset)
                        file.truncate()
                    file.write(data)
            except _PastTheEnd:
                file.truncate(0)
                raise
            os.fsync(file.fileno())

    def _chunks(self, url: str, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of a file from byte `start`, or from 0 where the server knows no ranges."""
        with _network_errors():
            response = urllib.request.urlopen(self._request(url, start), timeout=TIMEOUT_S)
        with response:
            offset = _offset(response, start)
            length = response.headers.get("Content-Length")
            end = offset + int(length) if length is not None else None
            while True:
                with _network_errors():  # not those of whoever writes the bytes
                    data = response.read1(_CHUNK)  # what has arrived, so that it is kept when the connection breaks
                if not data:
                    break
                yield offset, data
                offset += len(data)
        if end is not None and offset < end:
            raise _Broken(f"the connection ended after {offset} of {end} bytes")

    def _request(self, url: str, start: int) -> urllib.request.Request:
        request = urllib.request.Request(url, headers={"User-Agent": "rung", "Accept-Encoding": "identity"})
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        return request


def _offset(response: http.client.HTTPResponse, start: int) -> int:
    if response.status != 206:
        return 0
    found = response.headers.get("Content-Range", "")
    if not re.fullmatch(rf"bytes {start}-\d+/(\d+|\*)", found):
        raise _PastTheEnd(f"asked for the bytes from {start}, the server sent '{found}'")
    return start


@contextmanager
def _network_errors() -> Iterator[None]:
    """Turn what urllib and http.client raise into NotThere, _Broken or OSError."""
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            raise _of_status(error.code, error.headers, error.url) from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise OSError(f"certificate not trusted ({reason.verify_message}); set SSL_CERT_FILE") from error
        if isinstance(reason, TimeoutError):
            raise _Broken(f"no byte for {TIMEOUT_S:g} s") from error
        raise _Broken(f"{type(reason).__name__}: {reason}") from error


def _of_status(status: int, headers: email.message.Message, url: str) -> Exception:
    reason = f"HTTP status {status} ({http.client.responses.get(status, 'unknown')})"
    if status in (401, 403, 404, 410):  # a hub answers 401 for what does not exist, too
        return NotThere(f"{url}: {reason}")
    if status == 416:
        return _PastTheEnd(reason)
    if status in (408, 425, 429) or status >= 500:
        asked = headers.get("Retry-After", "").strip()
        return _Broken(reason, min(float(asked), _MAX_WAIT_S) if asked.isdecimal() else 0.0)
    return OSError(f"{url}: {reason}")
