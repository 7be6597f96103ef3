"""The convolution against e3nn's tensor products edge by edge, its equivariance and its derivatives."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import Tensor

from rung.kernels import Edges, VectorMessage, convolve, edge_basis

RADIAL, CHANNELS = 3, 2


def cluster(num_atoms: int = 5, extra: int = 1) -> tuple[Tensor, Edges]:
    """Return edge vectors of all pairs of a random cluster, and `extra` atoms without neighbours."""
    positions = torch.randn(num_atoms, 3, dtype=torch.float64)
    pairs = [(i, j) for i in range(num_atoms) for j in range(num_atoms) if i != j and (i, j) not in ((0, 1), (1, 0))]
    receivers, senders = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    counts = torch.bincount(receivers, minlength=num_atoms + extra)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    reverse = torch.tensor([pairs.index((j, i)) for i, j in pairs], dtype=torch.int32)
    vectors_E3 = positions[senders] - positions[receivers]
    return vectors_E3, Edges(receivers, senders, row_ptr, reverse)


def random_inputs(l_max: int, num_atoms: int) -> tuple[Tensor, Tensor, VectorMessage]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    vectors = VectorMessage(draw(num_atoms, 3, CHANNELS), draw(RADIAL, l_max + 1, CHANNELS), draw(RADIAL, CHANNELS))
    return draw(num_atoms, CHANNELS), draw(RADIAL, l_max + 1, CHANNELS), vectors


def from_definition(
    vectors_E3: Tensor, edges: Edges, x: Tensor, weights: Tensor, message: VectorMessage | None, l_max: int
) -> Tensor:
    """Add the messages edge by edge, with e3nn's harmonics and vector arithmetic written out."""
    A = torch.zeros(len(x), (l_max + 1) ** 2, CHANNELS, dtype=torch.float64)
    radial, _ = edge_basis(vectors_E3, cutoff=5.0, num_radial=RADIAL, l_max=0)
    for e, (i, j) in enumerate(zip(edges.receivers.tolist(), edges.senders.tolist(), strict=True)):
        direction = vectors_E3[e] / vectors_E3[e].norm()
        for degree in range(l_max + 1):
            harmonics = o3.spherical_harmonics(degree, direction, normalize=False, normalization="component")
            scalar = (radial[e] @ weights[:, degree]) * x[j]
            if message is not None:
                scalar = scalar + (radial[e] @ message.axial_weights[:, degree]) * (direction @ message.w[j])
            A[i, degree**2 : (degree + 1) ** 2] += harmonics[:, None] * scalar
        if message is not None:
            A[i, 1:4] += (radial[e] @ message.identity_weights) * message.w[j]
    return A


@pytest.mark.parametrize("l_max", [1, 2, 3])
@pytest.mark.parametrize("with_vectors", [False, True])
def test_equals_the_definition(l_max: int, with_vectors: bool) -> None:
    vectors_E3, edges = cluster()
    x, weights, message = random_inputs(l_max, num_atoms=6)
    radial, harmonics = edge_basis(vectors_E3, cutoff=5.0, num_radial=RADIAL, l_max=l_max)
    chosen = message if with_vectors else None
    A = convolve(radial, harmonics, x, weights, edges, chosen)
    torch.testing.assert_close(A, from_definition(vectors_E3, edges, x, weights, chosen, l_max))
    assert A[5].abs().max() == 0  # an atom without neighbours


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # inside e3nn
def test_is_equivariant_under_rotations_and_reflections() -> None:
    vectors_E3, edges = cluster()
    x, weights, message = random_inputs(3, num_atoms=6)
    irreps = o3.Irreps("0e + 1o + 2e + 3o")
    orthogonal = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    for matrix in (orthogonal, -orthogonal):
        results = []
        for turn in (torch.eye(3, dtype=torch.float64), matrix):
            radial, harmonics = edge_basis(vectors_E3 @ turn.T, cutoff=5.0, num_radial=RADIAL, l_max=3)
            results.append(convolve(radial, harmonics, x, weights, edges, message._replace(w=turn @ message.w)))
        expected = irreps.D_from_matrix(matrix) @ results[0]
        torch.testing.assert_close(results[1], expected, rtol=1e-5, atol=1e-5)  # e3nn holds Wigner constants in float32


@pytest.mark.parametrize("with_vectors", [False, True])
def test_derivatives_agree_with_finite_differences(with_vectors: bool) -> None:
    vectors_E3, edges = cluster(num_atoms=3)
    x, weights, message = random_inputs(1, num_atoms=4)

    def run(vectors_E3: Tensor, x: Tensor, weights: Tensor, *message: Tensor) -> Tensor:
        radial, harmonics = edge_basis(vectors_E3, cutoff=5.0, num_radial=RADIAL, l_max=1)
        return convolve(radial, harmonics, x, weights, edges, VectorMessage(*message) if message else None)

    inputs = [vectors_E3, x, weights, *(message if with_vectors else ())]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_no_edges_give_zeros_and_zero_gradients() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    edges = Edges(none, none, torch.zeros(3, dtype=torch.int32), none)
    x, weights, message = random_inputs(3, num_atoms=2)
    x.requires_grad_()
    radial, harmonics = edge_basis(torch.zeros(0, 3).double(), cutoff=5.0, num_radial=RADIAL, l_max=3)
    A = convolve(radial, harmonics, x, weights, edges, message)
    assert A.shape == (2, 16, CHANNELS) and A.abs().max() == 0
    assert torch.autograd.grad(A.sum(), x)[0].abs().max() == 0
