"""How a long run is watched and ended: a bar on a terminal, lines elsewhere, and Ctrl-C after a whole step."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

LINES = 20  # of a run whose length is known, where there is no terminal
SECONDS_PER_LINE = 30.0  # a line at least this often
SECONDS_PER_REFRESH = 0.5  # of what the bar says

INTERRUPTED = 130  # exit status: the shell's convention for Ctrl-C


class Progress:
    """Shows the number of steps and a line of text that is only made when it is shown."""

    def __init__(self, total: int | None, start: int = 0, *, every: int | None = None) -> None:
        """Begin at step `start` of `total` (None: not known); a line every so many steps where there is no terminal."""
        self._every = every or max(1, (total or 0) // LINES)
        self._shown = -float("inf")
        self._last = start
        self._bar = tqdm(total=total, initial=start, unit=" steps") if sys.stderr.isatty() else None

    def show(self, step: int, text: Callable[[], str]) -> None:
        """Show that `step` is done."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._shown > SECONDS_PER_REFRESH:
                self._bar.set_postfix_str(text(), refresh=False)
                self._shown = now
            self._bar.update(step - self._last)
        elif step % self._every == 0 or now - self._shown > SECONDS_PER_LINE:
            print(f"step {step}: {text()}", flush=True)
            self._shown = now
        self._last = step

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether SIGINT or SIGTERM came; the second one interrupts at once."""
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def take(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
        before |= {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
