"""Errors per task on unseen structures, spread over the ranks."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from itertools import islice

import torch

from rung.data.manifest import read_manifest
from rung.data.stream import epoch_structures
from rung.data.structure import Structure
from rung.model.potential import Potential
from rung.model.predict import ErrorSums, error_sums
from rung.pretrain.config import EvaluationConfig
from rung.pretrain.plan import Plan
from rung.pretrain.ranks import Ranks

Metrics = dict[str, float | None]


class Evaluation:
    """This rank's share of every task's evaluation set, read once and kept."""

    def __init__(self, plan: Plan, config: EvaluationConfig, ranks: Ranks) -> None:
        self._plan = plan
        self._ranks = ranks
        self._structures: list[list[Structure]] = []
        if config.max_structures == 0:
            return
        for name, task in zip(plan.task_names, plan.tasks, strict=True):
            entry = read_manifest(task.dataset).entry(task.fidelity)
            labels = max(counts.get(config.split, 0) for counts in (entry.num_energies, entry.num_forces))
            # Evenly spaced over the split, since neighbours are geometries of one molecule; the same on every rank.
            spacing = max(1, labels // config.max_structures)
            spaced = epoch_structures(
                task.dataset,
                task.fidelity,
                config.split,
                every=spacing,
                shard_url=task.shard_url,
                remote=task.remote,
            )
            found = list(islice(spaced, config.max_structures))
            if not found:
                raise ValueError(
                    f"task {name}: expected labels in split '{config.split}', found none; "
                    "choose another evaluation.split, or set evaluation.max_structures=0"
                )
            self._structures.append(found[ranks.rank :: ranks.world])

    def run(self, potential: Potential) -> dict[str, Metrics]:
        """Return task name -> metrics over all ranks' structures; empty when evaluation is off."""
        if not self._structures:
            return {}
        pairs = zip(self._plan.tasks, self._structures, strict=True)
        mine = [astuple(error_sums(potential, structures, task.fidelity)) for task, structures in pairs]
        sums = self._ranks.sum_(torch.tensor(mine, dtype=torch.float64, device=self._ranks.device)).tolist()
        return {name: _error_sums(row).metrics() for name, row in zip(self._plan.task_names, sums, strict=True)}


def _error_sums(row: list[float]) -> ErrorSums:
    """Return the sums from a tensor's row, in which counts became floats."""
    sums = ErrorSums(*row)  # type: ignore[arg-type]
    counts = {field.name: int(getattr(sums, field.name)) for field in fields(sums) if field.name.startswith("num_")}
    return replace(sums, **counts)


def table(metrics: dict[str, Metrics]) -> str:
    """Return the metrics as lines for people: MAE in meV/atom and meV/angstrom."""
    rows = [f"{'task':<40}{'energy MAE':>14}{'force MAE':>16}   (meV/atom, meV/angstrom)"]
    for name, values in metrics.items():
        energy, force = values["energy_mae_mev_per_atom"], values["force_mae_mev_per_angstrom"]
        cells = ["-" if value is None else f"{value:.2f}" for value in (energy, force)]
        rows.append(f"{name:<40}{cells[0]:>14}{cells[1]:>16}")
    return "\n".join(rows)
