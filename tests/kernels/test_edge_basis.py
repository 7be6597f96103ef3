"""The edge basis against e3nn, its continuity at the cut-off, and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3

from rung.kernels import edge_basis

CUTOFF = 5.0


def basis(vectors_E3: torch.Tensor, l_max: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return edge_basis(vectors_E3, cutoff=CUTOFF, num_radial=6, l_max=l_max)


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_harmonics_equal_e3nn(l_max: int) -> None:
    vectors_E3 = torch.randn(50, 3, dtype=torch.float64)
    _, harmonics_EL = basis(vectors_E3, l_max)
    expected = o3.spherical_harmonics(list(range(l_max + 1)), vectors_E3, normalize=True, normalization="component")
    torch.testing.assert_close(harmonics_EL, expected, rtol=1e-12, atol=1e-12)


def test_radial_functions_are_bessel_functions_times_the_cutoff() -> None:
    distance = torch.linspace(0.5, 4.9, 20, dtype=torch.float64)
    vectors_E3 = torch.stack([torch.zeros(20), distance, torch.zeros(20)], dim=1).double()
    radial_ER, _ = basis(vectors_E3)
    t = distance / CUTOFF
    envelope = 1 - 28 * t**6 + 48 * t**7 - 21 * t**8
    for nu in range(1, 7):
        bessel = math.sqrt(2 / CUTOFF) * torch.sin(nu * math.pi * t) / distance
        torch.testing.assert_close(radial_ER[:, nu - 1], bessel * envelope, rtol=1e-11, atol=1e-13)


def test_radial_functions_vanish_at_the_cutoff_with_two_derivatives() -> None:
    def radial(distance: torch.Tensor) -> torch.Tensor:
        return basis(torch.stack([distance, torch.zeros_like(distance), torch.zeros_like(distance)])[None])[0].sum()

    for distance in (CUTOFF - 1e-5, CUTOFF + 1e-5):
        x = torch.tensor(distance, dtype=torch.float64, requires_grad=True)
        value = radial(x)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, x)
        assert abs(value.item()) < 1e-12 and abs(slope.item()) < 1e-7 and abs(curvature.item()) < 1e-2
    assert basis(torch.tensor([[0.0, 6.0, 0.0]]))[0].abs().max() == 0


def test_derivatives_agree_with_finite_differences() -> None:
    vectors_E3 = torch.randn(4, 3, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(basis, vectors_E3)
    assert torch.autograd.gradgradcheck(basis, vectors_E3)


def test_no_edges_give_empty_tensors_and_gradients() -> None:
    vectors_E3 = torch.zeros(0, 3, requires_grad=True)
    radial_ER, harmonics_EL = basis(vectors_E3)
    assert radial_ER.shape == (0, 6) and harmonics_EL.shape == (0, 16)
    (gradient,) = torch.autograd.grad(radial_ER.sum() + harmonics_EL.sum(), vectors_E3)
    assert gradient.shape == (0, 3)


def test_an_unknown_degree_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"l_max: expected 0\.\.3, found 4"):
        basis(torch.ones(1, 3), l_max=4)
