"""The time that a part of the loop takes on the host, added up until it is read."""

from __future__ import annotations

import time
from types import TracebackType


class Stopwatch:
    """Context manager that adds the seconds of its block to `seconds`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._begin
