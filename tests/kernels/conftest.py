"""Random graphs, the tolerances of the native kernels, and the devices that they are tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.kernels import Edges, library, use_backend

# Largest error of a native result: the norm of the difference over the norm of the float64 reference.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A device that the native kernels are tested on."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu":
        try:
            library.compiler()
        except library.Unavailable as error:
            pytest.skip(str(error))
    return name


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the reference and again on the native kernels of the CPU."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def random_graph() -> Callable[..., Edges]:
    """Return a function that makes a symmetric graph of random pairs; its last `isolated` atoms have no neighbours."""

    def make(num_atoms: int, probability: float = 0.6, isolated: int = 1) -> Edges:
        linked = torch.rand(num_atoms, num_atoms).triu(1) > 1 - probability
        linked[:, num_atoms - isolated :] = False
        receivers, senders = (linked | linked.T).nonzero(as_tuple=True)
        counts = torch.bincount(receivers, minlength=num_atoms)
        row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        place = {pair: e for e, pair in enumerate(zip(receivers.tolist(), senders.tolist(), strict=True))}
        reverse = torch.tensor([place[j, i] for i, j in place], dtype=torch.int32)
        return Edges(receivers.int(), senders.int(), row_ptr.int(), reverse)

    return make


Function = Callable[..., Any]


@pytest.fixture
def compare() -> Callable[..., None]:
    """Return a check of an operation's value and first and second derivatives against its reference in float64.

    compare(native, reference, inputs): both functions take tensors like `inputs`, which fix dtype and device, and
    return one tensor or several. The cotangents are random, and second derivatives are taken with respect to the
    inputs and the first cotangents. `factor` multiplies the tolerance.
    """

    def run(function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], seeds: Sequence[Tensor]) -> Any:
        inputs = [tensor.requires_grad_() for tensor in inputs]
        cotangents = [tensor.requires_grad_() for tensor in cotangents]
        values = function(*inputs)
        values = [values] if isinstance(values, Tensor) else list(values)
        first = torch.autograd.grad(values, inputs, cotangents, create_graph=True)
        second = torch.autograd.grad(first, [*inputs, *cotangents], seeds, allow_unused=True)
        return [*values, *first, *second]

    def check(native: Function, reference: Function, inputs: Sequence[Tensor], factor: float = 1.0) -> None:
        values = reference(*inputs)
        values = [values] if isinstance(values, Tensor) else list(values)
        cotangents, seeds = ([torch.randn_like(tensor) for tensor in tensors] for tensors in (values, inputs))
        found = run(native, *([tensor.detach().clone() for tensor in group] for group in (inputs, cotangents, seeds)))
        exact = [[tensor.detach().cpu().double() for tensor in group] for group in (inputs, cotangents, seeds)]
        for k, (result, expected) in enumerate(zip(found, run(reference, *exact), strict=True)):
            if expected is None:  # linear in this input
                assert result is None or result.abs().max() == 0
                continue
            assert result.shape == expected.shape and result.dtype == inputs[0].dtype
            error = (result.detach().cpu().double() - expected.detach()).norm().item()
            assert error <= factor * TOLERANCE[result.dtype] * expected.norm().item(), f"result {k}"

    return check
