"""The roll call before the ranks connect: who is there, on which host, and by name who is not.

torch's own start would wait as long, and then say only how many ranks came.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from rung.pretrain.rendezvous import Rendezvous

_GRACE_SECONDS = 10.0  # beyond the limit, for rank 0's answer to arrive


@dataclass(frozen=True)
class Present:
    """The host of every rank; hold on to it until the ranks have connected, which is through the same server."""

    hosts: dict[int, str]
    store: Store


def roll_call(place: Rendezvous, seconds: float) -> Present:
    """Wait until every rank is there; all ranks call it before they connect.

    Raises ValueError naming the ranks that did not come within `seconds`, or, where that is so, that rank 0 cannot be
    reached.
    """
    store = _store(place, seconds)
    here = socket.gethostname()
    store.set(f"host/{place.rank}", here)
    if place.rank == 0:
        hosts = _arrived(store, place.world, seconds)
        store.set("hosts", "\n".join(f"{rank} {host}" for rank, host in hosts.items()))
        with suppress(DistError):  # the server must outlive the answer's last reader
            store.wait([f"heard/{rank}" for rank in hosts if rank], timedelta(seconds=_GRACE_SECONDS))
    else:
        try:
            store.wait(["hosts"], timedelta(seconds=seconds + _GRACE_SECONDS))
            rows = [line.split(" ", 1) for line in store.get("hosts").decode().splitlines()]
            store.set(f"heard/{place.rank}", "")
        except DistError as error:
            raise ValueError(f"rank {place.rank} on {here}: rank 0 was lost during the roll call: {error}") from error
        hosts = {int(rank): host for rank, host in rows}
    if missing := [rank for rank in range(place.world) if rank not in hosts]:
        there = "; ".join(f"{host}: {words(ranks)}" for host, ranks in by_host(hosts).items())
        raise ValueError(
            f"expected {place.world} ranks, but within {seconds:.0f} s these did not come: {words(missing)} "
            f"(there are, on {there}); look for the messages of those that are missing, and at their machines"
        )
    return Present(hosts, store)


def by_host(hosts: Mapping[int, str]) -> dict[str, list[int]]:
    """Return the ranks of each host."""
    found: dict[str, list[int]] = {}
    for rank, host in sorted(hosts.items()):
        found.setdefault(host, []).append(rank)
    return found


def words(ranks: Iterable[int]) -> str:
    """Return rank numbers as people write them: 0-3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _arrived(store: Store, world: int, seconds: float) -> dict[int, str]:
    end = time.monotonic() + seconds
    hosts = {}
    for rank in range(world):
        try:
            store.wait([f"host/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
        except DistError:
            continue
        hosts[rank] = store.get(f"host/{rank}").decode()
    return hosts


def _store(place: Rendezvous, seconds: float) -> Store:
    here = f"rank {place.rank} on {socket.gethostname()}"
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # whose agent serves a store already
    serves = place.rank == 0 and not torchrun
    limit = timedelta(seconds=seconds)
    try:
        # multi_tenant: torch's own start, later in this process, shares the server instead of finding the port taken.
        store = TCPStore(place.address, place.port, None, serves, limit, wait_for_workers=False, multi_tenant=True)
    except (DistError, RuntimeError) as error:
        if serves:
            raise ValueError(
                f"{here}: cannot listen on port {place.port}: {error}; if another job has it, set MASTER_PORT"
            ) from error
        raise ValueError(
            f"{here}: cannot reach rank 0 at {place.address}:{place.port} within {seconds:.0f} s; "
            "does its process live, is the address right, does a firewall close the port?"
        ) from error
    return PrefixStore(f"rung/roll_call/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
