"""Every argument of every operation corrupted in turn: the error names the operation and the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.kernels import Edges, VectorMessage, convolve, edge_basis, invariants, matmul, mix

R, L, L_MAX, C, N = 4, 9, 2, 16, 5
Arguments = dict[str, Any]


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]])


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


CORRUPTIONS: dict[str, Callable[[Tensor], Any]] = {
    "rank": lambda tensor: tensor[None],
    "size": longer,
    "dtype": lambda tensor: tensor.to(torch.int64 if not tensor.is_floating_point() else torch.float16),
    "device": lambda tensor: tensor.to("meta"),
    "contiguity": strided,
    "type": lambda tensor: tensor.tolist(),
}


@pytest.fixture
def arguments(random_graph: Callable[..., Edges]) -> Arguments:
    edges = random_graph(N)
    E = len(edges.senders)
    message = VectorMessage(torch.randn(N, 3, C), torch.randn(R, L_MAX + 1, C), torch.randn(R, C))
    tensors = {"radial": torch.randn(E, R), "harmonics": torch.randn(E, L), "x": torch.randn(N, C)}
    tensors["weights"] = torch.randn(R, L_MAX + 1, C)
    for prefix, group in (("edges", edges), ("vectors", message)):
        tensors |= {f"{prefix}.{name}": value for name, value in group._asdict().items()}
    return tensors


def call_convolve(tensors: Arguments) -> Tensor:
    edges = Edges(**{name: tensors[f"edges.{name}"] for name in Edges._fields})
    message = VectorMessage(**{name: tensors[f"vectors.{name}"] for name in VectorMessage._fields})
    return convolve(tensors["radial"], tensors["harmonics"], tensors["x"], tensors["weights"], edges, message)


ARGUMENTS = [
    *("radial", "harmonics", "x", "weights"),
    *(f"edges.{name}" for name in Edges._fields),
    *(f"vectors.{name}" for name in VectorMessage._fields),
]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_of_the_convolution(name: str, corruption: str, arguments: Arguments, backend: str) -> None:
    assert call_convolve(arguments).shape == (N, L, C)
    bad = CORRUPTIONS[corruption](arguments[name])
    # What these three fix (dtype, device, N, C, E, R), the others are held to: the error may then name another.
    culprit = r"[\w.]+" if name in ("x", "harmonics", "weights") else name
    with pytest.raises((ValueError, TypeError), match=rf"convolve: {culprit}: expected .*, found "):
        call_convolve(arguments | {name: bad})


@pytest.mark.parametrize("corruption", [name for name in CORRUPTIONS if name not in ("size", "dtype", "device")])
def test_what_has_one_tensor(corruption: str, backend: str) -> None:
    for function, name, good in (
        (invariants, "A", torch.randn(2, 9, 16)),
        (lambda v: edge_basis(v, cutoff=5.0, num_radial=4, l_max=2), "vectors", torch.randn(6, 3)),
    ):
        function(good)
        with pytest.raises((ValueError, TypeError), match=rf"\w+: {name}: expected .*, found "):
            function(CORRUPTIONS[corruption](good))


def test_integers_are_an_error(backend: str) -> None:
    with pytest.raises(ValueError, match=r"invariants: A: expected a floating-point tensor, found torch\.int64"):
        invariants(torch.ones(2, 4, 16, dtype=torch.int64))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("function", [mix, matmul])
def test_every_argument_of_the_products(function: Any, which: int, corruption: str, backend: str) -> None:
    good = (
        [torch.randn(5, 9, 16), torch.randn(3, 16, 16)]
        if function is mix
        else [torch.randn(5, 16), torch.randn(16, 32)]
    )
    function(*good)
    if which == 0 and corruption == "size":
        return  # any number of atoms is right
    bad = CORRUPTIONS[corruption](good[which])
    with pytest.raises((ValueError, TypeError), match=rf"{function.__name__}: (A|x|weights): expected .*, found "):
        function(*[bad if k == which else tensor for k, tensor in enumerate(good)])


@pytest.mark.parametrize(
    "option,message",
    [
        ({"l_max": 4}, r"l_max: expected 0\.\.3, found 4"),
        ({"cutoff": 0.0}, "cutoff: expected a positive length in angstrom, found 0.0"),
        ({"cutoff": float("nan")}, "cutoff: expected a positive length in angstrom, found nan"),
        ({"num_radial": 0}, "num_radial: expected at least 1, found 0"),
    ],
)
def test_every_option_of_the_edge_basis(option: Arguments, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge_basis(torch.ones(1, 3), **({"l_max": 2, "cutoff": 5.0, "num_radial": 4} | option))


def test_vectors_need_a_degree(random_graph: Callable[..., Edges]) -> None:
    edges = random_graph(3)
    E = len(edges.senders)
    message = VectorMessage(torch.randn(3, 3, C), torch.randn(R, 1, C), torch.randn(R, C))
    with pytest.raises(ValueError, match="convolve: vectors: expected l_max >= 1, found l_max = 0"):
        convolve(torch.randn(E, R), torch.ones(E, 1), torch.randn(3, C), torch.randn(R, 1, C), edges, message)
