"""A polite stop: SIGINT, SIGTERM and SIGUSR1 (Slurm's notice before a preemption) let the running rounds finish."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Context manager that notes `SIGNALS` in `requested`, and restores the old handlers at its end.

    Repeated signals change nothing, because launchers pass one Ctrl-C on several times; SIGQUIT ends a process at once.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
