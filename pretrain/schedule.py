"""What happens at a given step, as pure functions: the learning rate, and which group trains on which task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rung.pretrain.config import OptimizerConfig


def learning_rate(step: float, total_steps: int, config: OptimizerConfig) -> float:
    """Return the rate of step 0 .. total_steps - 1: linear warm-up times a cosine that ends at `final_lr_fraction`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, total_steps - 1)))
    return config.lr * warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def draw_tasks(seed: int, outer: int, weights: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the distinct tasks of one outer step, drawn by weight; the same on every rank and in every run."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, outer]))
    probabilities = np.asarray(weights, np.float64) / np.sum(weights)
    return tuple(int(task) for task in generator.choice(len(weights), size=count, replace=False, p=probabilities))


@lru_cache(maxsize=8)
def assign_tasks(
    seed: int, outer: int, weights: tuple[float, ...], count: int, groups: int
) -> tuple[tuple[int, ...], ...]:
    """Return the tasks of each group in one outer step: those drawn, equally many for every group.

    A task goes to group `task % groups` while that one has room, so that a group meets the same tasks again and its
    optimizer's state for them is of use.
    """
    room = count // groups
    assigned: list[list[int]] = [[] for _ in range(groups)]
    left: list[int] = []
    for task in sorted(draw_tasks(seed, outer, weights, count)):
        home = assigned[task % groups]
        (home if len(home) < room else left).append(task)
    for group in assigned:
        while len(group) < room:
            group.append(left.pop(0))
    return tuple(tuple(group) for group in assigned)
