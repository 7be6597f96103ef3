"""The CPU library of an operation: built by the machine's own C++ compiler at first use, kept in a cache.

A library is one `cpu.cpp` compiled for one set of macros (radial functions, l_max) and one instruction set, the best
that the processor has: AVX-512, AVX2 or the compiler's default. Environment variables:

    CXX                  the compiler (default: g++, c++ or clang++ on the PATH)
    RUNG_CACHE           where libraries are kept (default: $XDG_CACHE_HOME/rung/kernels or ~/.cache/rung/kernels)
    ATEN_CPU_CAPABILITY  torch's own switch (default, avx2, avx512) to a smaller instruction set
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KERNELS = Path(__file__).parent
SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}
_MARCH = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
# No -ffast-math: at link time it would set flush-to-zero for the whole process.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_REAL = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Unavailable(RuntimeError):
    """The native kernels cannot be used here; the message says what is missing."""


def cache_dir() -> Path:
    """Return the folder of compiled kernels, made if need be; raise Unavailable where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("RUNG_CACHE") or Path(base) / "rung" / "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"the kernel cache {folder} cannot be made ({error.strerror}); set RUNG_CACHE") from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that guards the making of `path`, against the other processes of this and other machines."""
    try:
        with open(f"{path}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.filename is None:
            raise
        raise Unavailable(
            f"the kernel cache {path.parent} cannot be written ({error.strerror}); set RUNG_CACHE"
        ) from error


def source_digest(sources: list[Path], *words: str) -> str:
    """Return a short digest of the files' names and texts and of `words`: equal digests make equal binaries."""
    digest = hashlib.sha256(repr(words).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def instruction_set() -> str:
    """Return the instruction set that libraries are built for: AVX512, AVX2 or `default`."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if platform.machine() in ("x86_64", "AMD64") and name in _MARCH else "default"


def description() -> str:
    """Return what the libraries are, for a log."""
    return f"{instruction_set()} libraries in {cache_dir()}"


class Library:
    """An operation's functions in C: `library(name, dtype, signature)` returns one, ready to be called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cdll = ctypes.CDLL(str(path))
        self._functions: dict[tuple[str, torch.dtype], Any] = {}

    def __call__(self, name: str, dtype: torch.dtype, signature: str) -> Any:
        """Return the function for `dtype`; in the signature: q int64, i int, t a number of `dtype`, p pointer."""
        key = (name, dtype)
        if key not in self._functions:
            function = self._cdll[name + SUFFIX[dtype]]
            kinds: dict[str, Any] = {"q": ctypes.c_int64, "i": ctypes.c_int, "t": _REAL[dtype], "p": ctypes.c_void_p}
            function.argtypes, function.restype = [kinds[letter] for letter in signature], None
            self._functions[key] = function
        return self._functions[key]


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, None (a null pointer) for no tensor."""
    return None if tensor is None else tensor.data_ptr()


@cache
def load(op: str, **macros: int) -> Library:
    """Return the library of an operation (the name of its folder) compiled with -DRUNG_<MACRO>=value.

    Raises Unavailable when it is not in the cache and cannot be built.
    """
    isa = instruction_set()
    openmp = _openmp()
    flags = [*_FLAGS, *([_MARCH[isa]] if isa in _MARCH else []), f"-I{KERNELS}"]
    flags += [f"-DRUNG_{name}={value}" for name, value in sorted(macros.items())]
    source = KERNELS / op / "cpu.cpp"
    sources = [source, *sorted(KERNELS.glob("*.h")), *sorted((KERNELS / op).glob("*.h"))]
    words = (platform.machine(), Path(openmp).name, *(flag for flag in flags if not flag.startswith("-I")))
    label = "-".join([op, *(f"{name}{value}" for name, value in sorted(macros.items())), isa.lower()])
    path = cache_dir() / f"{label}-{source_digest(sources, *words)}.so"
    if not path.exists():
        with locked(path):
            if not path.exists():
                _build(source, path, flags, openmp)
    try:
        return Library(path)
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error}); delete it to have it built again") from error


def compiler() -> str:
    """Return the C++ compiler's path; raise Unavailable when there is none."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return path
    wanted = f"CXX={chosen} is not a program" if chosen else "no C++ compiler (g++, c++, clang++) on the PATH"
    raise Unavailable(f"{wanted}; install g++ or set CXX")


def _openmp() -> str:
    """Return the OpenMP runtime that torch has loaded: two of them in one process would compete for the cores."""
    torch.get_num_threads()
    try:
        with open("/proc/self/maps") as maps:
            loaded = [line.split()[-1] for line in maps if "/" in line]
    except OSError:
        return ""
    return next((path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))), "")


def _build(source: Path, path: Path, flags: list[str], openmp: str) -> None:
    program = compiler()
    logger.info("building %s with %s", path.name, program)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [program, *flags, str(source), "-o", str(made), *([openmp] if openmp else [])]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode != 0:
            tail = "\n".join(result.stderr.strip().splitlines()[:12])
            raise Unavailable(f"{' '.join(command)} failed:\n{tail}")
        os.replace(made, path)
    logger.info("built %s in %.1f s", path.name, time.perf_counter() - start)
