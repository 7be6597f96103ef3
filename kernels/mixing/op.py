"""Dense mixing of channels as torch operations, on the native CPU kernels or on torch's own matrix product.

Both operations are bilinear, so each derivative is again one of them: they can be differentiated to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rung.kernels import backend, library
from rung.kernels.check import check_floating, check_l_max, check_tensor
from rung.kernels.invariants.table import DEGREE_OF_SIZE
from rung.kernels.mixing import reference
from rung.kernels.registration import needed, register

# Multiplications from which the native product is worth its call. MKL is as fast on the Intel processor measured; on
# an AMD one it reached only 35-40 % of the peak (the native product was not measured there).
LARGE_PRODUCT = 1 << 25


def mix(A_NLC: Tensor, weights_lCC: Tensor) -> Tensor:
    """Return A [N, L, C] with the channels of degree l multiplied by weights[l]: out[n,lm,:] = A[n,lm,:] @ weights[l].

    Any floating dtype (the native kernels: float32 and float64, a multiple of 16 channels, on a CPU).
    Raises ValueError, naming the argument, for a tensor that is not contiguous or does not fit the other.
    """
    check_floating("mix", "A", A_NLC, ("N", "L", "C"))
    C = A_NLC.shape[2]
    check_tensor("mix", "weights", weights_lCC, (check_l_max("mix", "A", A_NLC, "[N, L, C]") + 1, C, C), A_NLC)
    if is_native(A_NLC, C):
        mixed: Tensor = torch.ops.rung.mix(A_NLC, weights_lCC, False)
        return mixed
    return reference.mix(A_NLC, weights_lCC)


def matmul(x_NK: Tensor, weights_KC: Tensor) -> Tensor:
    """Return x @ weights [N, C], for many rows and few columns.

    Any floating dtype (the native kernels: float32 and float64, K and C multiples of 16, on a CPU). Raises ValueError,
    naming the argument, for a tensor that is not contiguous or does not fit the other.
    """
    check_floating("matmul", "x", x_NK, ("N", "K"))
    check_tensor("matmul", "weights", weights_KC, (x_NK.shape[1], "C"), x_NK)
    if is_large(x_NK, weights_KC) and is_native(x_NK, *weights_KC.shape):
        product: Tensor = torch.ops.rung.matmul(x_NK, weights_KC, False)
        return product
    return x_NK @ weights_KC


def is_large(x_NK: Tensor, weights_KC: Tensor) -> bool:
    """Return whether a product is worth a native call."""
    return x_NK.shape[0] * weights_KC.numel() >= LARGE_PRODUCT


def is_native(tensor: Tensor, *sizes: int) -> bool:
    """Return whether the native kernels are used: elsewhere torch's own product is as good, so nothing is warned of."""
    if tensor.device.type != "cpu" or tensor.dtype not in library.SUFFIX:
        return False
    return not any(size % backend.CHANNEL_MULTIPLE for size in sizes) and backend.native("mixing", tensor)


def _fake_mix_weights(A: Tensor, g: Tensor) -> Tensor:
    return A.new_empty(DEGREE_OF_SIZE[int(A.shape[1])] + 1, A.shape[2], A.shape[2])


def _fake_matmul(x: Tensor, weights: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[0 if transposed else 1])


def _register_pair(name: str, fake_product: Callable[..., Tensor], fake_weights: Callable[..., Tensor]) -> None:
    """Register out = name(x, w, transposed), with w [K, C] or its transpose, and name_weights(x, g) = x^T g."""

    def product(x: Tensor, w: Tensor, transposed: bool) -> Any:
        return getattr(torch.ops.rung, name)(x, w, transposed)

    def weights(x: Tensor, g: Tensor) -> Any:
        return getattr(torch.ops.rung, f"{name}_weights")(x, g)

    def save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, ctx.transposed = inputs
        ctx.save_for_backward(x, w)

    def product_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        need_x, need_w = needed(ctx, (x, w))
        g = g.contiguous()
        g_x = product(g, w, not ctx.transposed) if need_x else None
        g_w = weights(*((g, x) if ctx.transposed else (x, g))) if need_w else None
        return g_x, g_w, None

    def save_weights(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def weights_backward(ctx: Any, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, g = ctx.saved_tensors
        need_x, need_g = needed(ctx, (x, g))
        t = t.contiguous()
        return product(g, t, True) if need_x else None, product(x, t, False) if need_g else None

    register(
        f"{name}(Tensor x, Tensor w, bool transposed) -> Tensor",
        "mixing",
        lambda module, *arguments: getattr(module, name)(*arguments),
        fake=fake_product,
        save=save_product,
        backward=product_backward,
        devices=("cpu",),
    )
    register(
        f"{name}_weights(Tensor x, Tensor g) -> Tensor",
        "mixing",
        lambda module, *arguments: getattr(module, f"{name}_weights")(*arguments),
        fake=fake_weights,
        save=save_weights,
        backward=weights_backward,
        devices=("cpu",),
    )


_register_pair("mix", lambda A, weights, transposed: torch.empty_like(A), _fake_mix_weights)
_register_pair("matmul", _fake_matmul, lambda x, g: x.new_empty(x.shape[1], g.shape[1]))
