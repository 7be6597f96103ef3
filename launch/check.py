"""Pre-flight: is every machine fit for this run? `rung check CONFIG [key=value ...]`, started like the run itself.

Prints one table on rank 0 and names the machines to leave out or mend. Exit status: 0 fit, 1 not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from textwrap import wrap
from typing import TYPE_CHECKING

from rung.model.config import read_config
from rung.pretrain.config import PretrainConfig
from rung.pretrain.network import LOOPBACK, free_port
from rung.pretrain.rendezvous import join, launched

if TYPE_CHECKING:
    from rung.launch.check_site import Check, Site, Verdict

FIT, UNFIT = 0, 1
NAME, WIDTH = 13, 120  # columns of the names, and of a line
_END_SECONDS = 20.0  # for the other ranks to end after rank 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `rung check`."""
    parser.add_argument("config", help="YAML file, or one of ours by name, as for `rung pretrain`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, as for `rung pretrain`")
    parser.add_argument(
        "--ranks", type=int, help="start this many ranks here; under a launcher: how many there must be in all"
    )
    parser.add_argument(
        "--digests",
        default="16",
        metavar="N|all",
        help="shards whose SHA-256 is computed, spread over the ranks (%(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for a rank (%(default)s)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=16.0, help="size of the large message that is added up (%(default)s)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it


def run(args: argparse.Namespace) -> int:
    """Run `rung check` and return its exit status."""
    if not (args.digests == "all" or args.digests.isdigit()):
        raise ValueError(f"--digests: expected a number or 'all', found '{args.digests}'")
    if args.timeout <= 0 or args.megabytes <= 0:
        raise ValueError("--timeout, --megabytes: expected positive numbers")
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, found {args.ranks}")
    if (args.ranks or 1) > 1 and not launched(os.environ):
        return start_here(args)
    try:
        return check(args)
    except ValueError as error:
        print(f"rung check: {error}", file=sys.stderr, flush=True)
        return UNFIT


def checks() -> list[Check]:
    """Return all checks in their order: one that needs others comes after them."""
    from rung.launch import check_data, check_memory, check_network, check_software

    return [*check_software.CHECKS, *check_network.CHECKS, *check_data.CHECKS, *check_memory.CHECKS]


def check(args: argparse.Namespace) -> int:
    """Do every check as one of the ranks. Raises ValueError when ranks are missing, or rank 0 is lost on the way."""
    # Imported here: torch and deepspeed take seconds, which wrong arguments should not.
    from torch.distributed import DistError

    from rung.launch.check_site import Options, Site, perform
    from rung.pretrain.engine import connect, disconnect
    from rung.pretrain.roll_call import roll_call

    place = join(args.ranks)
    present = roll_call(place, args.timeout)
    options = Options(args.timeout, None if args.digests == "all" else int(args.digests), args.megabytes)
    try:
        ranks = connect(timedelta(seconds=args.timeout))
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"rank {place.rank} on {present.hosts[place.rank]}: all ranks are there, but they cannot reach each other: "
            f"{reason}; set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to the interface that joins the machines, "
            "and look for firewalls between them"
        ) from error
    site = Site(place, present.hosts, ranks, options, lambda: read(args))
    table = Table(site)
    passed: set[str] = set()
    for one in checks():
        if missing := [name for name in one.needs if name not in passed]:
            table.skipped(one.name, missing)
            continue
        outcome = perform(site, one)
        table.row(one.name, outcome.verdict)
        if outcome.lost:  # and whoever is lost may hold up an orderly end
            sys.stdout.flush()
            os._exit(UNFIT if place.rank else table.end())
        if outcome.passed:
            passed.add(one.name)
    disconnect()
    return table.end() if place.rank == 0 else FIT


def read(args: argparse.Namespace) -> PretrainConfig:
    """Return the config as this machine reads it."""
    from rung.pretrain.cli import find_config

    return read_config(PretrainConfig, find_config(args.config), args.overrides)


class Table:
    """Prints the rows on rank 0 as they come: the last one shows where the pre-flight stands."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._failed: list[str] = []
        self._hosts: set[str] = set()
        self._warnings = 0

    def row(self, name: str, verdict: Verdict | None) -> None:
        """Print a check's verdict, and what is bad by the ranks that have it."""
        if verdict is None:
            return
        status = "ok" if not verdict.bad else "warn" if verdict.warning else "FAIL"
        result = verdict.result
        if verdict.worst is not None and not verdict.bad:
            result += f"; worst: {self._site.who([verdict.worst])}"
        lines = [result]
        for text, ranks in _by_text(verdict.bad).items():
            lines.append(f"{self._site.who(ranks)}: {text}")
        if verdict.bad and verdict.advice:
            lines.append(f"-> {verdict.advice}")
        self._print(name, status, lines)
        if status == "FAIL":
            self._failed.append(name)
            self._hosts |= {self._site.hosts[rank] for rank in verdict.bad}
        self._warnings += status == "warn"

    def skipped(self, name: str, missing: Sequence[str]) -> None:
        """Print that a check was left out."""
        if self._site.place.rank == 0:
            self._print(name, "-", [f"left out: needs {', '.join(missing)}"])

    def end(self) -> int:
        """Print the outcome and return the exit status."""
        warnings = f", {self._warnings} warning(s)" if self._warnings else ""
        if self._failed:
            print(
                f"NOT FIT: {', '.join(self._failed)} failed, on {', '.join(sorted(self._hosts))}{warnings}", flush=True
            )
            return UNFIT
        print(f"fit{warnings}", flush=True)
        return FIT

    def _print(self, name: str, status: str, lines: Sequence[str]) -> None:
        start = NAME + 6
        wrapped = [part for line in lines for part in wrap(line, WIDTH - start, subsequent_indent="  ") or [""]]
        for index, part in enumerate(wrapped):
            head = f"{name:<{NAME}}{status:<6}" if index == 0 else " " * start
            print(head + part, flush=True)


def _by_text(bad: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, text in sorted(bad.items()):
        found.setdefault(text, []).append(rank)
    return found


def start_here(args: argparse.Namespace) -> int:
    """Start the ranks on this machine and return rank 0's exit status."""
    words = [args.config, *args.overrides, f"--ranks={args.ranks}", f"--digests={args.digests}"]
    words += [f"--timeout={args.timeout}", f"--megabytes={args.megabytes}"]
    common = {"WORLD_SIZE": str(args.ranks), "LOCAL_WORLD_SIZE": str(args.ranks), "MASTER_ADDR": LOOPBACK}
    common["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "rung.launch", "check", *words]
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(args.ranks)
    ]
    try:
        status = processes[0].wait()
        end = time.monotonic() + _END_SECONDS
        for process in processes[1:]:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return FIT if status == 0 else UNFIT
