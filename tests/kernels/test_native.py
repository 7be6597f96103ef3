"""The native kernels against the reference in float64: values, first and second derivatives, in both precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.kernels import Edges, VectorMessage, convolve, edge_basis, invariants, matmul, mix, use_backend
from rung.kernels.convolution import reference as convolution_reference
from rung.kernels.edge_basis import reference as edge_basis_reference
from rung.kernels.invariants import reference as invariants_reference
from rung.kernels.mixing import reference as mixing_reference

DTYPES = [torch.float32, torch.float64]
CUTOFF = 5.0
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
Compare = Callable[..., None]
RandomGraph = Callable[..., Edges]


@pytest.fixture(autouse=True)
def native() -> Any:
    """Never fall back in this file."""
    with use_backend("native"):
        yield


def edges_on(edges: Edges, device: str) -> Edges:
    return Edges(*(tensor.to(device) for tensor in edges))


def convolution_inputs(
    edges: Edges, R: int, l_max: int, C: int, with_vectors: bool, device: str, dtype: torch.dtype
) -> list[Tensor]:
    E, N, degrees = len(edges.senders), len(edges.row_ptr) - 1, l_max + 1
    shapes = [(E, R), (E, degrees**2), (N, C), (R, degrees, C)]
    shapes += [(N, 3, C), (R, degrees, C), (R, C)] if with_vectors else []
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def convolution_pair(edges: Edges, device: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def call(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        message = VectorMessage(*inputs[4:]) if len(inputs) > 4 else None
        return function(*inputs[:4], edges_on(edges, str(inputs[0].device)), message)

    return lambda *inputs: call(convolve, *inputs), lambda *inputs: call(convolution_reference.convolve, *inputs)


@dtypes
@pytest.mark.parametrize("with_vectors", [False, True], ids=["scalars", "vectors"])
@pytest.mark.parametrize("R,l_max,C", [(8, 3, 64), (8, 3, 16), (4, 1, 48), (5, 2, 32), (11, 3, 16), (16, 2, 16)])
def test_convolution(
    R: int,
    l_max: int,
    C: int,
    with_vectors: bool,
    dtype: torch.dtype,
    device: str,
    compare: Compare,
    random_graph: RandomGraph,
) -> None:
    edges = random_graph(num_atoms=12)
    inputs = convolution_inputs(edges, R, l_max, C, with_vectors, device, dtype)
    compare(*convolution_pair(edges, device), inputs)


@pytest.mark.parametrize("num_atoms", [1, 2, 40])
def test_convolution_of_few_and_of_many_neighbours(
    num_atoms: int, device: str, compare: Compare, random_graph: RandomGraph
) -> None:
    edges = random_graph(num_atoms, probability=1.0, isolated=0)
    inputs = convolution_inputs(edges, 8, 3, 16, True, device, torch.float64)
    compare(*convolution_pair(edges, device), inputs)


@pytest.mark.parametrize("num_atoms", [0, 3])
def test_no_edges_give_zeros_everywhere(num_atoms: int, device: str, random_graph: RandomGraph) -> None:
    edges = random_graph(num_atoms, probability=0.0, isolated=0)
    inputs = [x.requires_grad_() for x in convolution_inputs(edges, 8, 3, 16, True, device, torch.float32)]
    A = convolution_pair(edges, device)[0](*inputs)
    first = torch.autograd.grad(A, inputs, torch.ones_like(A), create_graph=True)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in first), inputs, allow_unused=True)
    assert A.shape == (num_atoms, 16, 16)
    for tensor, *gradients in zip(inputs, first, second, strict=True):
        for gradient in gradients:
            assert gradient is None or (gradient.shape == tensor.shape and not gradient.any())
    assert not A.any()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2, 3), (4,), (3, 5, 6), (0, 1, 4)])
def test_any_subset_of_gradients_can_be_asked_for(
    wanted: tuple[int, ...], device: str, random_graph: RandomGraph
) -> None:
    """What is not asked for is not computed (see `needed`), which must not change the rest."""
    edges = random_graph(9)
    inputs = [x.requires_grad_() for x in convolution_inputs(edges, 4, 2, 16, True, device, torch.float64)]
    function = convolution_pair(edges, device)[0]
    cotangent = torch.randn(9, 9, 16, dtype=torch.float64, device=device, requires_grad=True)
    everything = torch.autograd.grad(function(*inputs), inputs, cotangent, create_graph=True)
    some = torch.autograd.grad(function(*inputs), [inputs[k] for k in wanted], cotangent, create_graph=True)
    for k, gradient in zip(wanted, some, strict=True):
        torch.testing.assert_close(gradient, everything[k])
    seeds = [torch.randn_like(gradient) for gradient in some]
    targets = [cotangent, *inputs]
    all_second = torch.autograd.grad([everything[k] for k in wanted], targets, seeds, allow_unused=True)
    for k, target in enumerate(targets):
        (one,) = torch.autograd.grad(some, target, seeds, retain_graph=True, allow_unused=True)
        expected = torch.zeros_like(target) if all_second[k] is None else all_second[k]
        torch.testing.assert_close(torch.zeros_like(target) if one is None else one, expected)


@dtypes
@pytest.mark.parametrize("l_max,C", [(3, 64), (3, 16), (2, 48), (1, 16)])
def test_invariants(l_max: int, C: int, dtype: torch.dtype, device: str, compare: Compare) -> None:
    A = torch.randn(7, (l_max + 1) ** 2, C, dtype=dtype, device=device)
    compare(invariants, invariants_reference.invariants, [A])


@dtypes
@pytest.mark.parametrize("R,l_max", [(8, 3), (4, 1), (5, 2), (16, 3)])
@pytest.mark.parametrize("num_edges", [1, 16, 37])
def test_edge_basis(num_edges: int, R: int, l_max: int, dtype: torch.dtype, device: str, compare: Compare) -> None:
    directions = torch.nn.functional.normalize(torch.randn(num_edges, 3, dtype=torch.float64), dim=1)
    distances = torch.linspace(0.6, 1.05, num_edges, dtype=torch.float64)[:, None] * CUTOFF  # the last are beyond it
    vectors = (distances * directions).to(device, dtype)

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda vectors: function(vectors, cutoff=CUTOFF, num_radial=R, l_max=l_max)

    # The rounding of a distance moves the phase of the highest radial function R pi d / cutoff times as much.
    compare(call(edge_basis), call(edge_basis_reference.edge_basis), [vectors], factor=R)


@dtypes
@pytest.mark.parametrize("distances", [(0.05, 0.06, 0.07), (0.3, 0.5, 0.7), (1.0, 2.5, 4.9, 4.9999, 5.0)])
def test_edge_basis_at_all_distances(
    distances: tuple[float, ...], dtype: torch.dtype, device: str, compare: Compare
) -> None:
    directions = torch.nn.functional.normalize(torch.randn(len(distances), 3, dtype=torch.float64), dim=1)
    vectors = (torch.tensor(distances, dtype=torch.float64)[:, None] * directions).to(device, dtype)

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda vectors: function(vectors, cutoff=CUTOFF, num_radial=8, l_max=3)

    compare(call(edge_basis), call(edge_basis_reference.edge_basis), [vectors], factor=8)


def test_no_edges_have_an_empty_basis(device: str) -> None:
    vectors = torch.zeros(0, 3, device=device, requires_grad=True)
    radial, harmonics = edge_basis(vectors, cutoff=CUTOFF, num_radial=6, l_max=3)
    assert radial.shape == (0, 6) and harmonics.shape == (0, 16)
    (gradient,) = torch.autograd.grad(radial.sum() + harmonics.sum(), vectors, create_graph=True)
    assert gradient.shape == (0, 3)


@dtypes
@pytest.mark.parametrize("num_atoms", [0, 1, 3, 50])
@pytest.mark.parametrize("l_max,C", [(3, 32), (1, 16), (2, 80), (0, 16)])
def test_mix(num_atoms: int, l_max: int, C: int, dtype: torch.dtype, device: str, compare: Compare) -> None:
    A = torch.randn(num_atoms, (l_max + 1) ** 2, C, dtype=dtype, device=device)
    weights = torch.randn(l_max + 1, C, C, dtype=dtype, device=device)
    compare(mix, mixing_reference.mix, [A, weights])


@dtypes
@pytest.mark.parametrize("N,K,C", [(0, 16, 16), (1, 16, 32), (37, 224, 16), (300, 48, 80), (1030, 64, 64)])
def test_matmul(
    N: int, K: int, C: int, dtype: torch.dtype, device: str, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.kernels.mixing.op.LARGE_PRODUCT", 0)
    x, weights = torch.randn(N, K, dtype=dtype, device=device), torch.randn(K, C, dtype=dtype, device=device)
    compare(matmul, torch.matmul, [x, weights])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_repeat_bit_for_bit_and_hardly_depend_on_threads(num_threads: int, random_graph: RandomGraph) -> None:
    edges = random_graph(30)
    inputs = [0.3 * x for x in convolution_inputs(edges, 8, 3, 32, True, "cpu", torch.float32)]
    mixing = torch.randn(4, 32, 32) / 32

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        radial, harmonics, x, weights, *message = leaves
        A = mix(convolve(radial, harmonics, x, weights, edges, VectorMessage(*message)), mixing)
        first = torch.autograd.grad(invariants(A).square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)]

    expected = gradients()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        once, again = gradients(), gradients()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(once, again, expected, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() <= 1e-5 * c.norm()


@pytest.mark.parametrize("name", ["convolve", "edge_basis", "invariants"])
def test_a_third_derivative_is_an_error_that_names_the_way_out(name: str, random_graph: RandomGraph) -> None:
    edges = random_graph(4)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "convolve": lambda x: convolve(*convolution_inputs(edges, 4, 1, 16, False, "cpu", torch.float32)[:2], x,
                                       torch.ones(4, 2, 16), edges),
        "edge_basis": lambda x: edge_basis(x, cutoff=CUTOFF, num_radial=4, l_max=1)[0],
        "invariants": invariants,
    }  # fmt: skip
    shape = {"convolve": (4, 16), "edge_basis": (3, 3), "invariants": (2, 4, 16)}[name]
    x = torch.randn(shape, requires_grad=True)
    value = functions[name](x)
    cotangent = torch.ones_like(value, requires_grad=True)
    (first,) = torch.autograd.grad(value, x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), cotangent, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"{name}: .*use_backend\('reference'\) has no limit"):
        second.sum().backward()


def test_what_has_no_native_kernel_is_an_error_here() -> None:
    with pytest.raises(ValueError, match="a multiple of 16 channels, not 20"):
        invariants(torch.ones(2, 4, 20))
    with pytest.raises(ValueError, match="4 to 16 radial functions, not 3"):
        edge_basis(torch.ones(2, 3), cutoff=CUTOFF, num_radial=3, l_max=2)
    with pytest.raises(ValueError, match=r"float32 and float64, not torch\.bfloat16"):
        invariants(torch.ones(2, 4, 16, dtype=torch.bfloat16))


def opcheck_arguments(random_graph: RandomGraph) -> dict[str, tuple[Any, ...]]:
    edges = random_graph(5)
    inputs = convolution_inputs(edges, 4, 1, 16, True, "cpu", torch.float32)
    A, gA = torch.randn(5, 4, 16), torch.randn(5, 4, 16)
    vectors, t = torch.randn(6, 3), torch.randn(6, 3)
    g_radial, g_harmonics = torch.randn(6, 4), torch.randn(6, 4)
    g, weights = torch.randn(5, 2, 16), torch.randn(2, 16, 16)
    leaves = [*inputs, A, gA, vectors, t, g_radial, g_harmonics, g, weights]
    for tensor in leaves:
        tensor.requires_grad_()
    scalars, x = (*inputs[:4], None, None, None), inputs[2]
    return {
        "convolve": (*inputs, *edges),
        "convolve_backward": (gA, *scalars, *edges, [True] * 4 + [False] * 3),
        "convolve_backward2": (gA, *inputs, *edges, inputs[0], inputs[1], None, inputs[4], [True] * 8),
        "edge_basis": (vectors, CUTOFF, 4, 1),
        "edge_basis_backward": (vectors, g_radial, g_harmonics, CUTOFF, 4, 1),
        "edge_basis_backward2": (vectors, g_radial, g_harmonics, t, CUTOFF, 4, 1, True),
        "invariants": (A,),
        "invariants_backward": (A, g),
        "invariants_backward2": (A, g, gA),
        "mix": (A, weights, True),
        "mix_weights": (A, gA),
        "matmul": (x, weights[0].detach().requires_grad_(), False),
        "matmul_weights": (x, x.detach().requires_grad_()),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("convolve", "convolve_backward", "convolve_backward2", "edge_basis", "edge_basis_backward"),
        *("edge_basis_backward2", "invariants", "invariants_backward", "invariants_backward2"),
        *("mix", "mix_weights", "matmul", "matmul_weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own reading
def test_torch_opcheck(name: str, random_graph: RandomGraph) -> None:
    operation = getattr(torch.ops.rung, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not name.endswith("2"):  # whose derivative is an error
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operation, opcheck_arguments(random_graph)[name], test_utils=tests)
