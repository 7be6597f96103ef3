"""The outer step against closed forms and torch's SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rung.pretrain.config import ReptileConfig
from rung.pretrain.reptile import SHARED, Outer

RATE, CURVATURES, CENTRES = 0.1, (0.5, 2.0, 3.0), (1.0, -2.0, 0.25)
EQUAL = [(0, 1.0)] * 3


def descend(phi: Tensor, curvature: float, centre: float, steps: int) -> Tensor:
    """Gradient descent on curvature / 2 * (x - centre)^2."""
    for _ in range(steps):
        phi = phi - RATE * curvature * (phi - centre)
    return phi


def make_outer(phi: Tensor, rows: list[int] | None = None, groups: int = 1, **options: Any) -> Outer:
    owners = torch.tensor([SHARED] * len(phi) if rows is None else rows)
    return Outer(phi, owners, ReptileConfig(**options), lambda tensor: None, groups)


def test_one_outer_step_on_quadratics_is_the_closed_form() -> None:
    phi, steps, epsilon = torch.tensor([1.5, -0.5], dtype=torch.float64), 5, 0.7
    outer = make_outer(phi, outer_rate=epsilon)
    for curvature, centre in zip(CURVATURES, CENTRES, strict=True):
        outer.add(descend(phi, curvature, centre, steps), (0, 1.0))
    outer.finish(EQUAL)
    ends = torch.stack([c + (phi - c) * (1 - RATE * a) ** steps for a, c in zip(CURVATURES, CENTRES, strict=True)])
    torch.testing.assert_close(outer.phi, phi + epsilon * (ends.mean(0) - phi), rtol=0, atol=1e-14)


@pytest.mark.parametrize("outer_optimizer", ["sgd", "momentum", "nesterov"])
def test_many_outer_steps_converge_to_the_fixed_point(outer_optimizer: str) -> None:
    steps = 3
    outer = make_outer(
        torch.zeros(1, dtype=torch.float64), outer_rate=0.5, outer_optimizer=outer_optimizer, outer_momentum=0.5
    )
    for _ in range(200):
        for curvature, centre in zip(CURVATURES, CENTRES, strict=True):
            outer.add(descend(outer.phi, curvature, centre, steps), (0, 1.0))
        outer.finish(EQUAL)
    shares = torch.tensor([1 - (1 - RATE * a) ** steps for a in CURVATURES], dtype=torch.float64)
    expected = (shares * torch.tensor(CENTRES, dtype=torch.float64)).sum() / shares.sum()
    torch.testing.assert_close(outer.phi[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("outer_optimizer", "momentum"), [("sgd", 0.0), ("momentum", 0.9), ("nesterov", 0.9)])
def test_the_outer_optimizer_is_torchs_on_minus_the_mean_difference(outer_optimizer: str, momentum: float) -> None:
    random = torch.Generator().manual_seed(0)
    phi = torch.randn(5, generator=random, dtype=torch.float64)
    outer = make_outer(phi, outer_rate=0.3, outer_optimizer=outer_optimizer, outer_momentum=0.9)
    reference = torch.nn.Parameter(phi.clone())
    optimizer = torch.optim.SGD([reference], lr=0.3, momentum=momentum, nesterov=outer_optimizer == "nesterov")
    for _ in range(6):
        ends = [outer.phi + torch.randn(5, generator=random, dtype=torch.float64) for _ in range(3)]
        reference.grad = outer.phi - torch.stack(ends).mean(0)
        for end in ends:
            outer.add(end, (0, 1.0))
        outer.finish(EQUAL)
        optimizer.step()
        torch.testing.assert_close(outer.phi, reference.detach(), rtol=0, atol=1e-14)


def test_weights_of_tasks() -> None:
    outer = make_outer(torch.zeros(2))
    outer.add(torch.tensor([1.0, 2.0]), (0, 3.0))
    outer.add(torch.tensor([5.0, -2.0]), (0, 1.0))
    outer.finish([(0, 3.0), (0, 1.0)])
    torch.testing.assert_close(outer.phi, torch.tensor([2.0, 1.0]))


def test_owned_elements_belong_to_their_fidelity() -> None:
    """Elements 1, 2, 3 are rows of fidelities 0, 1, 2: each takes its own tasks' mean in full, the others nothing."""
    outer = make_outer(torch.zeros(4), [SHARED, 0, 1, 2], outer_rate=0.5, outer_optimizer="momentum")
    tasks = [(0, 1.0), (0, 1.0), (1, 1.0)]
    ends = [[1.0, 2.0, 7.0, 7.0], [2.0, 4.0, 7.0, 7.0], [3.0, 7.0, 5.0, 7.0]]
    for end, task in zip(ends, tasks, strict=True):
        outer.add(torch.tensor(end), task)
    outer.finish(tasks)
    torch.testing.assert_close(outer.phi, torch.tensor([1.0, 3.0, 5.0, 0.0]))


def test_an_exchange_in_bfloat16_loses_nothing_in_the_long_run() -> None:
    """Each exchange is rounded; what it left out comes with the next, so the sum is as good as unrounded."""
    phi = torch.zeros(3, dtype=torch.float64)
    differences = torch.tensor([1.0, 1.003, 1e-3 + 1e-7], dtype=torch.float64)
    rounded = make_outer(phi, groups=2, exchange="bfloat16")
    for step in range(1, 51):
        rounded.add(rounded.phi + differences, (0, 1.0))
        rounded.finish([(0, 1.0)])
        assert (rounded.phi - step * differences).abs().le(0.01 * differences).all()
    assert not torch.equal(rounded.phi, 50 * differences)


def test_overlap_applies_an_exchange_one_outer_step_later() -> None:
    """The other group adds twice as much each time; its part is not in the start of the very next outer step."""

    def exchange(tensor: Tensor) -> None:
        tensor *= 3

    outer = Outer(torch.zeros(2), torch.tensor([SHARED, 0]), ReptileConfig(overlap=True), exchange, 2)
    seen = []
    for difference in (1.0, 10.0, 100.0):
        outer.add(outer.start + difference, (0, 1.0))
        outer.finish([(0, 1.0), (1, 2.0)], last=difference == 100.0)
        seen.append((outer.phi.tolist(), outer.start.tolist()))
    assert seen == [([0, 0], [1, 1]), ([1, 3], [11, 13]), ([111, 333], [111, 333])]


@pytest.mark.parametrize("options", [{}, {"outer_optimizer": "nesterov", "exchange": "bfloat16", "overlap": True}])
def test_a_saved_state_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(1)
    differences = torch.randn(6, 7, generator=random)
    whole, first = (make_outer(torch.zeros(7), groups=2, **options) for _ in range(2))
    for index, difference in enumerate(differences):
        whole.add(whole.start + difference, (0, 1.0))
        whole.finish([(0, 1.0)])
        if index == 2:
            saved = {name: tensor.clone() for name, tensor in first.state().items()}
            weights = first.phi.clone()
            first = make_outer(torch.ones(7), groups=2, **options)
            first.load_state(weights, saved)
        first.add(first.start + difference, (0, 1.0))
        first.finish([(0, 1.0)])
    assert torch.equal(whole.phi, first.phi)


def test_no_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one task, found none"):
        make_outer(torch.zeros(1)).finish([])
