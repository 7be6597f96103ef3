"""Evaluation over ranks against one process, the sharing of structures, and the criterion in closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rung.data.batch import Budget
from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.manifest import read_manifest
from rung.data.mixing import Task
from rung.data.stream import epoch_structures
from rung.data.structure import Structure
from rung.model.config import ModelConfig
from rung.model.potential import Potential
from rung.model.predict import DEFAULT_BUDGET, evaluate
from rung.pretrain.config import EvaluationConfig
from rung.pretrain.evaluation import Baseline, Evaluated, Evaluation, Share, criterion
from rung.pretrain.metrics import Metrics
from rung.pretrain.ranks import Ranks


def metrics_of(energy: float | None, force: float | None) -> Metrics:
    return {"energy_mae_mev_per_atom": energy, "force_mae_mev_per_angstrom": force}


def test_criterion_is_the_mean_over_tasks_of_relative_errors() -> None:
    metrics = {"a": metrics_of(10.0, 30.0), "b": metrics_of(1.0, None), "c": metrics_of(None, None)}
    baselines = {"a": Baseline(40.0, 60.0), "b": Baseline(8.0, 5.0), "c": Baseline(1.0, 1.0)}
    assert criterion(metrics, baselines) == pytest.approx(((10 / 40 + 30 / 60) / 2 + 1 / 8) / 2, rel=1e-15)
    # A task with a hundred times larger errors and baselines counts the same.
    scaled = {**metrics, "a": metrics_of(1000.0, 3000.0)}
    same = criterion(scaled, {**baselines, "a": Baseline(4000.0, 6000.0)})
    assert same == pytest.approx(criterion(metrics, baselines), rel=1e-15)


@pytest.mark.parametrize(
    ("energy", "force", "baseline", "expected"),
    [
        (3.0, 4.0, Baseline(6.0, None), 0.5),
        (None, 4.0, Baseline(6.0, 16.0), 0.25),
        (math.nan, 4.0, Baseline(6.0, 16.0), math.inf),
        (3.0, math.inf, Baseline(6.0, 16.0), math.inf),
        (math.nan, 4.0, Baseline(None, 16.0), 0.25),  # what is not compared does not matter
        (None, None, Baseline(6.0, 16.0), math.inf),
        (3.0, 4.0, Baseline(None, None), math.inf),
    ],
)
def test_criterion_without_labels_or_finite_errors(
    energy: float | None, force: float | None, baseline: Baseline, expected: float
) -> None:
    assert criterion({"task": metrics_of(energy, force)}, {"task": baseline}) == expected


def test_baselines_are_the_manifests_statistics(dataset: Path) -> None:
    """A potential that knows the mean energy per atom, and no forces, has RMS errors of exactly the baseline."""
    entry = read_manifest(dataset).entry("low")
    labels = [(s, s.labels["low"]) for s in epoch_structures(dataset, "low", "train")]
    energies = [
        (label.energy - sum(entry.e0[int(z)] for z in s.numbers)) / s.num_atoms
        for s, label in labels
        if label.energy is not None
    ]
    forces = np.concatenate([label.forces.ravel() for _, label in labels if label.forces is not None])
    found = Baseline.of(entry)
    assert found.energy == pytest.approx(1000 * np.std(energies), rel=1e-5)
    assert found.force == pytest.approx(1000 * np.sqrt(np.mean(np.square(forces))), rel=1e-5)
    assert Baseline.of(dataclasses.replace(entry, energy_std=0.0, force_rms=None)) == Baseline(None, None)


@pytest.mark.parametrize("world", [1, 3, 5])
def test_shares_hold_each_structure_once_and_about_equally_many_atoms(world: int, structures: list[Structure]) -> None:
    tasks = (structures, structures[:7])
    loads = [np.zeros(world, np.int64) for _ in range(world)]  # as each rank sees them
    shares = [
        [[structure.key for structure in Share(task, rank, loads[rank])] for task in tasks] for rank in range(world)
    ]
    for index, task in enumerate(tasks):
        together = [key for share in shares for key in share[index]]
        assert sorted(together) == sorted(structure.key for structure in task)
    assert all((first == second).all() for first, second in pairwise(loads))
    assert loads[0].sum() == sum(structure.num_atoms for task in tasks for structure in task)
    assert loads[0].max() - loads[0].min() <= max(structure.num_atoms for structure in structures)


def plan_of(dataset: Path) -> Any:
    """What of a plan an evaluation reads."""
    model = ModelConfig(
        elements=tuple(sorted(read_manifest(dataset).elements)),
        fidelities=("low", "high"),
        channels=4,
        num_radial=4,
        l_max=1,
        readout_hidden=4,
    )
    tasks = tuple(Task(str(dataset), fidelity) for fidelity in model.fidelities)
    return SimpleNamespace(tasks=tasks, task_names=("emt/low", "emt/high"), model=model)


def potential_of(dataset: Path) -> Potential:
    """Double precision, so that the order of sums does not matter."""
    model = plan_of(dataset).model
    potential = Potential(model)
    for fidelity in model.fidelities:
        potential.set_reference(fidelity, read_manifest(dataset).entry(fidelity).e0)
    potential.set_scale(3.0)
    return potential.double()


def run_evaluation(
    dataset: Path, max_structures: int, groups: int, budget: Budget = DEFAULT_BUDGET, broken_rank: int | None = None
) -> tuple[Evaluated | str, int]:
    """Evaluate on this rank; return the result, or the error, and the number of structures that this rank holds."""
    ranks = Ranks(torch.device("cpu"), timedelta(seconds=60), groups)
    evaluation = Evaluation(plan_of(dataset), EvaluationConfig(max_structures=max_structures), ranks, budget)
    potential = potential_of(dataset)
    if ranks.rank == broken_rank:
        potential.e0_FZ.fill_(math.nan)
    held = sum(map(len, evaluation._structures))
    try:
        return evaluation.run(potential), held
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", held


def assert_same(found: Evaluated, expected: Evaluated) -> None:
    for task, values in expected.metrics.items():
        assert found.metrics[task] == pytest.approx(values, rel=1e-9)
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.criterion == pytest.approx(expected.criterion, rel=1e-9)


def expected_of(dataset: Path, structures: Sequence[Structure]) -> dict[str, Metrics]:
    """The errors by `rung.model.predict`, of all validation structures in one process."""
    validation = [structure for structure in structures if structure.key.endswith(("_0", "_1"))]
    return {
        f"emt/{fidelity}": evaluate(potential_of(dataset), [s for s in validation if fidelity in s.labels], fidelity)
        for fidelity in ("low", "high")
    }


@pytest.mark.slow
def test_ranks_together_find_what_one_process_does(dataset: Path, structures: list[Structure], run_ranks: Any) -> None:
    expected = expected_of(dataset, structures)
    results = run_ranks(run_evaluation, 4, dataset, 100, 2)
    for evaluated, held in results:
        assert 0 < held < 18
        assert evaluated.metrics.keys() == expected.keys()
        for task, values in expected.items():
            assert evaluated.metrics[task] == pytest.approx(values, rel=1e-9)
            assert values["num_forces"] in (12, 6)
        assert evaluated == results[0][0]
    baselines = {f"emt/{name}": Baseline.of(read_manifest(dataset).entry(name)) for name in ("low", "high")}
    assert results[0][0].criterion == pytest.approx(criterion(expected, baselines), rel=1e-9)


@pytest.mark.slow
def test_ranks_without_structures_take_part(dataset: Path, run_ranks: Any) -> None:
    ((expected, _),) = run_ranks(run_evaluation, 1, dataset, 1, 1)
    results = run_ranks(run_evaluation, 3, dataset, 1, 1)
    assert sorted(held for _, held in results) == [0, 1, 1]
    for evaluated, _ in results:
        assert_same(evaluated, expected)


@pytest.mark.slow
def test_batches_keep_to_a_budget_but_for_larger_structures(dataset: Path, run_ranks: Any) -> None:
    ((expected, _),) = run_ranks(run_evaluation, 1, dataset, 100, 1)
    ((evaluated, _),) = run_ranks(run_evaluation, 1, dataset, 100, 1, Budget(3, 6))  # water; ethane has 8 atoms
    assert_same(evaluated, expected)


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all(dataset: Path, run_ranks: Any) -> None:
    results = run_ranks(run_evaluation, 3, dataset, 100, 1, DEFAULT_BUDGET, 1)
    errors = [error for error, _ in results]
    assert errors[1].startswith("ValueError: structure '") and "was not trained on" in errors[1]
    assert errors[0] == errors[2] == "RuntimeError: evaluation: failed on 1 other rank(s), whose message says why"


@pytest.mark.slow
def test_an_evaluation_that_is_off(dataset: Path, run_ranks: Any) -> None:
    assert run_ranks(run_evaluation, 2, dataset, 0, 1) == [(Evaluated({}, None), 0)] * 2


@pytest.mark.slow
def test_a_task_without_labels_in_the_split(structures: list[Structure], run_ranks: Any, tmp_path: Path) -> None:
    """Odd geometries have no labels at `high`."""
    folder = tmp_path / "dataset"
    build_dataset(
        structures,
        folder,
        name="emt",
        fidelities={name: Fidelity(name, "emt") for name in ("high", "low")},
        split=lambda group: "val" if group.endswith("_1") else "train",
    )
    (error,) = run_ranks(error_at_start, 1, folder)
    assert error.startswith("task emt/high: expected labels in split 'val', found none; choose another")


def error_at_start(dataset: Path) -> str:
    ranks = Ranks(torch.device("cpu"), timedelta(seconds=60))
    try:
        Evaluation(plan_of(dataset), EvaluationConfig(), ranks)
    except ValueError as error:
        return str(error)
    return "no error"
