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
from rung.pretrain.engine import connect, make_engine
from rung.pretrain.plan import Plan, make_plan, make_potential, task_groups
from rung.pretrain.rounds import Reptile
from rung.pretrain.schedule import assign_tasks, draw_tasks

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


def trained(structures: Sequence[Structure], runs: Sequence[tuple[list[str], bool]]) -> list[list[Any]]:
    """Return the weights after a few outer steps, for each config (as words) and whether it computes in float64."""
    return [trained_once(structures, words, double) for words, double in runs]


def trained_once(structures: Sequence[Structure], words: list[str], double: bool) -> list[Any]:
    config = read_config(PretrainConfig, None, words)
    ranks = connect(timedelta(minutes=2), lambda size: task_groups(config, size))
    plan = make_plan(config, ranks.world.size)
    potential = make_potential(plan)
    if double:  # DeepSpeed reduces no gradients of this type, unless its accelerator says that it can
        potential = potential.double()
        get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]
    engine = make_engine(potential, plan, config, ranks)
    rounds = Reptile(engine, plan, config)
    rounds.loader = GivenBatches(structures, plan, config, ranks.group, ranks.data_rank)  # type: ignore[assignment]
    for index in range(ROUNDS):
        totals = rounds.run(index, False)
        assert totals[4] == config.reptile.inner_steps * config.reptile.tasks_per_outer / ranks.world.groups
    return [parameter.cpu().numpy().copy() for parameter in engine.parameters()]


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
def test_groups_side_by_side_are_tasks_after_one_another(
    structures: list[Structure], config_words: list[str], run_ranks: Any, tmp_path: Path
) -> None:
    """Serial Reptile on D ranks and two groups of D ranks, given equal batches, end at the same weights."""
    runs = []
    for name, stage, inner_state, dtype, outer_optimizer in CASES:
        more = [f"optimizer.name={name}", f"optimizer.zero_stage={stage}", f"reptile.inner_state={inner_state}"]
        words = words_of(config_words, tmp_path, *more, f"reptile.outer_optimizer={outer_optimizer}")
        runs.append((words, dtype == "float64"))

    def arranged(groups: int) -> list[tuple[list[str], bool]]:
        return [([*words, f"world.groups={groups}"], double) for words, double in runs]

    one = run_ranks(trained, 1, structures, arranged(1))
    two = run_ranks(trained, 2, structures, arranged(1) + arranged(2))
    four = run_ranks(trained, 4, structures, arranged(2))
    start = list(make_potential(make_plan(read_config(PretrainConfig, None, runs[0][0]), 1)).parameters())
    for case, (_, double) in enumerate(runs):
        serial_1, serial_2 = one[0][case], two[0][case]
        compared = [(ends[len(runs) + case], serial_1) for ends in two] + [(ends[case], serial_2) for ends in four]
        moved = max(
            float(np.abs(end - begin.detach().numpy()).max()) for end, begin in zip(serial_1, start, strict=True)
        )
        assert moved > 1e-3
        for groups, serial in compared:
            for found, wanted in zip(groups, serial, strict=True):
                np.testing.assert_allclose(
                    found, wanted, rtol=0, atol=1e-6 if double else 1e-5, err_msg=str(CASES[case])
                )


def test_every_group_gets_as_many_tasks_and_all_that_were_drawn() -> None:
    weights = (0.4, 0.1, 0.2, 0.1, 0.1, 0.1)
    for outer in range(50):
        for groups in (1, 2, 4):
            assigned = assign_tasks(3, outer, weights, 4, groups)
            assert [len(tasks) for tasks in assigned] == [4 // groups] * groups
            assert sorted(sum(assigned, ())) == sorted(draw_tasks(3, outer, weights, 4))
    assert all(assign_tasks(0, outer, (1.0, 1.0, 1.0), 3, 3) == ((0,), (1,), (2,)) for outer in range(9))
