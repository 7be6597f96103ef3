"""One training step's mathematics as a module: energies, forces and the loss, all inside its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rung.data.batch import Batch
from rung.model.loss import LossConfig, loss_terms, total
from rung.model.potential import Potential


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks and over the steps of one round or one log interval; add them up with +."""

    loss: float = 0.0
    energy_loss: float = 0.0  # mean penalty of the energies, before loss.energy_weight
    forces_loss: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0  # that changed the weights
    skipped: int = 0  # not finite
    structures: int = 0
    atoms: int = 0
    stop: bool = False  # some rank was asked to stop

    def __add__(self, other: StepTotals) -> StepTotals:
        return StepTotals(
            self.loss + other.loss,
            self.energy_loss + other.energy_loss,
            self.forces_loss + other.forces_loss,
            self.grad_norm + other.grad_norm,
            self.steps + other.steps,
            self.skipped + other.skipped,
            self.structures + other.structures,
            self.atoms + other.atoms,
            self.stop or other.stop,
        )


class StepModule(nn.Module):
    """What DeepSpeed wraps: a batch in, the loss out.

    Forces must be taken inside this forward: DeepSpeed hooks the outputs, and forces differentiated from an engine's
    output are wrong without an error in some configurations. The loss is this rank's share of the loss over all
    ranks' labels, times their number, because DeepSpeed averages gradients over the ranks.
    """

    def __init__(self, potential: Potential, loss: LossConfig, sum_: Callable[[Tensor], Tensor], world: int) -> None:
        super().__init__()
        self.potential = potential
        self.loss = loss
        self._sum = sum_
        self._world = world

    def forward(self, batch: Batch, stop: bool) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and the sums over all ranks that `read_common` reads, float64, detached.

        These are the loss terms' statistics, the numbers of structures and atoms, and how many ranks were asked to
        stop. One collective makes them, so every rank reads the same numbers and takes the same decisions.
        """
        needs_forces = self.loss.forces_weight > 0
        prediction = self.potential(batch, forces=needs_forces)
        terms = loss_terms(prediction, batch, self.loss, self.potential.scale)
        local = terms.statistics()
        rest = local.new_tensor([batch.num_structures, batch.num_atoms, float(stop)])
        common = self._sum(torch.cat([local.flatten(), rest]))
        statistics = common[: local.numel()].reshape(local.shape)
        return total(terms, statistics, self.loss) * self._world, common


def read_common(common: Tensor, config: LossConfig) -> StepTotals:
    """Return the second output of `StepModule.forward` as numbers."""
    statistics = common[:-3].reshape(2, -1)
    sums, counts = statistics[:, :-1], statistics[:, -1].clamp(min=1)
    means = sums / counts[:, None]
    values = means[:, 0].sqrt() + means[:, 1] if config.kind == "rmse_mae" else means[:, 0]
    energy_loss, forces_loss = values.tolist()
    structures, atoms, stop = common[-3:].tolist()
    loss = config.energy_weight * energy_loss + config.forces_weight * forces_loss
    return StepTotals(loss, energy_loss, forces_loss, structures=int(structures), atoms=int(atoms), stop=stop > 0)
