"""DeepSpeed's steps against plain torch, and the traps of DeepSpeed that are silent."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.config import ModelConfig
from rung.model.loss import LossConfig
from rung.model.potential import Potential
from rung.pretrain.config import OptimizerConfig
from rung.pretrain.engine import Engine, connect
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import deepspeed_settings
from rung.pretrain.step import StepModule, StepTotals

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
CASES = [
    ("soap", 0, 0.0), ("soap", 0, 1e-3), ("adamw", 0, 1e-3), ("adamw", 1, 1e-3), ("adamw", 2, 0.0), ("muon", 0, 1e-3),
]  # fmt: skip
STEPS = 3
FIDELITIES = MODEL.fidelities
NUM_PARAMETERS = sum(parameter.numel() for parameter in Potential(MODEL).parameters())


def make_potential() -> Potential:
    potential = Potential(MODEL)
    for fidelity in MODEL.fidelities:
        potential.set_reference(fidelity, dict.fromkeys(MODEL.elements, 0.0))
    return potential


def make_batch(structures: Sequence[Structure]) -> Batch:
    """Every structure at its highest fidelity; ranks see different numbers of atoms and fidelities."""
    fidelities = ["high" if "high" in structure.labels else "low" for structure in structures]
    index = {name: row for row, name in enumerate(MODEL.fidelities)}
    return collate(structures, fidelities=fidelities, fidelity_index=index, cutoff=MODEL.cutoff)


def parts(structures: Sequence[Structure], step: int) -> list[list[Structure]]:
    """The two ranks' unequal shares of a step's structures."""
    chosen = structures[step * 8 : step * 8 + 8]
    return [list(chosen[:3]), list(chosen[3:])]


def plain_torch(structures: Sequence[Structure], config: OptimizerConfig) -> list[Tensor]:
    """The same steps on the whole batches, without DeepSpeed and ranks."""
    module = StepModule(make_potential(), LOSS, lambda tensor: tensor, 1, len(FIDELITIES))
    optimizer = make_optimizer(module, [p for _, p in module.potential.fidelity_parameters()], config)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = module(make_batch(sum(parts(structures, step), [])), False)
        loss.backward()
        if config.gradient_clipping > 0:
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def make_engine(config: OptimizerConfig, micro_batches: int = 1) -> Engine:
    ranks = connect(timedelta(minutes=1))
    module = StepModule(make_potential(), LOSS, ranks.sum_, ranks.world.data_ranks, len(FIDELITIES))
    return Engine(module, config, deepspeed_settings(config, NUM_PARAMETERS, micro_batches), ranks)


def deepspeed_ranks(structures: Sequence[Structure], configs: Sequence[OptimizerConfig]) -> list[list[Tensor]]:
    ends = []
    for config in configs:
        engine = make_engine(config)
        for step in range(STEPS):
            engine.step([make_batch(parts(structures, step)[engine.ranks.rank])], config.lr)
        ends.append([parameter.clone().numpy() for parameter in engine.parameters()])
    return ends


def test_two_ranks_are_one_rank(structures: list[Structure], run_ranks: Any) -> None:
    """Every optimizer, ZeRO stage and clipping: same weights as one process without DeepSpeed on the joined batch.

    A large eps makes SOAP's steps nearly linear in the gradients, whose rounding its eigenbases would amplify.
    """
    configs = [
        OptimizerConfig(name=name, zero_stage=stage, gradient_clipping=clipping, lr=0.1, eps=0.1)  # type: ignore[arg-type]
        for name, stage, clipping in CASES
    ]
    results = run_ranks(deepspeed_ranks, 2, structures, configs)
    start = [parameter.detach() for parameter in make_potential().parameters()]
    for case, config in enumerate(configs):
        expected = plain_torch(structures, config)
        moved = max(float((end - begin).abs().max()) for end, begin in zip(expected, start, strict=True))
        assert moved > 1e-5
        for ends in results:
            for found, wanted in zip(ends[case], expected, strict=True):
                difference = float((torch.from_numpy(found) - wanted).abs().max())
                assert difference < 1e-3 * moved, CASES[case]


def continued(
    structures: Sequence[Structure], config: OptimizerConfig, steps: Sequence[int], saved: Any
) -> tuple[dict[str, Tensor], list[Any]]:
    """Take these steps from a saved state, the whole batch of each spread over however many ranks there are."""
    engine = make_engine(config)
    if saved is not None:
        shares, weights = saved
        engine.write_parameters([torch.from_numpy(weight) for weight in weights])
        engine.load_optimizer_state([{name: torch.from_numpy(a) for name, a in share.items()} for share in shares])
    rank, size = engine.ranks.rank, engine.ranks.world.size
    for step in steps:
        chosen = sum(parts(structures, step), [])
        engine.step([make_batch(chosen[len(chosen) * rank // size : len(chosen) * (rank + 1) // size])], config.lr)
    state = {name: tensor.clone().numpy() for name, tensor in engine.optimizer_state().items()}
    return state, [parameter.clone().numpy() for parameter in engine.parameters()]


@pytest.mark.parametrize(("name", "stage"), [("soap", 0), ("adamw", 0), ("adamw", 1), ("adamw", 2), ("muon", 0)])
def test_the_optimizers_state_moves_to_another_number_of_ranks(
    structures: list[Structure], run_ranks: Any, name: str, stage: int
) -> None:
    """2 -> 3 -> 1 ranks end where one rank does that never stopped."""
    config = OptimizerConfig(name=name, zero_stage=stage, lr=0.1, eps=0.1)  # type: ignore[arg-type]
    ((_, expected),) = run_ranks(continued, 1, structures, config, range(6), None)
    saved = None
    for ranks, steps in ((2, range(3)), (3, range(3, 5)), (1, range(5, 6))):
        results = run_ranks(continued, ranks, structures, config, steps, saved)
        saved = [state for state, _ in results], results[0][1]
    assert saved is not None
    start = [parameter.detach().numpy() for parameter in make_potential().parameters()]
    moved = max(float(np.abs(end - begin).max()) for end, begin in zip(expected, start, strict=True))
    for found, wanted in zip(saved[1], expected, strict=True):
        assert float(np.abs(found - wanted).max()) < 1e-3 * moved


def not_finite(structures: Sequence[Structure], config: OptimizerConfig) -> list[tuple[Any, bool]]:
    """Rank 1 gets, in turn, a label that is infinite and one whose loss is finite but whose gradient is not."""
    engine = make_engine(config)
    good = make_batch(parts(structures, 0)[engine.ranks.rank])
    infinite = replace(good, energy=torch.full_like(good.energy, math.inf))
    seen = []
    for bad, spoiled in ((infinite, False), (good, True)):
        begin = [parameter.clone() for parameter in engine.parameters()]
        if spoiled and engine.ranks.rank == 1:
            handle = next(iter(engine._module.parameters())).register_hook(lambda gradient: gradient * math.nan)
        mine = bad if engine.ranks.rank == 1 else good
        totals = StepTotals.read(engine.step([mine], config.lr, stop=engine.ranks.rank == 1))
        if spoiled and engine.ranks.rank == 1:
            handle.remove()
        same = all(torch.equal(a, b) for a, b in zip(begin, engine.parameters(), strict=True))
        seen.append((totals, same))
    begin = [parameter.clone() for parameter in engine.parameters()]
    for _ in range(2):  # SOAP's first step only fills its statistics
        totals = StepTotals.read(engine.step([good], config.lr))
    seen.append((totals, all(torch.equal(a, b) for a, b in zip(begin, engine.parameters(), strict=True))))
    return seen


@pytest.mark.parametrize(("name", "stage"), [("soap", 0), ("adamw", 1)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    structures: list[Structure], run_ranks: Any, name: str, stage: int
) -> None:
    config = OptimizerConfig(name=name, zero_stage=stage)  # type: ignore[arg-type]
    for (infinite, same_1), (not_a_number, same_2), (good, same_3) in run_ranks(not_finite, 2, structures, config):
        assert (infinite.skipped, infinite.steps, same_1, infinite.stop) == (1, 0, True, 1)
        assert (not_a_number.skipped, not_a_number.steps, same_2) == (1, 0, True)
        assert (good.skipped, good.steps, same_3, good.stop) == (0, 1, False, 0)
        assert good.structures == 8


def written_parameters(structures: Sequence[Structure], config: OptimizerConfig) -> float:
    engine = make_engine(config)
    batch = make_batch(parts(structures, 0)[engine.ranks.rank])
    engine.step([batch], 1e-3)
    written = [torch.ones_like(parameter) for parameter in engine.parameters()]
    engine.write_parameters(written)
    engine.step([batch], 0.0)
    return max(float((a - b).abs().max()) for a, b in zip(written, engine.parameters(), strict=True))


def test_written_parameters_survive_the_next_step_of_zero(structures: list[Structure], run_ranks: Any) -> None:
    """DeepSpeed steps from its own float32 partitions: without refreshing them what was written is silently lost."""
    config = OptimizerConfig(name="adamw", zero_stage=1, weight_decay=0.0)
    assert max(run_ranks(written_parameters, 2, structures, config)) == 0.0


def shm_op_and_clipping() -> tuple[bool, float]:
    from deepspeed.comm import comm

    engine = make_engine(OptimizerConfig(gradient_clipping=0.0))
    return comm.cdb.shm_comm_op is None, engine._engine.gradient_clipping()


def test_nothing_is_compiled_and_clipping_is_ours(run_ranks: Any) -> None:
    assert run_ranks(shm_op_and_clipping, 1) == [(True, 0.0)]


def absent_rank(structures: Sequence[Structure]) -> str:
    """Rank 1 never joins rank 0's step; it waits in the world's group, whose time-out is long."""
    ranks = connect(timedelta(seconds=1))
    module = StepModule(make_potential(), LOSS, ranks.sum_, ranks.world.data_ranks, len(FIDELITIES))
    config = OptimizerConfig()
    engine = Engine(module, config, deepspeed_settings(config, NUM_PARAMETERS), ranks)
    if ranks.rank == 1:
        torch.distributed.barrier()
        return "released"
    try:
        engine.step([make_batch(structures[:2])], 1e-3)
    except RuntimeError as error:
        torch.distributed.barrier()
        return str(error)
    return "the step went on without rank 1"


def test_a_stalled_rank_is_an_error_after_the_time_out(structures: list[Structure], run_ranks: Any) -> None:
    message, released = run_ranks(absent_rank, 2, structures)
    assert "imed out" in message and released == "released"


class NoReading(TorchDispatchMode):
    """Lists the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
            self.found.append("".join(traceback.format_stack(limit=14)))
        return func(*args, **(kwargs or {}))


def reading_steps(structures: Sequence[Structure], config: OptimizerConfig) -> list[str]:
    engine = make_engine(config, micro_batches=2)
    batch = make_batch(parts(structures, 0)[engine.ranks.rank])
    for _ in range(2):  # SOAP's bases begin with an eigh, which checks its result
        engine.step([batch, batch], 1e-3)
    with NoReading() as mode:
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
            setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name), mode.found))
        accelerator = get_accelerator()
        accelerator.synchronize = recorded(accelerator.synchronize, mode.found)
        for _ in range(11):  # more than one period of the bases
            engine.step([batch, batch], 1e-3)
    return mode.found


def recorded(function: Any, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append("".join(traceback.format_stack(limit=14)))
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["soap", "adamw", "muon"])
def test_a_step_does_not_wait_for_the_device(structures: list[Structure], run_ranks: Any, name: str) -> None:
    assert run_ranks(reading_steps, 2, structures, OptimizerConfig(name=name)) == [[], []]  # type: ignore[arg-type]


def micro_batched(structures: Sequence[Structure], config: OptimizerConfig) -> list[list[Any]]:
    """The same structures in one batch, and in two of equally many labels."""
    batches = [make_batch(structures[4 * part : 4 * part + 4]) for part in range(2)]
    whole = make_batch(structures[:8])
    ends = []
    for parts_ in ([whole], batches):
        engine = make_engine(config, micro_batches=len(parts_))
        for _ in range(2):
            totals = StepTotals.read(engine.step(parts_, config.lr))
        ends.append([parameter.clone().numpy() for parameter in engine.parameters()])
        assert (totals.structures, totals.steps) == (8, 1)
    return ends


@pytest.mark.parametrize(("name", "stage"), [("soap", 0), ("adamw", 1)])
def test_micro_batches_add_up_to_one_step(structures: list[Structure], run_ranks: Any, name: str, stage: int) -> None:
    """The structures are rattled copies of one molecule, so that both halves have the same numbers of labels."""
    config = OptimizerConfig(name=name, zero_stage=stage, lr=0.1, eps=0.1)  # type: ignore[arg-type]
    ((whole, halves),) = run_ranks(micro_batched, 1, structures, config)
    for one, two in zip(whole, halves, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
