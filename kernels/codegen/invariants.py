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

    The products V = vv, P = QQ, B = T_acd T_bcd, D = T.v and e = T:Q are shared by rows that are products of two of
    them: as a rule, a shorter value makes shorter derivatives. Zero traces save several products.
    """
    v = A[1:4]
    rows = {"s": A[0], "v.v": dot(v, v)}
    if l_max >= 2:
        Q = _tensor(A[4:9], 2)
        V: Symmetric = {(i, j): v[i] * v[j] for i, j in PAIRS}
        P = _square(Q)
        rows |= {"Q:Q": _trace(P), "v.Q.v": _double_dot(Q, V), "(Qv).(Qv)": _double_dot(P, V)}
        # 3 det Q, by the minors P - (Q:Q)/2 of the first row
        minors = [P[0, 0] - 0.5 * _trace(P), P[0, 1], P[0, 2]]
        rows["Q:Q.Q"] = 3.0 * dot([Q[0, j] for j in AXES], minors)
    if l_max >= 3:
        T = _tensor(A[9:16], 3)
        B = _contracted_square(T)
        D: Symmetric = {(i, j): dot([_at(T, i, j, k) for k in AXES], v) for i, j in PAIRS[:-1]}
        D[2, 2] = -(D[0, 0] + D[1, 1])
        e = _contracted(T, Q)
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


def _at(a: Symmetric, *indices: int) -> Expression:
    return a[tuple(sorted(indices))]


def _trace(a: Symmetric) -> Expression:
    return total([a[i, i] for i in AXES])


def _double_dot(a: Symmetric, b: Symmetric) -> Expression:
    return dot([a[i, i] for i in AXES], [b[i, i] for i in AXES]) + 2.0 * dot(
        [a[p] for p in MIXED], [b[p] for p in MIXED]
    )


def _tensor(components: list[Expression], degree: int) -> Symmetric:
    """Return the symmetric traceless tensor with these spherical components."""
    H = harmonic_tensors(degree)
    tensor: Symmetric = {}
    for indices in combinations_with_replacement(AXES, degree):
        coefficients = [float(H_m[indices]) for H_m in H]
        tensor[indices] = total([c * a for c, a in zip(coefficients, components, strict=True) if abs(c) > 1e-12])
    for i in AXES if degree == 3 else (2,):  # the longest sums follow from the zero trace
        a, b = (_at(tensor, *[i] * (degree - 2), j, j) for j in AXES if j != i)
        tensor[(i,) * degree] = -(a + b)
    return tensor


def _square(Q: Symmetric) -> Symmetric:
    """Return QQ."""
    square: Symmetric = {(i, i): total([_at(Q, i, k) * _at(Q, i, k) for k in AXES]) for i in AXES}
    for i, j in MIXED:  # Q_ij (Q_ii + Q_jj) = -Q_ij Q_kk
        k = 3 - i - j
        square[i, j] = _at(Q, i, k) * _at(Q, j, k) - Q[k, k] * Q[i, j]
    return square


def _contracted_square(T: Symmetric) -> Symmetric:
    """Return T_acd T_bcd."""
    slices: list[Symmetric] = [{pair: _at(T, i, *pair) for pair in PAIRS} for i in AXES]
    square: Symmetric = {(i, i): _double_dot(slices[i], slices[i]) for i in AXES}
    twice = 2.0 * T[0, 1, 2]
    for i, j in MIXED:  # six products are three after T_iii, T_jjj and T_iik + T_jjk are replaced by the zero traces
        k = 3 - i - j
        ijj, ikk, iij, jkk = (_at(T, *indices) for indices in ((i, j, j), (i, k, k), (i, i, j), (j, k, k)))
        square[i, j] = ikk * (jkk - iij) - ijj * jkk - twice * T[k, k, k]
    return square


def _contracted(T: Symmetric, Q: Symmetric) -> list[Expression]:
    """Return T_abc Q_bc."""
    x, y = Q[0, 0] - Q[2, 2], Q[1, 1] - Q[2, 2]
    mixed = [Q[pair] for pair in MIXED]
    return [
        _at(T, i, 0, 0) * x + _at(T, i, 1, 1) * y + 2.0 * dot([_at(T, i, *pair) for pair in MIXED], mixed) for i in AXES
    ]
