"""The outer update against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rung.pretrain.reptile import OuterUpdate

RATE, CURVATURES, CENTRES = 0.1, (0.5, 2.0, 3.0), (1.0, -2.0, 0.25)


def descend(phi: Tensor, curvature: float, centre: float, steps: int) -> Tensor:
    """Gradient descent on curvature / 2 * (x - centre)^2."""
    for _ in range(steps):
        phi = phi - RATE * curvature * (phi - centre)
    return phi


def test_one_outer_step_on_quadratics_is_the_closed_form() -> None:
    phi, steps, epsilon = torch.tensor([1.5, -0.5], dtype=torch.float64), 5, 0.7
    outer = OuterUpdate([phi], [False])
    for curvature, centre in zip(CURVATURES, CENTRES, strict=True):
        outer.add([descend(phi, curvature, centre, steps)], fidelity=0)
    ends = torch.stack([c + (phi - c) * (1 - RATE * a) ** steps for a, c in zip(CURVATURES, CENTRES, strict=True)])
    torch.testing.assert_close(outer.result(epsilon)[0], phi + epsilon * (ends.mean(0) - phi), rtol=0, atol=1e-14)


def test_many_outer_steps_converge_to_the_fixed_point() -> None:
    steps, epsilon = 3, 0.5
    phi = torch.zeros(1, dtype=torch.float64)
    for _ in range(200):
        outer = OuterUpdate([phi], [False])
        for curvature, centre in zip(CURVATURES, CENTRES, strict=True):
            outer.add([descend(phi, curvature, centre, steps)], fidelity=0)
        phi = outer.result(epsilon)[0]
    shares = torch.tensor([1 - (1 - RATE * a) ** steps for a in CURVATURES], dtype=torch.float64)
    expected = (shares * torch.tensor(CENTRES, dtype=torch.float64)).sum() / shares.sum()
    torch.testing.assert_close(phi[0], expected, rtol=0, atol=1e-12)


def test_one_inner_step_at_full_rate_is_joint_gradient_descent() -> None:
    phi = torch.randn(4, 3, dtype=torch.float64)
    outer = OuterUpdate([phi], [False])
    for curvature, centre in zip(CURVATURES, CENTRES, strict=True):
        outer.add([descend(phi, curvature, centre, 1)], fidelity=0)
    gradient = sum(a * (phi - c) for a, c in zip(CURVATURES, CENTRES, strict=True)) / len(CURVATURES)
    torch.testing.assert_close(outer.result(1.0)[0], phi - RATE * gradient, rtol=0, atol=1e-14)


def test_rows_of_a_fidelity_take_their_own_results_and_no_others() -> None:
    phi = torch.randn(3, 2, dtype=torch.float64)
    ends = [torch.randn(3, 2, dtype=torch.float64) for _ in range(3)]  # every task moved every row
    outer = OuterUpdate([phi, phi], [True, False])
    for end, fidelity in zip(ends, (0, 2, 2), strict=True):
        outer.add([end, end], fidelity)
    owned, shared = outer.result(0.3)
    torch.testing.assert_close(owned[0], ends[0][0])
    assert torch.equal(owned[1], phi[1])
    torch.testing.assert_close(owned[2], (ends[1][2] + ends[2][2]) / 2)
    torch.testing.assert_close(shared, phi + 0.3 * (sum(ends) / 3 - phi))


def test_start_is_a_copy() -> None:
    phi = torch.ones(2)
    outer = OuterUpdate([phi], [False])
    phi.zero_()
    assert torch.equal(outer.start[0], torch.ones(2))


def test_no_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one task, found none"):
        OuterUpdate([torch.ones(1)], [False]).result(1.0)
