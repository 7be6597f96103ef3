"""Bilinear products with sparse constant tables: operations that are closed under differentiation, to any order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Term(NamedTuple):
    """One nonzero of a table: out[row] += coefficient * left[i] * right[j]."""

    row: int
    left: int
    right: int
    coefficient: float


@dataclass(frozen=True, eq=False)
class Table:
    """The nonzeros of constants [num_rows, num_left, num_right]."""

    terms: tuple[Term, ...]
    num_rows: int
    num_left: int
    num_right: int

    @cached_property
    def gradient_left(self) -> Table:
        """The table that takes (gradient of out, right) to the gradient of left."""
        terms = tuple(Term(i, row, j, coefficient) for row, i, j, coefficient in self.terms)
        return Table(terms, self.num_left, self.num_rows, self.num_right)

    @cached_property
    def gradient_right(self) -> Table:
        """The table that takes (gradient of out, left) to the gradient of right."""
        terms = tuple(Term(j, row, i, coefficient) for row, i, j, coefficient in self.terms)
        return Table(terms, self.num_right, self.num_rows, self.num_left)

    @cached_property
    def gradient_both(self) -> Table:
        """The sum of the two, when left and right are the same factors."""
        terms = self.gradient_left.terms + self.gradient_right.terms
        return Table(terms, self.num_left, self.num_rows, self.num_left)


def bilinear(left: Tensor, right: Tensor, table: Table) -> Tensor:
    """Return out[row] = sum over the table of coefficient * left[i] * right[j], elementwise in the other axes."""
    return cast(Tensor, _Bilinear.apply(left, right, table))  # type: ignore[no-untyped-call]


def quadratic(factors: Tensor, table: Table) -> Tensor:
    """Return `bilinear(factors, factors, table)`; its gradient is one product instead of two."""
    return cast(Tensor, _Quadratic.apply(factors, table))  # type: ignore[no-untyped-call]


def _sum_of_terms(left: Tensor, right: Tensor, table: Table) -> Tensor:
    """Add each term in place: autograd's own products would store and sum as many temporaries."""
    out = left.new_zeros((table.num_rows, *left.shape[1:]))
    rows, lefts, rights = out.unbind(), left.unbind(), right.unbind()
    for row, i, j, coefficient in table.terms:
        rows[row].addcmul_(lefts[i], rights[j], value=coefficient)
    return out


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, table: Table) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.table = table
        return _sum_of_terms(left, right, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        left, right = ctx.saved_tensors
        grad_left = bilinear(gradient, right, ctx.table.gradient_left) if ctx.needs_input_grad[0] else None
        grad_right = bilinear(gradient, left, ctx.table.gradient_right) if ctx.needs_input_grad[1] else None
        return grad_left, grad_right, None


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor, table: Table) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.table = table
        return _sum_of_terms(factors, factors, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (factors,) = ctx.saved_tensors
        return bilinear(gradient, factors, ctx.table.gradient_both), None
