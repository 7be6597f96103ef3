"""Times, and what the machine can do at most: the scale of the figures in a benchmark."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rung.kernels import library


class Timer:
    """Best times in ms of functions that take turns; on a GPU by its events' clock."""

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda = device != "cpu"
        self.repeats = repeats

    def __call__(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Return the best time of each function in ms."""
        best = dict.fromkeys(functions, float("inf"))
        for _ in range(self.repeats):
            for name, function in functions.items():
                function()  # its own data in the caches again, not those of the function before it
                best[name] = min(best[name], *(self._once(function) for _ in range(2)))
        return best

    def _once(self, function: Callable[[], object]) -> float:
        if self.cuda:
            events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            start, end = events
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end))
        start_time = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start_time)


def peak_flops(device: str) -> float:
    """Return the measured rate of float32 operations per second: fused multiply-adds of all CPU threads' cores, or on a
    GPU a large matrix product without tensor cores."""
    if device != "cpu":
        a = torch.randn(8192, 8192, device=device)
        return 2 * 8192**3 / (Timer(device, 10)({"mm": lambda: a @ a})["mm"] * 1e-3)
    function = library.load("roofs")("rung_multiply_add", torch.float32, "qipp")
    flops, result = ctypes.c_double(), ctypes.c_double()
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        function(5_000_000, 1, ctypes.addressof(flops), ctypes.addressof(result))
        best = max(best, flops.value / (time.perf_counter() - start))
    return best * torch.get_num_threads()


def copy_bandwidth(device: str) -> float:
    """Return the measured bytes per second of a large copy, read and written."""
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    ms = Timer(device, 10)({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * 4 * source.numel() / (ms * 1e-3)


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
