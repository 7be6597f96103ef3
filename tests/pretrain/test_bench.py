"""The benchmarks of several ranks, on a tiny model: what they count is right, and what they time is a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from rung.model.config import read_config
from rung.pretrain import bench, bench_runs, costs
from rung.pretrain.bench_ranks import Company, RankPool
from rung.pretrain.config import PretrainConfig
from rung.pretrain.plan import make_plan


@pytest.fixture()
def config(config_words: list[str]) -> PretrainConfig:
    return read_config(PretrainConfig, None, [*config_words, "output=nowhere"])


def values(line: dict[str, Any]) -> list[float]:
    """Return all numbers of a line."""
    found: list[float] = []
    for value in line.values():
        found += values(value) if isinstance(value, dict) else [value] if isinstance(value, int | float) else []
    return found


def test_reptile_keeps_the_rest_of_the_config(config: PretrainConfig) -> None:
    run = bench_runs.reptile(config, groups=1, exchange="bfloat16")
    assert (run.mode, run.world.groups, run.reptile.exchange) == ("reptile", 1, "bfloat16")
    assert run.reptile.inner_steps == bench_runs.INNER_STEPS
    assert (run.data, run.optimizer, run.model) == (config.data, config.optimizer, config.model)


def test_quiet_turns_are_those_in_which_nobody_else_worked() -> None:
    quiet = {"one": (10.0, 0.0), "side_by_side": (19.0, 0.01), "two": (18.0, 0.02)}
    busy = {"one": (10.0, 0.0), "side_by_side": (12.0, 0.5), "two": (9.0, 0.4)}
    assert bench._quiet_turns([quiet, busy]) == {"quiet_turns": 1, "quiet_speedup": 1.8, "quiet_ceiling": 1.9}
    assert bench._quiet_turns([busy])["quiet_speedup"] is None
    assert bench._ratio([quiet, busy], "two") == pytest.approx(1.35)


def test_a_turn_lasts_until_its_slowest_rank_is_done() -> None:
    times = [{"step": [(1.0, 0.5), (2.0, 0.5)]}, {"step": [(3.0, 0.25), (1.0, 0.5)]}]
    assert bench._walls(times, "step") == [3.0, 2.0]
    assert bench._cpus(times, "step") == [0.75, 1.0]


def test_company_is_a_share() -> None:
    with Company() as company:
        sum(range(100_000))
    assert 0 <= company.others_share <= 1


@pytest.mark.slow
def test_a_pool_calls_on_every_rank_and_tells_what_failed() -> None:
    with RankPool(2) as pool:
        assert pool(dict.setdefault, "kept", 1) == [1, 1]
        assert pool(dict.copy) == [{"kept": 1}] * 2  # between calls, too
        with pytest.raises(RuntimeError, match=r"rank 0:\n(?s:.*)KeyError: 'absent'"):
            pool(dict.__getitem__, "absent")
        assert pool(dict.copy) == [{"kept": 1}] * 2


@pytest.mark.slow
def test_the_bare_step_is_the_engines(config: PretrainConfig) -> None:
    adamw = replace(config.optimizer, name="adamw", zero_stage=1)
    soap = replace(config.optimizer, name="soap", precondition_frequency=2)
    with RankPool(2) as pool:
        for optimizer in (adamw, soap):
            for found in pool(bench_runs.compare_steps, replace(config, optimizer=optimizer), 4, 2):
                assert found.apart < 1e-6 < 1e-3 < found.moved
                assert {name: len(times) for name, times in found.times.items()} == {"engine": 4, "bare": 4}


@pytest.mark.slow
def test_bytes_are_those_of_the_gradients_and_the_weights(config: PretrainConfig) -> None:
    steps = 2 * bench_runs.INNER_STEPS  # joint; one round of two groups
    lines = [line for line in bench.bytes_per_structure(config, steps) if line["optimizer"] == "adamw"]
    assert [line["exchange"] for line in lines] == ["float32", "bfloat16"]
    size = make_plan(config, 2).num_parameters
    for line, element in zip(lines, (4, 2), strict=True):
        counts, joint, reptile = line["structures"], line["joint"], line["reptile"]
        step = 4 * size + costs.statistics_bytes(len(config.tasks))
        assert joint["inner"] * counts["joint"] == pytest.approx(2 * steps * step, rel=1e-3)
        assert reptile["outer"] * counts["reptile"] == pytest.approx(2 * element * size, rel=1e-3)
        assert joint["outer"] == reptile["inner"] == 0
        assert 0 < reptile["report"] < reptile["outer"]
        assert line["ratio"] == pytest.approx(reptile["outer"] / joint["inner"], rel=1e-3)


@pytest.mark.slow
def test_times_are_times(config: PretrainConfig) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: bench.step_overhead(config, 3, warmup=1),
        lambda: bench.outer_step_ms({"tiny": config}, 3),
        lambda: islice(bench.two_rank_speedup(config, 1), 1),
    ]
    lines = [line for maker in makers for line in maker()]
    assert [line["name"] for line in lines] == 2 * ["step_overhead"] + ["outer_step_ms", "two_rank_speedup"]
    assert all(math.isfinite(value) for line in lines for value in values(line))
    assert all(line["engine_ms"] > 0 and line["bare_ms"] > 0 for line in lines[:2])
    assert all(lines[2][form] >= lines[2]["best"][form] > 0 for form in ("float32", "bfloat16", "overlap"))
    assert lines[2]["parameters"] == make_plan(config, 2).num_parameters
    for line in lines[3:]:
        assert min(line["structures_per_s"].values()) > 0 and line["speedup"] > 0
