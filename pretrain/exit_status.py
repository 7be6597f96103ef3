"""How a run ends, told to whoever started it."""

from __future__ import annotations

import os
from pathlib import Path

FINISHED = 0
FAILED = 1  # a rank is lost, a disk is full: the same command with --resume may go on
BAD_INPUT = 2
DIVERGED = 3
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not finished, and the state is saved; start it again with --resume

VARIABLE = "RUNG_EXIT_STATUS_FILE"  # a file of the supervisor's machine, set by it


class RunFailed(OSError):
    """A run that was going on could not go on; starting it again may help."""


def leave(status: int) -> None:
    """Write the exit status where the supervisor of this machine looks for it: torchrun ends with 1 whatever it is.

    The cause counts: where one rank was refused its input, the others failed, and tell nothing.
    """
    path = Path(os.environ.get(VARIABLE, ""))
    if status not in (FINISHED, FAILED) and path.is_file():  # on other machines there is no such file
        path.write_text(str(status))
