"""The commit written into a checkpoint is that of Rung's own sources, or none."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from rung.model import provenance


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_a_tracked_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "provenance.py"
    shutil.copy(provenance.__file__, source)
    git_commit = runpy.run_path(str(source))["git_commit"]
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "somebody else's project")
    assert git_commit() is None  # installed inside another repository
    git(tmp_path, "add", source.name)
    git(tmp_path, "commit", "--quiet", "--message", "ours")
    assert git_commit() == git(tmp_path, "rev-parse", "HEAD").strip()
    source.write_text(source.read_text() + "# edited\n")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", git_commit())
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None  # no git


def test_versions_name_what_a_prediction_depends_on() -> None:
    versions = provenance.package_versions()
    assert set(versions) == {"python", "rung", "torch", "numpy", "vesin"}
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())
