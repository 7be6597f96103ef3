"""Keeps freed memory in the process: glibc returns large blocks to the system, and every step faults them in again."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGE = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse freed blocks of any size; elsewhere do nothing, as no result depends on it."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD):
        libc.mallopt(parameter, _LARGE)
