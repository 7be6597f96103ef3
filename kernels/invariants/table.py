"""The invariants of s = A_0, v = A_1, Q = A_2, T = A_3 (symmetric traceless Cartesian tensors), as a table.

All but T(v,Q) are the list of HIP-HOP-NN (arXiv:2503.23515), which is functionally independent; why T(v,Q) is added is
in DESIGN.md section 5. A row is the definition; `reference.py` evaluates the rows in this order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Invariant:
    """A full contraction of Cartesian tensors.

    `tensors` names the factors and `indices` their axes in einsum notation, for example Q:Q.Q = Q_ab Q_bc Q_ca is
    ("QQQ", "ab,bc,ca").
    """

    name: str
    tensors: str
    indices: str

    @property
    def degree(self) -> int:
        return len(self.tensors)

    @property
    def body_order(self) -> int:
        """Return the number of atoms that one term couples: the centre and one neighbour per factor."""
        return self.degree + 1

    @property
    def l_max(self) -> int:
        return max("svQT".index(tensor) for tensor in self.tensors)


INVARIANTS = (
    Invariant("s", "s", ""),
    Invariant("v.v", "vv", "a,a"),
    Invariant("Q:Q", "QQ", "ab,ab"),
    Invariant("Q:Q.Q", "QQQ", "ab,bc,ca"),
    Invariant("v.Q.v", "vQv", "a,ab,b"),
    Invariant("(Qv).(Qv)", "QvQv", "ab,b,ac,c"),
    Invariant("T:T", "TT", "abc,abc"),
    Invariant("B:Q", "TTQ", "acd,bcd,ab"),
    Invariant("T(v,Q)", "TvQ", "abc,a,bc"),
    Invariant("T(v,v,v)", "Tvvv", "abc,a,b,c"),
    Invariant("B:B", "TTTT", "acd,bcd,aef,bef"),
    Invariant("v.B.v", "vTTv", "a,acd,bcd,b"),
    Invariant("B:(QQ)", "TTQQ", "acd,bcd,ae,be"),
    Invariant("(T:Q).(T:Q)", "TQTQ", "abc,bc,ade,de"),
)


def invariants_up_to(l_max: int) -> tuple[Invariant, ...]:
    """Return the rows that exist when the highest degree of the tensors is l_max."""
    return tuple(row for row in INVARIANTS if row.l_max <= l_max)


NUM_INVARIANTS = {l_max: len(invariants_up_to(l_max)) for l_max in (0, 1, 2, 3)}

DEGREE_OF_SIZE = {(l_max + 1) ** 2: l_max for l_max in NUM_INVARIANTS}  # L -> l_max
