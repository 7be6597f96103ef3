"""What the model of costs says against what real ranks send and hold."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from rung.model.config import ModelConfig, read_config
from rung.model.potential import Potential
from rung.pretrain import costs
from rung.pretrain.config import OptimizerConfig, PretrainConfig, ReptileConfig
from rung.pretrain.costs import Activations, Collective, Held, Shape, shapes_of
from rung.pretrain.engine import Engine, connect
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import make_plan, make_potential, task_groups
from rung.pretrain.rounds import MODES
from rung.pretrain.step import StepModule
from rung.pretrain.world import World

RunRanks = Callable[..., list[Any]]  # conftest.py
ROUNDS = 2
PERIOD = 3  # of SOAP's eigenbases; a multiple of it are the steps of every run here


# Collectives of real ranks

OPTIMIZERS = {
    "soap": ["optimizer.name=soap", f"optimizer.precondition_frequency={PERIOD}"],
    "muon": ["optimizer.name=muon"],
    "adamw, stage 1": ["optimizer.name=adamw", "optimizer.zero_stage=1"],
    "adamw, stage 2": ["optimizer.name=adamw", "optimizer.zero_stage=2"],
}
WORLDS = {
    "joint, 2 ranks": (2, ["mode=joint", "data.micro_batches=3"]),
    "2 groups of 1": (2, ["mode=reptile"]),
    "2 groups of 2": (4, ["mode=reptile", "reptile.exchange=bfloat16", "reptile.overlap=true"]),
    "1 group of 2": (2, ["mode=reptile", "world.groups=1"]),
}
Counted = tuple[dict[str, int], int]  # bytes by purpose; the size of the vector of sums


def run_all(words: list[str], folder: Path) -> dict[str, Counted]:
    """Train some rounds for real with each optimizer."""
    return {name: run_rounds([*words, *more, f"output={folder}"]) for name, more in OPTIMIZERS.items()}


def run_rounds(words: list[str]) -> Counted:
    config = read_config(PretrainConfig, None, words)
    ranks = connect(timedelta(seconds=60), lambda size: task_groups(config, size))
    plan = make_plan(config, ranks.world.size)
    sums: list[int] = []

    def sum_(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor.nbytes)
        return ranks.sum_(tensor)

    module = StepModule(make_potential(plan).train(), config.loss, sum_, ranks.world.data_ranks, len(plan.tasks))
    rounds = MODES[config.mode](Engine(module, config.optimizer, plan.deepspeed, ranks), plan, config)
    ranks.traffic.bytes.clear()
    for index in range(ROUNDS):
        rounds.run(index, False)
    return dict(ranks.traffic.bytes), sums[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning", "ignore:`torch.distributed.:FutureWarning")
def test_bytes_are_those_that_real_ranks_hand_over(
    run_ranks: RunRanks, config_words: list[str], tmp_path: Path, world: str
) -> None:
    size, mode = WORLDS[world]
    words = [*config_words, f"reptile.inner_steps={PERIOD}", "reptile.tasks_per_outer=2", *mode]
    for results in run_ranks(run_all, size, words, tmp_path):
        for optimizer, (counted, sums) in results.items():
            config = read_config(PretrainConfig, None, [*words, *OPTIMIZERS[optimizer], "output=nowhere"])
            assert sums == costs.statistics_bytes(len(config.tasks))
            expected = expected_bytes(config, size)
            assert set(counted) == {purpose for purpose, value in expected.items() if value}
            for purpose, value in counted.items():
                assert value == pytest.approx(expected[purpose], rel=0.01), f"{optimizer}: {purpose}"


def expected_bytes(config: PretrainConfig, size: int) -> dict[str, float]:
    """Return the bytes that `run_rounds` should hand over, by purpose."""
    plan = make_plan(config, size)
    potential = make_potential(plan)
    shapes = shapes_of(potential, [parameter for _, parameter in potential.fidelity_parameters()])
    micro = config.data.micro_batches
    inner = costs.inner_collectives(shapes, config.optimizer, plan.world, len(config.tasks), micro)
    if config.mode == "joint":
        # The first of SOAP's eigenbases come at the first step; ROUNDS steps see one set of them, not 2/3.
        period = config.optimizer.precondition_frequency
        broadcasts = sum(c.handed * period for c in inner if c.operation == "broadcast")
        rest = sum(c.handed for c in inner if c.operation != "broadcast")
        return {"inner": ROUNDS * rest + broadcasts, "outer": 0}
    outer = costs.outer_collectives(shapes, config.optimizer, plan.world, config.reptile)
    steps = ROUNDS * costs.steps_per_outer(plan.world, config.reptile)
    return {"inner": steps * costs.handed(inner, "inner"), "outer": ROUNDS * costs.handed(outer, "outer")}


# Closed forms

SHAPES = [Shape("stack", (3, 4, 4), True), Shape("matrix", (6, 2), True), Shape("vector", (7,), False)]
ADAMW = OptimizerConfig(name="adamw")
NO_ACTIVATIONS = Activations()


def stage(number: int) -> OptimizerConfig:
    return OptimizerConfig(name="adamw", zero_stage=number)


@pytest.mark.parametrize(("operation", "wire"), [("all_reduce", 1500), ("all_gather", 750), ("broadcast", 750)])
def test_bytes_on_the_wire_of_a_ring_of_four(operation: Any, wire: int) -> None:
    assert Collective("inner", operation, 1000, ranks=4).wire == wire


@pytest.mark.parametrize("inner_steps", [1, 8, 500])
def test_reptile_with_groups_of_one_rank_sends_one_kth_of_what_joint_training_sends(inner_steps: int) -> None:
    reptile = ReptileConfig(inner_steps=inner_steps, tasks_per_outer=4)
    joint = costs.wire(c for c in costs.inner_collectives(SHAPES, ADAMW, World(4), 4) if c.bytes == 4 * 67)
    groups = World(4, 4)
    assert costs.inner_collectives(SHAPES, ADAMW, groups, 4) == []
    outer = costs.wire(costs.outer_collectives(SHAPES, ADAMW, groups, reptile))
    assert outer / costs.steps_per_outer(groups, reptile) == pytest.approx(joint / inner_steps)


def test_bf16_halves_the_exchange_and_data_ranks_divide_it() -> None:
    world = World(8, 4)

    def sent(optimizer: OptimizerConfig, **settings: Any) -> int:
        reptile = ReptileConfig(tasks_per_outer=4, **settings)
        return sum(c.bytes for c in costs.outer_collectives(SHAPES, optimizer, world, reptile) if c.across)

    part = (48 + 12 + 7 + 1) // 2  # of two data ranks, padded to an even number
    assert sent(ADAMW) == 4 * part
    assert sent(ADAMW, exchange="bfloat16") == 2 * part
    assert sent(stage(1)) == 4 * (60 + 8) // 2  # the vector is padded to a multiple of 2 * 2


def test_every_preconditioned_parameter_has_one_owner() -> None:
    shares = costs.owners(SHAPES, OptimizerConfig(), 3)
    assert sorted(shape.name for share in shares for shape in share if shape.axes) == ["matrix", "stack"]


@pytest.mark.parametrize(
    ("number", "weights", "gradients", "optimizer"),
    [(0, 67, 67, 134), (1, 67 + 34, 67 + 34, 68), (2, 67 + 34, 34, 68)],
)
def test_memory_of_the_stages(number: int, weights: int, gradients: int, optimizer: int) -> None:
    held = Held(max_atoms=10, max_edges=20)
    found = costs.memory(SHAPES, stage(number), World(2), NO_ACTIVATIONS, held)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * weights, 4 * gradients, 4 * optimizer)
    assert found["reduction_buffer"] == 4 * 67


def test_memory_of_activations_and_of_states_kept_per_task() -> None:
    def found(**settings: Any) -> dict[str, int]:
        held = Held(100, 1000, reptile=ReptileConfig(**settings), tasks=5)
        return costs.memory(SHAPES, ADAMW, World(2, 2), Activations(1.0, 10.0, 3.0), held)

    assert found()["activations"] == 1 + 1000 + 3000
    assert found(inner_state="task")["optimizer"] == 5 * found()["optimizer"]
    assert found(outer_optimizer="nesterov")["outer"] - found()["outer"] == 4 * 67


# Bytes of real optimizers

MODEL = ModelConfig(elements=(1, 6, 8), fidelities=("low", "high"), channels=16, fidelity_dim=4, readout_hidden=4)


@pytest.mark.parametrize("name", ["soap", "adamw", "muon"])
def test_optimizer_bytes_are_those_of_the_real_state(name: Any) -> None:
    potential = Potential(MODEL)
    unshared = [parameter for _, parameter in potential.fidelity_parameters()]
    config = OptimizerConfig(name=name)
    optimizer = make_optimizer(potential, unshared, config)
    for parameter in potential.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    held = sum(value.nbytes for value in state if value.dim() > 0)
    assert costs.optimizer_bytes(shapes_of(potential, unshared), config, data_ranks=1) == held


def test_shapes_are_grouped_as_the_optimizer_groups_parameters() -> None:
    potential = Potential(MODEL)
    unshared = [parameter for _, parameter in potential.fidelity_parameters()]
    shapes = shapes_of(potential, unshared)
    assert sum(shape.size for shape in shapes) == sum(parameter.numel() for parameter in potential.parameters())
    groups = make_optimizer(potential, unshared, ADAMW).param_groups
    for decayed, group in zip((True, False), groups, strict=True):
        assert [shape.shape for shape in shapes if shape.decayed is decayed] == [
            tuple(p.shape) for p in group["params"]
        ]
        assert sum(shape.size for shape in shapes if shape.decayed is decayed) == sum(
            prod(parameter.shape) for parameter in group["params"]
        )
