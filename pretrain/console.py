"""What goes to the terminal: warnings that name their rank, and an output that may be closed while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

from tqdm import tqdm


class RankWarnings:
    """Shows warnings, those of `warnings.warn` and of our loggers as well, on stderr after the rank; until `close`."""

    def __init__(self, rank: int) -> None:
        self._prefix = f"rank {rank}: warning: "
        self._logger = logging.getLogger("rung")
        self._handler = _Handler(self)
        self._logger.addHandler(self._handler)
        self._show_before, warnings.showwarning = warnings.showwarning, self._showwarning

    def show(self, text: str) -> None:
        """Print a warning; nothing can be said where stderr is gone, too."""
        with contextlib.suppress(OSError):
            tqdm.write("".join(f"{self._prefix}{line}\n" for line in text.splitlines()), file=sys.stderr, end="")
            sys.stderr.flush()

    def close(self) -> None:
        """Show warnings as before."""
        self._logger.removeHandler(self._handler)
        if warnings.showwarning == self._showwarning:
            warnings.showwarning = self._show_before

    def _showwarning(
        self, message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        self.show(f"{filename}:{lineno}: {category.__name__}: {message}")


class _Handler(logging.Handler):
    def __init__(self, warnings: RankWarnings) -> None:
        super().__init__(logging.WARNING)
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self._warnings.show(record.getMessage())


def on_terminal() -> bool:
    """Return whether stderr is a terminal in which a bar can be seen: some, such as containers', have no width."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal, a closed stream, a stand-in without a file
        return False


def stdout_is_gone() -> None:
    """Send what is printed from now on nowhere, after a reader such as `head` has closed the pipe.

    Otherwise everything that still prints, and Python itself when it ends, would fail in turn.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
