"""One training step's mathematics as a module: energies, forces and the loss, all inside its forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from rung.data.batch import Batch
from rung.model.loss import LossConfig, loss_terms, mean_loss, penalties, total
from rung.model.potential import Potential, Prediction

# What a step adds up beside the tasks' errors, in the order in which it lies in a vector of totals.
NAMES = ("loss", "energy_loss", "forces_loss", "grad_norm", "steps", "skipped", "structures", "atoms", "edges", "stop")
# ... and per task, of energies per atom (eV) and of force components (eV/angstrom): the number of labels, absolute
# errors, and weighted penalties (one or two kinds, see `loss.penalties`).
TASK_NAMES = (
    "structures",
    "energies",
    "energy_error",
    "energy_penalty",
    "energy_penalty_2",
    "forces",
    "force_error",
    "force_penalty",
    "force_penalty_2",
)


@dataclass(frozen=True)
class StepTotals:
    """Sums over ranks and over the steps of one log interval, read from the device."""

    loss: float = 0.0
    energy_loss: float = 0.0  # mean penalty of the energies, before loss.energy_weight
    forces_loss: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0  # that changed the weights
    skipped: int = 0  # not finite
    structures: int = 0
    atoms: int = 0
    edges: int = 0
    stop: int = 0  # ranks that were asked to stop, once for every step
    tasks: tuple[dict[str, float], ...] = field(default=())

    @classmethod
    def read(cls, totals: Tensor) -> Self:
        """Return a vector of totals as numbers: waits for the device."""
        values = totals.tolist()
        named = dict(zip(NAMES, values, strict=False))
        rows = [values[at : at + len(TASK_NAMES)] for at in range(len(NAMES), len(values), len(TASK_NAMES))]
        counts = {name: round(named[name]) for name in NAMES[4:]}
        tasks = tuple(dict(zip(TASK_NAMES, row, strict=True)) for row in rows)
        return cls(**(named | counts), tasks=tasks)


class StepModule(nn.Module):
    """What DeepSpeed wraps: a batch in, the loss out.

    Forces must be taken inside this forward: DeepSpeed hooks the outputs, and forces differentiated from an engine's
    output are wrong without an error in some configurations. The loss is this rank's share of the loss over the labels
    of all ranks of the task group, times their number, because DeepSpeed averages gradients over them.
    """

    def __init__(
        self, potential: Potential, loss: LossConfig, sum_: Callable[[Tensor], Tensor], ranks: int, num_tasks: int
    ) -> None:
        super().__init__()
        self.potential = potential
        self.loss = loss
        self.num_tasks = num_tasks
        self._sum = sum_
        self._ranks = ranks

    def forward(self, batch: Batch, stop: bool) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and this batch's vector of totals over the group, float64, detached.

        One collective makes the totals; nothing here waits for the device. When the loss over all ranks is not finite,
        so is this rank's, and therefore every gradient.
        """
        needs_forces = self.loss.forces_weight > 0
        prediction = self.potential(batch, forces=needs_forces)
        terms = loss_terms(prediction, batch, self.loss, self.potential.scale)
        local = terms.statistics()
        sizes = torch.tensor([batch.num_structures, batch.num_atoms, batch.num_edges, stop], dtype=local.dtype)
        sizes = sizes.to(local.device, non_blocking=True)
        errors = self._task_errors(prediction, batch)
        common = self._sum(torch.cat([local.flatten(), sizes, errors.flatten()]))
        statistics, sizes, errors = torch.split(common, [local.numel(), len(sizes), errors.numel()])
        statistics = statistics.reshape(local.shape)
        losses = mean_loss(statistics[:, :-1] / statistics[:, -1:].clamp(min=1), self.loss)
        share = total(terms, statistics, self.loss) * self._ranks
        share = share * torch.where(losses[0].isfinite(), 1.0, math.nan).to(share.dtype)
        return share, torch.cat([losses, losses.new_zeros(3), sizes, errors])

    @torch.no_grad()
    def _task_errors(self, prediction: Prediction, batch: Batch) -> Tensor:
        """Return the sums that `TASK_NAMES` lists; float64 [tasks, 9]."""
        ones_N = torch.ones_like(batch.numbers, dtype=torch.float64)
        num_atoms_M = ones_N.new_zeros(batch.num_structures).index_add_(0, batch.structure, ones_N)
        sums = ones_N.new_zeros(self.num_tasks, len(TASK_NAMES))
        sums[:, 0].index_add_(0, batch.task, torch.ones_like(num_atoms_M))
        energy_M = (prediction.energy - batch.energy) / num_atoms_M
        sums[:, 1:5].index_add_(0, batch.task, self._errors(energy_M, batch.energy_weight))
        if prediction.forces is not None:
            task_N = batch.task[batch.structure]
            for component_N in (prediction.forces - batch.forces).double().unbind(1):
                errors = self._errors(component_N, batch.forces_weight[batch.structure])
                sums[:, 5:].index_add_(0, task_N, errors)
        return sums

    def _errors(self, residual: Tensor, weight: Tensor) -> Tensor:
        """Return for every label whether it is there, its absolute error and its penalties; float64 [n, 4]."""
        there = ~residual.isnan()
        residual = residual.masked_fill(~there, 0)
        weighted = [weight * penalty for penalty in penalties(residual / self.potential.scale, self.loss)]
        return torch.stack([there.double(), residual.abs(), weighted[0], weighted[-1]], dim=1)
