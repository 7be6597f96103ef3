"""How an operation becomes a differentiable operation of torch, and which gradients a run of autograd really uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("rung", "FRAGMENT")  # type: ignore[no-untyped-call]
_register_fake: Any = torch.library.register_fake
_DEVICES = ("cpu", "cuda")


def register(
    schema: str,
    folder: str,
    call: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
    devices: Iterable[str] = _DEVICES,
) -> None:
    """Define torch.ops.rung.<name> by its schema, `name(arguments) -> results`.

    `call(module, *arguments)` computes it with the module of the operation's folder that is named after the device,
    which is imported at the first call. `fake` makes the results without their values; `save` and `backward` are the
    setup_context and the backward of torch.library.register_autograd.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(name, partial(_call, call, folder, device), device.upper())
    _register_fake(f"rung::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"rung::{name}", backward, setup_context=save, lib=_LIBRARY)


def _call(call: Callable[..., Any], folder: str, device: str, *arguments: Any) -> Any:
    return call(_module(folder, device), *arguments)


@cache
def _module(folder: str, device: str) -> ModuleType:
    return import_module(f"rung.kernels.{folder}.{device}")


def needed(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
    """Return which of an operation's first inputs need a gradient in the backward pass that is running.

    `ctx.needs_input_grad` only says which inputs require one. It is also not needed when the pass stops before it
    (`torch.autograd.grad` with other inputs), and not for a leaf whose requires_grad was switched off after the forward
    pass, which is how `Potential` says that no loss is differentiated with respect to the geometry.
    """
    flags = list(ctx.needs_input_grad[: len(inputs)])
    if torch.compiler.is_compiling():
        return flags
    nodes = iter(ctx.next_functions)  # one for each tensor, none for None
    for k, tensor in enumerate(inputs):
        if tensor is None:
            continue
        node = next(nodes)[0]
        flags[k] = flags[k] and not (tensor.is_leaf and not tensor.requires_grad) and _is_executed(node)
    return flags


def _is_executed(node: Any) -> bool:
    if node is None:
        return False
    try:
        # Private in torch, but the only exact answer; it raises for a leaf that is itself the input of autograd.grad.
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True


def no_third_derivative(op: str) -> Callable[..., NoReturn]:
    """Return a backward that raises NotImplementedError: the native kernels are differentiated by hand, twice."""

    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op}: the native kernels can be differentiated twice, not three times; "
            "use_backend('reference') has no limit"
        )

    return backward
