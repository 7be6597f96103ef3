"""How the pre-flight works: every check is measured on every rank, judged on rank 0, and is one row of the table.

Ranks answer through the run's key-value store and wait for rank 0's word before the next check. So a check may use
collectives, in which the others fail, and a rank that died or hangs is named as the one that does not answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from rung.pretrain.config import PretrainConfig
from rung.pretrain.plan import Plan, make_plan
from rung.pretrain.ranks import Ranks
from rung.pretrain.rendezvous import Rendezvous
from rung.pretrain.roll_call import words

GRACE_SECONDS = 15.0  # beyond a check's limit, for rank 0's word to arrive


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    seconds: float  # after which a rank that does not answer counts as lost
    digests: int | None  # shards whose digest is computed; None: all
    megabytes: float  # size of the large message of the bandwidth test


@dataclass
class Site:
    """What the checks of one rank can ask for."""

    place: Rendezvous
    hosts: Mapping[int, str]  # of every rank
    ranks: Ranks  # all in one group
    options: Options
    read: Callable[[], PretrainConfig]  # the config as this rank reads it
    grouped: Ranks | None = None  # in the config's task groups, once they are made
    shared: dict[str, Any] = field(default_factory=dict)  # what a check hands to its own judge or to a later one

    @cached_property
    def store(self) -> Store:
        """The key-value store of the run."""
        return self.ranks.store()

    @cached_property
    def config(self) -> PretrainConfig:
        return self.read()

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.config, self.place.world)

    @property
    def leads(self) -> bool:
        """Whether this rank does what need be done once on a machine."""
        return self.place.local_rank == 0

    def who(self, ranks: Sequence[int]) -> str:
        """Return ranks with their hosts: rank 0-1 (nodea), 2 (nodeb)."""
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(rank)
        return "rank " + ", ".join(f"{words(those)} ({host})" for host, those in by_host.items())


@dataclass(frozen=True)
class Verdict:
    """What rank 0 makes of a check."""

    result: str
    bad: Mapping[int, str] = field(default_factory=dict)  # rank -> what is wrong there
    advice: str = ""
    warning: bool = False  # what is bad is no reason not to start
    worst: int | None = None  # the rank to look at first, where nothing is bad
    lost: bool = False  # some rank does not answer any more

    @property
    def passed(self) -> bool:
        return self.warning or not self.bad


@dataclass(frozen=True)
class Check:
    """One row: `measure` returns what fits into JSON, or raises; `judge` gets it from every rank, in their order."""

    name: str
    measure: Callable[[Site], Any]
    judge: Callable[[Site, Sequence[Any]], Verdict]
    needs: tuple[str, ...] = ()  # checks without which this one has no sense
    seconds: float = 0.0  # what it may take beyond the limit of the command line


@dataclass(frozen=True)
class Outcome:
    """How a check ended: what every rank knows of it, and on rank 0 the verdict."""

    passed: bool
    lost: bool
    verdict: Verdict | None = None


def perform(site: Site, check: Check) -> Outcome:
    """Do one check together with the other ranks. Raises ValueError on them when rank 0 is lost."""
    try:
        answer = {"value": check.measure(site)}
    except Exception as error:  # whatever it is that a machine cannot do, the table is the place to say it
        answer = {"fault": " ".join(f"{error or type(error).__name__}".split())}
    store, rank = site.store, site.place.rank
    store.set(f"check/{check.name}/{rank}", json.dumps(answer))
    limit = timedelta(seconds=site.options.seconds + check.seconds)
    word = f"check/{check.name}/word"
    if rank == 0:
        verdict = _judge(site, check, _collect(site, check, limit))
        store.set(word, json.dumps([verdict.passed, verdict.lost]))
        return Outcome(verdict.passed, verdict.lost, verdict)
    try:
        store.wait([word], 2 * limit + timedelta(seconds=GRACE_SECONDS))
        return Outcome(*json.loads(store.get(word)))
    except DistError as error:
        raise ValueError(f"{site.who([rank])}: rank 0 was lost in check '{check.name}'") from error


def _collect(site: Site, check: Check, limit: timedelta) -> dict[int, Any]:
    """Return what the ranks answered; those that do not within the limit are left out."""
    keys = {rank: f"check/{check.name}/{rank}" for rank in range(site.place.world)}
    try:
        site.store.wait(list(keys.values()), limit)
        present = list(keys)
    except DistError:
        present = [rank for rank, key in keys.items() if site.store.check([key])]
    return {rank: json.loads(site.store.get(keys[rank])) for rank in present}


def _judge(site: Site, check: Check, answers: Mapping[int, Any]) -> Verdict:
    limit = site.options.seconds + check.seconds
    lost = {rank: f"no answer within {limit:.0f} s: dead, or hanging" for rank in site.hosts if rank not in answers}
    faults = {rank: answer["fault"] for rank, answer in answers.items() if "fault" in answer}
    if lost:
        advice = "look for the messages of these ranks and at their machines, or leave the machines out"
        return Verdict("not finished", {**faults, **lost}, advice, lost=True)
    if faults:
        return Verdict("failed", faults)
    return check.judge(site, [answers[rank]["value"] for rank in range(site.place.world)])


def differing(readings: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return what each rank has otherwise than most ranks have it."""
    bad: dict[int, str] = {}
    for name in readings[0]:
        values = [json.dumps(reading.get(name)) for reading in readings]
        usual = Counter(values).most_common(1)[0][0]  # of equally many, that of the lowest rank
        for rank, value in enumerate(values):
            if value != usual:
                text = f"{name} {json.loads(value)}, elsewhere {json.loads(usual)}"
                bad[rank] = f"{bad[rank]}; {text}" if rank in bad else text
    return bad


def gibibytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**30:.1f} GiB"
