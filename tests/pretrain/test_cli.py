"""The command line, from the words to the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rung.model.checkpoint import load_checkpoint
from rung.pretrain.cli import main
from rung.pretrain.exit_status import BAD_INPUT, STOPPED
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.network import free_port


@pytest.fixture()
def config_file(config_words: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(word.replace("=", ": ", 1) for word in config_words if "." not in word.split("=")[0]))
    return path


def test_dry_run_prints_everything_and_trains_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), f"output={tmp_path / 'run'}", "--dry-run", "--ranks", "3"]) == 0
    printed = capsys.readouterr().out
    for text in ("lr: 0.003", "3 rank(s)", "task emt/low: 36", "gradient_clipping: 10.0", "parameters", "3 atoms"):
        assert text in printed
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path / 'run'}"
    assert main([str(config_file), output, "optimiser.lr=1"]) == BAD_INPUT
    assert "unknown key 'optimiser'; did you mean 'optimizer'?" in capsys.readouterr().err
    assert main(["nowhere.yaml"]) == BAD_INPUT
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main([str(config_file), output, "--ranks", "0"]) == BAD_INPUT
    assert "--ranks: expected at least 1" in capsys.readouterr().err
    assert main([str(config_file), output, "model.chanels=3", "--ranks", "2"]) == BAD_INPUT
    assert "did you mean 'channels'" in capsys.readouterr().err


def test_interrupt_notes_signals_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_deepspeed_launches_two_ranks_which_stop_at_a_signal_and_go_on(config_file: Path, tmp_path: Path) -> None:
    """`--ranks 2`, SIGTERM while it trains, then `--resume` under the `deepspeed` command."""
    output, step = tmp_path / "run", 0
    words = [str(config_file), f"output={output}", "steps=100000"]
    command = [sys.executable, "-m", "rung.pretrain", *words, "log_every=1", "--ranks", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2 "):
                process.terminate()
            if line.startswith("stopped at step"):
                step = int(line.split()[3])
    assert process.returncode == STOPPED
    assert (output / "state" / "latest").read_text() == f"step_{step:09d}\n"

    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    module = ["--master_port", str(free_port()), "--module", "rung.pretrain"]
    more = [f"stop_at={step + 2}", "--resume"]
    done = subprocess.run([*deepspeed, *module, *words, *more], env=environment, capture_output=True, text=True)
    assert done.returncode == STOPPED, done.stderr
    assert f"resumed from {output}/state/step_{step:09d}" in done.stdout
    assert (output / "state" / "latest").read_text() == f"step_{step + 2:09d}\n"


@pytest.mark.slow
def test_one_process_without_a_launcher_writes_a_checkpoint(config_file: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-W", "error::UserWarning:rung", "-m", "rung.pretrain", str(config_file)]
    subprocess.run([*command, f"output={tmp_path / 'run'}"], env=environment, check=True, capture_output=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoint").potential.config.fidelities == ("low", "high")
