"""Errors per task on unseen structures, spread over the ranks, and the one number that chooses the best weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields, replace
from itertools import islice

import numpy as np
import torch

from rung.data.batch import Budget
from rung.data.manifest import FidelityEntry, read_manifest
from rung.data.stream import epoch_structures
from rung.data.structure import Structure
from rung.model.potential import Potential
from rung.model.predict import DEFAULT_BUDGET, MEV, ErrorSums, error_sums, widened
from rung.pretrain.config import EvaluationConfig
from rung.pretrain.metrics import Metrics
from rung.pretrain.plan import Plan
from rung.pretrain.ranks import Ranks


@dataclass(frozen=True)
class Baseline:
    """What a task's errors are compared with, from the manifest's statistics. None: no such labels."""

    energy: float | None  # meV/atom, the spread of the training energies per atom around their mean, less E0
    force: float | None  # meV/angstrom, the RMS of the training forces' components

    @staticmethod
    def of(entry: FidelityEntry) -> Baseline:
        """Return the baseline that a manifest's statistics give."""
        energy, force = (value and MEV * value for value in (entry.energy_std, entry.force_rms))
        return Baseline(energy or None, force or None)


def criterion(metrics: Mapping[str, Metrics], baselines: Mapping[str, Baseline]) -> float:
    """Return the error over all tasks, relative to their baselines; lower is better.

        criterion = mean over tasks t of r_t
        r_t = mean of (energy MAE_t / energy baseline_t, force MAE_t / force baseline_t)

    Every task counts the same, however many structures it has, and however large its errors are in meV. A ratio is left
    out where a task has no such labels or no baseline, and a task without any ratio is left out of the mean. Infinite,
    so never the best, when an error is not finite or nothing is left.
    """
    means = []
    for task, values in metrics.items():
        pairs = (
            (values["energy_mae_mev_per_atom"], baselines[task].energy),
            (values["force_mae_mev_per_angstrom"], baselines[task].force),
        )
        ratios = [error / baseline for error, baseline in pairs if error is not None and baseline]
        if ratios:
            means.append(sum(ratios) / len(ratios))
    value = sum(means) / len(means) if means else math.inf
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Evaluated:
    """The result of one evaluation, the same on every rank; without metrics and criterion when evaluation is off."""

    metrics: dict[str, Metrics]  # task name -> errors, see `rung.model.predict.ErrorSums.metrics`
    criterion: float | None


class Evaluation:
    """This rank's share of every task's evaluation set, read once and kept.

    Every rank reads the whole set, keeps nothing but its share of it, and has about as many atoms as any other.
    """

    def __init__(self, plan: Plan, config: EvaluationConfig, ranks: Ranks, budget: Budget = DEFAULT_BUDGET) -> None:
        """A batch keeps within `budget`, unless a single structure of the set is larger.

        Raises ValueError for a task without labels in the split.
        """
        self._plan = plan
        self._ranks = ranks
        self._budget = budget
        self._structures: list[list[Structure]] = []
        self._baselines: dict[str, Baseline] = {}
        if config.max_structures == 0:
            return
        atoms = np.zeros(ranks.world.size, np.int64)  # of each rank, all tasks together
        for index, name in enumerate(plan.task_names):
            share = Share(self._read(index, config), ranks.rank, atoms)
            self._structures.append(list(share))
            if share.total == 0:
                raise ValueError(
                    f"task {name}: expected labels in split '{config.split}', found none; "
                    "choose another evaluation.split, or set evaluation.max_structures=0"
                )
            task = plan.tasks[index]
            self._baselines[name] = Baseline.of(read_manifest(task.dataset).entry(task.fidelity))
        # Once, not at each evaluation: no structure must stop a run halfway.
        for structures in self._structures:
            self._budget = widened(self._budget, structures, plan.model.cutoff)

    def _read(self, index: int, config: EvaluationConfig) -> Iterator[Structure]:
        """Yield a task's evaluation set: evenly spaced over the split, as neighbours are geometries of one molecule."""
        task = self._plan.tasks[index]
        entry = read_manifest(task.dataset).entry(task.fidelity)
        labels = max(counts.get(config.split, 0) for counts in (entry.num_energies, entry.num_forces))
        every = max(1, labels // config.max_structures)
        spaced = epoch_structures(
            task.dataset, task.fidelity, config.split, every=every, shard_url=task.shard_url, remote=task.remote
        )
        return islice(spaced, config.max_structures)

    def run(self, potential: Potential) -> Evaluated:
        """Return the errors over all ranks' structures; every rank calls it.

        Raises what went wrong on this rank, and RuntimeError on the ranks where nothing did: all raise together.
        """
        if not self._structures:
            return Evaluated({}, None)
        failure: Exception | None = None
        rows = [astuple(ErrorSums())] * len(self._structures)
        try:
            pairs = zip(self._plan.tasks, self._structures, strict=True)
            rows = [astuple(error_sums(potential, mine, task.fidelity, budget=self._budget)) for task, mine in pairs]
        except Exception as error:  # raised below, when the other ranks know
            failure = error
        table = [[*row, float(failure is not None)] for row in rows]
        sums = self._ranks.sum_all_(torch.tensor(table, dtype=torch.float64, device=self._ranks.device)).tolist()
        if failure is not None:
            raise failure
        if sums[0][-1]:
            raise RuntimeError(f"evaluation: failed on {sums[0][-1]:.0f} other rank(s), whose message says why")
        names = self._plan.task_names
        metrics = {name: _error_sums(row[:-1]).metrics() for name, row in zip(names, sums, strict=True)}
        return Evaluated(metrics, criterion(metrics, self._baselines))


class Share:
    """One rank's part of structures that every rank sees in the same order.

    Each goes to the rank that has the fewest atoms so far, so no two ranks differ by more than the largest structure.
    """

    def __init__(self, structures: Iterable[Structure], rank: int, atoms: np.ndarray[tuple[int], np.dtype[np.int64]]):
        """`atoms` [ranks] is what every rank has already; it is added to."""
        self._structures = structures
        self._rank = rank
        self._atoms = atoms
        self.total = 0  # structures of all ranks that have gone by

    def __iter__(self) -> Iterator[Structure]:
        for structure in self._structures:
            self.total += 1
            owner = int(self._atoms.argmin())
            self._atoms[owner] += structure.num_atoms
            if owner == self._rank:
                yield structure


def _error_sums(row: list[float]) -> ErrorSums:
    """Return the sums from a tensor's row, in which counts became floats."""
    sums = ErrorSums(*row)  # type: ignore[arg-type]
    counts = {field.name: int(getattr(sums, field.name)) for field in fields(sums) if field.name.startswith("num_")}
    return replace(sums, **counts)
