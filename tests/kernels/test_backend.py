"""Which implementation runs, what is said about it, and how the CPU libraries come to be."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rung.kernels import ReferenceWarning, backend, invariants, library, matmul, use_backend

A = torch.ones(2, 4, 16)
SCRIPT = """
import torch, warnings
from rung.kernels import invariants, use_backend
warnings.simplefilter("always")
print(invariants(torch.ones(2, 4, 16))[0, 1, 0].item())
print(invariants(torch.ones(3, 4, 16))[0, 1, 0].item())
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was chosen, built and warned of."""
    monkeypatch.setattr(backend, "_choice", None)
    for name in ("_reasons", "_warned", "_described"):
        monkeypatch.setattr(backend, name, type(getattr(backend, name))())


def python(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with an empty kernel cache of its own."""
    env = os.environ | {"RUNG_CACHE": str(tmp_path / "cache"), "RUNG_KERNELS": "auto"} | environment
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


def test_the_choice_is_one_of_three(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_KERNELS", "fast")
    with pytest.raises(ValueError, match="RUNG_KERNELS: expected one of auto, native, reference, found 'fast'"):
        invariants(A)
    with pytest.raises(ValueError, match="use_backend: expected one of auto, native, reference, found 'cuda'"):
        use_backend("cuda")


def test_use_backend_holds_until_the_end_of_its_block(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNG_KERNELS", "native")
    assert backend.backend() == "native"
    with use_backend("reference"):
        assert backend.backend() == "reference"
        use_backend("auto")
        assert backend.backend() == "auto"
    assert backend.backend() == "native"


def test_the_reference_runs_no_native_operation() -> None:
    with torch.profiler.profile() as profile, use_backend("reference"):
        invariants(A)
    assert not [event for event in profile.events() if event.name.startswith("rung::")]


def test_native_kernels_run_and_are_logged_once(fresh: None, device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rung.kernels"), torch.profiler.profile() as profile:
        for _ in range(2):
            invariants(A.to(device))
    assert [event.name for event in profile.events()].count("rung::invariants") == 2
    said = [record.getMessage() for record in caplog.records if "native kernels on" in record.getMessage()]
    assert len(said) == 1 and device in said[0]


def test_a_fallback_warns_once_with_the_reason(fresh: None, recwarn: pytest.WarningsRecorder) -> None:
    with use_backend("auto"):
        with pytest.warns(ReferenceWarning, match="invariants runs on the PyTorch reference.*16 channels, not 20"):
            value = invariants(torch.ones(2, 4, 20))
        recwarn.clear()
        invariants(torch.ones(3, 4, 20))
    assert value.shape == (2, 2, 20) and not recwarn.list


def test_a_plain_product_falls_back_to_torch_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    assert torch.equal(matmul(torch.ones(2, 5), torch.ones(5, 3)), torch.full((2, 3), 5.0))
    assert not recwarn.list


def test_no_compiler_means_the_reference_and_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = python(SCRIPT, tmp_path, PATH=str(empty), CXX="")
    assert result.returncode == 0 and result.stdout.split() == ["3.0", "3.0"]
    assert result.stderr.count("no C++ compiler (g++, c++, clang++) on the PATH; install g++ or set CXX") == 1
    result = python(SCRIPT, tmp_path, PATH=str(empty), CXX="", RUNG_KERNELS="native")
    assert result.returncode == 1 and "but the kernels cannot be used: no C++ compiler" in result.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    bad = tmp_path / "bad-compiler"
    bad.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    bad.chmod(0o755)
    result = python(SCRIPT, tmp_path, CXX=str(bad))
    assert result.returncode == 0 and result.stderr.count("this compiler is broken") == 1
    result = python(SCRIPT, tmp_path, CXX=str(tmp_path / "absent"))
    assert result.returncode == 0 and "absent is not a program" in result.stderr


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    result = python(SCRIPT, tmp_path)
    assert result.returncode == 0 and "set RUNG_CACHE" in result.stderr


def load_fresh(folder: Path, barrier: Any, queue: Any) -> None:
    os.environ["RUNG_CACHE"] = str(folder)
    library.load.cache_clear()
    built: list[str] = []
    build = library._build
    library._build = lambda *args: (built.append("built"), build(*args))  # type: ignore[assignment]
    barrier.wait()
    found = library.load("invariants", L=1)
    queue.put((len(built), found.path.name))


def test_two_ranks_that_start_at_once_build_once(device: str, tmp_path: Path) -> None:
    if device != "cpu":
        pytest.skip("of the CPU library")
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=load_fresh, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 1]
    assert results[0][1] == results[1][1]
    assert [path.name for path in tmp_path.glob("*.so")] == [results[0][1]]


def test_a_library_is_named_by_its_sources_flags_and_instruction_set(device: str, monkeypatch: Any) -> None:
    if device != "cpu":
        pytest.skip("of the CPU library")
    first = library.load("invariants", L=1).path.name
    assert first.startswith(f"invariants-L1-{library.instruction_set().lower()}-")
    assert library.load("invariants", L=2).path.name != first
    sources = [Path(backend.__file__), Path(library.__file__)]
    assert library.source_digest(sources, "a") != library.source_digest(sources, "b")
    assert library.source_digest(sources[:1], "a") != library.source_digest(sources, "a")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_smaller_instruction_sets_give_the_same_results(capability: str, device: str, tmp_path: Path) -> None:
    """The tests of the operations, run by torch's own switch as on a smaller processor."""
    if device != "cpu":
        pytest.skip("of the CPU library")
    env = os.environ | {"RUNG_CACHE": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
    tests = Path(__file__).with_name("test_native.py")
    names = "(test_convolution and 8-3) or test_invariants or test_edge_basis or test_mix or test_matmul"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", names]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert all(f"-{'avx2' if capability == 'avx2' else 'default'}-" in path.name for path in tmp_path.glob("*.so"))
    assert list(tmp_path.glob("convolution-*.so"))
