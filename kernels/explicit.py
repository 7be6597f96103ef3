"""The native operations and their backward passes as plain functions, for a caller that differentiates by hand.

Nothing is recorded for autograd and no argument is checked: tensors must be contiguous, of one dtype and on one device,
as the operations in `rung.kernels` demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from rung.kernels import backend
from rung.kernels.mixing import cpu, reference
from rung.kernels.mixing.op import is_large, is_native


class Operations(NamedTuple):
    """The operations of one device, with the arguments of the operations' `cpu.py`."""

    edge_basis: Callable[[Tensor, float, int, int], tuple[Tensor, Tensor]]
    edge_basis_backward: Callable[[Tensor, Tensor | None, Tensor | None, float, int, int], Tensor]
    convolve: Callable[..., Tensor]
    convolve_backward: Callable[..., Sequence[Tensor | None]]
    invariants: Callable[[Tensor], Tensor]
    invariants_backward: Callable[[Tensor, Tensor], Tensor]
    mix: Callable[[Tensor, Tensor], Tensor]  # A [N, L, C], weights [l, C, C]
    matmul: Callable[[Tensor, Tensor], Tensor]  # x [N, K], weights [K, C]; K and C multiples of 16


def native_operations(like: Tensor, *, channels: int, num_radial: int, l_max: int) -> Operations | None:
    """Return the native operations for tensors like `like`, None where the reference is in use (see `use_backend`)."""
    if not (
        backend.native("edge_basis", like, num_radial=num_radial, l_max=l_max)
        and backend.native("convolution", like, channels=channels, num_radial=num_radial, l_max=l_max)
        and backend.native("invariants", like, channels=channels, l_max=l_max)
    ):
        return None
    return _operations(like.device.type, is_native(like, channels))


@cache
def _operations(device: str, native_mixing: bool) -> Operations:
    edge_basis, convolution, invariants = (
        import_module(f"rung.kernels.{op}.{device}") for op in ("edge_basis", "convolution", "invariants")
    )
    return Operations(
        edge_basis.forward,
        edge_basis.backward,
        convolution.forward,
        convolution.backward,
        invariants.forward,
        invariants.backward,
        _native_mix if native_mixing else reference.mix,
        _native_matmul if native_mixing else torch.mm,
    )


def _native_mix(A: Tensor, weights: Tensor) -> Tensor:
    return cpu.mix(A, weights, False)


def _native_matmul(x: Tensor, weights: Tensor) -> Tensor:
    return cpu.matmul(x, weights, False) if is_large(x, weights) else torch.mm(x, weights)
