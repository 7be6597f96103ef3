"""One log interval: what its steps added up on the device and on the host, and the record that it makes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rung.model.loss import LossConfig, mean_loss
from rung.pretrain.metrics import TaskRecord, TrainRecord, peak_memory_mb
from rung.pretrain.plan import Plan
from rung.pretrain.ranks import Ranks
from rung.pretrain.step import StepTotals
from rung.pretrain.stopwatch import Stopwatch


class Interval:
    """Adds up rounds until they are read, which is the one place where the loop waits for the device."""

    def __init__(self, plan: Plan, loss: LossConfig, ranks: Ranks, data_wait: Stopwatch) -> None:
        self._plan, self._loss, self._ranks, self._data_wait = plan, loss, ranks, data_wait
        self._totals: Tensor | None = None
        self._rounds = 0
        self._start()

    def add(self, totals: Tensor) -> None:
        """Add the totals of one round, as the task group has them."""
        self._totals = totals if self._totals is None else self._totals + totals
        self._rounds += 1

    def read(self) -> StepTotals:
        """Return the sums over all ranks; all ranks call it, after at least one round."""
        assert self._totals is not None
        return StepTotals.read(self._ranks.sum_all_(self._totals.clone()) / self._ranks.world.data_ranks)

    def close(self, totals: StepTotals, step: int, skipped: int, learning_rate: float) -> TrainRecord:
        """Return the record of what `read` returned, and begin the next interval; all ranks call it."""
        seconds = time.perf_counter() - self._begin
        ranks, steps = self._ranks, max(1, totals.steps)
        traffic = ranks.traffic
        moved = {name: traffic.bytes.get(name, 0) - before for name, before in self._bytes.items()}
        waited = self._communication() - self._waited_ranks
        mine = [seconds, self._data_wait.seconds - self._waited_data, waited, *moved.values()]
        shared = torch.tensor(mine, dtype=torch.float64, device=ranks.device)
        seconds, data_wait, communication, inner, outer = (ranks.sum_all_(shared) / ranks.world.size).tolist()
        memory = torch.tensor([peak_memory_mb(ranks.device)], dtype=torch.float64, device=ranks.device)
        inner_steps = (totals.steps + totals.skipped) / ranks.world.groups
        record = TrainRecord(
            step=step,
            loss=totals.loss / steps,
            energy_loss=totals.energy_loss / steps,
            forces_loss=totals.forces_loss / steps,
            grad_norm=totals.grad_norm / steps,
            learning_rate=learning_rate,
            skipped=skipped,
            structures_per_second=totals.structures / seconds,
            atoms_per_second=totals.atoms / seconds,
            edges_per_second=totals.edges / seconds,
            data_wait_share=data_wait / seconds,
            communication_share=communication / seconds,
            bytes_per_inner_step=inner / max(1, inner_steps),
            bytes_per_outer_step=outer / self._rounds,
            memory_mb=ranks.max_all_(memory).item(),
            tasks={
                name: self._task(values)
                for name, values in zip(self._plan.task_names, totals.tasks, strict=True)
                if values["structures"]
            },
        )
        self._start()
        return record

    def _start(self) -> None:
        self._totals = None
        self._rounds = 0
        self._begin = time.perf_counter()
        self._waited_data = self._data_wait.seconds
        self._waited_ranks = self._communication()
        self._bytes = {name: self._ranks.traffic.bytes.get(name, 0) for name in ("inner", "outer")}

    def _communication(self) -> float:
        return sum(self._ranks.traffic.seconds.values())

    def _task(self, values: dict[str, float]) -> TaskRecord:
        energies, forces = values["energies"], values["forces"]
        sums = [[values[f"{kind}_penalty"], values[f"{kind}_penalty_2"]] for kind in ("energy", "force")]
        means = torch.tensor(sums) / torch.tensor([[energies], [forces]]).clamp(min=1)
        return TaskRecord(
            structures=round(values["structures"]),
            loss=mean_loss(means, self._loss)[0].item(),
            energy_mae_mev_per_atom=1000 * values["energy_error"] / energies if energies else None,
            force_mae_mev_per_angstrom=1000 * values["force_error"] / forces if forces else None,
        )
