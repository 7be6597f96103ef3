"""The `rung` command: verbs, help, bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rung.launch import cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_prints_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"rung {verb}" in capsys.readouterr().out


def test_unknown_verb_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrian"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "pretrian" in message and "pretrain" in message


def test_bad_input_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", "/nonexistent/folder"]) == cli.EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert message.startswith("rung data: error: ") and "/nonexistent/folder" in message
    assert message.count("\n") == 1


def test_importing_the_command_imports_no_verb() -> None:
    code = "import sys, rung.launch.cli; print([m for m in ('torch', 'deepspeed', 'rung.data') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
