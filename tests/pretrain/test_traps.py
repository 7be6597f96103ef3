"""Traps of DeepSpeed that are silent, beside those of test_engine.py: what the engine relies on, seen from outside."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it, and so do forked ranks, each anew
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.config import ModelConfig
from rung.model.loss import LossConfig
from rung.model.potential import Potential
from rung.pretrain.config import OptimizerConfig
from rung.pretrain.engine import Engine, connect
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import deepspeed_settings
from rung.pretrain.step import StepModule

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's ZeRO uses parts of torch that this torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning"),
]

MODEL = ModelConfig(
    (1, 6, 7, 8), ("low", "high"), channels=16, num_layers=2, l_max=2, num_radial=4, fidelity_dim=4, readout_hidden=4
)
LOSS = LossConfig(energy_weight=0.5, forces_weight=2.0)
STEPS = 3
OPTIMIZERS = [("soap", 0), ("adamw", 0), ("adamw", 1), ("adamw", 2)]


def make_module(sum_: Any = lambda tensor: tensor, ranks: int = 1) -> StepModule:
    potential = Potential(MODEL)
    for fidelity in MODEL.fidelities:
        potential.set_reference(fidelity, dict.fromkeys(MODEL.elements, 0.0))
    return StepModule(potential, LOSS, sum_, ranks, len(MODEL.fidelities))


def make_engine(config: OptimizerConfig, timeout: timedelta = timedelta(minutes=1)) -> Engine:
    ranks = connect(timeout)
    module = make_module(ranks.sum_, ranks.world.data_ranks)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return Engine(module, config, deepspeed_settings(config, num_parameters), ranks)


def make_config(name: str, stage: int) -> OptimizerConfig:
    # A large eps makes steps nearly linear in the gradients: a wrong gradient is seen, rounding is not.
    return OptimizerConfig(name=name, zero_stage=stage, lr=0.1, eps=0.1, weight_decay=0.0)  # type: ignore[arg-type]


def shares(structures: Sequence[Structure], step: int) -> dict[str, list[Structure]]:
    """Other structures for each fidelity, of which all have labels at `high`."""
    labelled = [structure for structure in structures if "high" in structure.labels][step * 6 :]
    return {"low": labelled[:2], "high": labelled[2:6]}


def make_batch(parts: dict[str, list[Structure]]) -> Batch:
    chosen = [structure for part in parts.values() for structure in part]
    fidelities = [fidelity for fidelity, part in parts.items() for _ in part]
    index = {name: row for row, name in enumerate(MODEL.fidelities)}
    return collate(chosen, fidelities=fidelities, fidelity_index=index, cutoff=MODEL.cutoff)


def on_both(structures: Sequence[Structure], config: OptimizerConfig) -> list[Tensor]:
    """Plain torch, no ranks: every batch has both fidelities."""
    module = make_module()
    optimizer = make_optimizer(module, [p for _, p in module.potential.fidelity_parameters()], config)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(make_batch(shares(structures, step)), False)[0].backward()
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def on_one_each(structures: Sequence[Structure], cases: Sequence[tuple[str, int]]) -> list[list[Any]]:
    """Rank 0 has only `low`, rank 1 only `high`."""
    ends = []
    for case in cases:
        config = make_config(*case)
        engine = make_engine(config)
        fidelity = MODEL.fidelities[engine.ranks.rank]
        for step in range(STEPS):
            engine.step([make_batch({fidelity: shares(structures, step)[fidelity]})], config.lr)
        ends.append([parameter.clone().numpy() for parameter in engine.parameters()])
    return ends


def test_fidelities_that_only_some_ranks_see_are_not_mixed_up(structures: list[Structure], run_ranks: Any) -> None:
    """ZeRO reduces the gradients that exist by their position; with a head unused on one rank it adds up others'.

    Stacked rows have a gradient on every rank, zero where unused.
    """
    results = run_ranks(on_one_each, 2, structures, OPTIMIZERS)
    start = [parameter.detach() for parameter in make_module().parameters()]
    rows = [name for name, _ in make_module().potential.fidelity_parameters()]
    assert rows
    for number, case in enumerate(OPTIMIZERS):
        expected = on_both(structures, make_config(*case))
        moved = max(float((end - begin).abs().max()) for end, begin in zip(expected, start, strict=True))
        assert moved > 1e-5
        for ends in results:
            for found, wanted in zip(ends[number], expected, strict=True):
                assert float((torch.from_numpy(found) - wanted).abs().max()) < 1e-3 * moved, case


def without_rank_1(structures: Sequence[Structure], stage: int) -> str:
    """Rank 1 never takes the step, but waits in the world's group, whose time-out is long."""
    engine = make_engine(make_config("adamw", stage), timedelta(seconds=5))
    batch = make_batch(shares(structures, 0))
    # The model's own collective would time out first.
    engine._module._sum = lambda tensor: tensor
    message = "waited"
    if engine.ranks.rank == 0:
        try:
            engine.step([batch], 0.1)
        except RuntimeError as error:
            message = str(error)
    torch.distributed.barrier()
    return message


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeeds_own_collectives_time_out(stage: int, structures: list[Structure], run_ranks: Any) -> None:
    """DeepSpeed clones the world without its time-out, unless the groups are given to it."""
    message, waited = run_ranks(without_rank_1, 2, structures, stage)
    assert "imed out" in message and waited == "waited"


def clipping_of(stage: int) -> list[float]:
    configs = [OptimizerConfig(name="adamw", zero_stage=stage, gradient_clipping=norm) for norm in (0.0, 3.0)]
    return [make_engine(config)._engine.gradient_clipping() for config in configs]


def test_zero_clips_at_what_the_config_says(run_ranks: Any) -> None:
    """Without the key DeepSpeed clips at 1."""
    assert run_ranks(clipping_of, 1, 1) == [[0.0, 3.0]]
