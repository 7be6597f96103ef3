"""SOAP against another implementation, over ranks, through files, and when a step must not happen."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer.optimizer.soap as reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rung.model.config import ModelConfig
from rung.model.potential import Potential
from rung.pretrain.eigenbasis import deal, eigenbasis, owner_cost, refreshed
from rung.pretrain.soap import Soap

SHAPES = ((6, 6), (5, 6), (3, 4, 5), (4, 5, 5), (4, 5, 5), (7,), (1, 4), (5, 6))
FREQUENCY = 4
RunRanks = Callable[..., list[Any]]


class In64Bits:
    """torch, whose float32 is float64: the reference rounds what it decomposes to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]


def make(parameters: list[nn.Parameter], **settings: Any) -> Soap:
    return Soap(groups(parameters), precondition_frequency=FREQUENCY, **settings)


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * (1 + step % 3)


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()


def snapshot(parameters: Sequence[Tensor], optimizer: Soap) -> list[Tensor]:
    """Return copies of all parameters and of every tensor of the state."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*parameters, *state)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_another_implementation_agrees(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps, 7 refreshments, with a rate that changes; what is moved is of the order of 0.1."""
    if dtype == torch.float64:
        monkeypatch.setattr(reference, "torch", In64Bits())
    expected, found = make_parameters(dtype), make_parameters(dtype)
    theirs = reference.SOAP(groups(expected), precondition_frequency=FREQUENCY)
    ours = make(found)
    for step in range(30):
        for optimizer, parameters in ((theirs, expected), (ours, found)):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / 100)
            train(parameters, optimizer, range(step, step + 1))
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().max() <= tolerance
    start = make_parameters(dtype)
    assert max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(start, found, strict=True)) > 0.03


# Ranks


def ranked(parameters: list[nn.Parameter], *, stagger: bool = False) -> Soap:
    """An optimizer of this forked rank, that shares out its work over all of them."""

    def exchange(buffers: list[Tensor]) -> None:
        for rank, buffer in enumerate(buffers):
            torch.distributed.broadcast(buffer, rank)

    place = {"rank": torch.distributed.get_rank(), "world": torch.distributed.get_world_size()}
    return make(parameters, stagger=stagger, exchange=exchange, **place)


def train_on_ranks(stagger: bool) -> tuple[list[np.ndarray], int]:
    parameters = make_parameters()
    optimizer = ranked(parameters, stagger=stagger)
    train(parameters, optimizer, range(15))
    covariances = [
        value for entry in optimizer.state.values() for name, value in entry.items() if name.startswith("covariance")
    ]
    return [p.detach().numpy() for p in parameters], sum(value.numel() for value in covariances)


@pytest.mark.slow
@pytest.mark.parametrize("stagger", [False, True])
def test_any_number_of_ranks_gives_the_same_bits(stagger: bool, run_ranks: RunRanks) -> None:
    alone = make_parameters()
    train(alone, make(alone, stagger=stagger), range(15))
    for world in (2, 4):
        results = run_ranks(train_on_ranks, world, stagger)
        for parameters, _ in results:
            assert_equal([torch.from_numpy(parameter) for parameter in parameters], alone)
        sizes = [size for _, size in results]
        whole = sum(size**2 for shape in SHAPES if len(shape) > 1 for size in shape if size > 1)
        assert sum(sizes) == whole and max(sizes) < whole


def numpy_share(optimizer: Soap) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in optimizer.share().items()}


def go_on(shares: list[dict[str, np.ndarray]], weights: list[np.ndarray], steps: range) -> tuple[Any, list[np.ndarray]]:
    parameters = [nn.Parameter(torch.from_numpy(weight).clone()) for weight in weights]
    optimizer = ranked(parameters)
    optimizer.load_shares([{name: torch.from_numpy(value) for name, value in share.items()} for share in shares])
    train(parameters, optimizer, steps)
    return numpy_share(optimizer), [parameter.detach().numpy() for parameter in parameters]


@pytest.mark.slow
def test_the_state_moves_between_worlds_bit_by_bit(run_ranks: RunRanks) -> None:
    """1 -> 2 -> 4 -> 1 ranks, at steps that are not multiples of the frequency."""
    undisturbed = make_parameters()
    optimizer = make(undisturbed)
    train(undisturbed, optimizer, range(24))
    parameters = make_parameters()
    first = make(parameters)
    train(parameters, first, range(6))
    shares, weights = [numpy_share(first)], [parameter.detach().numpy() for parameter in parameters]
    for world, steps in ((2, range(6, 11)), (4, range(11, 17)), (1, range(17, 24))):
        results = run_ranks(go_on, world, shares, weights, steps)
        shares, weights = [share for share, _ in results], results[-1][1]
    expected = numpy_share(optimizer)
    assert shares[0].keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(shares[0][name], value), name
    for weight, parameter in zip(weights, undisturbed, strict=True):
        assert np.array_equal(weight, parameter.detach().numpy())


def test_shares_are_complete_or_refused() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    assert optimizer.share() == {}
    train(parameters, optimizer, range(3))
    share = optimizer.share()
    assert {name.split(".")[0] for name in share} == {str(number) for number in range(len(SHAPES))}
    fresh = make(make_parameters())
    with pytest.raises(ValueError, match=r"lack 3\.basis1; load the shares of all ranks"):
        fresh.load_shares([{name: value for name, value in share.items() if name != "3.basis1"}])
    with pytest.raises(ValueError, match=r"3\.exp_avg: expected shape \(4, 5, 5\), found \(4, 5\)"):
        fresh.load_shares([share | {"3.exp_avg": torch.zeros(4, 5)}])
    fresh.load_shares([{}])
    assert fresh.share() == {}


# State


def test_state_survives_a_file_that_executes_nothing() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    train(parameters, optimizer, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    again = make(resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(parameters, optimizer, range(6, 14))
    train(resumed, again, range(6, 14))
    assert_equal(snapshot(resumed, again), snapshot(parameters, optimizer))


def test_all_state_is_in_the_attribute_and_may_be_swapped() -> None:
    """Two tasks that take turns with states of their own are two optimizers; an empty state is a new start."""
    parameters = make_parameters()
    optimizer = make(parameters)
    weights: dict[str, list[Tensor]] = {name: [p.detach().clone() for p in parameters] for name in "ab"}
    states: dict[str, Any] = {name: defaultdict(dict) for name in "ab"}
    for name, steps in (("a", range(5)), ("b", range(3)), ("a", range(5, 10)), ("b", range(3, 10))):
        optimizer.state = states[name]
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights[name], strict=True):
                parameter.copy_(weight)
        train(parameters, optimizer, steps)
        weights[name] = [parameter.detach().clone() for parameter in parameters]
    alone = make_parameters()
    train(alone, make(alone), range(10))
    assert_equal(weights["a"], alone)
    assert_equal(weights["b"], alone)


# Skipped steps, and a device that nothing waits for


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_no_bit(value: float, stagger: bool) -> None:
    """At steps with and without new bases, and at the very first."""
    parameters = make_parameters()
    optimizer = make(parameters, stagger=stagger)
    for step in range(2 * FREQUENCY + 2):
        before = snapshot(parameters, optimizer)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        after = snapshot(parameters, optimizer)
        assert_equal(after[: len(before)], before)
        assert all(bool(tensor.isfinite().all()) for tensor in after)
        optimizer.found_inf = torch.zeros(())
        train(parameters, optimizer, range(step, step + 1))
        assert step == 0 or not torch.equal(parameters[0], before[0])


def test_a_skipped_step_is_as_if_it_had_not_been() -> None:
    """Between two refreshments; the schedule of the bases counts calls."""
    expected, found = make_parameters(), make_parameters()
    whole, skipping = Soap(expected, precondition_frequency=20), Soap(found, precondition_frequency=20)
    train(expected, whole, range(10))
    for step in range(10):
        skipping.found_inf = torch.zeros(())
        train(found, skipping, range(step, step + 1))
        skipping.found_inf = torch.ones(())
        train(found, skipping, range(99, 100)) if step == 4 else None
    assert_equal(found, expected)


class NoWaiting(TorchDispatchMode):
    """Refuses the operator behind item(), tolist(), float() and bool()."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stagger", [False, True])
def test_no_step_waits_for_the_device(stagger: bool) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, stagger=stagger)
    optimizer.found_inf = torch.zeros(())
    for step in range(2 * FREQUENCY + 1):
        set_gradients(parameters, step)
        with NoWaiting():
            optimizer.step()
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        float(parameters[0].sum())


# Linear algebra


def symmetric(values: Sequence[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def test_refreshments_converge_to_eigenvectors_and_keep_their_places() -> None:
    matrix = symmetric([5.0, 0.1, 2.0, 1.0])[None]
    vectors = torch.linalg.eigh(matrix).eigenvectors
    order = torch.tensor([2, 0, 3, 1])  # not sorted by eigenvalue
    basis = vectors[..., order] + 0.05 * torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(60):
        basis = refreshed(matrix, basis)
    overlap = (basis.mT @ vectors[..., order])[0].abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("values", [[0.0] * 5, [1.0, 0, 0, 0, 0], [1e30, 1.0, 1e-30, 0, 0], [3.0, 3.0, 3.0, 3.0, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_of_deficient_matrices_are_orthogonal(values: list[float], dtype: torch.dtype) -> None:
    matrix = symmetric(values).to(dtype)[None]
    tolerance = 10 * torch.finfo(dtype).eps
    basis = eigenbasis(matrix)
    for _ in range(5):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=dtype)[None], atol=tolerance, rtol=0)
        basis = refreshed(matrix, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_does_not_reach_the_bases(value: float, dtype: torch.dtype) -> None:
    """Neither its own, nor that of its neighbour in the stack."""
    good = symmetric([3.0, 2.0, 1.0]).to(dtype)
    bad = good.clone()
    bad[0, 1] = bad[1, 0] = value
    matrices = torch.stack([bad, good])
    bases = eigenbasis(matrices)
    identity = torch.eye(3, dtype=dtype).expand(2, 3, 3)
    torch.testing.assert_close(bases.mT @ bases, identity)
    new = refreshed(matrices, bases)
    assert torch.equal(new[0], bases[0])
    torch.testing.assert_close(new[1], refreshed(good[None], bases[1:])[0])


def test_gradients_of_rank_one_and_zero_train() -> None:
    """What a rare element or fidelity gives: most matrices of the stack never see a gradient."""
    weight = nn.Parameter(torch.ones(3, 8, 8))
    direction = torch.outer(torch.arange(8.0), torch.ones(8))
    optimizer = Soap([weight], precondition_frequency=2)
    for step in range(30):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = direction * (1 + step % 2)
        optimizer.step()
    assert weight.isfinite().all()
    assert torch.equal(weight[1:], torch.ones(2, 8, 8))
    assert (weight[0] * direction).sum() < direction.sum() - 1


# Refusals, and how work is dealt


def test_refusals() -> None:
    parameters = make_parameters()
    with pytest.raises(ValueError, match="an exchange between the 2 data ranks"):
        make(parameters, rank=0, world=2)
    with pytest.raises(ValueError, match="float32 or float64"):
        Soap([nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    parameters[4].grad = None
    with pytest.raises(ValueError, match=r"parameter 4 of shape \(4, 5, 5\) has no gradient"):
        optimizer.step()


def test_work_is_dealt_evenly() -> None:
    assert deal([1.0, 5.0, 4.0, 2.0, 3.0], 2) == [0, 0, 1, 0, 1]
    model = Potential(ModelConfig(elements=(1, 6, 7, 8), fidelities=("a", "b"), channels=32, num_layers=3))
    costs = [owner_cost(tuple(parameter.shape), 10) for parameter in model.parameters()]
    for hands in (2, 4):
        loads = [0.0] * hands
        for hand, cost in zip(deal(costs, hands), costs, strict=True):
            loads[hand] += cost
        assert sum(loads) == pytest.approx(sum(costs)) and max(loads) <= sum(costs) / hands + max(costs)
        assert max(loads) < 1.1 * min(loads)
