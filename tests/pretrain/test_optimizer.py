"""Parameter groups, and the averaged weights."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from rung.pretrain.config import OptimizerConfig
from rung.pretrain.ema import Ema
from rung.pretrain.optimizer import make_optimizer


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 4)
        self.rows_FD = nn.Parameter(torch.randn(2, 4))

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        return (self.dense(x) * self.rows_FD[step % 2]).square().mean()


def train(module: Toy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        module.loss(step).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["soap", "adamw"])
def test_only_shared_matrices_decay(name: str) -> None:
    module = Toy()
    optimizer = make_optimizer(module, [module.rows_FD], OptimizerConfig(name=name, weight_decay=0.1))  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(module.dense.weight): 0.1, id(module.dense.bias): 0.0, id(module.rows_FD): 0.0}


@pytest.mark.parametrize("name", ["soap", "adamw"])
def test_optimizer_state_survives_a_file_that_executes_nothing(name: str) -> None:
    """SOAP keeps lists of matrices with empty entries; weights_only must read them back bit by bit."""
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
