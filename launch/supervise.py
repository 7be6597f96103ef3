"""Run a training command until it has finished: `python -m rung.launch.supervise --output DIR -- COMMAND ...`.

The command is started again after a crash, with --resume once DIR/state/latest is there (so a queued job is one and the
same command every time). It is left when it has finished (exit status 0), refused its input (2), diverged (3), or was
stopped by a signal (75: queue it again). SIGTERM, SIGINT and SIGUSR1 reach its ranks, which save their state and stop.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rung.pretrain.exit_status import BAD_INPUT, DIVERGED, FINISHED, STOPPED, VARIABLE

GAVE_UP = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RANK_VARIABLES = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"}
# These pass SIGUSR1 on to ranks on other machines, and drop the ranks on SIGTERM.
FORWARDING_LAUNCHERS = {"srun", "mpirun", "mpiexec", "mpiexec.hydra", "prterun"}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_POLL_SECONDS = 1.0
_KILL_SECONDS = 30.0


def supervise(command: Sequence[str], output: Path, attempts: int, wait: float) -> int:
    """Run the command until it ends for good and return the exit status that says how.

    After a crash it is started again `wait` seconds later; `attempts` crashes in a row that saved no new state are one
    too many. Must be called in the main thread, once: it blocks the signals that it waits for.
    """
    with tempfile.NamedTemporaryFile(prefix="rung-exit-status-") as file:
        return _supervise(Supervisor(command, output, Path(file.name)), attempts, wait)


def _supervise(supervisor: Supervisor, attempts: int, wait: float) -> int:
    in_vain = 0
    while True:
        before = supervisor.latest()
        status = supervisor.attempt()
        if status in (FINISHED, BAD_INPUT, DIVERGED, STOPPED):
            return status
        in_vain = in_vain + 1 if supervisor.latest() == before else 0
        _say(f"ended with status {status}; the last state is {supervisor.latest() or 'none yet'}")
        if supervisor.stop is None and in_vain >= attempts:
            _say(f"{in_vain} attempts in a row saved no new state; giving up")
            return status
        supervisor.pause(wait)
        if supervisor.stop is not None:  # the state is the last one that was saved, maybe not of the last step
            _say(f"stopped by {supervisor.stop.name}")
            return STOPPED


class Supervisor:
    """Starts the command, waits for its end or for a signal, and clears up after it.

    Ranks leave their exit status in `status_file`: torchrun ends with 1 whatever it is.
    """

    def __init__(self, command: Sequence[str], output: Path, status_file: Path) -> None:
        self.stop: signal.Signals | None = None  # the last signal that asked for it
        self._command = list(command)
        self._output = output
        self._status_file = status_file
        # They stay blocked and are waited for, so that none can come between two instructions.
        self._signals = {*STOP_SIGNALS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        # Processes whose parent dies become our children, so that all that the command started can be found.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def latest(self) -> str:
        """Return the name of the newest saved state; empty when there is none."""
        pointer = self._output / "state" / "latest"
        return pointer.read_text().strip() if pointer.is_file() else ""

    def attempt(self) -> int:
        """Run the command once and return its exit status; nothing that it started is left on this machine."""
        self._status_file.write_text("")
        words = [*self._command, *(["--resume"] if self.latest() else [])]
        _say(f"$ {shlex.join(words)}")
        # In a session of its own: a Ctrl-C would otherwise reach launchers too, which drop their ranks.
        environment = {**os.environ, VARIABLE: str(self._status_file)}
        with subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=self._prepare) as process:
            while process.poll() is None:
                if (number := self._wait(_POLL_SECONDS)) is not None:
                    _say(f"{number.name}: asking the ranks to save their state and stop")
                    ask_to_stop(process.pid, Path(words[0]).name)
        end_leftovers()
        return self._status(process.returncode)

    def pause(self, seconds: float) -> None:
        """Wait until `seconds` have passed or a stop is asked for."""
        end = time.monotonic() + seconds
        while self.stop is None and (left := end - time.monotonic()) > 0:
            self._wait(left)

    def _prepare(self) -> None:
        """Before the command begins: the signals reach it, and SIGTERM does when the supervisor itself is killed."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _wait(self, seconds: float) -> signal.Signals | None:
        """Wait for the end of a child or for a signal that asks for a stop, and return that one."""
        found = signal.sigtimedwait(self._signals, seconds)
        if found is None or found.si_signo == signal.SIGCHLD:
            return None
        self.stop = signal.Signals(found.si_signo)
        return self.stop

    def _status(self, returncode: int) -> int:
        if returncode != FINISHED and (text := self._status_file.read_text()):
            return int(text)
        return 128 - returncode if returncode < 0 else returncode


def ask_to_stop(pid: int, program: str) -> None:
    """Send SIGTERM to the ranks below a command, past their launchers; without any here, ask the command itself."""
    try:
        command = psutil.Process(pid)
        if ranks := ranks_below(command):
            for rank in ranks:
                rank.terminate()  # the ranks agree on stops, so those of other machines need not be asked
        else:
            command.send_signal(signal.SIGUSR1 if program in FORWARDING_LAUNCHERS else signal.SIGTERM)
    except psutil.NoSuchProcess:
        pass  # it has just ended


def ranks_below(process: psutil.Process) -> list[psutil.Process]:
    """Return the topmost descendants that a launcher gave a rank; their own children are theirs to stop."""
    ranks: list[psutil.Process] = []
    for child in process.children():
        try:
            is_rank = bool(RANK_VARIABLES & set(child.environ()))
            ranks += [child] if is_rank else ranks_below(child)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return ranks


def end_leftovers() -> None:
    """Kill what an attempt left behind; two sets of ranks would write one state."""
    end = time.monotonic() + _KILL_SECONDS
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
        if time.monotonic() > end:
            raise OSError(f"processes {[process.pid for process in left]} cannot be killed; restart this machine")


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the supervisor's command line."""
    parser = argparse.ArgumentParser(prog="python -m rung.launch.supervise", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="output folder of the run, as in its config")
    parser.add_argument(
        "--attempts", type=int, default=3, help="crashes in a row without a new state before giving up (%(default)s)"
    )
    parser.add_argument("--wait", type=float, default=10.0, help="seconds between two attempts (%(default)s)")
    parser.add_argument("command", nargs="+", help="command to run, after --")
    args = parser.parse_args(argv)
    if args.attempts < 1 or args.wait < 0:
        parser.error("--attempts: expected at least 1; --wait: expected 0 or more")
    try:
        return supervise(args.command, args.output, args.attempts, args.wait)
    except OSError as error:  # no such command, or processes that cannot be killed
        _say(f"error: {error}")
        return GAVE_UP


if __name__ == "__main__":
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    sys.exit(main())
