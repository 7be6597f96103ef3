"""What a build leaves in its folder while it is unfinished: a record beside every finished piece, and whose work it is.

A piece counts as done when its record can be read and the file that it describes has the digest that it states.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rung.data.shard import ShardInfo, file_sha256, write_beside
from rung.data.statistics import LabelSums

JOB_FILE = "job.json"
LOCK_FILE = "lock"
SPILLED = "part-"  # how the files of the first pass begin
NEW = "new"  # the folder of the manifest that is about to be published

Record = TypeVar("Record", "PartRecord", "ShardRecord")


@dataclass(frozen=True)
class SpillRecord:
    """What the first pass says of one spill."""

    file: str  # in the work folder; what the E0 fits need of it lies beside it
    sha256: str
    sample_sha256: str
    structures: int
    bytes: list[int]  # of each split


@dataclass(frozen=True)
class PartRecord:
    """What the first pass says of one part."""

    spills: list[SpillRecord]  # one, unless the source could not cut a large file into parts
    rejected: dict[str, int]  # what was wrong -> structures
    named: list[str]  # some of those


@dataclass(frozen=True)
class ShardRecord:
    """What the second pass says of one shard."""

    info: ShardInfo
    elements: dict[int, int]  # atomic number -> atoms
    sums: dict[str, LabelSums]  # by fidelity
    outliers: dict[str, int]  # fidelity -> structures that composition does not explain
    named: dict[str, list[tuple[float, str]]]  # fidelity -> the worst of those: eV/atom and key
    extreme: dict[str, int]  # fidelity -> those beyond what is accepted


@contextmanager
def unfinished(
    work: Path, identity: Mapping[str, Any], shards: str, *, overwrite: bool, resumable: bool
) -> Iterator[None]:
    """Hold the folder of unfinished work; it must be that of the job with this identity (JSON), or empty.

    `identity` is what the spills depend on, `shards` what the shards depend on beside them: when only the latter
    differs, the spills are kept. Another's work is discarded when `overwrite` is true or nothing in it is finished.
    Raises FileExistsError for another's work otherwise, and while another process holds the folder. An error leaves no
    folder when there is nothing to go on from: nothing is finished, or the job is not `resumable`; but once the result
    is being published it always stays.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{work.parent}: another build is writing there; wait for it or choose another folder"
            raise FileExistsError(message) from None
        _take_over(work, identity, shards, overwrite)
        try:
            yield
        except BaseException:
            if not (work / NEW).exists() and not (resumable and _has_finished(work)):
                shutil.rmtree(work, ignore_errors=True)
            raise


def read_record(kind: type[Record], path: Path) -> Record | None:
    """Return the record that was written beside a finished file, None when there is none that can be read."""
    values = _json(path.with_suffix(".json"))
    try:
        if kind is PartRecord:
            values["spills"] = [SpillRecord(**spill) for spill in values["spills"]]
        if kind is ShardRecord:
            values["info"] = ShardInfo(**values["info"])
            values["elements"] = {int(z): count for z, count in values["elements"].items()}
            values["sums"] = {name: LabelSums(**sums) for name, sums in values["sums"].items()}
        return kind(**values)
    except (KeyError, TypeError, ValueError, AttributeError):  # none, or one of another version
        return None


def write_record(record: PartRecord | ShardRecord, path: Path) -> None:
    """Write a record beside the finished file that it describes."""
    write_beside(path.with_suffix(".json"), json.dumps(dataclasses.asdict(record)).encode())


def is_whole(path: Path, sha256: str) -> bool:
    """Return whether a file is there and has this digest."""
    return path.is_file() and file_sha256(path) == sha256


def _take_over(work: Path, identity: Mapping[str, Any], shards: str, overwrite: bool) -> None:
    path = work / JOB_FILE
    former = _json(path)
    job = {**identity, "shards": shards}
    if former == job:
        return
    is_same = all(former.get(name) == value for name, value in identity.items())
    if path.is_file() and _has_finished(work) and not is_same and not overwrite:
        differing = ", ".join(name for name in identity if former.get(name) != identity[name])
        raise FileExistsError(
            f"{work} holds an unfinished build of other files or options (other {differing}); run the command that "
            f"began it, choose another folder, or discard it with --overwrite. {path.name} says how it began"
        )
    path.unlink(missing_ok=True)  # first: the rest counts for nothing without it
    for other in work.iterdir():
        if other.is_dir():
            shutil.rmtree(other)
        elif other.name != LOCK_FILE and not (is_same and other.name.startswith(SPILLED)):
            other.unlink()
    write_beside(path, json.dumps(job, indent=1).encode())


def _has_finished(work: Path) -> bool:
    return any(path.suffix == ".json" and path.name != JOB_FILE for path in work.iterdir())


def _json(path: Path) -> dict[str, Any]:
    """Return the mapping in a file, empty when there is none; what a damaged file describes is made again."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
