"""Remote shards: fetched over http(s) or by a command into a cache on this machine, held to the manifest's digest.

Only the user names a URL or a command; a manifest gives plain file names, sizes and digests. `{file}` stands for the
shard's name:

    /data/set/{file}                                            files that are here; opened as they are
    https://host/set/{file}                                     also https://user:password@host/set/{file}
    pipe:aws s3 cp --only-show-errors s3://bucket/set/{file} -
    pipe:gsutil -q cat gs://bucket/set/{file}
    pipe:curl -sSfL https://host/set/{file}                     -f: an error page is a failure, not a shard
    pipe:ssh host cat /data/set/{file}

Cache. `<sha256>.tar` is a whole shard, `<sha256>.<bytes>.partial` one that is arriving and the space promised to it.
`<sha256>.lock` is held while a shard is opened or fetched, so the processes of a node fetch it once; `space.lock`
while files are counted, evicted and renamed. The kernel frees the locks of a killed process; who comes next continues
its partial file.
"""

from __future__ import annotations

import email.utils
import fcntl
import hashlib
import http.client
import logging
import os
import platform
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
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, NamedTuple

from rung.data.shard import ShardInfo

_CHUNK = 1 << 20  # bytes
_MAX_WAIT = 60.0  # s, between two tries
_MAX_ASKED_WAIT = 300.0  # s, where the server's Retry-After asks for more
_TAIL_LINES = 5  # of a command's stderr, in errors
_CACHE_FILE = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d+)\.partial)")

_log = logging.getLogger(__name__)
_verified: set[tuple[str, int, int]] = set()  # (digest, device, inode) of cached files that this process has hashed


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
        path = folder / f"{shard.sha256}.tar"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(folder, shard.sha256)):
                return _open_cached(path, shard) or self._download(shard, path)
        except ShardUnavailable:
            raise
        except OSError as error:
            raise ShardUnavailable(
                f"{self._name(shard)}: the shard cache {folder} cannot be used ({error.strerror or error}); "
                "make space there, lower cache_bytes, or set cache_folder or RUNG_CACHE to another disk of this machine"
            ) from error

    def _download(self, shard: ShardInfo, path: Path) -> BinaryIO:
        with _Partial(_reserve(path.parent, shard, self.config.cache_bytes), shard) as partial:
            self._fill(partial, shard)
            return partial.finish(path)

    def _fill(self, partial: _Partial, shard: ShardInfo) -> None:
        """Fetch until the shard is whole: `retries` more tries after broken ones, one more after wrong bytes."""
        tries = num_damaged = 0
        while True:
            tries += 1
            try:
                if partial.size < shard.bytes:
                    self._transfer(shard, partial)
                partial.check()
                return
            except _Failed as failure:
                if isinstance(failure, _Damaged):
                    num_damaged += 1
                    partial.restart()
                hopeless = isinstance(failure, _Refused) or num_damaged > 1
                if hopeless or tries - num_damaged > self.config.retries:
                    raise ShardUnavailable(self._message(shard, tries, failure)) from failure
                pause = max(_backoff(shard.file, tries), failure.wait_s)
                _log.warning("%s: %s; trying again in %.0f s", self._name(shard), failure.reason, pause)
                self.wait(pause)

    def _transfer(self, shard: ShardInfo, partial: _Partial) -> None:
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


class _Partial:
    """A shard that is arriving: its bytes so far, their digest, and what the server called this version of the file.

    It is kept for the next try when tries run out or the user interrupts, and deleted after any other failure.
    """

    def __init__(self, path: Path, shard: ShardInfo) -> None:
        self._path, self._shard = path, shard
        self._file = path.open("r+b", buffering=0)
        self._hash = hashlib.file_digest(self._file, "sha256")
        self.size, self.validator = self._file.tell(), ""

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        keep = isinstance(error, (ShardUnavailable, KeyboardInterrupt)) and self.size > 0
        if error is not None and not keep:
            self._path.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        return self._path.parent

    @property
    def total(self) -> int:
        """Bytes of the whole shard, by the manifest."""
        return self._shard.bytes

    def write(self, data: bytes) -> None:
        """Append `data`; raise _Damaged when that is more than the manifest says."""
        self._hash.update(data)
        self.size += len(data)
        if self.size > self.total:
            raise _Damaged(f"expected {self.total} bytes, found more")
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]

    def restart(self) -> None:
        """Drop what has arrived."""
        self._file.seek(0)
        self._file.truncate()
        self._hash, self.size, self.validator = hashlib.sha256(), 0, ""

    def check(self) -> None:
        """Raise _Damaged unless this is the manifest's shard."""
        if self.size != self.total:
            raise _Damaged(f"expected {self.total} bytes, found {self.size}")
        if (found := self._hash.hexdigest()) != self._shard.sha256:
            raise _Damaged(f"expected SHA-256 {self._shard.sha256}, found {found}")

    def finish(self, path: Path) -> BinaryIO:
        """Flush to disk, move to `path` and return the file opened for reading."""
        os.fsync(self._file.fileno())
        file = self._path.open("rb")  # before it can be evicted
        status = os.fstat(file.fileno())
        _verified.add((self._shard.sha256, status.st_dev, status.st_ino))
        with _locked(path.with_name("space.lock")):
            os.replace(self._path, path)
        return file


def _get(url: str, partial: _Partial, timeout_s: float) -> None:
    """Append what `partial` lacks from an http(s) URL; a server without ranges sends all of it anew."""
    try:
        response = urllib.request.urlopen(_request(url, partial), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_failure(error.code, error.headers) from error
    except (OSError, http.client.HTTPException) as error:
        raise _connection_failure(error, timeout_s) from error
    with response:
        _begin(response, partial)
        while data := _receive(response, timeout_s):
            partial.write(data)
    if partial.size < partial.total:
        raise _Failed(f"the connection ended after {partial.size} of {partial.total} bytes")


def _request(url: str, partial: _Partial) -> urllib.request.Request:
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


def _begin(response: http.client.HTTPResponse, partial: _Partial) -> None:
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


def _receive(response: http.client.HTTPResponse, timeout_s: float) -> bytes:
    try:
        return response.read1(_CHUNK)  # what has arrived, so that nothing is lost when the connection breaks
    except (OSError, http.client.HTTPException) as error:
        raise _connection_failure(error, timeout_s) from error


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


def _connection_failure(error: Exception, timeout_s: float) -> _Failed:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return _Refused(f"the server's certificate is not trusted ({reason.verify_message})", "set SSL_CERT_FILE")
    if isinstance(error, http.client.InvalidURL):
        return _Refused(str(error), "check shard_url")
    if isinstance(reason, TimeoutError):
        return _Failed(f"no byte for {timeout_s:g} s")
    return _Failed(f"{type(reason).__name__}: {reason}")


def _asked_wait(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for, 0 for one that is none."""
    if retry_after.strip().isdecimal():
        seconds = float(retry_after)
    else:
        date = email.utils.parsedate_tz(retry_after)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return min(max(seconds, 0.0), _MAX_ASKED_WAIT)


def _run(command: str, partial: _Partial, timeout_s: float) -> None:
    """Fill `partial` with what a shell command prints; whatever ends this early ends the command and its children."""
    partial.restart()
    try:
        with tempfile.TemporaryFile(dir=partial.folder) as errors, _started(command, errors) as process:
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


def _copy_output(process: subprocess.Popen[bytes], partial: _Partial, timeout_s: float) -> None:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(timeout_s * 1000):
            raise _Failed(f"no byte for {timeout_s:g} s")
        if not (data := os.read(descriptor, _CHUNK)):
            return
        partial.write(data)


def _check_exit(process: subprocess.Popen[bytes], errors: IO[bytes], timeout_s: float) -> None:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise _Failed(f"the command closed its output and did not end within {timeout_s:g} s") from error
    if status == 0:
        return
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
    tail = errors.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    reason = f"exit status {status}: {_public(' | '.join(tail)) or 'nothing on stderr'}"
    if status in (126, 127):  # the shell's own: not executable, not found
        raise _Refused(reason, "install the program, or name it by its path")
    raise _Failed(reason)


class _Entry(NamedTuple):
    """A file of the cache and the bytes that it holds or was promised."""

    used: int  # ns
    path: Path
    digest: str
    bytes: int


def _reserve(folder: Path, shard: ShardInfo, cache_bytes: int) -> Path:
    """Return the shard's partial file, made when it and all that is kept fit into `cache_bytes`."""
    path = folder / f"{shard.sha256}.{shard.bytes}.partial"
    # Who waits holds no space, and who holds space does not wait: no two processes can wait for each other.
    while busy := _make_room(path, shard, cache_bytes):
        with _locked(busy):
            pass
    return path


def _make_room(path: Path, shard: ShardInfo, cache_bytes: int) -> Path | None:
    """Evict least recently used files and make `path`; when downloads hold the space, return the lock of one."""
    folder, busy = path.parent, None
    with _locked(folder / "space.lock"):
        entries = _entries(folder)
        excess = sum(entry.bytes for entry in entries) - cache_bytes
        excess += 0 if path.exists() else shard.bytes
        for entry in entries:
            if excess <= 0:
                break
            if entry.path == path:
                continue
            if entry.path.suffix == ".tar" or entry.digest == shard.sha256:
                entry.path.unlink(missing_ok=True)
            elif not _removed(entry):
                busy = _lock_of(folder, entry.digest)
                continue
            excess -= entry.bytes
        if excess > 0 and busy and not path.exists():
            return busy
        path.touch()
    return None


def _entries(folder: Path) -> list[_Entry]:
    """Return what the cache holds, least recently used first."""
    entries = []
    for path in folder.iterdir():
        if match := _CACHE_FILE.fullmatch(path.name):
            try:
                status = path.stat()
            except FileNotFoundError:  # a failed download was deleted meanwhile
                continue
            entries.append(_Entry(status.st_mtime_ns, path, match[1], int(match[2] or status.st_size)))
    return sorted(entries)


def _removed(entry: _Entry) -> bool:
    """Remove a partial file unless a process is filling it."""
    with _locked(_lock_of(entry.path.parent, entry.digest), wait=False) as free:
        if free:
            entry.path.unlink(missing_ok=True)
        return free


def _open_cached(path: Path, shard: ShardInfo) -> BinaryIO | None:
    """Open a cached shard and mark it as used; None when there is none, or a damaged one, which is deleted."""
    try:
        status = path.stat()
        identity = (shard.sha256, status.st_dev, status.st_ino)
        if identity not in _verified:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                _log.warning(
                    "%s: damaged in the cache (found SHA-256 %s); fetching '%s' again", path, found, shard.file
                )
                path.unlink()
                return None
            _verified.add(identity)
        os.utime(path)
        return path.open("rb")
    except FileNotFoundError:  # never there, or evicted meanwhile
        return None


def _open_local(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such shard; copy it beside its dataset.yaml, or set shard_url to where the shards are"
        ) from error


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock against other processes and threads; with `wait` false give False at once when another holds it."""
    with path.open("ab") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a forked child shares the file


def _lock_of(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.lock"


def _check(shard: ShardInfo, config: RemoteConfig) -> None:
    # Manifests come from anywhere: the digest and the size become a file's name, the name a word of a command.
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"shard '{shard.file}': sha256: expected 64 hexadecimal digits, found '{shard.sha256}'")
    if not isinstance(shard.bytes, int) or shard.bytes <= 0:
        raise ValueError(f"shard '{shard.file}': bytes: expected a whole number > 0, found {shard.bytes!r}")
    if shard.file.startswith("-"):
        raise ValueError(f"shard '{shard.file}': expected a name that a command does not take for an option")
    if shard.bytes > config.cache_bytes:
        raise ValueError(
            f"shard '{shard.file}' has {shard.bytes} bytes, the shard cache may hold {config.cache_bytes}; "
            "raise cache_bytes, or build the dataset with smaller shards"
        )


def _backoff(file: str, tries: int) -> float:
    """Return the seconds to wait after a try: 1, 2, 4, ... 60, and up to a quarter more that differs by process."""
    seed = f"{platform.node()}/{os.getpid()}/{file}/{tries}"
    return min(2.0 ** min(tries - 1, 6), _MAX_WAIT) * (1 + zlib.crc32(seed.encode()) / 2**34)


def _public(text: str) -> str:
    """Return a text without the credentials and the queries of its URLs."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)
