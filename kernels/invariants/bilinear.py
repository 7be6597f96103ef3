"""Bilinear products with sparse constant tables: closed under differentiation, to any order."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Term(NamedTuple):
    """One nonzero of a table: out[row] += coefficient * left[i] * right[j]."""

    row: int
    left: int
    right: int
    coefficient: float


Terms = tuple[Term, ...]


def bilinear(left: Tensor, right: Tensor, terms: Terms, num_rows: int) -> Tensor:
    """Return out [num_rows, ...] = sum over terms of coefficient * left[i] * right[j], elementwise in the other axes."""
    return cast(Tensor, _Bilinear.apply(left, right, terms, num_rows))  # type: ignore[no-untyped-call]


def quadratic(factors: Tensor, terms: Terms, num_rows: int) -> Tensor:
    """Return `bilinear(factors, factors, terms, num_rows)`; its gradient is one product instead of two."""
    return cast(Tensor, _Quadratic.apply(factors, terms, num_rows))  # type: ignore[no-untyped-call]


def _sum_of_terms(left: Tensor, right: Tensor, terms: Terms, num_rows: int) -> Tensor:
    """Add each term in place: autograd's own products would store and sum as many temporaries."""
    out = left.new_zeros((num_rows, *left.shape[1:]))
    rows, lefts, rights = out.unbind(), left.unbind(), right.unbind()
    for row, i, j, coefficient in terms:
        rows[row].addcmul_(lefts[i], rights[j], value=coefficient)
    return out


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, terms: Terms, num_rows: int) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.terms = terms
        return _sum_of_terms(left, right, terms, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = gradients
        left, right = ctx.saved_tensors
        grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_left = bilinear(grad, right, _transposed_left(ctx.terms), len(left))
        if ctx.needs_input_grad[1]:
            grad_right = bilinear(grad, left, _transposed_right(ctx.terms), len(right))
        return grad_left, grad_right, None, None


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factors: Tensor, terms: Terms, num_rows: int) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.terms = terms
        return _sum_of_terms(factors, factors, terms, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = gradients
        (factors,) = ctx.saved_tensors
        terms = _transposed_left(ctx.terms) + _transposed_right(ctx.terms)
        return bilinear(grad, factors, terms, len(factors)), None, None


@cache
def _transposed_left(terms: Terms) -> Terms:
    """Return the terms of the gradient with respect to the left factors, of the row's gradient and the right factors."""
    return tuple(Term(i, row, j, coefficient) for row, i, j, coefficient in terms)


@cache
def _transposed_right(terms: Terms) -> Terms:
    return tuple(Term(j, row, i, coefficient) for row, i, j, coefficient in terms)
