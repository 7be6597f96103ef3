"""What distributing costs and brings, measured with real DeepSpeed ranks on this machine, as JSON lines.

    python -m rung.pretrain.bench [--only step_overhead ...] [--config small] [--turns 6] [--out FILE]

step_overhead               a step of the engine over the same step in plain torch: one flat all-reduce, one optimizer
bytes_per_structure_ratio   what Reptile with two groups hands to collectives, over what joint training does
two_rank_speedup            structures per second of two ranks over those of one
outer_step_ms               an outer step of two groups: exchange, update and write-back

Every rank has one thread. What is compared takes turns, and every figure is the median over the turns; `others_share`
is the share of all the machine's processor time that went to other processes meanwhile. `overhead_best` compares the
fastest turns, `overhead_cpu` the processor time of the ranks, neither of which depends much on such company.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rung.kernels.measure import processor
from rung.model.config import read_config
from rung.model.provenance import git_commit
from rung.pretrain.bench_ranks import Company, RankPool, Times
from rung.pretrain.bench_runs import (
    INNER_STEPS,
    Compared,
    compare_steps,
    count_bytes,
    prepare,
    reptile,
    run_rounds,
    time_outer_steps,
)
from rung.pretrain.cli import find_config
from rung.pretrain.config import OptimizerConfig, PretrainConfig

BARS = {"step_overhead": 0.15, "bytes_per_structure_ratio": 1.05 / INNER_STEPS, "two_rank_speedup": 1.8}
QUIET = 0.05  # share of the processor time that other processes may take in a turn of which we say that it had none
Line = dict[str, Any]


# A step with and without DeepSpeed


def step_overhead(config: PretrainConfig, turns: int, warmup: int = 5) -> Iterator[Line]:
    """Yield the lines of ZeRO stage 1 with AdamW, which the bar is for, and of stage 0 with SOAP; on two ranks."""
    settings = config.optimizer
    optimizers = (replace(settings, name="adamw", zero_stage=1), replace(settings, name="soap", zero_stage=0))
    with RankPool(2) as pool:
        for optimizer in optimizers:
            with Company(pool) as company:
                found = pool(compare_steps, replace(config, optimizer=optimizer, mode="joint"), turns, warmup)
            yield _overhead(optimizer, turns, found) | {"others_share": company.others_share}


def _overhead(optimizer: OptimizerConfig, turns: int, found: Sequence[Compared]) -> Line:
    times = [each.times for each in found]
    walls, cpus = ({name: combine(times, name) for name in ("engine", "bare")} for combine in (_walls, _cpus))
    return {
        "name": "step_overhead",
        "optimizer": optimizer.name,
        "zero_stage": optimizer.zero_stage,
        "bar": BARS["step_overhead"] if optimizer.zero_stage else None,
        "overhead": _round(median(walls["engine"]) / median(walls["bare"]) - 1),
        "overhead_best": _round(min(walls["engine"]) / min(walls["bare"]) - 1),
        "overhead_cpu": _round(median(cpus["engine"]) / median(cpus["bare"]) - 1),
        "engine_ms": _round(1e3 * median(walls["engine"])),
        "bare_ms": _round(1e3 * median(walls["bare"])),
        "turns": turns,
        "largest_difference": max(compared.apart for compared in found),
    }


def _walls(ranks_times: Sequence[Times], name: str) -> list[float]:
    """Return the seconds of each turn: until the slowest rank is done."""
    return [max(wall for wall, _ in turn) for turn in zip(*(times[name] for times in ranks_times), strict=True)]


def _cpus(ranks_times: Sequence[Times], name: str) -> list[float]:
    """Return the processor time of each turn, that of all ranks."""
    return [sum(cpu for _, cpu in turn) for turn in zip(*(times[name] for times in ranks_times), strict=True)]


# Bytes


def bytes_per_structure(config: PretrainConfig, steps: int) -> Iterator[Line]:
    """Yield Reptile's bytes per structure over those of joint training, on two ranks, for each form of the exchange.

    Joint training with SOAP exchanges eigenbases, too; groups of one rank exchange the same with every optimizer.
    """
    rounds = max(1, steps // (2 * INNER_STEPS))
    with RankPool(2) as pool:
        exchanges = {
            exchange: pool(count_bytes, reptile(config, exchange=exchange), rounds)
            for exchange in ("float32", "bfloat16")
        }
        for optimizer in (replace(config.optimizer, name="soap"), replace(config.optimizer, name="adamw")):
            joint = pool(count_bytes, replace(config, mode="joint", optimizer=replace(optimizer, zero_stage=0)), steps)
            for exchange, found in exchanges.items():
                moved = {"reptile": _per_structure(found), "joint": _per_structure(joint)}
                training = {mode: each["inner"] + each["outer"] for mode, each in moved.items()}
                yield {
                    "name": "bytes_per_structure_ratio",
                    "optimizer": optimizer.name,
                    "exchange": exchange,
                    "inner_steps": INNER_STEPS,
                    "bar": BARS["bytes_per_structure_ratio"],
                    "ratio": _round(training["reptile"] / training["joint"]),
                    **{mode: {name: _round(value) for name, value in each.items()} for mode, each in moved.items()},
                    "structures": {"reptile": found[0][1], "joint": joint[0][1]},
                }


def _per_structure(found: Sequence[tuple[dict[str, int], float]]) -> dict[str, float]:
    names = ("inner", "outer", "report")
    return {name: sum(moved.get(name, 0) for moved, _ in found) / found[0][1] for name in names}


# Throughput


def two_rank_speedup(config: PretrainConfig, turns: int) -> Iterator[Line]:
    """Yield for each mode the structures per second of two ranks over those of one.

    `ceiling` is what two runs of one rank each reach side by side, which know nothing of each other: two cores of this
    machine give no more, because they share its caches and memory.
    """
    modes = {
        "reptile": (reptile(config, groups=1), reptile(config), 1),
        "joint": (replace(config, mode="joint"), replace(config, mode="joint"), INNER_STEPS),
    }
    with RankPool(1) as first, RankPool(1) as second, RankPool(2) as both:
        for mode, (alone, together, rounds) in modes.items():
            for pool, run in ((first, alone), (second, alone), (both, together)):
                pool(prepare, run)
                pool(run_rounds, 1)
            sides = {"one": (first,), "side_by_side": (first, second), "two": (both,)}
            found = [_turn(sides, rounds) for _ in range(turns)]
            yield {
                "name": "two_rank_speedup",
                "mode": mode,
                "inner_steps": INNER_STEPS if mode == "reptile" else None,
                "bar": BARS["two_rank_speedup"],
                "speedup": _ratio(found, "two"),
                "ceiling": _ratio(found, "side_by_side"),
                "structures_per_s": {name: round(median(turn[name][0] for turn in found), 1) for name in sides},
                "turns": turns,
                "others_share": {name: median(turn[name][1] for turn in found) for name in sides},
                **_quiet_turns(found),
                "load_average": round(os.getloadavg()[0], 2),
            }


Turn = dict[str, tuple[float, float]]  # structures per second, share of the processor time that others took


def _turn(sides: Mapping[str, Sequence[RankPool]], rounds: int) -> Turn:
    turn: Turn = {}
    for name, pools in sides.items():
        with Company(*(pool for all_pools in sides.values() for pool in all_pools)) as company:
            for pool in pools:
                pool.begin(run_rounds, rounds)
            results = [result for pool in pools for result in pool.results()]
        rate = sum(structures for structures, _ in results) / max(seconds for _, seconds in results)
        turn[name] = rate, company.others_share
    return turn


def _ratio(turns: Sequence[Turn], name: str) -> float:
    return _round(median(turn[name][0] / turn["one"][0] for turn in turns))


def _quiet_turns(turns: Sequence[Turn]) -> Line:
    """Return what the turns say in which both cores were free."""
    quiet = [turn for turn in turns if max(share for _, share in turn.values()) <= QUIET]
    return {
        "quiet_turns": len(quiet),
        "quiet_speedup": _ratio(quiet, "two") if quiet else None,
        "quiet_ceiling": _ratio(quiet, "side_by_side") if quiet else None,
    }


# Outer steps


def outer_step_ms(configs: Mapping[str, PretrainConfig], turns: int) -> Iterator[Line]:
    """Yield the time of outer steps of two groups of one rank, for models of several sizes."""
    with RankPool(2) as pool:
        for name, config in configs.items():
            with Company(pool) as company:
                found = pool(time_outer_steps, config, turns)
            walls = {form: _walls([times for times, _ in found], form) for form in found[0][0]}
            yield {
                "name": "outer_step_ms",
                "config": name,
                "parameters": found[0][1],
                **{form: _round(1e3 * median(wall)) for form, wall in walls.items()},
                "best": {form: _round(1e3 * min(wall)) for form, wall in walls.items()},
                "turns": turns,
                "others_share": company.others_share,
            }


# Command line


def read(name: str) -> PretrainConfig:
    """Return one of the configs of this package, or that of a file."""
    return read_config(PretrainConfig, find_config(name))


def machine(command: str) -> Line:
    """Return what the figures were measured on."""
    return {
        "name": "machine",
        "command": command,
        "commit": git_commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Print the lines, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("step_overhead", "bytes_per_structure_ratio", "two_rank_speedup", "outer_step_ms")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--config", default="small", help="one of ours by name, or a file")
    parser.add_argument("--sizes", nargs="*", default=["small", "base", "large"], help="configs of outer_step_ms")
    parser.add_argument("--turns", type=int, default=6, help="of throughput; ten times as many of single steps")
    parser.add_argument("--out", type=Path, help="file for the lines")
    arguments = parser.parse_args()
    config = read(arguments.config)
    makers: dict[str, Callable[[], Iterator[Line]]] = {
        "step_overhead": lambda: step_overhead(config, 10 * arguments.turns),
        "bytes_per_structure_ratio": lambda: bytes_per_structure(config, 4 * INNER_STEPS),
        "two_rank_speedup": lambda: two_rank_speedup(config, arguments.turns),
        "outer_step_ms": lambda: outer_step_ms({name: read(name) for name in arguments.sizes}, 10 * arguments.turns),
    }
    lines = [machine(" ".join(["python -m rung.pretrain.bench", *sys.argv[1:]]))]
    print(json.dumps(lines[0]), flush=True)
    for name in arguments.only:
        for line in makers[name]():
            lines.append(line)
            print(json.dumps(line), flush=True)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
