"""Which code made a checkpoint: the commit of the sources and the versions of what they ran on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path


def package_versions() -> dict[str, str]:
    """Return the versions of Python, Rung and the packages that a prediction depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("rung", "torch", "numpy", "vesin")}
    return {"python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """Return the commit of the sources, with "-dirty" when they were edited; None outside a clone or without git."""
    here = Path(__file__)
    git = shutil.which("git")
    if git is None:
        return None
    # An installed copy may lie inside some other project's repository: only a tracked file tells our commit.
    tracked = subprocess.run([git, "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True)
    if tracked.returncode != 0:
        return None
    describe = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(describe, cwd=here.parent, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None
