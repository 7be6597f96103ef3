"""Which implementation an operation uses: the native kernels or the plain PyTorch reference.

`auto` (the default) takes the native kernels wherever they can be had, and says once, with the reason, where they
cannot. `native` is an error there instead. `reference` never compiles anything. The choice is made by `use_backend` or
the environment variable RUNG_KERNELS.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.library import Unavailable

logger = logging.getLogger(__name__)

CHOICES = ("auto", "native", "reference")
CHANNEL_MULTIPLE = 16
NATIVE_RADIAL = range(4, 17)
NATIVE_L_MAX = range(1, 4)


class ReferenceWarning(UserWarning):
    """An operation runs on the PyTorch reference because the native kernels cannot be used."""


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(CHOICES)}, found '{name}'")
    return name


_choice: str | None = None  # None: not asked yet, see RUNG_KERNELS
_reasons: dict[tuple[object, ...], str] = {}  # kind of input -> why the native kernels cannot take it, or ""
_warned: set[str] = set()
_described: set[str] = set()


def backend() -> str:
    """Return the choice in force: auto, native or reference; raise ValueError for an unknown RUNG_KERNELS."""
    global _choice
    if _choice is None:
        _choice = _checked(os.environ.get("RUNG_KERNELS") or "auto", "RUNG_KERNELS")
    return _choice


class use_backend:
    """Choose auto, native or reference from now on, or, in a `with` statement, until its end.

    Raises ValueError for any other name.
    """

    def __init__(self, name: str) -> None:
        global _choice
        self._before = _choice
        _choice = _checked(name, "use_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _choice
        _choice = self._before


def native(
    op: str,
    tensor: Tensor,
    *,
    channels: int = CHANNEL_MULTIPLE,
    num_radial: int | None = None,
    l_max: int | None = None,
) -> bool:
    """Return whether an operation (the name of its folder) takes the native kernels for inputs like `tensor`.

    The first answer for a kind of input builds what is needed, and is logged; a fall back to the reference warns once
    for each reason. Raises ValueError where the backend is `native` and the kernels cannot be used.
    """
    choice = backend()
    if choice == "reference":
        return False
    reason = _reason(op, tensor, channels, num_radial, l_max)
    if not reason:
        return True
    if choice == "native":
        raise ValueError(f"{op}: backend 'native' was asked for, but the kernels cannot be used: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{op} runs on the PyTorch reference, which is many times slower: {reason}. "
            "(RUNG_KERNELS=reference or use_backend('reference') asks for that and silences this.)",
            ReferenceWarning,
            stacklevel=3,
        )
    return False


def _reason(op: str, tensor: Tensor, channels: int, num_radial: int | None, l_max: int | None) -> str:
    """Return what `_why_not` says; asked once for a kind of input, as it may compile."""
    key = (op, tensor.device, tensor.dtype, channels, num_radial, l_max)
    if key not in _reasons:
        _reasons[key] = _why_not(*key)
    return _reasons[key]


def _why_not(
    op: str, device: torch.device, dtype: torch.dtype, channels: int, num_radial: int | None, l_max: int | None
) -> str:
    """Make the native kernels ready; return why that is not possible, an empty string when it is."""
    if device.type not in ("cpu", "cuda"):
        return f"there are none for {device.type} devices"
    if dtype not in library.SUFFIX:
        return f"they compute in float32 and float64, not {dtype}"
    if channels % CHANNEL_MULTIPLE:
        return f"they take a multiple of {CHANNEL_MULTIPLE} channels, not {channels}"
    for name, value, known in (("radial functions", num_radial, NATIVE_RADIAL), ("for l_max", l_max, NATIVE_L_MAX)):
        if value is not None and value not in known:
            return f"they take {known[0]} to {known[-1]} {name}, not {value}"
    try:
        description = import_module(f"rung.kernels.{op}.{device.type}").prepare(device, num_radial, l_max)
    except Unavailable as error:
        return str(error)
    if description not in _described:
        _described.add(description)
        logger.info("native kernels on %s: %s", device, description)
    return ""


def description(like: Tensor, *, channels: int, num_radial: int, l_max: int) -> str:
    """Return, for a log, what runs for such inputs and why; makes the native kernels ready where they are used."""
    choice = backend()
    if choice == "reference":
        return "PyTorch reference (as asked)"
    for op in ("edge_basis", "convolution", "invariants"):
        if not native(op, like, channels=channels, num_radial=num_radial, l_max=l_max):
            return f"PyTorch reference: {_reason(op, like, channels, num_radial, l_max)}"
    return f"native, {'; '.join(sorted(_described))}"
