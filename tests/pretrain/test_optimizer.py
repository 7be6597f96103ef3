"""Parameter groups, skipped steps, Muon with and without ZeRO, and the averaged weights."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rung.pretrain.config import OptimizerConfig
from rung.pretrain.ema import Ema
from rung.pretrain.muon import Muon, orthogonal, step_scale
from rung.pretrain.optimizer import make_optimizer

NAMES = ("soap", "adamw", "muon")
RunRanks = Callable[..., list[Any]]

deepspeed_warnings = pytest.mark.filterwarnings(
    "ignore:`torch.jit.:DeprecationWarning", "ignore:`torch.distributed.:FutureWarning"
)


class Toy(nn.Module):
    """A linear layer, a stack of square matrices, and rows of which a step uses one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dense = nn.Linear(3, 4)
        self.hidden_KCC = nn.Parameter(torch.randn(2, 4, 4, generator=generator))
        self.rows_FD = nn.Parameter(torch.randn(2, 4, generator=generator))
        with torch.no_grad():
            self.dense.weight.copy_(torch.randn(4, 3, generator=generator))
            self.dense.bias.zero_()

    def loss(self, step: int) -> torch.Tensor:
        x = self.dense(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)))
        for hidden_CC in self.hidden_KCC:
            x = torch.tanh(x @ hidden_CC)
        return (x * self.rows_FD[step % 2] - 1).square().mean()


def train(module: Toy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        module.loss(step).backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_only_shared_matrices_decay(name: str) -> None:
    module = Toy()
    optimizer = make_optimizer(module, [module.rows_FD], OptimizerConfig(name=name, weight_decay=0.1))  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        id(module.dense.weight): 0.1,
        id(module.hidden_KCC): 0.1,
        id(module.dense.bias): 0.0,
        id(module.rows_FD): 0.0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_survives_a_file_that_executes_nothing(name: str) -> None:
    """weights_only must read it back bit by bit."""
    config = OptimizerConfig(name=name, precondition_frequency=2)  # type: ignore[arg-type]
    first = Toy()
    optimizer = make_optimizer(first, [first.rows_FD], config)
    train(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = Toy()
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second, [second.rows_FD], config)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(first, optimizer, range(5, 10))
    train(second, resumed, range(5, 10))
    for expected, found in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)


def tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of all parameters and of all tensors of the state."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*module.parameters(), *state)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_found_inf_skips_a_step(name: str, value: float) -> None:
    """Without the host knowing; with 0.0 the step is the usual one."""
    module, undisturbed = Toy(), Toy()
    optimizer, plain = (
        make_optimizer(each, [each.rows_FD], OptimizerConfig(name=name))  # type: ignore[arg-type]
        for each in (module, undisturbed)
    )
    for step in range(4):
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        train(module, optimizer, range(step, step + 1))
        train(undisturbed, plain, range(step, step + 1))
        before = tensors(module, optimizer)
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(module, optimizer), strict=True))
    for a, b in zip(module.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(a, b)


# Muon


@pytest.mark.parametrize("shape", [(4, 4), (3, 6, 4), (2, 4, 6)])
def test_orthogonal_maps_singular_values_by_the_published_polynomial(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrices), left @ torch.diag_embed(values) @ right)
    assert orthogonal(torch.zeros(2, 3, 3)).count_nonzero() == 0


def test_muon_steps_stacks_as_torch_steps_single_matrices() -> None:
    """torch.optim.Muon takes matrices only, and computes in bfloat16."""
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = nn.Parameter(weights.clone())
    theirs = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": [ours], "use_muon": True, "weight_decay": 0.1}
    optimizer = Muon([group], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    expected = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        ours.grad = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(step))
        for weight, gradient in zip(theirs, ours.grad, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        expected.step()
    moved = (ours.detach() - weights).abs().max()
    assert (ours - torch.stack(list(theirs))).abs().max() < 0.03 * moved


def test_muon_is_for_matrices() -> None:
    group = {"params": [nn.Parameter(torch.zeros(3))], "use_muon": True, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"matrices or stacks of them, found shape \(3,\)"):
        Muon([group], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="zero_stage=1 needs DeepSpeed's"):
        make_optimizer(Toy(), [], OptimizerConfig(name="muon", zero_stage=1, gradient_clipping=0.0))


def train_with_deepspeed(stage: int, clip: float, bad_step: int) -> list[np.ndarray]:
    """Six steps of Muon on two forked ranks, one of which finds a NaN at `bad_step`; return the weights."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed would compile Muon's step, which takes half a minute
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    deepspeed.ops.__compatible_ops__ = {}
    original_muon.ns_compute_dtype = lambda method="gram": torch.float32  # bfloat16 where it can, to compare it with
    deepspeed.init_distributed("gloo", verbose=False)
    module = Toy()
    config = OptimizerConfig(name="muon", zero_stage=stage, lr=1e-2, weight_decay=0.1, gradient_clipping=0.0)
    optimizer = make_optimizer(module, [module.rows_FD], config, zero_muon=muon_optimizer.MuonWithAuxAdam)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    module.forward = module.loss  # type: ignore[method-assign]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    rank = torch.distributed.get_rank()
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 10)
        loss = engine(10 * step + rank)
        engine.backward(loss * float("nan") if (step, rank) == (bad_step, 1) else loss)
        engine.step()
    return [parameter.detach().numpy() for parameter in module.parameters()]


def train_alone(bad_step: int) -> list[np.ndarray]:
    module = Toy()
    optimizer = make_optimizer(module, [module.rows_FD], OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1))
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 10)
        optimizer.zero_grad()
        ((module.loss(10 * step) + module.loss(10 * step + 1)) / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.found_inf = torch.tensor(float(step == bad_step))  # type: ignore[attr-defined]
        optimizer.step()
    return [parameter.detach().numpy() for parameter in module.parameters()]


def largest_difference(weights: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(abs(a - b).max()) for a, b in zip(weights, expected, strict=True))


@pytest.mark.slow
@deepspeed_warnings
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_muon_of_two_ranks_is_that_of_one(stage: int, run_ranks: RunRanks) -> None:
    """ZeRO runs DeepSpeed's Muon, one rank and stage 0 ours; a step with a NaN on one rank is none for all."""
    bad_step = -1 if stage == 0 else 3  # without ZeRO, skipping is the engine's work
    for weights in run_ranks(train_with_deepspeed, 2, stage, 0.0, bad_step):
        assert largest_difference(weights, train_alone(bad_step)) < 2e-6


@pytest.mark.slow
@deepspeed_warnings
def test_zero_clips_what_muon_has_made_orthogonal(run_ranks: RunRanks) -> None:
    """Why muon with ZeRO must not clip: the norm is that of the orthogonal matrices, whatever the gradient's is."""
    clipped = run_ranks(train_with_deepspeed, 2, 1, 1.0, -1)[0]
    assert largest_difference(clipped, train_alone(-1)) > 1e-3


def test_muon_steps_have_the_size_of_adamws() -> None:
    """Root mean square 0.2, what arXiv:2502.16982 found of AdamW's, when all singular values are one."""
    matrix = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    assert (matrix * step_scale(matrix.shape)).square().mean().sqrt() == pytest.approx(0.2, rel=1e-5)


# The averaged weights


def test_average_forgets_the_start_and_is_put_back() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, decay=0.5)
    expected, values = module.weight.item(), [1.0, 4.0, -2.0]
    for count, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == values[-1]


def test_no_decay_serves_the_raw_weights() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, decay=0.0)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update()
    assert torch.equal(ema.averages["weight"], module.weight)
