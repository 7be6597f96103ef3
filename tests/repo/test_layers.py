"""The import DAG of DESIGN.md section 3, read from the source of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "data": set(),
    "model": {"kernels", "data"},
    "pretrain": {"kernels", "data", "model"},
    "finetune": {"kernels", "data", "model"},
    "analysis": {"kernels", "data", "model"},
    "launch": {"kernels", "data", "model", "pretrain", "finetune", "analysis"},
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    """Return the packages of the namespace `rung` that a module imports, at any depth of its code."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; use absolute imports"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("rung.")}


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_module_imports_only_the_rooms_below_it(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    forbidden = imported_packages(path) - MAY_IMPORT[package] - {package}
    assert not forbidden, f"{path.relative_to(ROOT)} may not import {sorted(forbidden)}"


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(
            name.split(".")[0] == "deepspeed"
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        )
    }
    assert importers <= {"pretrain/engine.py"}


def test_no_module_unpickles() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name != "pickle" for alias in node.names), f"{path} imports pickle"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}: torch.load without weights_only"
