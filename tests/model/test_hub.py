"""Checkpoints by name, from a stand-in of a Hugging Face hub on this machine that serves and takes real bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from rung.data.fidelity import Fidelity
from rung.model import hub, load
from rung.model.checkpoint import save_checkpoint
from rung.model.download import RETRIES, Client
from rung.model.hub import HubName
from rung.model.potential import Potential

REPOSITORY = "lab/ladder"
WEIGHTS = "model.safetensors"
FORK = multiprocessing.get_context("fork")


class Request(NamedTuple):
    method: str
    host: str
    path: str
    range: str | None
    authorization: str | None

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


Fault = Callable[["Handler", bytes, int], None]  # answers a request for a file's bytes from an offset


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        request = self.note()
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/(\S+)", request.path):
            commit = self.server.commit(match[1], unquote(match[2]))
            self.reply({"sha": commit} if commit else None)
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)", request.path):
            self.reply({"id": match[1], "private": match[1] in self.server.private})
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/([^/?]+)", request.path):
            files = self.server.files(match[1], unquote(match[2])) or {}
            self.reply([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()])
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(\S+)", request.path):
            data = (self.server.files(match[1], match[2]) or {}).get(match[3])
            if data is None:
                self.reply(None)
            elif match[3].endswith(".safetensors"):  # as hubs do with big files: another host has them
                self.head(302, Location=f"http://localhost:{self.server.server_port}/cdn/{match[2]}/{match[3]}")
            else:
                self.send_file(match[3], data)
        elif match := re.fullmatch(r"/cdn/([^/]+)/(\S+)", request.path):
            self.send_file(match[2], self.server.commits[match[1]][match[2]])
        else:
            self.reply(None)

    def do_POST(self) -> None:
        request, body = self.note(), self.body()
        if request.path == "/api/repos/create":
            self.reply({"url": f"{self.server.url}/{self.server.create(**json.loads(body))}"})
        elif request.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.reply({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/branch/(\w+)", request.path):
            self.server.branches[match[1]].setdefault(match[2], self.server.branches[match[1]]["main"])
            self.reply({})
        elif "/preupload/" in request.path:
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            modes_of = {name: modes[name.endswith(".safetensors")] for name in names}
            self.reply({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes_of.items()]})
        elif request.path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}} for one in wanted]
            objects = [one | {"actions": action} for one, action in zip(wanted, actions, strict=True)]
            self.reply({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/(\w+)", request.path):
            self.take_commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(None)

    def do_PUT(self) -> None:
        request, data = self.note(), self.body()
        assert hashlib.sha256(data).hexdigest() == request.file
        self.server.lfs[request.file] = data
        self.head(200, Content_Length=0)

    def take_commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.files(repository, branch) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.add(repository, files, branch)
        self.reply({"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def send_file(self, name: str, data: bytes) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        with self.server.guard:
            faults = self.server.faults[name]
            fault = faults.pop(0) if faults else send
        fault(self, data, start)

    def note(self) -> Request:
        get, path = self.headers.get, urlsplit(self.path).path
        request = Request(self.command, get("Host") or "", path, get("Range"), get("Authorization"))
        with self.server.guard:
            self.server.requests.append(request)
        return request

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.head(404 if value is None else 200, Content_Length=len(data), Content_Type="application/json")
        self.wfile.write(data)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": 0} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def send(handler: Handler, data: bytes, start: int, stop: int | None = None) -> None:
    if start >= len(data) > 0:
        return handler.head(416)
    length = {"Content_Length": len(data) - start}
    if start:
        handler.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **length)
    else:
        handler.head(200, **length)
    handler.wfile.write(data[start:stop])
    handler.close_connection = True


def cut(stop: int) -> Fault:
    """Hang up before byte `stop`."""
    return lambda handler, data, start: send(handler, data, start, stop)


def changed(handler: Handler, data: bytes, start: int) -> None:
    """Send the file with one bit of its last byte turned."""
    send(handler, data[:-1] + bytes([data[-1] ^ 1]), start)


def without_ranges(handler: Handler, data: bytes, start: int) -> None:
    send(handler, data, 0)


def status(code: int, **headers: object) -> Fault:
    return lambda handler, data, start: handler.head(code, **headers)


class Hub(ThreadingHTTPServer):
    """Keeps commits (files by name) and branches, notes requests, answers with `faults` of a file first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.guard = threading.Lock()
        self.requests: list[Request] = []
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.lfs: dict[str, bytes] = {}
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[repository][branch] = commit
        return commit

    def create(
        self, organization: str, name: str, private: bool = False, visibility: str = "", **others: object
    ) -> str:
        """Make a repository, private where asked (huggingface_hub 1 or 2); one that exists stays as it is."""
        repository = f"{organization}/{name}"
        if repository not in self.branches:
            self.add(repository, {})
            self.private |= {repository} if private or visibility == "private" else set()
        return repository

    def commit(self, repository: str, revision: str) -> str | None:
        known = self.branches.get(repository, {})
        return known.get(revision) or (revision if known and revision in self.commits else None)

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.commit(repository, revision) or "")

    def asked(self, method: str = "GET") -> list[str]:
        return [request.file for request in self.requests if request.method == method]

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that hang up."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, make_potential: Callable[..., Potential]) -> Path:
    """Return a checkpoint on this machine."""
    potential = make_potential(fidelities=("low",))
    return save_checkpoint(
        tmp_path / "saved",
        potential,
        fidelities={"low": Fidelity("low", "GFN2-xTB")},
        training_config={},
        datasets=[{"name": "none", "licence": "CC0-1.0"}],
        evaluation={},
    )


@pytest.fixture
def commit(server: Hub, folder: Path) -> str:
    """Put the checkpoint on the hub and return its commit."""
    return server.add(REPOSITORY, {path.name: path.read_bytes() for path in folder.iterdir()})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Waits(list[float]):
    """Notes the waits between tries instead of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


# Names


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("lab/ladder", "lab/ladder", None),
        ("lab/ladder@v1.0", "lab/ladder", "v1.0"),
        ("lab/ladder-2@refs/pr/1", "lab/ladder-2", "refs/pr/1"),
    ],
)
def test_names_of_a_hub(name: str, repository: str, revision: str | None) -> None:
    assert hub.parse(name) == HubName(repository, revision)
    assert str(hub.parse(name)) == name


@pytest.mark.parametrize(
    "path", ["ladder", "/lab/ladder", "./lab/ladder", "../ladder", "a/b/c", "lab/ladder.tar", "a/b@"]
)
def test_paths_are_no_names(path: str) -> None:
    assert hub.parse(path) is None
    assert hub.resolve(path) == Path(path)


def test_what_is_here_is_not_looked_for_elsewhere(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    folder.rename(tmp_path / REPOSITORY)
    monkeypatch.chdir(tmp_path)
    assert load(REPOSITORY).potential.config.fidelities == ("low",)
    assert not server.requests


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_CACHE", "/fast")
    assert hub.cache_folder() == Path("/fast/checkpoints")
    monkeypatch.delenv("RUNG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub.cache_folder() == Path("/xdg/rung/checkpoints")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert hub.cache_folder() == Path("/home/me/.cache/rung/checkpoints")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(ValueError, match="HF_ENDPOINT: expected 'https://host', found 'hub.example'"):
        hub.endpoint()


# Download


def test_a_pinned_checkpoint_is_fetched_once(server: Hub, commit: str, folder: Path) -> None:
    loaded = load(f"{REPOSITORY}@{commit}")
    assert loaded.potential.state_dict().keys() == load(folder).potential.state_dict().keys()
    kept = hub.resolve(f"{REPOSITORY}@{commit}")
    assert contents(kept) == contents(folder)
    requests = len(server.requests)
    server.shutdown()  # it is not needed any more
    assert load(Path(f"{REPOSITORY}@{commit}")).fidelities == loaded.fidelities
    assert len(server.requests) == requests
    assert kept.stat().st_mode & 0o777 == 0o777 & ~umask()
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in kept.iterdir())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_branch_is_a_commit_and_the_log_says_how_to_pin_it(
    server: Hub, commit: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert hub.resolve(REPOSITORY).name == commit
    assert f"{REPOSITORY} is commit {commit} now; name {REPOSITORY}@{commit} to keep using this one" in caplog.text
    newer = server.add(REPOSITORY, server.commits[commit] | {"notes.txt": b"not in SHA256SUMS"})
    kept = hub.resolve(f"{REPOSITORY}@main")
    assert kept.name == newer != commit
    assert "notes.txt" not in contents(kept)


def test_offline_uses_what_is_kept(server: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = hub.resolve(REPOSITORY)
    requests = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(REPOSITORY) == hub.resolve(f"{REPOSITORY}@{commit}") == kept
    for name in ("lab/other", f"{REPOSITORY}@v2", f"{REPOSITORY}@{'0' * 40}"):
        with pytest.raises(FileNotFoundError, match=f"{name}'? is not on this machine; unset HF_HUB_OFFLINE"):
            hub.resolve(name)
    assert len(server.requests) == requests


def test_an_unreachable_hub_is_named_with_the_commit_that_is_kept(server: Hub, commit: str) -> None:
    hub.resolve(REPOSITORY)
    server.shutdown()
    server.server_close()
    waits = Waits()
    with pytest.raises(OSError, match=rf"is no local path, .*refused.*, 3 times; .*; it was {commit} before"):
        hub.fetch(HubName(REPOSITORY), Client(wait=waits))
    assert waits == [1, 2]


@pytest.mark.parametrize("revision", ["", "@v9"])
def test_an_unknown_name_is_no_path_and_no_repository(server: Hub, revision: str) -> None:
    with pytest.raises(FileNotFoundError, match="neither a local path nor a repository .* 404 .* set HF_TOKEN"):
        load(f"runs/typo{revision}")


def test_a_repository_that_is_no_checkpoint_is_named(server: Hub) -> None:
    commit = server.add(REPOSITORY, {"README.md": b"# Something else"})
    with pytest.raises(FileNotFoundError, match="SHA256SUMS: HTTP status 404 .*; expected a Rung checkpoint"):
        load(f"{REPOSITORY}@{commit}")


def test_a_broken_download_goes_on_where_it_broke(server: Hub, commit: str, folder: Path) -> None:
    server.faults[WEIGHTS] = [cut(1000), cut(5000)]
    waits = Waits()
    kept = hub.fetch(HubName(REPOSITORY, commit), Client(wait=waits))
    assert contents(kept) == contents(folder)
    ranges = [request.range for request in server.requests if request.path.startswith("/cdn/")]
    assert ranges == [None, "bytes=1000-", "bytes=5000-"]
    assert waits == [1, 2]


def test_a_later_process_goes_on_with_what_has_arrived(server: Hub, commit: str, folder: Path) -> None:
    server.faults[WEIGHTS] = [cut(1000 * (i + 1)) for i in range(RETRIES + 1)]
    with pytest.raises(OSError, match=rf"the connection ended after 6000 of \d+ bytes, {RETRIES + 1} times"):
        hub.fetch(HubName(REPOSITORY, commit), Client(wait=Waits()))
    before = len(server.requests)
    assert contents(hub.resolve(f"{REPOSITORY}@{commit}")) == contents(folder)
    later = [(request.file, request.range) for request in server.requests[before:] if request.range]
    assert later == [(WEIGHTS, "bytes=6000-")] * 2  # the hub's and, after the redirection, the other host's
    assert "README.md" not in [request.file for request in server.requests[before:]]


def test_a_server_without_ranges_sends_all_anew(server: Hub, commit: str, folder: Path) -> None:
    server.faults[WEIGHTS] = [cut(1000), without_ranges]
    assert contents(hub.fetch(HubName(REPOSITORY, commit), Client(wait=Waits()))) == contents(folder)


@pytest.mark.parametrize("busy", [status(503), status(500), status(429, Retry_After=7)])
def test_a_busy_server_is_asked_again(server: Hub, commit: str, folder: Path, busy: Fault) -> None:
    server.faults["rung.yaml"] = [busy]
    waits = Waits()
    assert contents(hub.fetch(HubName(REPOSITORY, commit), Client(wait=waits))) == contents(folder)
    assert waits in ([1], [7])


@pytest.mark.parametrize("file", [WEIGHTS, "rung.yaml"])
def test_a_wrong_byte_is_refused(server: Hub, commit: str, folder: Path, file: str) -> None:
    good = contents(folder)[file]
    bad = good[:-1] + bytes([good[-1] ^ 1])
    server.faults[file] = [changed, changed]
    expected, found = (hashlib.sha256(data).hexdigest() for data in (good, bad))
    with pytest.raises(ValueError, match=f"{file}: expected SHA-256 {expected}, found {found}"):
        hub.fetch(HubName(REPOSITORY, commit), Client(wait=Waits()))
    assert not list(hub.cache_folder().glob(f"**/{commit}"))
    server.faults[file] = [changed]  # the second time, the right bytes come
    assert contents(hub.fetch(HubName(REPOSITORY, commit), Client(wait=Waits()))) == contents(folder)


def test_damage_in_the_cache_is_repaired(
    server: Hub, commit: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = hub.resolve(f"{REPOSITORY}@{commit}")
    (kept / WEIGHTS).write_bytes((kept / WEIGHTS).read_bytes()[:-1] + b"?")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=f"is damaged here .{WEIGHTS}: expected SHA-256.*unset HF_HUB_OFFLINE"):
        hub.resolve(f"{REPOSITORY}@{commit}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    before = len(server.requests)
    assert contents(hub.fetch(HubName(REPOSITORY, commit), Client(wait=Waits()))) == contents(folder)
    assert {request.file for request in server.requests[before:]} == {WEIGHTS, "SHA256SUMS"}
    assert f"{WEIGHTS}: expected SHA-256" in caplog.text


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", ".hidden", "a/b"])
def test_a_list_of_digests_cannot_name_other_places(server: Hub, commit: str, name: str) -> None:
    listed = server.commits[commit]["SHA256SUMS"] + f"{'0' * 64}  {name}\n".encode()
    bad = server.add(REPOSITORY, server.commits[commit] | {"SHA256SUMS": listed})
    with pytest.raises(ValueError, match=f"SHA256SUMS: expected plain file names, found '{name}'"):
        hub.resolve(f"{REPOSITORY}@{bad}")


def test_the_token_goes_to_the_hub_only(server: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.resolve(f"{REPOSITORY}@{commit}")
    sent = {(request.host.partition(":")[0], request.authorization) for request in server.requests}
    assert sent == {("127.0.0.1", "Bearer secret"), ("localhost", None)}


# Python 3.12 warns of threads at a fork; the children here use nothing that a thread of the server may hold.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_ask_at_once_fetch_it_once(server: Hub, commit: str, folder: Path) -> None:
    start = FORK.Barrier(4)

    def ask() -> None:
        start.wait()
        assert contents(hub.resolve(f"{REPOSITORY}@{commit}")) == contents(folder)

    children = [FORK.Process(target=ask) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    asked = server.asked()
    assert {name: asked.count(name) for name in ("rung.yaml", "SHA256SUMS")} == {"rung.yaml": 1, "SHA256SUMS": 1}


# Upload


@pytest.mark.parametrize(
    ("repository", "message"),
    [("ladder", "expected user/repository"), ("lab/ladder@v1", "a branch goes into --revision")],
)
def test_a_bad_repository_is_refused_before_any_work(repository: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub.check_upload(repository)


def test_an_upload_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rung\[hub\]'"):
        hub.check_upload(REPOSITORY)


@pytest.mark.slow
def test_publish_uploads_and_what_comes_back_is_the_same(server: Hub, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (rung[hub])")
    older = server.add(REPOSITORY, {"raw.safetensors": b"of an older checkpoint", "LICENSE": b"CC0"})
    command = """if True:
        import sys, pathlib; from rung.launch.cli import run_module; from rung.model import hub, publish
        publish.verify_in_fresh_process = publish.verify  # that process is tested with publishing
        status = run_module("rung.model.publish", "rung publish", sys.argv[1:])
        for repository in ("lab/vault", "lab/ladder"):
            try:
                hub.upload(pathlib.Path(sys.argv[3]), repository, private=True)
            except ValueError as error:
                print(error)
        sys.exit(status)
    """
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--to", REPOSITORY, "--revision", "next"]
    # A home of its own: no token of whoever runs the tests is sent, and nothing is written there.
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("secret")  # as `hf auth login` leaves it
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RUNG_KERNELS": "reference"}
    python = [sys.executable, "-P", "-c", command]
    done = subprocess.run([*python, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--private: ") == 1
    assert f"--private: {REPOSITORY} at {server.url} exists and is public, so nothing was uploaded" in done.stdout
    assert server.private == {"lab/vault"} and server.files("lab/vault", "main") == contents(tmp_path / "out")
    sent = {(r.host.partition(":")[0], r.authorization) for r in server.requests if r.method != "PUT"}
    assert sent == {("127.0.0.1", "Bearer secret"), ("localhost", None)}
    commit = server.branches[REPOSITORY]["next"]
    assert server.branches[REPOSITORY] == {"main": older, "next": commit}
    assert f'load it with rung.model.load("{REPOSITORY}@{commit}")' in done.stdout
    files = server.commits[commit]
    assert files == contents(tmp_path / "out") | {"LICENSE": b"CC0"}  # no raw.safetensors, which this one has not
    assert hashlib.sha256(files[WEIGHTS]).hexdigest() in server.lfs  # the big file went the way of big files
    assert f'rung.model.load("{REPOSITORY}@COMMIT")' in files["README.md"].decode()
    assert load(f"{REPOSITORY}@next").info["publication"]["repository"] == REPOSITORY
