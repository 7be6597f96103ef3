"""The code generator: derivatives on closed forms, generated programs against the references, files up to date."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rung.kernels.codegen import OPERATIONS, sources
from rung.kernels.codegen.emit import Program
from rung.kernels.codegen.tape import Expression, Tape, forward, reverse, total
from rung.kernels.edge_basis import reference as edge_basis_reference
from rung.kernels.invariants import reference as invariants_reference
from rung.kernels.invariants.table import NUM_INVARIANTS

# Value, VJP and VJP of VJP, a fused multiplication and addition counted as one. Fewer is progress: lower the number.
OPERATION_COUNTS = {
    ("invariants", 1): [3, 6, 12],
    ("invariants", 2): [51, 119, 274],
    ("invariants", 3): [179, 425, 998],
    ("edge_basis", 1): [3, 12, 40],
    ("edge_basis", 2): [18, 42, 124],
    ("edge_basis", 3): [51, 121, 349],
}
degrees = pytest.mark.parametrize("l_max", [1, 2, 3])


def run(program: Program, sizes: dict[str, int], **arguments: Any) -> list[Tensor]:
    """Return the output arrays of a program's C++ text, which is also Python after a few replacements."""
    header, body = program.text().split("{\n")
    names = re.findall(r"[\w]+ (\w+)[,)]", header.split("(")[-1])
    assert names == [*arguments, *sizes]  # the order of the arguments
    outputs: dict[str, Any] = {name: [None] * size for name, size in sizes.items()}
    python = body.removesuffix("}").replace("const F ", "").replace("F{}", "zero").replace(";", "")
    zero = torch.zeros(len(next(iter(arguments.values()))[0]), dtype=torch.float64)
    exec(re.sub(r"^ +", "", python, flags=re.MULTILINE), {**arguments, **outputs, "T": float, "zero": zero})
    return [torch.stack(outputs[name], dim=1) for name in sizes]


def value(x: Expression, inputs: dict[str, float]) -> float:
    if x.node.op == "input":
        return inputs[x.node.place]
    if x.constant is not None:
        return x.constant
    a, b = (value(operand, inputs) for operand in x.operands())
    return a + b if x.node.op == "+" else a * b


def test_the_generated_files_are_up_to_date() -> None:
    for path, text in sources().items():
        assert path.read_text() == text, f"{path.name} of {path.parent.name}: run `python -m rung.kernels.codegen`"


def test_equal_expressions_are_one_operation_and_trivial_ones_none() -> None:
    tape = Tape()
    x, y = tape.inputs("x", 2)
    assert (x * y + 1.0).number == (1.0 + y * x).number
    assert (x * 1.0).number == (x + 0.0).number == (2.0 * (0.5 * x)).number == x.number
    assert (x * 0.0).constant == 0.0 and (tape.constant(2) * 3.0 - 1.0).constant == 5.0
    assert ((0.1 + 0.2) * x).number == (0.3 * x).number  # equal but for rounding


def test_first_and_second_derivatives_of_closed_forms() -> None:
    tape = Tape()
    x, y = tape.inputs("x", 2)
    t = tape.inputs("t", 2)
    point = {"x[0]": 0.7, "x[1]": -1.3, "t[0]": 0.4, "t[1]": 2.0}
    a, b, c, d = point.values()
    f = [x * x * y - 3.0 * y + x, y * y * y]
    (first, _), gradient = reverse(f, [tape.constant(1), tape.constant(0)], [x, y]), reverse(f, t, [x, y])
    assert value(first, point) == pytest.approx(2 * a * b + 1)
    assert [value(g, point) for g in gradient] == pytest.approx([c * (2 * a * b + 1), c * (a * a - 3) + 3 * d * b * b])
    moved = forward(f, {x.number: t[0], y.number: t[1]})
    assert [value(m, point) for m in moved] == pytest.approx([(2 * a * b + 1) * c + (a * a - 3) * d, 3 * b * b * d])
    second = reverse([total(moved)], [tape.constant(1)], [x, y])
    assert [value(s, point) for s in second] == pytest.approx([2 * b * c + 2 * a * d, 2 * a * c + 6 * b * d])
    assert value(reverse([x], [x], [y])[0], point) == 0


@degrees
@pytest.mark.parametrize("op", OPERATIONS)
def test_operation_counts_do_not_grow(op: str, l_max: int) -> None:
    counts = [program.num_operations for program in OPERATIONS[op](l_max)]
    assert all(found <= expected for found, expected in zip(counts, OPERATION_COUNTS[op, l_max], strict=True)), counts


@degrees
def test_invariants_and_their_derivatives_are_those_of_the_reference(l_max: int) -> None:
    L, K = (l_max + 1) ** 2, NUM_INVARIANTS[l_max]
    A, g, u = (torch.randn(50, size, dtype=torch.float64, requires_grad=True) for size in (L, K, L))
    I = invariants_reference.invariants(A[:, :, None])[:, :, 0]  # noqa: E741
    (gA,) = torch.autograd.grad(I, A, g, create_graph=True)
    dg, dA = torch.autograd.grad(gA, (g, A), u)
    forward_, backward, backward2 = OPERATIONS["invariants"](l_max)
    arrays = {name: list(array.detach().unbind(1)) for name, array in (("A", A), ("g", g), ("u", u))}
    found = run(forward_, {"I": K}, A=arrays["A"]) + run(backward, {"gA": L}, A=arrays["A"], g=arrays["g"])
    found += run(backward2, {"dg": K, "dA": L}, **arrays)
    for result, expected in zip(found, (I, gA, dg, dA), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-12)


@degrees
def test_harmonics_and_their_derivatives_are_those_of_the_reference(l_max: int) -> None:
    L = (l_max + 1) ** 2
    x, g, t = (torch.randn(50, size, dtype=torch.float64, requires_grad=True) for size in (3, L, 3))
    _, Y = edge_basis_reference.edge_basis(x, cutoff=5.0, num_radial=1, l_max=l_max)
    (gx,) = torch.autograd.grad(Y, x, g, create_graph=True)
    dg, dx = torch.autograd.grad(gx, (g, x), t)
    forward_, backward, backward2 = OPERATIONS["edge_basis"](l_max)
    r = 1 / x.detach().norm(dim=1)
    n = list((x.detach() * r[:, None]).unbind(1))
    columns = {name: list(array.detach().unbind(1)) for name, array in (("g", g), ("t", t))}
    found = run(forward_, {"Y": L}, n=n) + run(backward, {"gx": 3}, n=n, r=r, g=columns["g"])
    found += run(backward2, {"dg": L, "dx": 3}, n=n, r=r, **columns)
    for result, expected in zip(found, (Y, gx, dg, dx), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-11, atol=1e-11)
