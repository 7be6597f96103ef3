"""A folder of states on the disk, as one process sees it: names, digests, pointers, and moves that cannot tear.

<folder>/latest                     name of the newest whole state; moved last
<folder>/best                       name of the best one, when there is one
<folder>/step_000000123/
    state.json                      version, world, step and what the caller adds
    *.safetensors, *.json           the files of every rank, each written by one
    SHA256SUMS                      digests of all of them (`sha256sum -c` reads it)
<folder>/.step_000000123.*.partial  a state that is being written or removed, or was when a run was killed
<folder>/.step_000000123.old        a state that another one of the same step is replacing
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.data.shard import file_sha256

STATE_VERSION = 2
DIGESTS = "SHA256SUMS"
STATE_FILE = "state.json"
LATEST, BEST = "latest", "best"

Content = bytes | Mapping[str, Tensor]
Digests = dict[str, str]  # file name -> SHA-256 in hexadecimal


class Fault(IntEnum):
    """What is wrong with a file of a state."""

    NONE = 0
    MISSING = 1
    DAMAGED = 2
    UNREADABLE = 3

    def __str__(self) -> str:
        return {1: "is missing", 2: f"is damaged (its SHA-256 is not the one in {DIGESTS})", 3: "cannot be read"}[self]


# Reading a state


def state_files(place: Path) -> Digests:
    """Return the files of a state with their digests, by name. Raises ValueError if its list of them is damaged."""
    digests = {}
    for line in (place / DIGESTS).read_text().splitlines():
        if not (match := re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)):
            raise ValueError(f"state {place}: {DIGESTS}: expected '<SHA-256>  <file name>', found {line[:80]!r}")
        digests[match[2]] = match[1]
    if STATE_FILE not in digests:
        raise ValueError(f"state {place}: {DIGESTS} does not list {STATE_FILE}: it is cut off")
    return digests


def state_tensors(place: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of one file of a state, on the host."""
    return load_file(place / name)


def state_document(place: Path, name: str = STATE_FILE) -> Any:
    """Return the JSON value of one file of a state."""
    return json.loads((place / name).read_bytes())


def fault_of(place: Path, name: str, digest: str) -> Fault:
    """Return what is wrong with one file of a state."""
    try:
        try:
            found = file_sha256(place / name)
        except FileNotFoundError:
            os.listdir(place)  # a client of a network file system that remembers there is no such file looks again
            found = file_sha256(place / name)
    except FileNotFoundError:
        return Fault.MISSING
    except OSError:
        return Fault.UNREADABLE
    return Fault.NONE if found == digest else Fault.DAMAGED


# Writing a state


def write_file(path: Path, content: Content) -> None:
    """Write one file of a state: bytes, or tensors as safetensors."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(dict(content), path)  # from 0.8 on, safetensors lets other threads run meanwhile
        path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)  # it makes files that only their owner can read


def settle(path: Path) -> str:
    """Wait until a written file is on the disk and return its digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


class StateFolder:
    """The states under `path`; only one process, rank 0, calls what changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def name(step: int) -> str:
        return f"step_{step:09d}"

    def states(self) -> list[str]:
        """Return the names of the states in their place, oldest step first."""
        found = [entry.name for entry in self.path.glob("step_*") if re.fullmatch(r"step_\d{9,}", entry.name)]
        return sorted(found, key=_step)

    def pointer(self, name: str) -> str:
        """Return what `latest` or `best` names; empty if there is no such pointer."""
        with suppress(FileNotFoundError):
            return (self.path / name).read_text(errors="replace").strip()
        return ""

    def publish(self, partial: Path, name: str, digests: Digests, *, best: bool) -> None:
        """Put a state whose files are all written and settled into its place, then move the pointers.

        Raises OSError, among others for a file that this machine does not see. Killed at any moment, it leaves a whole
        state for the pointers to name.
        """
        present = set(os.listdir(partial))
        for file in sorted(digests.keys() - present):
            if not (partial / file).exists():  # a listing may be older than the file on a network file system
                raise FileNotFoundError(
                    errno.ENOENT,
                    f"{file} was written, but rank 0 does not see it in {self.path}: "
                    "expected a folder on a file system that all nodes share",
                )
        lines = (f"{digest}  {file}\n" for file, digest in sorted(digests.items()))
        write_file(partial / DIGESTS, "".join(lines).encode())
        settle(partial / DIGESTS)
        _sync_folder(partial)
        place, old = self.path / name, self.path / f".{name}.old"
        if place.exists():  # left by a run that this one repeats
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        partial.rename(place)
        _sync_folder(self.path)
        self._point(LATEST, name)
        if best:
            self._point(BEST, name)
        shutil.rmtree(old, ignore_errors=True)

    def prune(self, keep: int, newest: str) -> None:
        """Remove states older than `newest` beyond `keep` with it, but none that a pointer names; and leftovers.

        States of later steps, which are there when a run was sent back, stay until the run reaches their step.
        """
        states = self.states()
        until_newest = [name for name in states if _step(name) <= _step(newest)]
        named = {self.pointer(LATEST), self.pointer(BEST)}
        for name in until_newest[:-keep]:
            if name not in named:
                # Half removed under its own name, it would be a state that looks damaged.
                (self.path / name).rename(self.path / f".{name}.removed.partial")
        self.remove_partial()

    def recover(self) -> None:
        """Finish or take back what a killed run was doing."""
        for old in self.path.glob(".step_*.old"):
            place = self.path / old.name.removeprefix(".").removesuffix(".old")
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(place)
        self.remove_partial()

    def remove_partial(self) -> None:
        for partial in self.path.glob(".step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def candidates(self) -> tuple[list[str], str]:
        """Return the states to try, first the one to prefer, and what is wrong with the pointer `latest` (or "").

        The one that `latest` names comes first, then the older ones. If it names none, the newest comes first.
        """
        states, latest = self.states()[::-1], self.pointer(LATEST)
        if latest in states:
            return states[states.index(latest) :], ""
        fault = f"names {latest!r}, which does not exist" if latest else "is empty"
        return states, f"{LATEST} {fault if (self.path / LATEST).exists() else 'is missing'}"

    def _point(self, pointer: str, name: str) -> None:
        partial = self.path / f".{pointer}.partial"
        write_file(partial, f"{name}\n".encode())
        settle(partial)
        os.replace(partial, self.path / pointer)
        _sync_folder(self.path)


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system has a way to."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
