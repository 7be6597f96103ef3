"""Edge basis in plain PyTorch: the definition, for any dtype and device, differentiable to any order."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from rung.kernels.harmonics import component_norm, harmonic_tensors

CUTOFF_POWER = 6  # p of the polynomial cut-off


def edge_basis(vectors_E3: Tensor, *, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
    """Return the radial functions [E, R] and the real harmonics [E, L] of edge vectors in angstrom.

    Radial: sqrt(2/r_c) sin(nu pi d/r_c)/d, nu = 1..R, times a polynomial that goes to zero at the cut-off with two
    continuous derivatives (arXiv:2003.03123, equations 7 and 8). Harmonics: e3nn's order, `component` normalised.
    Vectors must not be zero; beyond the cut-off the radial functions are zero.
    """
    distance_E1 = torch.linalg.vector_norm(vectors_E3, dim=1, keepdim=True)
    return (_radial(distance_E1, cutoff, num_radial), _harmonics(vectors_E3 / distance_E1, l_max))


def _radial(distance_E1: Tensor, cutoff: float, num_radial: int) -> Tensor:
    wave_numbers_R = torch.arange(1, num_radial + 1, dtype=distance_E1.dtype, device=distance_E1.device)
    wave_numbers_R = wave_numbers_R * (math.pi / cutoff)
    p = CUTOFF_POWER
    t = (distance_E1 / cutoff).clamp(max=1.0)
    envelope_E1 = 1 - t**p * ((p + 1) * (p + 2) / 2 - p * (p + 2) * t + p * (p + 1) / 2 * t * t)
    return torch.sin(distance_E1 * wave_numbers_R) * (envelope_E1 * math.sqrt(2 / cutoff) / distance_E1)


def _harmonics(directions_E3: Tensor, l_max: int) -> Tensor:
    """Build each degree from the one below: Y_l is linear in the products of Y_(l-1) and the direction."""
    degrees = [torch.ones_like(directions_E3[:, :1])]
    for degree in range(1, l_max + 1):
        raising = _raising(degree).to(directions_E3)
        products = degrees[-1][:, :, None] * directions_E3[:, None, :]
        degrees.append(products.flatten(1) @ raising)
    return torch.cat(degrees, dim=1)


@cache
def _raising(degree: int) -> Tensor:
    """Return the float64 matrix [(2l-1) * 3, 2l+1] that takes Y_(l-1) u to Y_l."""
    upper = harmonic_tensors(degree).reshape(2 * degree + 1, -1, 3)
    lower = harmonic_tensors(degree - 1).reshape(2 * degree - 1, -1)
    matrix = torch.einsum("map,ka->kpm", upper, lower).reshape(-1, 2 * degree + 1)
    return matrix * math.sqrt(component_norm(degree) / component_norm(degree - 1))
