"""A package that is missing from pyproject.toml works in development and is absent from the wheel: compare them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def tracked_files() -> list[Path]:
    """Return the files under the packages' folders that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SETUPTOOLS["package-dir"].values()]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in listing.splitlines() if (ROOT / line).exists()]


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    found = {"rung." + ".".join(path.parent.parts) for path in tracked_files() if path.suffix == ".py"}
    assert found == set(SETUPTOOLS["packages"])


def test_every_data_file_matches_a_glob() -> None:
    globs = SETUPTOOLS["package-data"]["*"]
    missed = [p for p in tracked_files() if p.suffix != ".py" and not any(fnmatch(p.name, g) for g in globs)]
    assert not missed


def test_every_top_package_is_typed() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        assert (ROOT / folder / "py.typed").exists()


@pytest.mark.slow
def test_the_wheel_holds_every_tracked_file(tmp_path: Path) -> None:
    # Built from a copy: a stale build/ folder of the checkout would hide a package that is missing from the list.
    source = tmp_path / "source"
    for path in [*tracked_files(), Path("pyproject.toml"), Path("README.md"), Path("LICENSE")]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("rung-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        contents = set(archive.namelist())
    assert not [path for path in tracked_files() if f"rung/{path}" not in contents]
