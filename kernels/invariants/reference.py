"""Invariants in plain PyTorch: the definition, for any dtype and device, differentiable to any order.

They are evaluated in two bilinear steps on spherical components, first the products

    V = (v v)_2    P = (Q Q)_2    B_2 = (T_acd T_bcd)_2    D = (T.v)_2    e = T:Q    v.v    Q:Q    T:T

where X_2 is the symmetric traceless part of a matrix X, and then the rows of the table.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import torch
from torch import Tensor

from rung.kernels.harmonics import harmonic_tensors
from rung.kernels.invariants.bilinear import Table, Term, quadratic
from rung.kernels.invariants.table import DEGREE_OF_SIZE, NUM_INVARIANTS, invariants_up_to

# Products of the first step: name, factors, and definition on the factors' harmonic tensors. By the l_max they need.
_PRODUCTS = {
    2: (
        ("vv", "v", "v", "ia,ja->ij"),
        ("QQ", "Q", "Q", "iab,jab->ij"),
        ("V", "v", "v", "kab,ia,jb->kij"),
        ("P", "Q", "Q", "kab,iac,jbc->kij"),
    ),
    3: (
        ("TT", "T", "T", "iabc,jabc->ij"),
        ("B", "T", "T", "kab,iacd,jbcd->kij"),
        ("D", "T", "v", "kab,iabc,jc->kij"),
        ("e", "T", "Q", "ka,iabc,jbc->kij"),
    ),
}
# Rows of the table as sums of coefficient * (left . right). For symmetric matrices X:Y = X_2:Y_2 + tr(X) tr(Y)/3.
_ROWS = {
    "v.v": (("v", "v", 1.0),),
    "Q:Q": (("Q", "Q", 1.0),),
    "Q:Q.Q": (("Q", "P", 1.0),),
    "v.Q.v": (("Q", "V", 1.0),),
    "(Qv).(Qv)": (("P", "V", 1.0), ("QQ", "vv", 1 / 3)),
    "T:T": (("T", "T", 1.0),),
    "B:Q": (("B", "Q", 1.0),),
    "T(v,Q)": (("D", "Q", 1.0),),
    "T(v,v,v)": (("D", "V", 1.0),),
    "B:B": (("B", "B", 1.0), ("TT", "TT", 1 / 3)),
    "v.B.v": (("B", "V", 1.0), ("TT", "vv", 1 / 3)),
    "B:(QQ)": (("B", "P", 1.0), ("TT", "QQ", 1 / 3)),
    "(T:Q).(T:Q)": (("e", "e", 1.0),),
}


def invariants(A_NLC: Tensor) -> Tensor:
    """Return the invariants [N, K, C] of each atom's and channel's tensors, in the order of `table.INVARIANTS`."""
    l_max = DEGREE_OF_SIZE[A_NLC.shape[1]]
    components = A_NLC.transpose(0, 1).contiguous()  # [L, N, C]: the terms are whole [N, C] planes
    products_table, rows_table = _tables(l_max)
    factors = torch.cat([components, quadratic(components, products_table)])
    return torch.cat([components[:1], quadratic(factors, rows_table)]).transpose(0, 1)


@cache
def _tables(l_max: int) -> tuple[Table, Table]:
    """Return the constants of the two steps: components -> products, and both -> the rows after s, which is linear."""
    places = {"v": range(1, 4), "Q": range(4, 9), "T": range(9, 16)}  # of each factor's components
    num_components = num_factors = (l_max + 1) ** 2
    products: list[Term] = []
    for degree in range(2, l_max + 1):
        for name, left, right, definition in _PRODUCTS[degree]:
            table_kij = _product_table(definition, "svQT".index(left), "svQT".index(right))
            places[name] = range(num_factors, num_factors + len(table_kij))
            num_factors += len(table_kij)
            for k, i, j in torch.nonzero(table_kij.abs() > 1e-12).tolist():
                row = places[name][k] - num_components
                products.append(Term(row, places[left][i], places[right][j], table_kij[k, i, j].item()))
    rows = [
        Term(row, i, j, coefficient)
        for row, invariant in enumerate(invariants_up_to(l_max)[1:])
        for left, right, coefficient in _ROWS[invariant.name]
        for i, j in zip(places[left], places[right], strict=True)
    ]
    products_table = Table(_merge(products), num_factors - num_components, num_components, num_components)
    return products_table, Table(_merge(rows), NUM_INVARIANTS[l_max] - 1, num_factors, num_factors)


def _product_table(definition: str, left: int, right: int) -> Tensor:
    """Return the constants [k, i, j] of a product of degrees `left` and `right`."""
    inputs, output = definition.split("->")
    factors = [harmonic_tensors(left), harmonic_tensors(right)]
    if "k" in output:
        factors.insert(0, harmonic_tensors(inputs.index(",") - 1))
    return torch.einsum(definition, factors).reshape(-1, len(factors[-2]), len(factors[-1]))


def _merge(terms: list[Term]) -> tuple[Term, ...]:
    """Return the terms with left[i] right[j] and left[j] right[i] added up; both sides are the same tensor."""
    merged: defaultdict[tuple[int, int, int], float] = defaultdict(float)
    for row, i, j, coefficient in terms:
        merged[row, min(i, j), max(i, j)] += coefficient
    return tuple(Term(row, i, j, coefficient) for (row, i, j), coefficient in merged.items())
