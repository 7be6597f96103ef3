"""Pre-flight: are all ranks the same program, with the same config, and fit to run it?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from rung.launch.check_site import Check, Site, Verdict, differing
from rung.model.config import to_yaml
from rung.model.provenance import git_commit, package_versions
from rung.pretrain.plan import make_potential
from rung.pretrain.roll_call import by_host, words

PACKAGES = ("kernels", "data", "model", "pretrain")
SOURCES = {".py", ".cpp", ".cu", ".h"}
LOCK_SECONDS = 600.0  # no build of an extension takes as long


def _world(site: Site) -> dict[str, Any]:
    device = site.ranks.device
    name, identity = "cpu", ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, identity = properties.name, str(properties.uuid)
    return {"device": name, "identity": identity}


def _judge_world(site: Site, readings: Sequence[Any]) -> Verdict:
    hosts = by_host(site.hosts)
    devices = ", ".join(sorted({reading["device"] for reading in readings}))
    listed = "; ".join(f"{host}: {words(ranks)}" for host, ranks in list(hosts.items())[:4])
    more = f"; and {len(hosts) - 4} more" if len(hosts) > 4 else ""
    result = f"{site.place.world} rank(s) by {site.place.launcher} on {len(hosts)} host(s) ({listed}{more}), {devices}"
    owner: dict[tuple[str, str], int] = {}
    bad: dict[int, str] = {}
    for rank, reading in enumerate(readings):
        first = owner.setdefault((site.hosts[rank], reading["identity"]), rank)
        if reading["identity"] and first != rank:
            bad[rank] = f"computes on the same GPU as rank {first}"
    return Verdict(result, bad, "start as many ranks on a machine as it has GPUs, each with a LOCAL_RANK of its own")


def _threads(site: Site) -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0))}


def _judge_threads(site: Site, readings: Sequence[Any]) -> Verdict:
    bad: dict[int, str] = {}
    for ranks in by_host(site.hosts).values():
        cores = {core for rank in ranks for core in readings[rank]["cores"]}
        threads = sum(readings[rank]["threads"] for rank in ranks)
        if threads > len(cores):
            bad |= dict.fromkeys(ranks, f"{threads} threads on the {len(cores)} core(s) that the ranks here may use")
        for rank in ranks:
            if readings[rank]["threads"] > (own := len(readings[rank]["cores"])):
                bad[rank] = f"{readings[rank]['threads']} threads bound to {own} core(s)"
    each = sorted({reading["threads"] for reading in readings})
    result = f"{' or '.join(map(str, each))} thread(s) a rank"
    advice = "set OMP_NUM_THREADS to the cores of a machine divided by its ranks, or loosen the launcher's binding"
    return Verdict(result, bad, advice, warning=True)


def _versions(site: Site) -> dict[str, str | None]:
    versions: dict[str, str | None] = dict(package_versions())
    versions["deepspeed"] = importlib.metadata.version("deepspeed")
    versions["processor"] = platform.machine()
    if site.ranks.device.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        text = Path("/proc/driver/nvidia/version")
        found = re.search(r"\d+\.\d+(\.\d+)?", text.read_text()) if text.exists() else None
        versions["driver"] = found[0] if found else None
    return versions


def _judge_versions(site: Site, readings: Sequence[Any]) -> Verdict:
    result = ", ".join(f"{name} {version}" for name, version in readings[0].items())
    return Verdict(result, differing(readings), "install the same environment there, or put it on a shared file system")


def _code(site: Site) -> dict[str, str | None]:
    digest = hashlib.sha256()
    for package in PACKAGES:
        root = Path(str(resources.files(f"rung.{package}")))
        for path in sorted(root.rglob("*")):
            if path.suffix in SOURCES:
                digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {"sources": digest.hexdigest()[:12], "commit": git_commit()}


def _judge_code(site: Site, readings: Sequence[Any]) -> Verdict:
    commit = readings[0]["commit"]
    edited = (
        " (edited since: commit the changes, or the run cannot be repeated)" if commit and "dirty" in commit else ""
    )
    result = f"sources {readings[0]['sources']}, commit {commit or 'unknown'}{edited}"
    return Verdict(result, differing(readings), "check out the same commit there, without edits")


def _config(site: Site) -> dict[str, str]:
    site.plan  # noqa: B018 (what the datasets do not have is an error of the config too)
    return {"config": hashlib.sha256(to_yaml(site.config).encode()).hexdigest()[:12]}


def _judge_config(site: Site, readings: Sequence[Any]) -> Verdict:
    world = site.plan.world
    result = f"{readings[0]['config']}: mode {site.config.mode}, {world.groups} task group(s) of {world.data_ranks}"
    advice = "give every rank the same file and key=value words; a file on a shared file system cannot differ"
    return Verdict(result, differing(readings), advice)


def _kernels(site: Site) -> str:
    potential = make_potential(site.plan).to(site.ranks.device)
    return potential.kernels()


def _judge_kernels(site: Site, readings: Sequence[Any]) -> Verdict:
    slow = {rank: text for rank, text in enumerate(readings) if "reference" in text}
    advice = "the PyTorch reference is many times slower: see what is missing, or what RUNG_KERNELS says"
    return Verdict(readings[0], slow, advice, warning=True)


def _locks(site: Site) -> list[tuple[str, float]]:
    if not site.leads:
        return []
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    now = time.time()
    return [(str(path), now - path.stat().st_mtime) for path in sorted(root.glob("**/lock"))]


def _judge_locks(site: Site, readings: Sequence[Any]) -> Verdict:
    bad = {}
    for rank, locks in enumerate(readings):
        if old := [path for path, age in locks if age > LOCK_SECONDS]:
            bad[rank] = f"left by a build that was killed: {', '.join(old)}"
    advice = "delete the lock: whatever builds that extension again waits for it for ever"
    return Verdict("none is left of killed builds" if not bad else f"{len(bad)} found", bad, advice, warning=True)


CHECKS = (
    Check("world", _world, _judge_world),
    Check("threads", _threads, _judge_threads),
    Check("versions", _versions, _judge_versions),
    Check("code", _code, _judge_code),
    Check("build locks", _locks, _judge_locks),
    Check("config", _config, _judge_config),
    Check("kernels", _kernels, _judge_kernels, ("config",), 600.0),  # maybe their first build
)
