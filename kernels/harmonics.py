"""Real spherical harmonics as symmetric traceless Cartesian tensors, in e3nn's order (y is the polar axis).

H_l [2l+1, 3, ..., 3] is orthonormal, H_lm : H_lm' = delta_mm', so that coefficients A_lm and the Cartesian tensor
sum_m A_lm H_lm have the same norm. The harmonics themselves are Y_lm(u) = sqrt(norm_l) H_lm : u...u.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

MAX_DEGREE = 3

# Each harmonic as {monomial: coefficient}, unnormalised (e3nn.o3.spherical_harmonics up to a factor for each degree).
_POLYNOMIALS: dict[int, list[dict[str, float]]] = {
    0: [{"": 1.0}],
    1: [{"x": 1.0}, {"y": 1.0}, {"z": 1.0}],
    2: [
        {"xz": math.sqrt(3)},
        {"xy": math.sqrt(3)},
        {"yy": 1.0, "xx": -0.5, "zz": -0.5},
        {"yz": math.sqrt(3)},
        {"zz": math.sqrt(3 / 4), "xx": -math.sqrt(3 / 4)},
    ],
    3: [
        {"xzz": 3 * math.sqrt(5 / 8), "xxx": -math.sqrt(5 / 8)},
        {"xyz": math.sqrt(15)},
        {"xyy": 4 * math.sqrt(3 / 8), "xxx": -math.sqrt(3 / 8), "xzz": -math.sqrt(3 / 8)},
        {"yyy": 1.0, "xxy": -1.5, "yzz": -1.5},
        {"yyz": 4 * math.sqrt(3 / 8), "xxz": -math.sqrt(3 / 8), "zzz": -math.sqrt(3 / 8)},
        {"yzz": math.sqrt(15 / 4), "xxy": -math.sqrt(15 / 4)},
        {"zzz": math.sqrt(5 / 8), "xxz": -3 * math.sqrt(5 / 8)},
    ],
}


@cache
def harmonic_tensors(degree: int) -> Tensor:
    """Return H_l as float64 [2l+1, 3, ..., 3] with l trailing axes; it is shared, do not write to it."""
    polynomials = _POLYNOMIALS[degree]
    tensors = torch.zeros((len(polynomials),) + (3,) * degree, dtype=torch.float64)
    for m, polynomial in enumerate(polynomials):
        for monomial, coefficient in polynomial.items():
            places = set(itertools.permutations("xyz".index(axis) for axis in monomial))
            for place in places:
                tensors[(m, *place)] = coefficient / len(places)
    return tensors / tensors[0].square().sum().sqrt()


def component_norm(degree: int) -> float:
    """Return norm_l, for which Y_lm = sqrt(norm_l) H_lm : u...u has sum_m Y_lm^2 = 2l + 1 (e3nn's `component`)."""
    # |u...u, symmetric and traceless|^2 = l! / (2l - 1)!!
    squared = math.factorial(degree) / math.prod(range(1, 2 * degree, 2))
    return (2 * degree + 1) / squared
