"""Remote shards: fetched over http(s) or by a command into a cache on this machine, held to the manifest's digest.

Only the user names a URL or a command; a manifest gives plain file names, sizes and digests. `{file}` stands for the
shard's name:

    /data/set/{file}                                            files that are here; opened as they are
    https://host/set/{file}                                     also https://user:password@host/set/{file}
    pipe:aws s3 cp --only-show-errors s3://bucket/set/{file} -
    pipe:gsutil -q cat gs://bucket/set/{file}
    pipe:curl -sSfL https://host/set/{file}                     -f: an error page is a failure, not a shard
    pipe:ssh host cat /data/set/{file}
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import os
import random
import re
import select
import shlex
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, BinaryIO

from rung.data.cache import Partial, ShardCache
from rung.data.shard import ShardInfo

_CHUNK = 1 << 20  # bytes
_MAX_WAIT = 60.0  # s, between two tries
_MAX_ASKED_WAIT = 300.0  # s, where the server's Retry-After asks for more
_TAIL_BYTES, _TAIL_LINES = 4096, 5  # of a command's stderr, in errors

_log = logging.getLogger(__name__)


class ShardUnavailable(OSError):
    """A remote shard cannot be had: the message names it, the tries, the last reason and what to do."""


@dataclass(frozen=True)
class RemoteConfig:
    """How remote shards are fetched and kept."""

    cache_folder: str = ""  # default: $RUNG_CACHE/shards, $XDG_CACHE_HOME/rung/shards or ~/.cache/rung/shards
    cache_bytes: int = 50_000_000_000  # the cache's bound; least recently used shards make room
    timeout_s: float = 60.0  # of a connection, and of silence after it
    retries: int = 5  # beyond the first try, after 1, 2, 4, ... 60 s

    def __post_init__(self) -> None:
        checks = {"cache_bytes": self.cache_bytes > 0, "timeout_s": self.timeout_s > 0, "retries": self.retries >= 0}
        for name, good in checks.items():
            if not good:
                bound = "0 or more" if name == "retries" else "more than 0"
                raise ValueError(f"remote shards: {name}: expected {bound}, found {getattr(self, name)}")


@dataclass(frozen=True)
class ShardSource:
    """Opens the shards of one dataset; see the top of this file for what `location` may be.

    `wait` sleeps for a number of seconds between two tries.
    """

    location: str
    config: RemoteConfig = RemoteConfig()
    wait: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        found = _public(self.location)
        if "{file}" not in self.location:
            raise ValueError(f"shard_url: expected '{{file}}' where the shard's name goes, found '{found}'")
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", self.location)
        if not self.is_pipe and scheme and not self.is_http:
            raise ValueError(
                f"shard_url: expected a folder, http://, https:// or 'pipe:COMMAND', found '{found}'; "
                f"read {scheme[1]}:// through a command, such as 'pipe:aws s3 cp s3://bucket/set/{{file}} -'"
            )
        if self.is_http and not re.fullmatch(r"https?://[^/\s]+/\S*", self.location):
            raise ValueError(f"shard_url: expected 'https://host/set/{{file}}' without spaces, found '{found}'")

    @property
    def is_pipe(self) -> bool:
        return self.location.startswith("pipe:")

    @property
    def is_http(self) -> bool:
        return self.location.startswith(("http://", "https://"))

    def open(self, shard: ShardInfo) -> BinaryIO:
        """Return the shard as a seekable local file, fetched first unless it is local or in the cache.

        A local file is opened as it is; what comes from elsewhere has the manifest's size and SHA-256. An open file
        stays readable when the cache evicts it. Raises FileNotFoundError for a local file that is not there,
        ValueError for a shard that the cache cannot hold, and ShardUnavailable when the shard cannot be had.
        """
        if not self.is_pipe and not self.is_http:
            return _open_local(Path(self.location.replace("{file}", shard.file)))
        _check(shard, self.config)
        folder = cache_folder(self.config)
        try:
            return ShardCache(folder, self.config.cache_bytes).open(shard, lambda partial: self._fill(partial, shard))
        except ShardUnavailable:
            raise
        except OSError as error:
            raise ShardUnavailable(
                f"{self._name(shard)}: the shard cache {folder} cannot be used ({error.strerror or error}); "
                "make space there, lower cache_bytes, or set cache_folder or RUNG_CACHE to another disk of this machine"
            ) from error

    def _fill(self, partial: Partial, shard: ShardInfo) -> None:
        """Fetch until the shard is whole: `retries` more tries after broken ones, one more after wrong bytes."""
        tries = num_damaged = 0
        while True:
            tries += 1
            try:
                if partial.size < partial.total:
                    self._transfer(partial, shard)
                if partial.fault:
                    raise _Damaged(partial.fault)
                return
            except _Failed as failure:
                if isinstance(failure, _Damaged):
                    num_damaged += 1
                    partial.restart()
                hopeless = isinstance(failure, _Refused) or num_damaged > 1
                if hopeless or tries - num_damaged > self.config.retries:
                    raise ShardUnavailable(self._message(shard, tries, failure)) from failure
                pause = max(_backoff(tries), failure.wait_s)
                _log.warning("%s: %s; trying again in %.0f s", self._name(shard), failure.reason, pause)
                self.wait(pause)

    def _transfer(self, partial: Partial, shard: ShardInfo) -> None:
        if self.is_pipe:
            command = self.location.removeprefix("pipe:").replace("{file}", shlex.quote(shard.file))
            _run(command, partial, self.config.timeout_s)
        else:
            _get(self.location.replace("{file}", shard.file), partial, self.config.timeout_s)

    def _message(self, shard: ShardInfo, tries: int, failure: _Failed) -> str:
        advice = "run the command by hand" if self.is_pipe else "check the network and the server"
        return (
            f"{self._name(shard)}: shard '{shard.file}' unavailable after {tries} {'try' if tries == 1 else 'tries'}: "
            f"{failure.reason}; {failure.advice or advice}"
        )

    def _name(self, shard: ShardInfo) -> str:
        """Return the shard's place for a message, without what may be a secret."""
        if not self.is_pipe:
            return _public(self.location.replace("{file}", shard.file))
        program, *words = self.location.removeprefix("pipe:").split() or [""]
        shown = ["..." if "=" in program else program, *(word for word in words if "{file}" in word)]
        return "pipe:" + _public(" ".join(shown).replace("{file}", shard.file))


def cache_folder(config: RemoteConfig) -> Path:
    """Return the folder of fetched shards."""
    if config.cache_folder:
        return Path(config.cache_folder).expanduser()
    if folder := os.environ.get("RUNG_CACHE"):
        return Path(folder) / "shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung" / "shards"


def _check(shard: ShardInfo, config: RemoteConfig) -> None:
    # Manifests come from anywhere: the digest and the size become a file's name, the name a word of a command.
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"shard '{shard.file}': sha256: expected 64 hexadecimal digits, found '{shard.sha256}'")
    if not isinstance(shard.bytes, int) or shard.bytes <= 0:
        raise ValueError(f"shard '{shard.file}': bytes: expected a whole number > 0, found {shard.bytes!r}")
    if shard.bytes > config.cache_bytes:
        raise ValueError(
            f"shard '{shard.file}' has {shard.bytes} bytes, the shard cache may hold {config.cache_bytes}; "
            "raise cache_bytes, or build the dataset with smaller shards"
        )


def _open_local(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such shard; copy it beside its dataset.yaml, or set shard_url to where the shards are"
        ) from error


def _backoff(tries: int) -> float:
    """Return the seconds to wait after a try: 1, 2, 4, ... 60, and up to a quarter more that differs by process."""
    return min(2.0 ** min(tries - 1, 6), _MAX_WAIT) * random.SystemRandom().uniform(1, 1.25)  # leaves seeds alone


def _public(text: str) -> str:
    """Return a text without the credentials and the queries of its URLs."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


class _Failed(Exception):
    """A try that may do better next time, after `wait_s` seconds or more."""

    def __init__(self, reason: str, advice: str = "", wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.wait_s = reason, advice, wait_s


class _Refused(_Failed):
    """A try that would end the same way next time."""


class _Damaged(_Failed):
    """A try that brought other bytes than the manifest's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "put the shards and the dataset.yaml of one build there")


def _append(partial: Partial, data: bytes) -> None:
    if partial.size + len(data) > partial.total:
        raise _Damaged(f"expected {partial.total} bytes, found more")
    partial.write(data)


# HTTP


def _get(url: str, partial: Partial, timeout_s: float) -> None:
    """Append what `partial` lacks from an http(s) URL; a server without ranges sends all of it anew."""
    with _network_errors(timeout_s):
        response = urllib.request.urlopen(_request(url, partial), timeout=timeout_s)
    with response:
        _begin(response, partial)
        while True:
            with _network_errors(timeout_s):  # not those of the disk
                data = response.read1(_CHUNK)  # what has arrived, so that nothing is lost when the connection breaks
            if not data:
                break
            _append(partial, data)
    if partial.size < partial.total:
        raise _Failed(f"the connection ended after {partial.size} of {partial.total} bytes")


def _request(url: str, partial: Partial) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "rung"})
    if user:
        # Unredirected: another host that the server points to does not get the password.
        name, _, password = user.partition(":")
        token = b64encode(urllib.parse.unquote(f"{name}:{password}").encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if partial.size:
        request.add_header("Range", f"bytes={partial.size}-")
        if partial.validator:
            request.add_header("If-Range", partial.validator)
    return request


def _begin(response: http.client.HTTPResponse, partial: Partial) -> None:
    """Check a response's status, range and length before its bytes are taken."""
    total = response.headers.get("Content-Length")
    if response.status == 206:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        if match is None or int(match[1]) != partial.size:
            raise _Damaged(f"asked for the bytes from {partial.size}, the server sent '{content_range}'")
        total = match[2]
    elif response.status == 200:
        partial.restart()
    else:
        raise _Refused(f"unexpected status {response.status}")
    if total not in (None, "*", str(partial.total)):
        raise _Damaged(f"expected {partial.total} bytes, the server's file has {total}")
    etag = response.headers.get("ETag", "")
    strong = "" if etag.startswith("W/") else etag
    partial.validator = strong or response.headers.get("Last-Modified", "")


@contextmanager
def _network_errors(timeout_s: float) -> Iterator[None]:
    """Turn what urllib and http.client raise into _Failed."""
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            raise _status_failure(error.code, error.headers) from error
    except http.client.InvalidURL as error:
        raise _Refused(str(error), "check shard_url") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            untrusted = f"the server's certificate is not trusted ({reason.verify_message})"
            raise _Refused(untrusted, "set SSL_CERT_FILE") from error
        if isinstance(reason, TimeoutError):
            raise _Failed(f"no byte for {timeout_s:g} s") from error
        raise _Failed(f"{type(reason).__name__}: {reason}") from error


def _status_failure(status: int, headers: Message) -> _Failed:
    reason = f"HTTP status {status} ({http.client.responses.get(status, 'unknown')})"
    if status in (401, 403, 407):
        return _Refused(reason, "give https://user:password@host/..., a fresh signed URL, or a 'pipe:' that signs in")
    if status in (404, 410):
        return _Refused(reason, "check shard_url, and that the shards there belong to this dataset.yaml")
    if status == 416:
        return _Damaged(f"{reason}: the server's file is shorter than the manifest's")
    if status in (408, 425, 429) or status >= 500:
        return _Failed(reason, wait_s=_asked_wait(headers.get("Retry-After", "")))
    return _Refused(reason, "check shard_url")


def _asked_wait(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for, 0 for one that is none."""
    if retry_after.strip().isdecimal():
        seconds = float(retry_after)
    else:
        date = email.utils.parsedate_tz(retry_after)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return min(max(seconds, 0.0), _MAX_ASKED_WAIT)


# Commands


def _run(command: str, partial: Partial, timeout_s: float) -> None:
    """Fill `partial` with what a shell command prints; whatever ends this early ends the command and its children."""
    partial.restart()
    try:
        with tempfile.TemporaryFile(dir=partial.path.parent) as errors, _started(command, errors) as process:
            _copy_output(process, partial, timeout_s)
            _check_exit(process, errors, timeout_s)
    except BaseException:
        partial.restart()  # there is no way to ask for the rest
        raise


@contextmanager
def _started(command: str, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own (no terminal to ask for a password); kill all of it at the end."""
    # The shell waits for a line: an interrupt before the `try` below closes the pipe, and the command never starts.
    script, pipe = f"read -r line || exit\nexec </dev/null\n{command}", subprocess.PIPE
    try:
        process = subprocess.Popen(
            script, shell=True, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True, bufsize=0
        )
    except OSError as error:
        raise _Failed(f"the command cannot be started ({error.strerror})") from error
    with process:
        try:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            yield process
        finally:
            if process.returncode is None:  # not reaped, so the group's number is still its own
                os.killpg(process.pid, signal.SIGKILL)


def _copy_output(process: subprocess.Popen[bytes], partial: Partial, timeout_s: float) -> None:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(timeout_s * 1000):
        if not (data := os.read(descriptor, _CHUNK)):
            return
        _append(partial, data)
    raise _Failed(f"no byte for {timeout_s:g} s")


def _check_exit(process: subprocess.Popen[bytes], errors: IO[bytes], timeout_s: float) -> None:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise _Failed(f"the command closed its output and did not end within {timeout_s:g} s") from error
    if status == 0:
        return
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = errors.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    reason = f"exit status {status}: {_public(' | '.join(tail)) or 'nothing on stderr'}"
    if status in (126, 127):  # the shell's own: not executable, not found
        raise _Refused(reason, "install the program, or name it by its path")
    raise _Failed(reason)
