"""A tape of scalar operations: expressions with value numbering, and their derivatives as more expressions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """One operation: a `constant` (its value), an `input` (its place, for example "A[3]"), + or * (their operands)."""

    op: str
    operands: tuple[int, ...] = ()
    value: float = 0.0
    place: str = ""


class Tape:
    """The operations, each after its operands; an operation that is asked for again is the same number."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._constants: list[float] = []

    def _expression(self, node: Node) -> Expression:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return Expression(self, self._numbers[node])

    def constant(self, value: float) -> Expression:
        """Return a number; one that differs from an earlier one by rounding only is the earlier one."""
        for known in self._constants:
            if math.isclose(value, known, rel_tol=1e-14, abs_tol=0):
                return self._expression(Node("constant", value=known))
        self._constants.append(float(value))
        return self._expression(Node("constant", value=float(value)))

    def input(self, place: str) -> Expression:
        """Return an argument, or an element of one, named as in C++."""
        return self._expression(Node("input", place=place))

    def inputs(self, array: str, size: int) -> list[Expression]:
        """Return the elements of an array."""
        return [self.input(f"{array}[{k}]") for k in range(size)]

    def operation(self, op: str, *operands: Expression) -> Expression:
        """Return an operation as it stands; `Expression` simplifies."""
        return self._expression(Node(op, tuple(operand.number for operand in operands)))


class Expression:
    """A value on the tape. Sums and products are simplified: constants are folded and come first, operands sorted."""

    __slots__ = ("tape", "number")

    def __init__(self, tape: Tape, number: int) -> None:
        self.tape = tape
        self.number = number

    @property
    def node(self) -> Node:
        return self.tape.nodes[self.number]

    @property
    def constant(self) -> float | None:
        """The value of a constant, None for anything else."""
        return self.node.value if self.node.op == "constant" else None

    def operands(self) -> list[Expression]:
        return [Expression(self.tape, number) for number in self.node.operands]

    def _with(self, other: Expression | float) -> Expression:
        return other if isinstance(other, Expression) else self.tape.constant(other)

    def __add__(self, other: Expression | float) -> Expression:
        other = self._with(other)
        a, b = self.constant, other.constant
        if a is not None and b is not None:
            return self.tape.constant(a + b)
        if a == 0:
            return other
        if b == 0:
            return self
        return self.tape.operation("+", *sorted((self, other), key=lambda operand: operand.number))

    def __mul__(self, other: Expression | float) -> Expression:
        other = self._with(other)
        a, b = self.constant, other.constant
        if a is not None and b is not None:
            return self.tape.constant(a * b)
        if b is not None:
            return other * self
        if a is None:
            return self.tape.operation("*", *sorted((self, other), key=lambda operand: operand.number))
        if a == 0:
            return self
        if a == 1:
            return other
        if other.node.op == "*":  # a (c x) = (a c) x
            inner, rest = other.operands()
            if inner.constant is not None:
                return self.tape.constant(a * inner.constant) * rest
        return self.tape.operation("*", self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __sub__(self, other: Expression | float) -> Expression:
        return self + -1.0 * self._with(other)

    def __neg__(self) -> Expression:
        return -1.0 * self


def total(terms: Sequence[Expression]) -> Expression:
    """Return the sum of at least one term."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def dot(a: Sequence[Expression], b: Sequence[Expression]) -> Expression:
    """Return the sum of the products of two equally long lists."""
    return total([x * y for x, y in zip(a, b, strict=True)])


def partial_derivatives(x: Expression) -> list[tuple[Expression, Expression]]:
    """Return each operand of one operation with the derivative with respect to it."""
    if x.node.op == "+":
        return [(operand, x.tape.constant(1)) for operand in x.operands()]
    if x.node.op == "*":
        a, b = x.operands()
        return [(a, 2.0 * a)] if a.number == b.number else [(a, b), (b, a)]
    return []


def reverse(
    outputs: Sequence[Expression], cotangents: Sequence[Expression], wrt: Sequence[Expression]
) -> list[Expression]:
    """Return the gradients of sum_k cotangents[k] outputs[k] with respect to the expressions `wrt`."""
    tape = outputs[0].tape
    gradients: dict[int, Expression] = {}

    def add(number: int, gradient: Expression) -> None:
        gradients[number] = gradients[number] + gradient if number in gradients else gradient

    for output, cotangent in zip(outputs, cotangents, strict=True):
        add(output.number, cotangent)
    for number in range(max(output.number for output in outputs), -1, -1):
        if number in gradients:
            for operand, derivative in partial_derivatives(Expression(tape, number)):
                if operand.constant is None:
                    add(operand.number, gradients[number] * derivative)
    return [gradients.get(x.number, tape.constant(0)) for x in wrt]


def forward(outputs: Sequence[Expression], tangents: Mapping[int, Expression]) -> list[Expression]:
    """Return the derivatives of the outputs when the expressions with the numbers in `tangents` move along those."""
    tape = outputs[0].tape
    moves: list[Expression] = []
    zero = tape.constant(0)
    for number in range(max(output.number for output in outputs) + 1):
        if number in tangents:
            moves.append(tangents[number])
            continue
        move = zero
        for operand, derivative in partial_derivatives(Expression(tape, number)):
            move = move + moves[operand.number] * derivative
        moves.append(move)
    return [moves[output.number] for output in outputs]
