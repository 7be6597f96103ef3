"""The label engine: the plan, workers that die, a parent that is killed, failures, wrong arguments."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rung.data.generate import cli
from rung.data.generate.engine import CHEAP, COUNTS, Plan, generate, is_affordable, isolated_atoms, planned_labels
from rung.data.generate.store import Geometry, LabelRow, LabelStore
from rung.data.generate.workers import Lost, run_parallel

for _package in ("rdkit", "tblite", "pyscf"):
    pytest.importorskip(_package, reason="needs rung[generate]")

PLAN = Plan(["C", "N", "O"], {"gfn2_xtb": None}, seed=1, structures_per_mode=3.0)

KILLED_AFTER_20_LABELS = """
import os, signal, sys
from pathlib import Path
from rung.data.generate.engine import Plan, generate
from rung.data.generate.store import LabelStore

add_label, count = LabelStore.add_label, 0
def add_and_die(store, row):
    global count
    add_label(store, row)
    count += 1
    if count == 20:
        os.kill(os.getpid(), signal.SIGKILL)
LabelStore.add_label = add_and_die
generate(Plan(["C", "N", "O"], {"gfn2_xtb": None}, seed=1, structures_per_mode=3.0), Path(sys.argv[1]), jobs=2)
"""


def _geometries(count: int) -> list[Geometry]:
    """Structures of methane-sized and benzene-sized "molecules"; only composition and key matter here."""
    sizes = {"C": [6, 1, 1, 1, 1], "c1ccccc1": [6] * 6 + [1] * 6}
    return isolated_atoms() + [
        Geometry(f"{smiles}:{i}", smiles, 1, np.array(numbers, np.uint8), np.zeros((len(numbers), 3), np.float32))
        for smiles, numbers in sizes.items()
        for i in range(count)
    ]


def test_higher_fidelities_nest_in_lower_ones_and_only_affordable_structures_get_them() -> None:
    counts = {**COUNTS, "pbe_def2svp": 30, "wb97x_631gd": 20, "mp2_ccpvdz": 10, "ccsdt_ccpvdz": 10}
    planned: dict[str, set[str]] = {name: set() for name in counts}
    for geometry, fidelity in planned_labels(Plan(["C"], counts), _geometries(40)):
        planned[fidelity].add(geometry.key)
        assert fidelity in CHEAP or not geometry.smiles or is_affordable(geometry.numbers)
    assert planned["ccsdt_ccpvdz"] == planned["mp2_ccpvdz"] < planned["wb97x_631gd"] < planned["pbe_def2svp"]
    assert planned["pbe_def2svp"] < planned["gfn2_xtb"] == planned["gfn1_xtb"]


def test_a_plan_cut_short_is_a_shorter_prefix_at_every_level() -> None:
    order = planned_labels(Plan(["C"], {"wb97x_631gd": 30, "ccsdt_ccpvdz": 20}), _geometries(40))
    half = [(geometry.key, fidelity) for geometry, fidelity in order if geometry.smiles][:25]
    dft, correlated = ([key for key, fidelity in half if fidelity == name] for name in ("wb97x_631gd", "ccsdt_ccpvdz"))
    assert dft and correlated
    shorter, longer = sorted((dft, correlated), key=len)
    assert longer[: len(shorter)] == shorter


def test_workers_return_every_result() -> None:
    tasks = [float(n) for n in range(20)]
    assert sorted(run_parallel(math.sqrt, tasks, jobs=2, timeout=60)) == sorted(map(math.sqrt, tasks))  # type: ignore[type-var]


def test_a_function_may_return_none() -> None:
    assert list(run_parallel(time.sleep, [0.0, 0.0], jobs=1, timeout=60)) == [None, None]  # type: ignore[func-returns-value]


def test_a_worker_that_dies_is_replaced_and_its_task_reported() -> None:
    assert list(run_parallel(os._exit, [3], jobs=1, timeout=60)) == [Lost(3, "worker process died (exit code 3)")]


def test_a_worker_that_hangs_is_stopped() -> None:
    start = time.monotonic()
    lost = list(run_parallel(time.sleep, [3600], jobs=1, timeout=0.5))
    assert lost == [Lost(3600, "calculation exceeded 0.5 s")]
    assert time.monotonic() - start < 600


def test_an_exception_in_a_worker_reaches_the_caller() -> None:
    with pytest.raises(ValueError):
        list(run_parallel(math.sqrt, [-1.0], jobs=1, timeout=60))


@pytest.mark.slow
def test_a_killed_run_continues_and_computes_nothing_twice(tmp_path: Path) -> None:
    undisturbed = generate(PLAN, tmp_path / "undisturbed", jobs=1)
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_20_LABELS, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    with LabelStore(tmp_path / "killed" / "labels.sqlite") as store:
        before = store.labels("gfn2_xtb")
    assert len(before) == 20
    continued = generate(PLAN, tmp_path / "killed", jobs=2)
    assert continued["done"] == undisturbed["done"] - 20
    assert not generate(PLAN, tmp_path / "killed", jobs=2)
    with (
        LabelStore(tmp_path / "undisturbed" / "labels.sqlite") as one,
        LabelStore(tmp_path / "killed" / "labels.sqlite") as other,
    ):
        assert one.molecules() == other.molecules()
        for a, b in zip(one.geometries(), other.geometries(), strict=True):
            assert a.key == b.key
            np.testing.assert_array_equal(a.positions, b.positions)
        rows, others = one.labels("gfn2_xtb"), other.labels("gfn2_xtb")
    assert rows.keys() == others.keys()
    for key, row in rows.items():
        assert (row.energy, row.failure) == (others[key].energy, others[key].failure)
        np.testing.assert_array_equal(row.forces, others[key].forces)
        assert key not in before or others[key].seconds == before[key].seconds  # not computed again


def test_a_failure_is_a_row_with_a_reason(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "labels.sqlite") as store:
        store.add_label(LabelRow("O:0", "gfn2_xtb", None, None, "SCF not converged", 0.1))
        assert store.labels("gfn2_xtb")["O:0"].failure == "SCF not converged"
        assert store.done() == {("O:0", "gfn2_xtb")}
        with pytest.raises(Exception, match="CHECK constraint"):
            store.add_label(LabelRow("O:1", "gfn2_xtb", None, None, None, 0.1))


def test_a_store_refuses_other_settings(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "labels.sqlite") as store:
        store.check_meta(seed=0)
        with pytest.raises(ValueError, match=r"seed: expected 0 .* found 1; continue with the same, or choose"):
            store.check_meta(seed=1)


@pytest.mark.parametrize(
    ("count", "message"),
    [("ccsd=3", "expected one of the levels gfn1_xtb, .* found 'ccsd'"), ("mp2_ccpvdz=many", "found 'many'")],
)
def test_a_bad_count_is_named(count: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.parse_counts([count])


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "pyscf" else object())
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(ValueError, match=r'found no pyscf; install them with: pip install "rung\[generate\]"'):
        cli.run(parser.parse_args(["--out", str(tmp_path)]))
