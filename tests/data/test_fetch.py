"""Remote shards over a real HTTP server, real commands and real processes: whole, once, bounded, and loud."""

from __future__ import annotations

import email.utils
import hashlib
import io
import multiprocessing
import os
import resource
import select
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.data import fetch
from rung.data.fetch import RemoteConfig, ShardSource, ShardUnavailable
from rung.data.shard import ShardInfo

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
HALF = 150_000
FORK = multiprocessing.get_context("fork")
# Python 3.12 warns of threads at a fork; the children here use nothing that a thread of the test's server may hold.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def info(data: bytes = DATA, file: str = "train-000000.tar", **changes: Any) -> ShardInfo:
    values: dict[str, Any] = {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "packs": 1}
    values |= {"structures": 1, "atoms": 1, "edges": 0, "split": "train", "labels": {}}
    return ShardInfo(**values | changes)


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    if_range: str | None
    authorization: str | None

    @property
    def start(self) -> int:
        return int(self.range.removeprefix("bytes=").removesuffix("-")) if self.range else 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        get = self.headers.get
        request = Request(self.path, get("Range"), get("If-Range"), get("Authorization"))
        with self.server.guard:
            self.server.requests.append(request)
            answer = self.server.answers[min(len(self.server.requests), len(self.server.answers)) - 1]
        answer(self, request)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


Answer = Callable[[Handler, Request], None]


class Server(ThreadingHTTPServer):
    """Answers the i-th request with the i-th of `answers`, the last one from then on, and keeps the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.guard, self.done = threading.Lock(), threading.Event()
        self.requests: list[Request] = []
        self.answers: list[Answer] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/set/{{file}}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that hang up."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


def send(
    data: bytes = DATA, *, stop: int | None = None, hang: bool = False, ranges: bool = True, **head: str
) -> Answer:
    """Serve `data` from where the client asks; break off, or fall silent, before byte `stop`."""

    def answer(handler: Handler, request: Request) -> None:
        start = request.start if ranges else 0
        if start:
            content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
            handler.head(206, Content_Length=len(data) - start, Content_Range=content_range, **head)
        else:
            handler.head(200, Content_Length=len(data), **head)
        handler.wfile.write(data[start:stop])
        if hang:
            assert isinstance(handler.server, Server)
            handler.server.done.wait()

    return answer


def status(code: int, **headers: str) -> Answer:
    return lambda handler, request: handler.head(code, Content_Length=0, **headers)


def hang_up(handler: Handler, request: Request) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


class Fetcher:
    """A source with a cache of its own that notes the waits instead of waiting."""

    def __init__(self, location: str, folder: Path, **config: Any) -> None:
        self.waits: list[float] = []
        self.folder = folder
        self.source = ShardSource(location, RemoteConfig(str(folder), **config), self.waits.append)

    def read(self, shard: ShardInfo | None = None) -> bytes:
        with self.source.open(shard or info()) as file:
            return file.read()

    def files(self) -> list[str]:
        """What the cache holds, beside locks."""
        return sorted(path.name for path in self.folder.iterdir() if path.suffix != ".lock")


def cached_name(data: bytes = DATA) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.tar"


def partial_name(data: bytes = DATA) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{len(data)}.partial"


# Locations


def test_a_local_shard_is_opened_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(OTHER)  # hashing every local file is `rung data verify`
    fetcher = Fetcher(f"{tmp_path}/{{file}}", tmp_path / "cache")
    assert fetcher.read() == OTHER and not fetcher.folder.exists()
    with pytest.raises(FileNotFoundError, match="val-000000.tar: no such shard; .*set shard_url"):
        fetcher.read(info(file="val-000000.tar"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://user:secret@host/set/?token=secret", "expected '{file}'.* found 'https://host/set/'"),
        ("s3://bucket/{file}", "read s3:// through a command, such as 'pipe:aws s3 cp"),
        ("file:///set/{file}", "expected a folder"),
        ("https://host/a set/{file}", "without spaces"),
        ("https://{file}", "expected 'https://host/set/{file}'"),
    ],
)
def test_unusable_locations_are_refused(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ShardSource(location)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"sha256": "../../home/x"}, {"sha256": "A" * 64}, {"bytes": "1/../../x"}, {"bytes": 0}, {"file": "-o.tar"}],
)
def test_a_manifest_cannot_name_other_files_or_options(tmp_path: Path, wrong: dict[str, Any]) -> None:
    fetcher = Fetcher("pipe:echo {file}", tmp_path / "cache")
    with pytest.raises(ValueError, match="expected"):
        fetcher.read(info(**wrong))
    assert not fetcher.folder.exists()


@pytest.mark.parametrize("wrong", [{"cache_bytes": 0}, {"timeout_s": 0.0}, {"retries": -1}])
def test_unusable_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"remote shards: {next(iter(wrong))}: expected .*, found"):
        RemoteConfig(**wrong)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_CACHE", "/fast")
    assert fetch.cache_folder(RemoteConfig()) == Path("/fast/shards")
    assert fetch.cache_folder(RemoteConfig("/mine")) == Path("/mine")
    monkeypatch.delenv("RUNG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert fetch.cache_folder(RemoteConfig()) == Path("/xdg/rung/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert fetch.cache_folder(RemoteConfig()) == Path("/home/me/.cache/rung/shards")


# HTTP


def test_a_shard_is_fetched_once_and_seekable(server: Server, tmp_path: Path) -> None:
    server.answers = [send()]
    fetcher = Fetcher(server.url, tmp_path / "deep" / "cache")
    assert fetcher.read() == DATA and fetcher.files() == [cached_name()]
    with fetcher.source.open(info()) as file:
        assert file.seek(-10, os.SEEK_END) == len(DATA) - 10 and file.read() == DATA[-10:]
    assert [request.path for request in server.requests] == ["/set/train-000000.tar"]


@pytest.mark.parametrize(
    ("head", "if_range"),
    [
        ({"ETag": '"v1"', "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, '"v1"'),
        ({"ETag": 'W/"v1"', "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ({}, None),
    ],
)
def test_a_broken_download_goes_on_where_it_broke(
    server: Server, tmp_path: Path, head: dict[str, Any], if_range: str | None
) -> None:
    server.answers = [send(stop=HALF, **head), send(stop=HALF + 1000, **head), hang_up, send(**head)]
    fetcher = Fetcher(server.url, tmp_path)
    assert fetcher.read() == DATA
    assert [request.start for request in server.requests] == [0, HALF, HALF + 1000, HALF + 1000]
    assert [request.if_range for request in server.requests] == [None, if_range, if_range, if_range]


def test_a_server_without_ranges_sends_it_anew(server: Server, tmp_path: Path) -> None:
    server.answers = [send(stop=HALF), send(ranges=False)]
    assert Fetcher(server.url, tmp_path).read() == DATA
    assert [request.start for request in server.requests] == [0, HALF]


def test_silence_ends_a_try(server: Server, tmp_path: Path) -> None:
    server.answers = [send(stop=HALF, hang=True), send()]
    fetcher = Fetcher(server.url, tmp_path, timeout_s=0.5)
    assert fetcher.read() == DATA and server.requests[1].start == HALF


def test_chunked_bytes_without_a_length_are_taken(server: Server, tmp_path: Path) -> None:
    def chunked(handler: Handler, request: Request) -> None:
        handler.head(200, Transfer_Encoding="chunked")
        for start in range(0, len(DATA), 70_000):
            chunk = DATA[start : start + 70_000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        handler.wfile.write(b"0\r\n\r\n")

    Handler.protocol_version = "HTTP/1.1"
    try:
        server.answers = [chunked]
        assert Fetcher(server.url, tmp_path).read() == DATA
    finally:
        Handler.protocol_version = "HTTP/1.0"


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(
    server: Server, tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [status(code), send()]
    fetcher = Fetcher(server.url, tmp_path)
    assert fetcher.read() == DATA and len(fetcher.waits) == 1
    assert f"HTTP status {code}" in caplog.text and "trying again in 1 s" in caplog.text


def test_a_server_may_ask_for_a_longer_wait(server: Server, tmp_path: Path) -> None:
    date = email.utils.formatdate(time.time() + 100_000, usegmt=True)
    server.answers = [status(429, Retry_After=value) for value in ("30", "1000000", date, "soon", "0")]
    server.answers.append(send())
    fetcher = Fetcher(server.url, tmp_path)
    assert fetcher.read() == DATA
    assert fetcher.waits[:3] == [30, 300, 300] and 8 <= fetcher.waits[3] <= 10 and 16 <= fetcher.waits[4] <= 20


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "user:password@host"), (403, "signed URL"), (404, "shard_url"), (400, "shard_url")]
)
def test_a_refusal_fails_at_once(server: Server, tmp_path: Path, code: int, advice: str) -> None:
    server.answers = [status(code)]
    fetcher = Fetcher(f"http://me:secret@{server.host}/set/{{file}}?sign=secret", tmp_path)
    with pytest.raises(ShardUnavailable, match=f"after 1 try: HTTP status {code} .*{advice}") as caught:
        fetcher.read()
    assert f"http://{server.host}/set/train-000000.tar: " in str(caught.value)
    assert "secret" not in str(caught.value) and not fetcher.waits and not fetcher.files()


def test_retries_end_with_an_error_and_go_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.answers = [send(stop=HALF), *[status(503)] * 8, send()]
    fetcher = Fetcher(server.url, tmp_path, retries=8)
    with pytest.raises(OSError, match=r"unavailable after 9 tries: HTTP status 503 .*; check the network"):
        fetcher.read()
    assert fetcher.files() == [partial_name()]
    for wait, base in zip(fetcher.waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert base <= wait <= 1.25 * base
    assert fetcher.read() == DATA and server.requests[-1].start == HALF


def test_a_server_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        fetcher = Fetcher(f"http://127.0.0.1:{unused.getsockname()[1]}/{{file}}", tmp_path, retries=2)
        with pytest.raises(ShardUnavailable, match="after 3 tries: ConnectionRefusedError"):
            fetcher.read()
    assert len(fetcher.waits) == 2


def test_a_password_goes_to_the_server_but_not_where_it_points_to(server: Server, tmp_path: Path) -> None:
    server.answers = [status(302, Location=f"http://{server.host}/elsewhere.tar"), send()]
    assert Fetcher(f"http://me:pass%40word@{server.host}/{{file}}", tmp_path).read() == DATA
    assert [request.authorization for request in server.requests] == ["Basic bWU6cGFzc0B3b3Jk", None]
    assert [request.path for request in server.requests] == ["/train-000000.tar", "/elsewhere.tar"]


# Wrong bytes


def test_wrong_bytes_are_fetched_once_more(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.answers = [send(OTHER), send()]
    fetcher = Fetcher(server.url, tmp_path, retries=0)
    assert fetcher.read() == DATA and [request.start for request in server.requests] == [0, 0]
    assert "expected SHA-256" in caplog.text


def test_wrong_bytes_twice_are_an_error(server: Server, tmp_path: Path) -> None:
    server.answers = [send(OTHER)]
    fetcher = Fetcher(server.url, tmp_path)
    found = hashlib.sha256(OTHER).hexdigest()
    message = f"shard 'train-000000.tar' unavailable .*expected SHA-256 {info().sha256}, found {found}; .*dataset.yaml"
    with pytest.raises(ShardUnavailable, match=message):
        fetcher.read()
    assert len(server.requests) == 2 and not fetcher.files()


@pytest.mark.parametrize("size", [1000, 400_000])
def test_another_size_is_an_error_before_the_bytes_are_taken(server: Server, tmp_path: Path, size: int) -> None:
    server.answers = [send(bytes(size))]
    with pytest.raises(ShardUnavailable, match=f"expected 300000 bytes, the server's file has {size}"):
        Fetcher(server.url, tmp_path).read()
    assert len(server.requests) == 2


def test_a_changed_file_is_not_joined_to_the_old_half(server: Server, tmp_path: Path) -> None:
    def wrong_range(handler: Handler, request: Request) -> None:
        handler.head(206, Content_Length=100, Content_Range=f"bytes 0-99/{len(DATA)}")

    server.answers = [send(OTHER, stop=HALF), send(), send()]  # the halves of two versions: a wrong digest
    assert Fetcher(server.url, tmp_path / "a").read() == DATA
    assert [request.start for request in server.requests] == [0, HALF, 0]
    for second in (wrong_range, status(416)):
        server.requests.clear()
        server.answers = [send(stop=HALF), second, send()]
        assert Fetcher(server.url, tmp_path / second.__name__).read() == DATA
        assert [request.start for request in server.requests] == [0, HALF, 0]


# Commands


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "train-000000.tar").write_bytes(DATA)
    return folder


def test_a_command_prints_the_shard(published: Path, tmp_path: Path) -> None:
    fetcher = Fetcher(f"pipe:cat {shlex.quote(str(published))}/{{file}} | cat", tmp_path / "cache")
    assert fetcher.read() == DATA
    (published / "train-000000.tar").unlink()
    assert fetcher.read() == DATA and fetcher.files() == [cached_name()]


def test_a_failing_command_is_run_again_and_its_last_words_are_told(published: Path, tmp_path: Path) -> None:
    noise = "for i in $(seq 1000 2000); do echo line $i >&2; done; echo https://me:secret@host/?sign=secret >&2"
    command = f"echo run >> {tmp_path}/runs; cat {shlex.quote(str(published))}/{{file}}; {noise}; exit 3"
    fetcher = Fetcher(f"pipe:TOKEN=secret {command}", tmp_path / "cache", retries=1)
    message = r"after 2 tries: exit status 3: line 1997 \| .* \| line 2000 \| https://host/; run the command by hand"
    with pytest.raises(ShardUnavailable, match=message) as caught:
        fetcher.read()
    assert "secret" not in str(caught.value) and "pipe:... " in str(caught.value)
    assert (tmp_path / "runs").read_text() == "run\n" * 2  # whole as the bytes were, the command says it failed
    assert len(fetcher.waits) == 1 and not fetcher.files()


def test_a_silent_failure_and_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailable, match="after 2 tries: exit status 1: nothing on stderr"):
        Fetcher("pipe:false {file}", tmp_path, retries=1).read()
    with pytest.raises(ShardUnavailable, match="after 1 try: exit status 127: .*not found; install the program"):
        Fetcher("pipe:no-such-program {file}", tmp_path).read()


@pytest.mark.parametrize(("command", "found"), [("head -c 100", "100"), ("cat - /dev/zero <", "more")])
def test_a_command_that_prints_too_little_or_too_much(
    published: Path, tmp_path: Path, command: str, found: str
) -> None:
    fetcher = Fetcher(f"pipe:{command} {shlex.quote(str(published))}/{{file}}", tmp_path / "cache")
    with pytest.raises(ShardUnavailable, match=f"after 2 tries: expected 300000 bytes, found {found}"):
        fetcher.read()
    assert not fetcher.files()


@contextmanager
def witness(folder: Path) -> Iterator[tuple[str, io.BufferedReader]]:
    """Give a command's beginning and a file that ends when the command and all its children have."""
    os.mkfifo(folder / "witness")
    descriptor = os.open(folder / "witness", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        yield f"exec 3>{shlex.quote(str(folder / 'witness'))}; echo started >&3", file


@pytest.mark.parametrize(
    ("end", "reason"),
    [("sleep 1000", "no byte for 0.5 s"), ("sleep 1000 >&2 & exec >&-; sleep 1000", "did not end within 0.5 s")],
)
def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, end: str, reason: str) -> None:
    with witness(tmp_path) as (begin, file):
        fetcher = Fetcher(f"pipe:{begin}; echo {{file}}; {end}", tmp_path / "cache", timeout_s=0.5, retries=0)
        with pytest.raises(ShardUnavailable, match=reason):
            fetcher.read()
        file.read()  # returns when nobody holds the other side any more
    assert not fetcher.files()


# Processes


def _report(source: ShardSource, shard: ShardInfo, max_file: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, resource.RLIM_INFINITY))
    pipe.send("ready")
    pipe.recv()
    try:
        with source.open(shard) as file:
            pipe.send(hashlib.sha256(file.read()).hexdigest())
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def child(
    source: ShardSource, shard: ShardInfo, max_file: int = resource.RLIM_INFINITY
) -> Iterator[tuple[Any, Connection]]:
    """Fork a process that opens the shard once it is told to, and sends its digest or the error."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_report, args=(source, shard, max_file, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    with ours:
        yield process, ours
    process.kill()
    process.join()
    process.close()


@forks
def test_processes_that_want_one_shard_fetch_it_once(server: Server, tmp_path: Path) -> None:
    go = threading.Event()

    def slow(handler: Handler, request: Request) -> None:
        go.wait()
        send()(handler, request)

    server.answers = [slow]
    source = Fetcher(server.url, tmp_path).source
    with child(source, info()) as (_, first), child(source, info()) as (_, second):
        first.send("go")
        second.send("go")
        go.set()
        assert first.recv() == second.recv() == info().sha256
    assert len(server.requests) == 1


@forks
def test_a_killed_process_leaves_a_download_that_goes_on(server: Server, tmp_path: Path) -> None:
    server.answers = [send(stop=HALF), send()]
    waiting, unwaited = FORK.Pipe()

    def wait_for_ever(seconds: float) -> None:
        unwaited.send(seconds)
        signal.pause()

    fetcher = Fetcher(server.url, tmp_path)
    with child(ShardSource(server.url, fetcher.source.config, wait_for_ever), info()) as (process, pipe):
        pipe.send("go")
        waiting.recv()  # it holds the lock and half of the shard
        assert fetcher.files() == [partial_name()]
        process.kill()
    assert fetcher.read() == DATA and fetcher.files() == [cached_name()]
    assert [request.start for request in server.requests] == [0, HALF]
    waiting.close()
    unwaited.close()


@forks
def test_an_interrupt_ends_the_command(tmp_path: Path) -> None:
    with witness(tmp_path) as (begin, file):
        fetcher = Fetcher(f"pipe:{begin}; echo {{file}}; sleep 1000", tmp_path / "cache")
        with child(fetcher.source, info()) as (process, pipe):
            pipe.send("go")
            poll = select.poll()
            poll.register(file, select.POLLIN)
            poll.poll()
            assert file.readline() == b"started\n"
            os.kill(process.pid, signal.SIGINT)
            assert pipe.recv().startswith("KeyboardInterrupt")
            assert file.read() == b"" and not fetcher.files()


@forks
@pytest.mark.parametrize("remote", ["http", "pipe"])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    server: Server, published: Path, tmp_path: Path, remote: str
) -> None:
    server.answers = [send()]
    location = server.url if remote == "http" else f"pipe:cat {shlex.quote(str(published))}/{{file}}"
    fetcher = Fetcher(location, tmp_path / "cache")
    # The kernel's limit on a file's size stands in for a full disk: a short write, then an error.
    with child(fetcher.source, info(), max_file=100_000) as (_, pipe):
        pipe.send("go")
        message = pipe.recv()
    assert message.startswith("ShardUnavailable") and "File too large" in message and "make space there" in message
    assert not fetcher.files() and len(server.requests) == (remote == "http")


# The cache


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    """Four published shards of 1000 bytes."""
    contents = [bytes([number]) * 1000 for number in range(4)]
    (tmp_path / "set").mkdir()
    infos = [info(data, f"{number}.tar") for number, data in enumerate(contents)]
    for shard, data in zip(infos, contents, strict=True):
        (tmp_path / "set" / shard.file).write_bytes(data)
    return infos


def small_cache(folder: Path, cache_bytes: int, **config: Any) -> Fetcher:
    """Fetch by a command that notes which shards were asked for in the file `asked`."""
    command = f"echo {{file}} >> {folder}/asked; cat {folder}/set/{{file}}"
    return Fetcher(f"pipe:{command}", folder / "cache", cache_bytes=cache_bytes, **config)


def age(fetcher: Fetcher, *names: str) -> None:
    """Let the files have been used in this order, long ago."""
    for second, name in enumerate(names):
        os.utime(fetcher.folder / name, (second, second))


def tar(shard: ShardInfo) -> str:
    return f"{shard.sha256}.tar"


def test_least_recently_used_shards_make_room(tmp_path: Path, shards: list[ShardInfo]) -> None:
    fetcher = small_cache(tmp_path, 3000)
    for shard in shards[:3]:
        fetcher.read(shard)
    age(fetcher, *map(tar, shards[:3]))
    (fetcher.folder / "mine.txt").write_bytes(bytes(10_000))  # neither counted nor deleted
    fetcher.read(shards[0])  # used again
    with fetcher.source.open(shards[1]) as file:
        age(fetcher, tar(shards[1]), tar(shards[2]))
        fetcher.read(shards[3])
        assert fetcher.files() == sorted(["mine.txt", *map(tar, [shards[0], shards[2], shards[3]])])
        assert file.read() == bytes([1]) * 1000  # evicted, yet open
    fetcher.read(shards[1])
    assert (tmp_path / "asked").read_text().split() == ["0.tar", "1.tar", "2.tar", "3.tar", "1.tar"]


def test_abandoned_downloads_are_counted_as_promised_and_evicted(tmp_path: Path, shards: list[ShardInfo]) -> None:
    fetcher = small_cache(tmp_path, 2500)
    fetcher.read(shards[0])
    abandoned = f"{shards[1].sha256}.1000.partial"
    (fetcher.folder / abandoned).touch()
    age(fetcher, abandoned, tar(shards[0]))
    fetcher.read(shards[2])
    assert fetcher.files() == sorted([tar(shards[0]), tar(shards[2])])


@forks
def test_a_download_in_progress_is_not_evicted_but_waited_for(
    server: Server, tmp_path: Path, shards: list[ShardInfo]
) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(handler: Handler, request: Request) -> None:
        started.set()
        go.wait()
        send(bytes([0]) * 1000)(handler, request)

    server.answers = [slow]
    first = Fetcher(server.url, tmp_path / "cache", cache_bytes=1500)
    second = small_cache(tmp_path, 1500)
    with child(second.source, shards[1]) as (_, b), child(first.source, shards[0]) as (_, a):
        a.send("go")
        started.wait()
        b.send("go")
        assert first.files() == [f"{shards[0].sha256}.1000.partial"]
        go.set()
        assert [a.recv(), b.recv()] == [shard.sha256 for shard in shards[:2]]
    assert first.files() == [tar(shards[1])] and len(server.requests) == 1


def test_a_shard_beyond_the_bound_is_an_error_naming_both(tmp_path: Path, shards: list[ShardInfo]) -> None:
    message = "shard '0.tar' has 1000 bytes, the shard cache may hold 999; raise cache_bytes"
    with pytest.raises(ValueError, match=message):
        small_cache(tmp_path, 999).read(shards[0])


@pytest.mark.parametrize("damaged", [bytes(1000), bytes([1]) * 999, b""])
def test_a_damaged_cached_shard_is_fetched_again(
    tmp_path: Path, shards: list[ShardInfo], damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fetcher = small_cache(tmp_path, 1500)
    fetcher.folder.mkdir()
    (fetcher.folder / tar(shards[1])).write_bytes(damaged)
    assert fetcher.read(shards[1]) == bytes([1]) * 1000
    assert "damaged in the cache" in caplog.text and "fetching '1.tar' again" in caplog.text
    assert fetcher.files() == [tar(shards[1])]


def test_a_whole_cached_shard_of_an_earlier_run_is_used(tmp_path: Path, shards: list[ShardInfo]) -> None:
    fetcher = small_cache(tmp_path, 1500)
    fetcher.folder.mkdir()
    (fetcher.folder / tar(shards[1])).write_bytes(bytes([1]) * 1000)
    assert fetcher.read(shards[1]) == bytes([1]) * 1000
    assert not (tmp_path / "asked").exists()


def test_an_unusable_cache_is_an_error_that_says_where(tmp_path: Path, shards: list[ShardInfo]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ShardUnavailable, match="the shard cache .*/cache cannot be used .*set cache_folder"):
        small_cache(tmp_path, 1500).read(shards[0])
