"""Task groups: G = 1 after one another and G = T side by side are the same mathematics; the schedule; the counts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepspeed.accelerator import get_accelerator

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.config import read_config
from rung.pretrain.config import PretrainConfig
from rung.pretrain.engine import Engine, connect
from rung.pretrain.plan import Plan, make_plan, make_potential, task_groups
from rung.pretrain.rounds import Reptile
from rung.pretrain.schedule import assign_tasks, draw_tasks
from rung.pretrain.step import StepModule

ROUNDS = 3


class GivenBatches:
    """In place of the loader: the n-th batch of a task on a data rank is the same whatever the number of groups."""

    def __init__(self, structures: Sequence[Structure], plan: Plan, config: PretrainConfig, group: int, data_rank: int):
        self._batches = self._all(structures, plan, config, group, data_rank)

    def __next__(self) -> Batch:
        return next(self._batches)

    @staticmethod
    def _all(structures: Sequence[Structure], plan: Plan, config: PretrainConfig, group: int, data_rank: int) -> Any:
        for outer in count():
            for task in plan.assigned(config, outer)[group]:
                fidelity = plan.tasks[task].fidelity
                labelled = [structure for structure in structures if fidelity in structure.labels]
                for inner in range(config.reptile.inner_steps):
                    random = np.random.default_rng([task, outer, inner, data_rank])
                    chosen = [labelled[index] for index in random.choice(len(labelled), 3, replace=False)]
                    yield collate(
                        chosen,
                        fidelities=[fidelity] * 3,
                        fidelity_index=plan.fidelity_index,
                        cutoff=plan.model.cutoff,
                    )


def trained(structures: Sequence[Structure], words: list[str], double: bool) -> tuple[list[Any], dict[str, int]]:
    """Return the weights after a few outer steps, and the bytes that collectives were given since the start."""
    config = read_config(PretrainConfig, None, words)
    ranks = connect(timedelta(minutes=2), lambda size: task_groups(config, size))
    plan = make_plan(config, ranks.world.size)
    potential = make_potential(plan).train()
    if double:  # DeepSpeed reduces no gradients of this type, unless its accelerator says that it can
        potential = potential.double()
        get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]
    module = StepModule(potential, config.loss, ranks.sum_, ranks.world.data_ranks, len(plan.tasks))
    engine = Engine(module, config.optimizer, plan.deepspeed, ranks)
    rounds = Reptile(engine, plan, config)
    rounds.loader = GivenBatches(structures, plan, config, ranks.group, ranks.data_rank)  # type: ignore[assignment]
    for index in range(ROUNDS):
        totals = rounds.run(index, False)
        assert totals[4] == config.reptile.inner_steps * config.reptile.tasks_per_outer / ranks.world.groups
    return [parameter.cpu().numpy().copy() for parameter in engine.parameters()], dict(ranks.traffic.bytes)


def words_of(config_words: list[str], tmp_path: Path, *more: str) -> list[str]:
    # A large eps makes the inner steps nearly linear in the gradients: rounding is not amplified by signs of zeros.
    return [
        *config_words, f"output={tmp_path}", "mode=reptile", "steps=12", "reptile.inner_steps=2",
        "reptile.tasks_per_outer=2", "optimizer.lr=0.05", "optimizer.eps=0.1", *more,
    ]  # fmt: skip


CASES = [
    ("soap", 0, "reset", "float64", "sgd"),
    ("soap", 0, "task", "float64", "nesterov"),
    ("adamw", 0, "task", "float32", "momentum"),
    ("adamw", 1, "reset", "float32", "sgd"),
    ("adamw", 2, "task", "float32", "nesterov"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning")
@pytest.mark.parametrize(("name", "stage", "inner_state", "dtype", "outer_optimizer"), CASES)
@pytest.mark.parametrize("data_ranks", [1, 2])
def test_groups_side_by_side_are_tasks_after_one_another(
    structures: list[Structure],
    config_words: list[str],
    run_ranks: Any,
    tmp_path: Path,
    name: str,
    stage: int,
    inner_state: str,
    dtype: str,
    outer_optimizer: str,
    data_ranks: int,
) -> None:
    """Serial Reptile on D ranks and two groups of D ranks, given equal batches, end at the same weights."""
    words = words_of(
        config_words, tmp_path, f"optimizer.name={name}", f"optimizer.zero_stage={stage}",
        f"reptile.inner_state={inner_state}", f"reptile.outer_optimizer={outer_optimizer}",
    )  # fmt: skip
    double = dtype == "float64"
    serial = run_ranks(trained, data_ranks, structures, [*words, "world.groups=1"], double)
    groups = run_ranks(trained, 2 * data_ranks, structures, [*words, "world.groups=2"], double)
    start = [
        parameter.detach()
        for parameter in make_potential(make_plan(read_config(PretrainConfig, None, words), 1)).parameters()
    ]
    moved = max(
        float(np.abs(end - begin.detach().numpy()).max()) for end, begin in zip(serial[0][0], start, strict=True)
    )
    assert moved > 1e-3
    for weights, _ in groups:
        for found, wanted in zip(weights, serial[0][0], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 if double else 1e-5)


def test_every_group_gets_as_many_tasks_and_all_that_were_drawn() -> None:
    weights = (0.4, 0.1, 0.2, 0.1, 0.1, 0.1)
    for outer in range(50):
        for groups in (1, 2, 4):
            assigned = assign_tasks(3, outer, weights, 4, groups)
            assert [len(tasks) for tasks in assigned] == [4 // groups] * groups
            assert sorted(sum(assigned, ())) == sorted(draw_tasks(3, outer, weights, 4))
    assert all(assign_tasks(0, outer, (1.0, 1.0, 1.0), 3, 3) == ((0,), (1,), (2,)) for outer in range(9))
