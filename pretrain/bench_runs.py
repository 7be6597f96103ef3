"""What the ranks of the benchmarks do: parts of runs, and the same step without DeepSpeed.

Functions with `kept`, a rank's own dictionary, are for `bench_ranks.RankPool` to call on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from rung.data.batch import Batch
from rung.pretrain.bench_ranks import TIMEOUT, Times, take_turns
from rung.pretrain.config import PretrainConfig
from rung.pretrain.engine import Engine, connect, make_module
from rung.pretrain.interval import Interval
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import Plan, make_plan, make_potential, task_groups
from rung.pretrain.ranks import Ranks
from rung.pretrain.reptile import Outer
from rung.pretrain.rounds import MODES, Rounds, make_loader
from rung.pretrain.step import StepModule, StepTotals

INNER_STEPS = 20


@dataclass
class Trainer:
    """The parts of a run that take part in its rounds, on one rank."""

    config: PretrainConfig
    ranks: Ranks
    plan: Plan
    module: StepModule
    engine: Engine

    @classmethod
    def of(cls, config: PretrainConfig) -> Self:
        """Return this rank's part of a run of all ranks of its pool."""
        ranks = connect(TIMEOUT, lambda size: task_groups(config, size))
        plan = make_plan(config, ranks.world.size)
        module = make_module(make_potential(plan).to(ranks.device), plan, config, ranks)
        return cls(config, ranks, plan, module, Engine(module, config.optimizer, plan.deepspeed, ranks))

    def rounds(self) -> Rounds:
        """Return the rounds of the run's mode."""
        return MODES[self.config.mode](self.engine, self.plan, self.config)


def reptile(config: PretrainConfig, *, groups: int | None = None, **changes: Any) -> PretrainConfig:
    """Return the config in mode reptile, with two tasks and `INNER_STEPS` of each in an outer step."""
    settings = replace(config.reptile, **{"inner_steps": INNER_STEPS, "tasks_per_outer": 2, **changes})
    return replace(config, mode="reptile", reptile=settings, world=replace(config.world, groups=groups))


class BareStep:
    """The engine's step in plain torch: one all-reduce of all gradients, clipping, the optimizer."""

    def __init__(self, module: StepModule, config: PretrainConfig, ranks: Ranks) -> None:
        self._module, self._ranks = module, ranks
        self._clipping = config.optimizer.gradient_clipping
        self._parameters = list(module.parameters())
        unshared = [parameter for _, parameter in module.potential.fidelity_parameters()]
        self._optimizer = make_optimizer(
            module,
            unshared,
            replace(config.optimizer, zero_stage=0),
            rank=ranks.data_rank,
            world=ranks.world.data_ranks,
            exchange=ranks.share_,
        )

    def step(self, batch: Batch, learning_rate: float) -> None:
        """Take one step on this rank's batch together with those of the other ranks."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss, _ = self._module(batch.to(self._ranks.device, self._parameters[0].dtype), False)
        self._optimizer.zero_grad()
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = self._ranks.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        flat /= self._ranks.world.data_ranks
        parts = torch.split(flat, [parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        if self._clipping > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clipping, foreach=True)
        self._optimizer.step()


@dataclass(frozen=True)
class Compared:
    """The times of the engine's and of the bare steps, and the largest differences of weights."""

    times: Times
    apart: float  # the engine's and the bare ones
    moved: float  # the engine's since the start


def compare_steps(kept: dict[str, Any], config: PretrainConfig, turns: int, warmup: int) -> Compared:
    """Train two copies of the same module on the same batches, one with the engine; called on all ranks of a pool."""
    trainer = Trainer.of(config)
    start = [parameter.clone() for parameter in trainer.engine.parameters()]
    ranks, rate = trainer.ranks, config.optimizer.lr
    bare_module = make_module(make_potential(trainer.plan).to(ranks.device), trainer.plan, config, ranks)
    bare = BareStep(bare_module, config, ranks)
    loader = make_loader(trainer.engine, trainer.plan, config)
    batches = [next(loader) for _ in range(8)]
    loader.close()
    engine_batches, bare_batches = (iter(batches * (1 + (turns + warmup) // len(batches))) for _ in range(2))
    functions: dict[str, Callable[[], object]] = {
        "engine": lambda: trainer.engine.step([next(engine_batches)], rate),
        "bare": lambda: bare.step(next(bare_batches), rate),
    }
    take_turns(ranks, functions, warmup)
    times = take_turns(ranks, functions, turns)
    end = trainer.engine.parameters()
    return Compared(times, _distance(end, list(bare_module.parameters())), _distance(end, start))


def _distance(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ones, others, strict=True))


def count_bytes(kept: dict[str, Any], config: PretrainConfig, rounds: int) -> tuple[dict[str, int], float]:
    """Return the bytes that this rank handed to collectives in so many rounds, by purpose, and all ranks' structures.

    Log lines are due as in the loop.
    """
    trainer = Trainer.of(config)
    running = trainer.rounds()
    traffic, steps = trainer.ranks.traffic, trainer.plan.steps_per_round
    interval = Interval(trainer.plan, config.loss, trainer.ranks, running.data_wait)
    structures = 0
    traffic.bytes.clear()
    for index in range(rounds):
        interval.add(running.run(index, False))
        if (index + 1) * steps // config.log_every > index * steps // config.log_every or index == rounds - 1:
            totals = interval.read()
            structures += totals.structures
            interval.close(totals, (index + 1) * steps, 0, 0.0)
    running.loader.close()
    return dict(traffic.bytes), structures


def prepare(kept: dict[str, Any], config: PretrainConfig) -> None:
    """Make a run ready for `run_rounds`."""
    trainer = Trainer.of(config)
    kept["run"] = trainer, trainer.rounds(), iter(range(10**9))


def run_rounds(kept: dict[str, Any], rounds: int) -> tuple[float, float]:
    """Run the next rounds; return this rank's share of the group's structures, and the seconds."""
    trainer, running, index = kept["run"]
    begin = time.perf_counter()
    totals: Tensor = sum((running.run(next(index), False) for _ in range(rounds)), trainer.engine.zero_totals())
    return StepTotals.read(totals).structures / trainer.ranks.world.data_ranks, time.perf_counter() - begin


def time_outer_steps(kept: dict[str, Any], config: PretrainConfig, turns: int) -> tuple[Times, int]:
    """Return the times of outer steps of each form on this rank of two groups, and the number of masters.

    `overlap` is what is left to wait for when the inner steps took longer than the exchange.
    """
    trainer = Trainer.of(reptile(config))
    engine, ranks = trainer.engine, trainer.ranks
    forms: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"exchange": "bfloat16"},
        "overlap": {"overlap": True},
    }
    functions: dict[str, Callable[[], object]] = {}
    for name, changes in forms.items():
        settings = reptile(config, **changes).reptile
        outer = Outer(engine.masters(), engine.master_rows(), settings, ranks.exchange_, ranks.world.groups)

        def outer_step(outer: Outer = outer) -> None:
            outer.add(engine.masters(), (ranks.group, 1.0))
            outer.finish([(0, 1.0), (1, 1.0)])
            engine.write_masters(outer.start)

        functions[name] = outer_step
        if name == "overlap":
            functions["wait"] = outer.state  # for the exchange, as inner steps would
    take_turns(ranks, functions, 2)
    times = take_turns(ranks, functions, turns)
    del times["wait"]
    return times, engine.masters().numel()
