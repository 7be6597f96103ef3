"""CUDA kernels, compiled at run time for the device at hand and launched on torch's current stream.

A module is one `cuda.cu` compiled for one set of macros by NVRTC, through NVIDIA's `cuda.bindings`: torch's CUDA builds
require both, and no CUDA toolkit is needed. Cubins are kept in the same cache as the CPU libraries.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rung.kernels import library
from rung.kernels.library import KERNELS, Unavailable

logger = logging.getLogger(__name__)

REAL = {torch.float32: "float", torch.float64: "double"}
_ALIGNMENT = 16  # bytes; the kernels' widest load
_INSTALL = "torch's CUDA builds bring it; else install rung[cuda]"

# A tensor or none: its pointer. An integer: int64. A tuple of tensors: a structure of pointers. A ctypes number: as is.
Argument = Tensor | None | int | tuple[Tensor | None, ...] | ctypes.c_float | ctypes.c_double


class Kernels(Protocol):
    """The kernels of a module, by name."""

    def launch(self, name: str, grid: tuple[int, ...], block: int, *arguments: Argument) -> None:
        """Start a kernel on `grid` blocks of `block` threads; do nothing for an empty grid."""


def load(op: str, device: torch.device, macros: Mapping[str, object]) -> Kernels:
    """Return the kernels of an operation (the name of its folder) compiled with -DRUNG_<MACRO>=value.

    Raises Unavailable when NVRTC or the driver is missing, RuntimeError when a source does not compile.
    """
    return _load(op, device, tuple(sorted(macros.items())))


@cache
def prepare(device: torch.device) -> str:
    """Compile and load an empty kernel; return what compiles. Raises Unavailable when that is not possible."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise Unavailable("torch has no CUDA device here")
    arch = architecture(device)
    try:
        _Module("prepare", device, _compile('extern "C" __global__ void nothing() {}', "nothing.cu", [], arch, []))
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return f"CUDA, compiled by NVRTC {_version()} for {arch}"


def aligned(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a copy when its memory does not begin where the kernels' widest loads may."""
    return tensor if tensor is None or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def values(arguments: Iterable[Argument]) -> list[Any]:
    """Return a kernel's arguments as C values."""
    return [_value(argument) for argument in arguments]


def _value(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return (ctypes.c_void_p * len(argument))(*map(library.pointer, argument))
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(library.pointer(argument))
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


# ---- compiling


def architecture(device: torch.device) -> str:
    """Return what to compile for: the device's own sm_XY or, for a newer device, the newest compute_XY before it."""
    major, minor = torch.cuda.get_device_capability(device)
    known = _checked("NVRTC", _nvrtc().nvrtcGetSupportedArchs())
    if (own := 10 * major + minor) in known:
        return f"sm_{own}"
    if older := [arch for arch in known if arch < own]:
        return f"compute_{max(older)}"
    raise Unavailable(f"NVRTC {_version()} does not compile for compute capability {major}.{minor}")


def compile_op(op: str, arch: str, macros: Mapping[str, object]) -> bytes:
    """Return an operation's cubin, or its PTX for an `arch` that is not a real one; raise RuntimeError with the log."""
    source = KERNELS / op / "cuda.cu"
    return _compile(source.read_text(), str(source), _headers(op), arch, _defines(macros))


def _headers(op: str) -> list[Path]:
    return [*sorted(KERNELS.glob("*.h")), *sorted((KERNELS / op).glob("*.h")), *sorted((KERNELS / op).glob("*.cuh"))]


def _defines(macros: Mapping[str, object]) -> list[str]:
    return [f"-DRUNG_{name}={value}" for name, value in sorted(macros.items())]


def _compile(source: str, name: str, headers: list[Path], arch: str, defines: list[str]) -> bytes:
    nvrtc = _nvrtc()
    texts, names = [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    created = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(headers), texts, names)
    program = _checked("NVRTC", created)
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", "--std=c++17", *defines)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = bytearray(_checked("NVRTC", nvrtc.nvrtcGetProgramLogSize(program)))
            _checked("NVRTC", nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").rstrip("\0")
            raise RuntimeError(f"NVRTC: {name} does not compile for {arch}:\n{text}")
        kind = "CUBIN" if arch.startswith("sm_") else "PTX"
        code = bytearray(_checked("NVRTC", getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
        _checked("NVRTC", getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _cached(op: str, arch: str, macros: Mapping[str, object]) -> bytes:
    """Return the code from the cache; compile it at first use, in one process if several ask."""
    defines = _defines(macros)
    words = (arch, _version(), *defines)
    digest = library.source_digest([KERNELS / op / "cuda.cu", *_headers(op)], *words)
    label = "-".join([op, *(f"{name}{value}" for name, value in sorted(macros.items())), arch])
    path = library.cache_dir() / f"{label}-{digest}.cubin"
    if not path.exists():
        with library.locked(path):
            if not path.exists():
                start = time.perf_counter()
                made = path.with_suffix(f".{os.getpid()}")
                made.write_bytes(compile_op(op, arch, macros))
                made.replace(path)
                logger.info("compiled %s in %.1f s", path.name, time.perf_counter() - start)
    return path.read_bytes()


# ---- loading and launching


@cache
def _load(op: str, device: torch.device, macros: tuple[tuple[str, object], ...]) -> Kernels:
    return _Module(op, device, _cached(op, architecture(device), dict(macros)))


class _Module:
    """Compiled kernels in the device's primary context, which is torch's."""

    def __init__(self, op: str, device: torch.device, code: bytes) -> None:
        self._op, self._device = op, device
        self._driver = _bindings("driver")
        self._functions: dict[str, Any] = {}
        self._check("cuInit", 0)
        index = torch.cuda.current_device() if device.index is None else device.index
        handle = self._check("cuDeviceGet", index)
        self._context = self._check("cuDevicePrimaryCtxRetain", handle)
        self._check("cuCtxSetCurrent", self._context)
        self._module = self._check("cuModuleLoadData", code)

    def launch(self, name: str, grid: tuple[int, ...], block: int, *arguments: Argument) -> None:
        """Start a kernel on torch's current stream; raise RuntimeError, with the shapes, when CUDA refuses."""
        if 0 in grid:
            return
        packed = values(arguments)
        pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        with torch.cuda.device(self._device):
            stream = self._driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
            self._check("cuCtxSetCurrent", self._context)
            if name not in self._functions:
                self._functions[name] = self._check("cuModuleGetFunction", self._module, name.encode())
            shape = (*grid, 1, 1)[:3]
            status, *_ = self._driver.cuLaunchKernel(
                self._functions[name], *shape, block, 1, 1, 0, stream, ctypes.addressof(pointers), 0
            )
        if int(status) != 0:
            shapes = ", ".join(_describe(argument) for argument in arguments)
            raise RuntimeError(
                f"{self._op}: {name} on {self._device}, {grid} blocks of {block} threads, "
                f"with {shapes}: {self._message(status)}"
            )

    def _check(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self._driver, function)(*arguments)
        if int(status) != 0:
            raise RuntimeError(f"{self._op} on {self._device}: {function}: {self._message(status)}")
        return results[0] if results else None

    def _message(self, status: Any) -> str:
        _, text = self._driver.cuGetErrorString(status)
        return f"{getattr(status, 'name', status)}: {text.decode() if text else 'unknown error'}"


def _describe(argument: Argument) -> str:
    if isinstance(argument, tuple):
        return f"({', '.join(map(_describe, argument))})"
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"
    return str(getattr(argument, "value", argument))


# ---- NVIDIA's bindings


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise Unavailable(f"the Python package cuda-bindings is missing ({error}); {_INSTALL}") from error


@cache
def _nvrtc() -> Any:
    nvrtc = _bindings("nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda.bindings looks for the library at the first call
        raise Unavailable(f"the library NVRTC is missing ({str(error).splitlines()[0]}); {_INSTALL}") from error
    return nvrtc


def _version() -> str:
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def _checked(library_name: str, answer: tuple[Any, ...]) -> Any:
    """Return the result of a call to the bindings; raise RuntimeError for an error status."""
    status, *results = answer
    if int(status) != 0:
        raise RuntimeError(f"{library_name}: {getattr(status, 'name', status)}")
    return results[0] if results else None
