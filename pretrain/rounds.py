"""The two ways to train, as rounds: between two rounds the weights are one set phi, the same on every rank.

joint     one round is one step on a batch that mixes the tasks by weight.
reptile   one round is one outer step: k inner steps on each of the drawn tasks, then the outer update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from rung.data.batch import Batch, Budget
from rung.data.loader import BatchLoader
from rung.data.mixing import MixedStream, Task, open_tasks
from rung.model.config import ModelConfig
from rung.pretrain.config import PretrainConfig
from rung.pretrain.engine import Engine
from rung.pretrain.plan import Plan
from rung.pretrain.reptile import OuterUpdate
from rung.pretrain.schedule import draw_tasks, learning_rate
from rung.pretrain.step import StepTotals


class Rounds(Protocol):
    """What the loop needs to know about a mode."""

    loaders: list[BatchLoader]

    def run(self, index: int, stop: bool) -> StepTotals:
        """Do round `index`; `stop` says that this rank was asked to stop, which the totals of every rank then tell."""


class Joint:
    """Multi-fidelity training: every batch mixes the tasks."""

    def __init__(self, engine: Engine, plan: Plan, config: PretrainConfig) -> None:
        self.loaders = [_loader(plan.tasks, engine, plan, config)]
        self._engine, self._plan, self._config = engine, plan, config

    def run(self, index: int, stop: bool) -> StepTotals:
        """See `Rounds`."""
        rate = learning_rate(index, self._plan.steps, self._config.optimizer)
        return self._engine.step(_next(self.loaders[0], self._plan.model), rate, stop=stop)


class Reptile:
    """Serial Reptile: all ranks work on one task at a time, as data-parallel ranks."""

    def __init__(self, engine: Engine, plan: Plan, config: PretrainConfig) -> None:
        self.loaders = [_loader([task], engine, plan, config) for task in plan.tasks]
        self._engine, self._plan, self._config = engine, plan, config
        self._owned = engine.owned()

    def run(self, index: int, stop: bool) -> StepTotals:
        """See `Rounds`."""
        engine, plan, reptile = self._engine, self._plan, self._config.reptile
        step = index * plan.steps_per_round
        weights = [task.weight for task in plan.tasks]
        outer = OuterUpdate(engine.parameters(), self._owned)
        totals = StepTotals()
        for task in draw_tasks(self._config.seed, index, weights, reptile.tasks_per_outer):
            engine.write_parameters(outer.start)
            for _ in range(reptile.inner_steps):
                rate = learning_rate(step, plan.steps, self._config.optimizer)
                totals += engine.step(_next(self.loaders[task], plan.model), rate, stop=stop)
                step += 1
            outer.add(engine.parameters(), plan.fidelity_index[plan.tasks[task].fidelity])
        engine.write_parameters(outer.result(reptile.outer_rate))
        return totals


MODES: Mapping[str, type[Joint] | type[Reptile]] = {"joint": Joint, "reptile": Reptile}


def _loader(tasks: Sequence[Task], engine: Engine, plan: Plan, config: PretrainConfig) -> BatchLoader:
    """Return this rank's batches of these tasks, mixed by their weights."""
    data, ranks = config.data, engine.ranks

    def make_stream(consumer: int, num_consumers: int) -> MixedStream:
        return open_tasks(tasks, seed=config.seed, rank=consumer, world=num_consumers, max_bad=data.max_bad)

    return BatchLoader(
        make_stream,
        plan.fidelity_index,
        plan.model.cutoff,
        Budget(data.max_atoms, data.max_edges),
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        rank=ranks.rank,
        world=ranks.world,
        pin_memory=ranks.device.type == "cuda",
    )


def _next(loader: BatchLoader, model: ModelConfig) -> Batch:
    """Return the next batch; raise ValueError naming a structure whose charge or multiplicity the model has no row for.

    (Elements and fidelities come from the manifests, which do not list these two.)
    """
    batch = next(loader)
    for field, values, known in (
        ("charges", batch.charge, model.charges),
        ("multiplicities", batch.multiplicity, model.multiplicities),
    ):
        unknown = ~torch.isin(values, torch.tensor(known))
        if unknown.any():
            index = int(unknown.nonzero()[0])
            raise ValueError(
                f"structure '{batch.keys[index]}': {int(values[index])} is not one of model.{field}, "
                f"{', '.join(map(str, known))}; add it there"
            )
    return batch
