"""Checkpoints by name: a local path, or `user/repository[@revision]` on a Hugging Face hub, kept on this machine.

What comes from a hub is held to the digests in its SHA256SUMS and kept by commit, so it is fetched once:

    RUNG_CACHE      where: $RUNG_CACHE/checkpoints (default: $XDG_CACHE_HOME or ~/.cache, then rung/checkpoints)
    HF_ENDPOINT     which hub (default: https://huggingface.co)
    HF_TOKEN        a token for private repositories; sent to that hub only
    HF_HUB_OFFLINE  1: use what is kept, ask nobody

    <host>/<user>/<repository>/<commit>/           a whole checkpoint
    <host>/<user>/<repository>/.<commit>.partial/  one that is arriving; who comes next goes on with it
    <host>/<user>/<repository>/refs/<revision>     the commit that a branch or a tag was when it was last asked for

A commit never changes, so one that is here is used without asking; a branch or a tag is asked for every time.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from rung.data.shard import file_sha256, write_beside
from rung.model.checkpoint_files import DIGESTS, OPTIONAL, parse_digests
from rung.model.download import Client, NotThere

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)(?:@([A-Za-z0-9_][A-Za-z0-9_./+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
QUESTION_RETRIES = 2  # which commit a name is: few, for the name may be a mistyped path on a machine without network

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubName:
    """A repository of a hub and the commit, tag or branch in it; None is its main branch as it stands."""

    repository: str  # user/repository
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def parse(name: str) -> HubName | None:
    """Return what `name` means on a hub; None when it has not the form `user/repository[@revision]`."""
    match = _NAME.fullmatch(name)
    return HubName(match[1], match[2]) if match and not name.endswith(".tar") else None


def resolve(name: Path | str) -> Path:
    """Return the local path of a checkpoint, fetched first when `name` is no local path but one of a hub's.

    Raises what `fetch` does; a path that cannot be a name is returned as it is, whether it exists or not.
    """
    hub_name = parse(str(name))
    if hub_name is None or Path(name).exists():
        return Path(name)
    return fetch(hub_name)


def fetch(name: HubName, client: Client | None = None) -> Path:
    """Return the folder of a hub's checkpoint on this machine; every file in it has its digest.

    A download that broke is continued, here or by the next process that asks; processes that ask at the same time
    fetch it once. `client` has the token (default: HF_TOKEN).

    Raises:
        FileNotFoundError: neither a local path nor a repository and revision of the hub; or not kept, when offline.
        ValueError: a file has another digest than SHA256SUMS says, or there is no such list.
        OSError: the hub cannot be reached, or the cache cannot be written.
    """
    client = client or Client(os.environ.get("HF_TOKEN", ""))
    home = cache_folder() / urlsplit(endpoint()).netloc.rpartition("@")[2] / name.repository
    commit = _commit(name, home, client)
    folder = home / commit
    if folder.is_dir() and not _fault(folder):
        return folder
    if _offline():
        fault = f"damaged here ({_fault(folder)})" if folder.is_dir() else "not on this machine"
        raise FileNotFoundError(f"{name.repository}@{commit} is {fault}; unset HF_HUB_OFFLINE to fetch it")
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / f"{commit}.lock"):
        if folder.is_dir() and (fault := _fault(folder)):
            _log.warning("%s: %s; fetching it again", folder, fault)
            folder.rename(_partial(folder))
        if not folder.is_dir():
            _fill(_partial(folder), name.repository, commit, client)
            _partial(folder).rename(folder)
    return folder


def endpoint() -> str:
    """Return the hub's address, without a slash at its end; raise ValueError where HF_ENDPOINT is none."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        raise ValueError(f"HF_ENDPOINT: expected 'https://host', found '{address}'")
    return address


def cache_folder() -> Path:
    """Return the folder of the checkpoints that came from hubs."""
    if folder := os.environ.get("RUNG_CACHE"):
        return Path(folder).expanduser() / "checkpoints"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung" / "checkpoints"


def _commit(name: HubName, home: Path, client: Client) -> str:
    """Return the commit that a name stands for now; offline, the one that it was when it was last asked for."""
    if name.is_pinned:
        assert name.revision is not None
        return name.revision
    revision = name.revision or "main"
    kept = home / "refs" / f"{quote(revision, safe='')}"
    if _offline():
        if not kept.is_file():
            raise FileNotFoundError(f"'{name}' is not on this machine; unset HF_HUB_OFFLINE to fetch it")
        return kept.read_text().strip()
    url = f"{endpoint()}/api/models/{name.repository}/revision/{quote(revision, safe='')}"
    try:
        commit = json.loads(client.read(url, QUESTION_RETRIES)).get("sha")
    except NotThere as error:
        raise FileNotFoundError(
            f"'{name}' is neither a local path nor a repository with that revision at {endpoint()} ({error}); "
            "for a private one set HF_TOKEN"
        ) from error
    except OSError as error:
        hint = f"; it was {kept.read_text().strip()} before, name that as the revision" if kept.is_file() else ""
        raise OSError(f"'{name}' is no local path, and the hub cannot say which commit it is: {error}{hint}") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{url}: expected a JSON object with 'sha'; is HF_ENDPOINT a Hugging Face hub?") from error
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"{url}: sha: expected a commit of 40 hexadecimal digits, found {commit!r}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_beside(kept, f"{commit}\n".encode())
    say = _log.warning if name.revision is None else _log.info
    say("%s is commit %s now; name %s@%s to keep using this one", name, commit, name.repository, commit)
    return commit


def _fill(partial: Path, repository: str, commit: str, client: Client) -> None:
    """Fetch into `partial` what it lacks of a checkpoint; its list of digests comes last."""
    partial.mkdir(exist_ok=True)
    base = f"{endpoint()}/{repository}/resolve/{commit}"
    try:
        listed = client.read(f"{base}/{DIGESTS}")
        digests = parse_digests(listed, f"{repository}@{commit}")
        with tqdm(digests.items(), desc=f"{repository}@{commit[:8]}", unit="file", disable=None) as files:
            for file, digest in files:
                client.download(f"{base}/{file}", partial / file, digest)
    except NotThere as error:
        raise FileNotFoundError(
            f"{repository}@{commit}: {error}; expected a Rung checkpoint with all files that its {DIGESTS} lists"
        ) from error
    write_beside(partial / DIGESTS, listed)


def _fault(folder: Path) -> str:
    """Return what is wrong with a kept checkpoint; empty when nothing is."""
    try:
        for file, digest in parse_digests((folder / DIGESTS).read_bytes(), str(folder)).items():
            if (found := file_sha256(folder / file)) != digest:
                return f"{file}: expected SHA-256 {digest}, found {found}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock against other processes and threads; the kernel frees that of a killed one."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


# Upload


def check_upload(repository: str) -> None:
    """Raise ValueError unless `repository` is user/repository and what an upload needs is installed."""
    name = parse(repository)
    if name is None or name.revision is not None:
        raise ValueError(f"--to: expected user/repository, found '{repository}'; a branch goes into --revision")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError("an upload needs huggingface_hub: pip install 'rung[hub]'")


def upload(folder: Path, repository: str, branch: str | None = None, *, private: bool = False) -> str:
    """Put the checkpoint in `folder` into a hub's repository, made if need be, fetch it back and return its commit.

    Files of an older checkpoint that this one has not are removed there, others are left alone. Raises ValueError as
    `check_upload` does and for `private` where the repository is a public one, and OSError when the hub refuses, cannot
    be reached or gives back other bytes.
    """
    check_upload(repository)
    from huggingface_hub import HfApi, get_token

    listed = (folder / DIGESTS).read_bytes()
    api = HfApi(endpoint=endpoint())
    with _as_os_error(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        is_exposed = private and not api.repo_info(repository).private
    if is_exposed:
        raise ValueError(
            f"--private: {repository} at {endpoint()} exists and is public, so nothing was uploaded: "
            "make it private there, name another one, or leave out --private"
        )
    with _as_os_error(repository):
        if branch not in (None, "main"):
            api.create_branch(repository, branch=branch, exist_ok=True)
        info = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message="Checkpoint written by rung publish",
            allow_patterns=[DIGESTS, *parse_digests(listed, str(folder))],
            delete_patterns=list(OPTIONAL),
        )
    kept = fetch(HubName(repository, info.oid), Client(get_token() or ""))  # also that of `hf auth login`
    if (kept / DIGESTS).read_bytes() != listed:
        raise OSError(f"{repository}@{info.oid}: the hub gives back other files than those in {folder}; upload again")
    return str(info.oid)


@contextmanager
def _as_os_error(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of several libraries below huggingface_hub, not all of them an OSError
        reason = " ".join(str(error).split())
        raise OSError(f"{repository} at {endpoint()}: the upload failed: {reason}") from error
