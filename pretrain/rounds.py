"""The two ways to train, as rounds: between two rounds the weights are one set phi, the same on every rank.

joint     one round is one step on batches that mix the tasks by weight.
reptile   one round is one outer step: every group takes k inner steps on each of its tasks, then the outer update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from rung.data.batch import Batch, Budget
from rung.data.loader import BatchLoader, MakeStream, only
from rung.data.mixing import MixedStream, open_tasks
from rung.model.config import ModelConfig
from rung.pretrain.config import PretrainConfig
from rung.pretrain.engine import Engine
from rung.pretrain.plan import Plan
from rung.pretrain.reptile import Outer
from rung.pretrain.schedule import learning_rate
from rung.pretrain.stopwatch import Stopwatch


class Rounds(Protocol):
    """What the loop needs to know about a mode."""

    loader: BatchLoader
    data_wait: Stopwatch  # time spent waiting for batches
    batches_per_round: int  # that one rank takes

    def run(self, index: int, stop: bool) -> Tensor:
        """Do round `index` and return the vector of its totals over the task group (see `step.NAMES`).

        `stop` says that this rank was asked to stop, which the totals tell.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what the next round needs beside weights, inner optimizer and loader."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, and the engine's present weights."""


class Joint:
    """Multi-fidelity training: every batch mixes the tasks."""

    def __init__(self, engine: Engine, plan: Plan, config: PretrainConfig) -> None:
        self.batches_per_round = config.data.micro_batches
        self.data_wait = Stopwatch()
        self.loader = make_loader(engine, plan, config)
        self._engine, self._plan, self._config = engine, plan, config

    def run(self, index: int, stop: bool) -> Tensor:
        """See `Rounds`."""
        rate = learning_rate(index, self._plan.steps, self._config.optimizer)
        with self.data_wait:
            batches = [_next(self.loader, self._plan.model) for _ in range(self.batches_per_round)]
        return self._engine.step(batches, rate, stop=stop)

    def state(self) -> dict[str, Tensor]:
        """See `Rounds`."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Rounds`."""


class Reptile:
    """Meta-learning: groups of ranks train on tasks of their own; with one group the tasks follow one another."""

    def __init__(self, engine: Engine, plan: Plan, config: PretrainConfig) -> None:
        self.data_wait = Stopwatch()
        self.loader = make_loader(engine, plan, config)
        self.batches_per_round = _group_tasks(plan, config) * config.reptile.inner_steps * config.data.micro_batches
        self._engine, self._plan, self._config = engine, plan, config
        self._outer = Outer(
            engine.masters(), engine.master_rows(), config.reptile, engine.ranks.exchange_, plan.world.groups
        )

    def run(self, index: int, stop: bool) -> Tensor:
        """See `Rounds`."""
        engine, plan, reptile = self._engine, self._plan, self._config.reptile
        groups = plan.assigned(self._config, index)
        totals = engine.zero_totals()
        for number, task in enumerate(groups[engine.ranks.group]):
            if number > 0 or reptile.overlap:  # else it begins where the round before has left the weights: at phi
                engine.write_masters(self._outer.start)
            engine.use_inner_state({"group": "", "task": f"task{task}", "reset": None}[reptile.inner_state])
            for inner in range(reptile.inner_steps):
                # Counted as if the tasks ran side by side, so that the rate does not depend on the number of groups.
                step = index * plan.steps_per_round + inner * reptile.tasks_per_outer
                rate = learning_rate(step, plan.steps, self._config.optimizer)
                totals += engine.step(self._batches(task), rate, stop=stop)
            self._outer.add(engine.masters(), plan.outer_task(task))
        tasks = [plan.outer_task(task) for group in groups for task in group]
        self._outer.finish(tasks, last=index == plan.rounds - 1)
        engine.write_masters(self._outer.phi)
        return totals

    def state(self) -> dict[str, Tensor]:
        """See `Rounds`."""
        return self._outer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Rounds`."""
        self._outer.load_state(self._engine.masters(), state)

    def _batches(self, task: int) -> list[Batch]:
        """Return one step's batches, whose only task is this one."""
        with self.data_wait:
            batches = [_next(self.loader, self._plan.model) for _ in range(self._config.data.micro_batches)]
        row, _ = self._plan.outer_task(task)
        if any((batch.fidelity != row).any() for batch in batches):
            raise RuntimeError(f"loader: expected structures of task {self._plan.task_names[task]}, found others'")
        return [replace(batch, task=torch.full_like(batch.task, task)) for batch in batches]


MODES: Mapping[str, type[Joint] | type[Reptile]] = {"joint": Joint, "reptile": Reptile}


def _group_tasks(plan: Plan, config: PretrainConfig) -> int:
    """Return how many tasks a group trains on in one outer step."""
    return config.reptile.tasks_per_outer // plan.world.groups


def make_loader(engine: Engine, plan: Plan, config: PretrainConfig) -> BatchLoader:
    """Return this rank's batches: of the tasks mixed by weight (joint), or of each round's tasks in turn (reptile).

    A task's structures are dealt to the ranks that `plan.readers` names.
    """
    data, ranks = config.data, engine.ranks
    mixes = [plan.tasks] if config.mode == "joint" else [(task,) for task in plan.tasks]

    def maker(index: int) -> MakeStream:
        readers = plan.readers(config, plan.world, index)

        def make_stream(consumer: int, num_consumers: int) -> MixedStream:
            workers = num_consumers // plan.world.size
            rank, worker = divmod(consumer, workers)
            number, count = readers.index(rank) * workers + worker, len(readers) * workers
            return open_tasks(mixes[index], seed=config.seed, rank=number, world=count, max_bad=data.max_bad)

        return make_stream

    def task_of(batch: int) -> int:
        outer, rest = divmod(batch // data.micro_batches, _group_tasks(plan, config) * config.reptile.inner_steps)
        return plan.assigned(config, outer)[ranks.group][rest // config.reptile.inner_steps]

    return BatchLoader(
        [maker(index) for index in range(len(mixes))],
        plan.fidelity_index,
        plan.model.cutoff,
        Budget(data.max_atoms, data.max_edges),
        order=only if config.mode == "joint" else task_of,
        reads=lambda index: ranks.rank in plan.readers(config, plan.world, index),
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        rank=ranks.rank,
        world=ranks.world.size,
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
