"""Pre-flight: clocks, and the all-reduces of the groups that training will use."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rung.launch.check_site import Check, Site, Verdict
from rung.pretrain.ranks import Ranks

CLOCK_SECONDS = 1.0  # a larger skew makes logs and file times of the machines contradict each other
ROUND_TRIPS = 5
SMALL_REPEATS, LARGE_REPEATS = 20, 3
SLOW = 0.5  # of the median bandwidth of groups of one kind


def _clock(site: Site) -> list[float]:
    """Return bounds of this machine's clock less rank 0's, in seconds: the narrowest of a few round trips.

    Rank 0 answers with its time, which is between this rank's times of asking and hearing.
    """
    store, rank = site.store, site.place.rank
    store.set(f"clock/{rank}", "asks" if site.leads and rank else "")
    if rank == 0:
        keys = [f"clock/{other}" for other in range(site.place.world)]
        for other, word in enumerate(store.multi_get(keys)):
            for trip in range(ROUND_TRIPS if word == b"asks" else 0):
                store.get(f"clock/{other}/{trip}/question")
                store.set(f"clock/{other}/{trip}/answer", repr(time.time()))
    bounds = [0.0, 0.0]
    width = math.inf
    for trip in range(ROUND_TRIPS if site.leads and rank else 0):
        asked = time.time()
        store.set(f"clock/{rank}/{trip}/question", "")
        answer = float(store.get(f"clock/{rank}/{trip}/answer"))
        heard = time.time()
        if heard - asked < width:
            width, bounds = heard - asked, [asked - answer, heard - answer]
    return bounds


def _judge_clock(site: Site, readings: Sequence[Any]) -> Verdict:
    least = [max(0.0, low, -high) for low, high in readings]  # that the skew has for certain
    most = [max(abs(low), abs(high)) for low, high in readings]
    bad = {
        rank: f"its clock differs by {most[rank]:.1f} s from rank 0's"
        for rank in site.hosts
        if least[rank] > CLOCK_SECONDS
    }
    worst = most.index(max(most))
    result = f"at most {1e3 * max(most):.3g} ms from rank 0's"
    return Verdict(result, bad, "start chrony or ntpd on these machines", worst=worst if max(most) else None)


def _reductions(ranks: Ranks) -> dict[str, tuple[int, Callable[[Tensor], object]]]:
    """Return what training adds up over: name -> number of ranks, and the collective."""

    def exchange(tensor: Tensor) -> None:
        if (work := ranks.exchange_(tensor)) is not None:
            work.wait()

    world = ranks.world
    found: dict[str, tuple[int, Callable[[Tensor], object]]] = {
        "task group": (world.data_ranks, ranks.sum_),
        "exchange": (world.groups, exchange),
        "all": (world.size, ranks.sum_all_),
    }
    different = {name: row for name, row in found.items() if row[0] > 1}
    if world.groups == 1 or world.data_ranks == 1:
        different.pop("all", None)  # the same as one of the others
    return different


def _all_reduce(site: Site) -> dict[str, list[float]]:
    """Return for each kind of group the seconds of an all-reduce of 8 bytes, and the bytes/s of a large one."""
    site.grouped = ranks = Ranks(site.ranks.device, site.ranks.timeout, site.plan.world.groups)
    measured = {}
    for name, (members, reduce) in _reductions(ranks).items():
        small = torch.zeros(2, device=ranks.device)
        large = torch.zeros(round(site.options.megabytes * 1e6 / 4), device=ranks.device)
        latency = _seconds(ranks, lambda: reduce(small), SMALL_REPEATS)  # noqa: B023 (called at once)
        seconds = _seconds(ranks, lambda: reduce(large), LARGE_REPEATS)  # noqa: B023
        # What a ring sends and receives per rank, so that the numbers of different group sizes compare.
        measured[name] = [latency, 2 * (members - 1) / members * large.nbytes / seconds]
    return measured


def _seconds(ranks: Ranks, call: Callable[[], object], repeats: int) -> float:
    """Return the mean time of a call, begun by all ranks together, the first one left out."""
    call()
    ranks.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return (time.perf_counter() - begin) / repeats


def _judge_all_reduce(site: Site, readings: Sequence[Any]) -> Verdict:
    if not readings[0]:
        return Verdict("one rank: nothing to add up")
    texts, bad = [], {}
    worst, worst_share = 0, math.inf
    for name in readings[0]:
        latencies = [reading[name][0] for reading in readings]
        bandwidths = [reading[name][1] for reading in readings]
        usual = statistics.median(bandwidths)
        texts.append(f"{name}: {1e3 * max(latencies):.2f} ms, {min(bandwidths) / 1e9:.2f} GB/s")
        for rank, bandwidth in enumerate(bandwidths):
            if bandwidth < SLOW * usual:
                bad[rank] = f"{name}: {bandwidth / 1e9:.2f} GB/s, elsewhere {usual / 1e9:.2f}"
        slowest = bandwidths.index(min(bandwidths))
        if bandwidths[slowest] / usual < worst_share:
            worst, worst_share = slowest, bandwidths[slowest] / usual
    advice = "look at the network of these machines: a link at a lower rate, or GLOO/NCCL_SOCKET_IFNAME at a slow one"
    return Verdict("; ".join(texts), bad, advice, warning=True, worst=worst)


CHECKS = (
    Check("clock", _clock, _judge_clock),
    Check("all-reduce", _all_reduce, _judge_all_reduce, ("config",)),
)
