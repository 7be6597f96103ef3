"""The real harmonics of a direction as programs: value and derivatives with respect to the edge vector."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations_with_replacement, permutations

from rung.kernels.codegen.emit import Program
from rung.kernels.codegen.tape import Expression, Tape, dot, forward, reverse
from rung.kernels.harmonics import component_norm, harmonic_tensors

AXES = range(3)
Polynomial = dict[tuple[int, ...], float]  # coefficients of monomials: (0, 2, 2) is x z z


def values(n: list[Expression], l_max: int) -> list[Expression]:
    """Return the harmonics [L] of the unit vector n, in e3nn's order, `component` normalised."""
    rows = [n[0].tape.constant(1)]
    for degree in range(1, l_max + 1):
        rows += [_evaluate(polynomial, n) for polynomial in _harmonics(degree)]
    return rows


def programs(l_max: int) -> list[Program]:
    """Return value, VJP and VJP of VJP.

    The vector x enters as its direction n and r = 1/|x|: dn_i/dx_j = r (delta_ij - n_i n_j) and dr/dx_j = -r^2 n_j.
    """
    tape = Tape()
    n, r = tape.inputs("n", 3), tape.input("r")
    Y = values(n, l_max)
    g, t = tape.inputs("g", len(Y)), tape.inputs("t", 3)

    def to_vector(gradient_n: list[Expression], r_gradient_r: Expression | None = None) -> list[Expression]:
        """Return the gradient with respect to x from those with respect to n and (times r) to r."""
        along = dot(n, gradient_n)
        along = along if r_gradient_r is None else along + r_gradient_r
        return [r * (gradient_n[i] - n[i] * along) for i in AXES]

    gx = to_vector(reverse(Y, g, n))
    # dn along t has the same form as a gradient, because the matrix above is symmetric.
    dY = forward(Y, dict(zip((component.number for component in n), to_vector(t), strict=True)))
    # g.dY is linear in r: r times its gradient with respect to r is itself.
    dx = to_vector(reverse(dY, g, n), dot(g[1:], dY[1:]))
    name = "harmonics{}_" + str(l_max)
    return [
        Program(name.format(""), {"Y": Y}, "The harmonics Y [L] of the direction n [3]."),
        Program(name.format("_backward"), {"gx": gx}, "Their VJP: gx [3] for the cotangent g [L] of Y; r = 1/|x|."),
        Program(
            name.format("_backward2"), {"dg": dY, "dx": dx}, "The VJP of that: dg [L], dx [3] for the cotangent t [3]."
        ),
    ]


def _harmonics(degree: int) -> list[Polynomial]:
    """Return the harmonics of one degree."""
    scale = math.sqrt(component_norm(degree))
    polynomials = []
    for tensor in harmonic_tensors(degree):
        polynomial: Polynomial = {}
        for indices in combinations_with_replacement(AXES, degree):
            coefficient = scale * float(tensor[indices]) * len(set(permutations(indices)))
            if abs(coefficient) > 1e-12:
                polynomial[indices] = coefficient
        polynomials.append(polynomial)
    return polynomials


def _evaluate(polynomial: Polynomial, n: list[Expression]) -> Expression:
    """Return the polynomial's value, with the axis that most of its monomials share taken out first."""
    if list(polynomial) == [()]:
        return n[0].tape.constant(polynomial[()])
    counts = Counter(axis for indices in polynomial for axis in set(indices))
    axis = max(AXES, key=lambda axis: counts[axis])
    quotient: Polynomial = {}
    for indices in [indices for indices in polynomial if axis in indices]:
        place = indices.index(axis)
        quotient[indices[:place] + indices[place + 1 :]] = polynomial[indices]
    rest = {indices: coefficient for indices, coefficient in polynomial.items() if axis not in indices}
    value = n[axis] * _evaluate(quotient, n)
    return value + _evaluate(rest, n) if rest else value
