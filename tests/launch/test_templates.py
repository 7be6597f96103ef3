"""The launch templates: what every one of them must do, and real runs by those whose launcher is here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
TEMPLATES = sorted((LAUNCH / "templates").iterdir())
PROGRAMS = Path(sys.executable).parent
HERE = Path(__file__).parent


def test_there_is_one_for_every_launcher() -> None:
    assert [path.name for path in TEMPLATES] == ["deepspeed.sh", "mpirun.sh", "slurm.sbatch", "torchrun.sh"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_checks_first_and_trains_under_the_supervisor(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    places = [text.index(part) for part in ("/env.sh", "rung.launch check", "rung.launch.supervise", "rung.pretrain ")]
    assert places == sorted(places)
    assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n")


def test_env_divides_the_cores_by_the_ranks_of_a_node() -> None:
    def threads(**variables: str) -> str:
        script = f'. {LAUNCH / "env.sh"}; echo "${{OMP_NUM_THREADS:-unset}} $PYTHONSAFEPATH"'
        environment = {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stdout.strip()

    cores = len(os.sched_getaffinity(0))
    assert threads() == "unset 1"
    assert threads(RANKS_PER_NODE="1") == f"{cores} 1"
    assert threads(RANKS_PER_NODE=str(4 * cores)) == "1 1"
    assert threads(RANKS_PER_NODE="1", OMP_NUM_THREADS="3") == "3 1"


TINY = ["debug", "steps=4", "evaluation={every: 4, max_structures: 8}"]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return variables for a template; the stand-ins of this folder come first on the PATH."""
    named = {"OUTPUT": str(folder / "run"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PATH": f"{folder}:{PROGRAMS}:{os.environ['PATH']}", **named, **variables}


def run(name: str, *words: str, env: Mapping[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(LAUNCH / "templates" / name), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("torchrun.sh", {"RANKS_PER_NODE": "2"}),
        ("mpirun.sh", {"RANKS": "2", "MPI_OPTIONS": "--allow-run-as-root --oversubscribe"}),
    ],
)
def test_a_template_trains(name: str, variables: Mapping[str, str], tmp_path: Path) -> None:
    status, output = run(name, *TINY, env=environment(tmp_path, **variables))
    assert status == 0, output
    assert "2 rank(s) by" in output and "\nfit" in output
    assert (tmp_path / "run" / "checkpoint").is_dir()


@pytest.mark.slow
def test_torchrun_refuses_what_the_check_refuses(tmp_path: Path) -> None:
    env = environment(tmp_path, RANKS_PER_NODE="2")
    status, output = run("torchrun.sh", "debug", "data.max_atoms=2", "steps=2", env=env)
    assert status == 1 and "NOT FIT: memory" in output and "$ " not in output, output


@pytest.fixture()
def slurm(tmp_path: Path) -> dict[str, str]:
    """The variables of a batch job of two tasks, and stand-ins for srun and scontrol."""
    (tmp_path / "srun").symlink_to(HERE / "srun")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$1" = show ] && exit 1\necho "$@" >>{tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    return environment(tmp_path, SLURM_NTASKS="2", SLURM_JOB_ID=str(os.getpid()), SLURM_PROCID="0", SLURM_LOCALID="0")


@pytest.mark.slow
def test_a_slurm_job_is_queued_again_and_goes_on(slurm: dict[str, str], tmp_path: Path) -> None:
    """The notice that comes before the time limit goes to the batch script only."""
    words = ["debug", "steps=400", "save_every=1000", "log_every=1", "evaluation={every: 1000, max_structures: 8}"]
    script = [str(LAUNCH / "templates" / "slurm.sbatch"), *words]
    log = tmp_path / "log"
    with log.open("w") as file:
        job = subprocess.Popen(script, env=slurm, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            trained = wait_for(lambda: "\nstep 1 " in log.read_text(), job)
            assert trained, log.read_text()
            job.send_signal(signal.SIGUSR1)
            assert job.wait(timeout=100) == 75, log.read_text()
        finally:
            job.kill()
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    stopped = (tmp_path / "run" / "state" / "latest").read_text().strip()
    step = int(stopped.split("_")[1])
    status, output = run("slurm.sbatch", *words, f"stop_at={step + 2}", env=slurm)
    assert status == 75 and "resumed from" in output and stopped in output, output
    assert (tmp_path / "requeued").read_text().count("requeue") == 2


def wait_for(condition: object, job: subprocess.Popen[bytes]) -> bool:
    """Wait until a condition is met; False when the job has ended before."""
    assert callable(condition)
    while not condition():
        try:
            job.wait(timeout=0.2)
            return False
        except subprocess.TimeoutExpired:
            continue
    return True
