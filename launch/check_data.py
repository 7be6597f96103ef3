"""Pre-flight: does every machine see the same data and the output folder, and do all ranks get as much of it?"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rung.data.dealing import Dealing
from rung.data.fetch import ShardSource
from rung.data.manifest import MANIFEST_FILE, read_manifest, resolve_dataset
from rung.data.mixing import Task
from rung.data.shard import ShardInfo, file_sha256
from rung.data.stream import epoch_structures
from rung.data.verify import file_fault
from rung.launch.check_site import Check, Site, Verdict, differing, gibibytes

SEEN_SECONDS = 30.0  # how long a network file system may take to show a new file


def _manifests(site: Site) -> dict[str, str]:
    names = sorted({task.dataset for task in site.plan.tasks})
    return {name: file_sha256(resolve_dataset(name) / MANIFEST_FILE)[:12] for name in names}


def _judge_manifests(site: Site, readings: Sequence[Any]) -> Verdict:
    result = ", ".join(f"{name} {digest}" for name, digest in readings[0].items())
    return Verdict(
        result, differing(readings), "copy the dataset there again; every rank must deal the same structures"
    )


def _sources(site: Site) -> list[tuple[Task, ShardInfo]]:
    """Return every shard that the run may read, once, in an order that is the same on every rank."""
    found: dict[tuple[str, str, str], tuple[Task, ShardInfo]] = {}
    splits = {"train", *([site.config.evaluation.split] if site.config.evaluation.max_structures else [])}
    for task in site.plan.tasks:
        for shard in read_manifest(task.dataset).shards:
            if shard.split in splits and any(shard.labels.get(task.fidelity, [])):
                found.setdefault((task.dataset, task.shard_url, shard.file), (task, shard))
    return list(found.values())


def _shards(site: Site) -> dict[str, int]:
    """Look at the size of every shard, and read the first structure of every task as training would."""
    sources = _sources(site)
    for task, shard in sources if site.leads else []:
        path = resolve_dataset(task.dataset) / shard.file
        if not task.shard_url and not path.is_file():
            raise FileNotFoundError(f"{path}: missing; copy or build it again")
        if not task.shard_url and path.stat().st_size != shard.bytes:
            raise ValueError(f"{path}: manifest says {shard.bytes} bytes, found {path.stat().st_size}; copy it again")
    for task in site.plan.tasks:
        next(epoch_structures(task.dataset, task.fidelity, "train", shard_url=task.shard_url, remote=task.remote))
    return {"shards": len(sources), "bytes": sum(shard.bytes for _, shard in sources)}


def _judge_shards(site: Site, readings: Sequence[Any]) -> Verdict:
    return Verdict(f"{readings[0]['shards']} shard(s), {gibibytes(readings[0]['bytes'])}; each task's first was read")


def sample(number: int, wanted: int | None) -> list[int]:
    """Return which of `number` shards to look at: `wanted` of them, evenly spread, or all."""
    wanted = number if wanted is None else min(wanted, number)
    return [index * number // wanted for index in range(wanted)]


def _digests(site: Site) -> int:
    sources = _sources(site)
    mine = sample(len(sources), site.options.digests)[site.place.rank :: site.place.world]
    faults = []
    for task, shard in (sources[index] for index in mine):
        if task.shard_url:
            ShardSource(task.shard_url, task.remote).open(shard).close()  # fetched ones are held to their digest
        elif fault := file_fault(resolve_dataset(task.dataset) / shard.file, shard):
            faults.append(f"{task.dataset}: {fault}")
    if faults:
        raise ValueError("; ".join(faults))
    return len(mine)


def _judge_digests(site: Site, readings: Sequence[Any]) -> Verdict:
    return Verdict(f"{sum(readings)} of {len(_sources(site))} shard(s) are what their manifest says")


def shares(total: int, consumers: int) -> list[int]:
    """Return how many of `total` structures each consumer is dealt in an epoch."""
    dealt = [Dealing(total, 1, consumer, consumers).start().todo[0] for consumer in range(consumers)]
    return [work.stop - work.start for work in dealt]


def _judge_balance(site: Site, readings: Sequence[Any]) -> Verdict:
    workers = max(1, site.config.data.num_workers)
    world = site.place.world
    bad: dict[int, str] = {}
    texts = []
    for name, total in zip(site.plan.task_names, site.plan.counts, strict=True):
        dealt = shares(total, world * workers)
        by_rank = [sum(dealt[rank * workers : (rank + 1) * workers]) for rank in range(world)]
        texts.append(f"{name} {min(by_rank)}-{max(by_rank)}")
        if min(dealt) == 0:
            rank = dealt.index(0) // workers
            bad[rank] = f"{name}: {total} labelled structures for {world} rank(s) of {workers} loader(s): it gets none"
    advice = "use fewer ranks or data.num_workers, or leave the task out"
    return Verdict(f"structures a rank and epoch: {', '.join(texts)}", bad, advice)


def _output(site: Site) -> dict[str, Any]:
    """Rank 0 writes a word that only it knows into the output folder; the others read it and write as well."""
    folder = Path(site.config.output)
    if site.place.rank == 0:
        token = secrets.token_hex(8)
        site.shared["made"] = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".check-{token}").write_text(token)
        site.store.set("check/token", token)
    site.store.wait(["check/token"], timedelta(seconds=site.options.seconds))
    token = site.store.get("check/token").decode()
    path = folder / f".check-{token}"
    if not _seen(lambda: path.is_file() and path.read_text() == token, site):
        raise ValueError(
            f"{folder.absolute()}: the file that rank 0 wrote has not come; "
            "set output to a folder that all machines share"
        )
    (folder / f".check-{token}-{site.place.rank}").write_text(token)
    return {"token": token, "free": shutil.disk_usage(folder).free}


def _judge_output(site: Site, readings: Sequence[Any]) -> Verdict:
    folder = Path(site.config.output)
    path = folder / f".check-{readings[0]['token']}"
    written = {rank: path.with_name(f"{path.name}-{rank}") for rank in site.hosts}
    _seen(lambda: all(other.is_file() for other in written.values()), site)
    bad = {rank: "what it wrote does not arrive at rank 0" for rank, other in written.items() if not other.is_file()}
    for other in (path, *written.values()):
        other.unlink(missing_ok=True)
    if site.shared.get("made"):
        with suppress(OSError):
            folder.rmdir()
    free = min(reading["free"] for reading in readings)
    worst = [reading["free"] for reading in readings].index(free)
    result = f"{folder} is shared and can be written, {gibibytes(free)} are free"
    return Verdict(result, bad, "set output to a folder that all machines share", worst=worst)


def _seen(condition: Callable[[], bool], site: Site) -> bool:
    """Wait for a change that another machine makes; False when it does not come."""
    end = time.monotonic() + min(SEEN_SECONDS, site.options.seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


CHECKS = (
    Check("output", _output, _judge_output, ("config",), SEEN_SECONDS),
    Check("manifests", _manifests, _judge_manifests, ("config",)),
    Check("shards", _shards, _judge_shards, ("manifests",), 600.0),
    Check("digests", _digests, _judge_digests, ("shards",), 3600.0),
    Check("balance", lambda site: None, _judge_balance, ("manifests",)),
)
