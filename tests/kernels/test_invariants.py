"""The invariants against their table's Cartesian definition; symmetry, independence, derivatives."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import Tensor

from rung.kernels import NUM_INVARIANTS, invariants
from rung.kernels.harmonics import harmonic_tensors
from rung.kernels.invariants.table import INVARIANTS, Invariant, invariants_up_to


def from_definition(row: Invariant, A_NLC: Tensor) -> Tensor:
    """Evaluate a row of the table by one einsum over Cartesian tensors; [N, C]."""
    factors = []
    for tensor in row.tensors:
        degree = "svQT".index(tensor)
        components = A_NLC[:, degree**2 : (degree + 1) ** 2]
        factors.append(torch.einsum("nmc,m...->nc...", components, harmonic_tensors(degree)))
    terms = ",".join("NC" + indices for indices in row.indices.split(","))
    return torch.einsum(f"{terms}->NC", factors)


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_rows_equal_their_definition(l_max: int) -> None:
    A_NLC = torch.randn(6, (l_max + 1) ** 2, 5, dtype=torch.float64)
    values_NKC = invariants(A_NLC)
    assert values_NKC.shape == (6, NUM_INVARIANTS[l_max], 5)
    for k, row in enumerate(invariants_up_to(l_max)):
        torch.testing.assert_close(values_NKC[:, k], from_definition(row, A_NLC), msg=row.name)


def test_table_lists_degrees_and_body_orders() -> None:
    assert len(INVARIANTS) == 14
    assert NUM_INVARIANTS == {0: 1, 1: 2, 2: 6, 3: 14}
    assert max(row.body_order for row in INVARIANTS) == 5
    assert {row.name: row.degree for row in INVARIANTS}["T(v,Q)"] == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # inside e3nn
def test_rotations_and_reflections_change_nothing() -> None:
    A_NLC = torch.randn(6, 16, 5, dtype=torch.float64)
    irreps = o3.Irreps("0e + 1o + 2e + 3o")
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    for matrix in (turn, -turn):
        turned_NLC = irreps.D_from_matrix(matrix) @ A_NLC
        torch.testing.assert_close(
            invariants(turned_NLC), invariants(A_NLC), rtol=1e-5, atol=1e-5
        )  # e3nn holds Wigner constants in float32


def rows(A_L: Tensor) -> Tensor:
    """Return the table's rows [K] by their definition for one atom and channel."""
    return torch.cat([from_definition(row, A_L[None, :, None]).reshape(1) for row in INVARIANTS])


def test_hip_hop_list_is_functionally_independent_and_complete_locally() -> None:
    """16 components less 3 rotations leave 13 independent functions (arXiv:2503.23515)."""
    jacobian = torch.autograd.functional.jacobian(rows, torch.randn(16, dtype=torch.float64))
    hip_hop = [k for k, row in enumerate(INVARIANTS) if row.name != "T(v,Q)"]
    assert torch.linalg.matrix_rank(jacobian[hip_hop], rtol=1e-9) == 13
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == 13


def test_only_the_added_invariant_couples_v_and_q_around_a_tetrahedron() -> None:
    """Where v = Q = 0 and T is not (every sp3 carbon), d2/dv dQ of all the others is zero."""
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    T = torch.einsum("ea,eb,ec,mabc->m", corners, corners, corners, harmonic_tensors(3))
    A_L = torch.cat([torch.ones(1, dtype=torch.float64), torch.zeros(8, dtype=torch.float64), T])
    coupling = torch.func.jacrev(torch.func.jacrev(rows))(A_L)[:, 1:4, 4:9].abs().amax((1, 2))
    assert [row.name for row, value in zip(INVARIANTS, coupling, strict=True) if value > 1e-9] == ["T(v,Q)"]


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_derivatives_agree_with_finite_differences(l_max: int) -> None:
    A_NLC = torch.randn(2, (l_max + 1) ** 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(invariants, A_NLC)
    assert torch.autograd.gradgradcheck(invariants, A_NLC)


def test_a_wrong_number_of_components_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"L = 1, 4, 9 or 16, found \[2, 10, 3\]"):
        invariants(torch.ones(2, 10, 3))
