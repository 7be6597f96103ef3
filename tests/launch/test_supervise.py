"""The supervisor, with real commands that fail, stop, leave processes behind and get signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

SUPERVISE = [sys.executable, "-m", "rung.launch.supervise", "--wait", "0"]
# Writes its arguments into a log, then does what the n-th word of `plan` says: a status, or "save" before it.
SCRIPT = """
import os, pathlib, signal, sys
output = pathlib.Path(sys.argv[1])
with (output / "log").open("a") as log:
    print(*sys.argv[2:], file=log)
words = (output / "plan").read_text().split()
index = len((output / "log").read_text().splitlines()) - 1
word = words[min(index, len(words) - 1)]
if word.startswith("save"):
    (output / "state").mkdir(exist_ok=True)
    (output / "state" / "latest").write_text(f"step_{index}")
    word = word.removeprefix("save")
if word.startswith("file"):
    from rung.pretrain.exit_status import leave
    leave(int(word.removeprefix("file")))
    word = "1"
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""


def supervise(tmp_path: Path, plan: str, *options: str) -> tuple[int, list[str]]:
    """Return the supervisor's exit status and the arguments of each attempt."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "plan").write_text(plan)
    command = [*SUPERVISE, "--output", str(tmp_path), *options, "--", sys.executable, "-c", SCRIPT, str(tmp_path), "x"]
    status = subprocess.run(command, capture_output=True, timeout=60).returncode
    return status, (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 2, 3, 75])
def test_an_end_for_good_is_left_as_it_is(status: int, tmp_path: Path) -> None:
    assert supervise(tmp_path, str(status)) == (status, ["x"])


def test_it_is_started_again_with_resume_once_there_is_a_state(tmp_path: Path) -> None:
    assert supervise(tmp_path, "1 save1 kill 0") == (0, ["x", "x", "x --resume", "x --resume"])


def test_a_queued_job_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    assert supervise(tmp_path, "save75") == (75, ["x"])
    assert supervise(tmp_path, "0") == (0, ["x", "x --resume"])


def test_crashes_without_progress_end_it(tmp_path: Path) -> None:
    status, log = supervise(tmp_path, "7", "--attempts", "3")
    assert status == 7 and len(log) == 3


def test_progress_starts_the_count_again(tmp_path: Path) -> None:
    status, log = supervise(tmp_path, "1 save1 1 save1 1 kill 0", "--attempts", "2")
    assert status == 128 + signal.SIGKILL and len(log) == 6


def test_ranks_leave_the_status_that_torchrun_hides(tmp_path: Path) -> None:
    assert supervise(tmp_path, "1 file3") == (3, ["x", "x"])
    assert supervise(tmp_path / "unsaved", "file75 0")[0] == 75


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run([*SUPERVISE, "--output", str(tmp_path), "--", "no-such-command"], capture_output=True)
    assert done.returncode == 1 and b"no-such-command" in done.stderr


@contextmanager
def supervised(tmp_path: Path, code: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A supervised script, and the process ids that it printed as its first line."""
    command = [*SUPERVISE, "--output", str(tmp_path), "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


def gone(pids: Sequence[int]) -> bool:
    """Wait until the processes have ended; False when one is still there after a while."""
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return not psutil.wait_procs(processes, timeout=20)[1]


SAVES = (
    "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    "print(os.getppid(), os.getpid(), flush=True); signal.pause()"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_not_their_launcher(number: signal.Signals, tmp_path: Path) -> None:
    launcher = (
        "import os, subprocess, sys; "
        f"sys.exit(subprocess.run([sys.executable, '-c', {SAVES!r}], env={{**os.environ, 'RANK': '0'}},"
        " start_new_session=True).returncode)"
    )
    with supervised(tmp_path, launcher) as (process, _):
        process.send_signal(number)
        assert process.wait(timeout=30) == 75


def test_without_ranks_the_command_itself_is_asked(tmp_path: Path) -> None:
    with supervised(tmp_path, SAVES) as (process, _):
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 75


@pytest.mark.parametrize(("program", "signal_name"), [("srun", "SIGUSR1"), ("anything", "SIGTERM")])
def test_srun_is_asked_by_the_signal_that_it_passes_on(program: str, signal_name: str, tmp_path: Path) -> None:
    script = tmp_path / program
    code = (
        "import pathlib, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})\n"
        "print(1, flush=True)\n"
        "found = signal.sigwait({signal.SIGUSR1, signal.SIGTERM})\n"
        "pathlib.Path(__file__).with_name('signal').write_text(found.name)\n"
    )
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
    command = [*SUPERVISE, "--output", str(tmp_path), "--", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert (tmp_path / "signal").read_text() == signal_name


def test_a_command_that_dies_of_the_signal_is_queued_again(tmp_path: Path) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with supervised(tmp_path, code) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75


def test_what_a_failed_attempt_left_is_killed(tmp_path: Path) -> None:
    """A rank in a session of its own outlives its launcher, and would write into the same state as the next attempt."""
    code = (
        "import os, subprocess, sys; "
        "rank = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True); "
        "print(rank.pid, flush=True); os._exit(2)"
    )
    with supervised(tmp_path, code) as (process, pids):
        assert process.wait(timeout=30) == 2
        assert len(pids) == 1 and not psutil.pid_exists(pids[0])


def test_the_command_ends_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with supervised(tmp_path, code) as (process, pids):
        process.kill()
        process.wait()
        assert len(pids) == 1 and gone(pids)


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_ends_with_the_undisturbed_weights(tmp_path: Path) -> None:
    kills = [(1, 4)]  # (rank, after the state of which step); test_faults.py has other ranks and moments
    words = ["debug", "steps=24", "save_every=4", "log_every=24", "evaluation={every: 24, max_structures: 8}"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    start += ["rung.pretrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*start, f"output={whole}"], check=True, env=environment, capture_output=True, timeout=120)
    command = [*SUPERVISE, "--output", str(killed), "--", *start, f"output={killed}"]
    killings = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as supervisor:
        for rank, step in kills:
            while not has_state(killed, step):
                with suppress(subprocess.TimeoutExpired):
                    supervisor.wait(timeout=0.02)
                    break
            killings += kill_rank(supervisor.pid, rank)
        output = supervisor.communicate(timeout=120)[0].decode()
    assert supervisor.returncode == 0, output
    assert killings == len(kills) and output.count("supervise: $") == 1 + len(kills), output
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


def has_state(folder: Path, step: int) -> bool:
    pointer = folder / "state" / "latest"
    return pointer.exists() and int(pointer.read_text().split("_")[1]) >= step


def kill_rank(supervisor: int, rank: int) -> int:
    """Kill one rank of the run that a supervisor looks after; return 1, or 0 when it is not there."""
    for process in psutil.Process(supervisor).children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                process.kill()
                return 1
    return 0


def test_help_needs_no_torch() -> None:
    code = "import sys, rung.launch.supervise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
