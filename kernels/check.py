"""Checks of an operation's arguments: an error names the operation, the argument, what was expected and found."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.kernels.edges import Edges
from rung.kernels.invariants.table import DEGREE_OF_SIZE


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous, of `shape` (words: any size) and of `like`'s dtype and device."""
    _check(op, name, tensor, shape, like.dtype, like.device)


def check_floating(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `tensor` is contiguous, floating-point and of `shape` (words: any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name}: expected a floating-point tensor, found {tensor.dtype}")
    _check(op, name, tensor, shape, tensor.dtype, tensor.device)


def check_l_max(op: str, name: str, tensor: Tensor, shape: str) -> int:
    """Return l_max of a tensor whose second size is L = (l_max + 1)^2; raise ValueError, with `shape`, for another."""
    l_max = DEGREE_OF_SIZE.get(tensor.shape[1])
    if l_max is None:
        raise ValueError(f"{op}: {name}: expected {shape} with L = 1, 4, 9 or 16, found {list(tensor.shape)}")
    return l_max


def check_edges(op: str, edges: Edges, num_edges: int, num_atoms: int, device: torch.device) -> None:
    """Raise ValueError unless the graph's arrays are int32, contiguous, on `device` and of these sizes.

    Their values are not read: that would wait for the device.
    """
    sizes = {"receivers": num_edges, "senders": num_edges, "row_ptr": num_atoms + 1, "reverse": num_edges}
    for name, size in sizes.items():
        _check(op, f"edges.{name}", getattr(edges, name), (size,), torch.int32, device)


def _check(
    op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, found {type(tensor).__name__}")
    right_shape = tensor.dim() == len(shape) and all(
        isinstance(expected, str) or expected == found for expected, found in zip(shape, tensor.shape, strict=True)
    )
    if right_shape and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        return
    sizes = ", ".join(str(size) for size in shape)
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    found += "" if tensor.is_contiguous() else ", not contiguous"
    raise ValueError(f"{op}: {name}: expected contiguous {dtype} [{sizes}] on {device}, found {found}")
