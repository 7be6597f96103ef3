"""The invariants as a program: the rows of `invariants/table.py` with the products that they share."""

from __future__ import annotations

from itertools import combinations_with_replacement

from rung.kernels.codegen.emit import Program
from rung.kernels.codegen.tape import Expression, Tape, dot, forward, reverse, total
from rung.kernels.harmonics import harmonic_tensors
from rung.kernels.invariants.table import invariants_up_to

AXES = range(3)
PAIRS = tuple(combinations_with_replacement(AXES, 2))
MIXED = tuple((i, j) for i, j in PAIRS if i != j)
Symmetric = dict[tuple[int, ...], Expression]  # the components with indices in ascending order


def values(A: list[Expression], l_max: int) -> list[Expression]:
    """Return the invariants of the components A [L], in the order of the table.

    With matrices V = vv, P = QQ, B = T_acd T_bcd, D = T.v and the vector e = T:Q, these are few operations in all
    three programs: every row is a product of two of them.
    """
    s, v = A[0], A[1:4]
    rows = {"s": s, "v.v": dot(v, v)}
    if l_max >= 2:
        Q = _tensor(A[4:9], 2)
        V = {(i, j): v[i] * v[j] for i, j in PAIRS}
        P = {(i, j): total([_at(Q, i, k) * _at(Q, k, j) for k in AXES]) for i, j in PAIRS}
        rows |= {
            "Q:Q": _trace(P),
            "Q:Q.Q": _double_dot(P, Q),
            "v.Q.v": _double_dot(Q, V),
            "(Qv).(Qv)": _double_dot(P, V),
        }
    if l_max >= 3:
        T = _tensor(A[9:16], 3)
        B = {(i, j): _double_dot(_slice(T, i), _slice(T, j)) for i, j in PAIRS}
        D = {(i, j): total([_at(T, i, j, k) * v[k] for k in AXES]) for i, j in PAIRS[:-1]}
        D[2, 2] = -(D[0, 0] + D[1, 1])
        e = [_double_dot(_slice(T, i), Q) for i in AXES]
        rows |= {"T:T": _trace(B), "B:Q": _double_dot(B, Q), "B:B": _double_dot(B, B), "v.B.v": _double_dot(B, V)}
        rows |= {"B:(QQ)": _double_dot(B, P), "T(v,v,v)": _double_dot(D, V)}
        rows |= {"T(v,Q)": dot(e, v), "(T:Q).(T:Q)": dot(e, e)}
    return [rows[invariant.name] for invariant in invariants_up_to(l_max)]


def programs(l_max: int) -> list[Program]:
    """Return value, VJP and VJP of VJP."""
    tape = Tape()
    A = tape.inputs("A", (l_max + 1) ** 2)
    I = values(A, l_max)  # noqa: E741
    g, u = tape.inputs("g", len(I)), tape.inputs("u", len(A))
    gA = reverse(I, g, A)
    # g . dI along u is u . gA; its gradients are those of the VJP, and this way round they need fewer operations.
    dI = forward(I, dict(zip((a.number for a in A), u, strict=True)))
    dA = reverse(dI, g, A)
    name = "invariants{}_" + str(l_max)
    return [
        Program(name.format(""), {"I": I}, "The invariants I [K] of A [L]."),
        Program(name.format("_backward"), {"gA": gA}, "Their VJP: gA [L] for the cotangent g [K] of I."),
        Program(
            name.format("_backward2"),
            {"dg": dI, "dA": dA},
            "The VJP of that: dg [K] and dA [L] for the cotangent u [L] of gA.",
        ),
    ]


def _double_dot(a: Symmetric, b: Symmetric) -> Expression:
    return total([a[i, i] * b[i, i] for i in AXES]) + 2.0 * total([a[pair] * b[pair] for pair in MIXED])


def _trace(a: Symmetric) -> Expression:
    return total([a[i, i] for i in AXES])


def _at(a: Symmetric, *indices: int) -> Expression:
    return a[tuple(sorted(indices))]


def _slice(T: Symmetric, i: int) -> Symmetric:
    return {pair: _at(T, i, *pair) for pair in PAIRS}


def _tensor(components: list[Expression], degree: int) -> Symmetric:
    """Return the symmetric traceless tensor with these spherical components."""
    H = harmonic_tensors(degree)
    tensor: Symmetric = {}
    for indices in combinations_with_replacement(AXES, degree):
        coefficients = [float(h) for h in H[(slice(None), *indices)]]
        tensor[indices] = total([c * a for c, a in zip(coefficients, components, strict=True) if abs(c) > 1e-12])
    for i in AXES:  # the longest sums follow from the zero trace
        rest = [_at(tensor, *[i] * (degree - 2), j, j) for j in AXES if j != i]
        if degree == 3 or i == 2:
            tensor[(i,) * degree] = -total(rest)
    return tensor
