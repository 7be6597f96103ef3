"""The training loss as sums and counts, so that its mean over the whole data-parallel group is exact.

With mean normalisation on each rank, a rank with few labels would weigh them more. So a rank computes its sums
(`loss_terms`), the group adds up the detached `statistics`, and `total` divides by the group's counts. The sum of
`total` over the ranks is the loss; where gradients are averaged (DeepSpeed), multiply it by the number of ranks.

M structures, N atoms, S sums per quantity (1; 2 for `rmse_mae`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rung.data.batch import Batch
from rung.model.potential import Prediction


@dataclass(frozen=True)
class LossConfig:
    """Weights and shape of the loss; residuals (energy per atom, force component) are in units of the model's scale.

    huber     quadratic below `huber_delta`, linear above: one wrong label does not dominate.
    l2        half the square: the limit of `huber` for a large delta.
    rmse_mae  root mean square + mean absolute error of each quantity (arXiv:2505.01590).
    """

    kind: Literal["huber", "l2", "rmse_mae"] = "huber"
    huber_delta: float = 0.1  # in units of the model's scale
    energy_weight: float = 1.0
    forces_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("huber", "l2", "rmse_mae"):
            raise ValueError(f"loss.kind: expected huber, l2 or rmse_mae, found {self.kind}")
        if not self.huber_delta > 0:
            raise ValueError(f"loss.huber_delta: expected a positive number, found {self.huber_delta}")
        for name in ("energy_weight", "forces_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name}: expected a number >= 0, found {getattr(self, name)}")
        if self.energy_weight == self.forces_weight == 0:
            raise ValueError("loss: energy_weight and forces_weight are both 0, so there is nothing to train on")


@dataclass(frozen=True)
class LossTerms:
    """One rank's sums over its labels (absent ones excluded), rows: energies per atom, force components."""

    sums: Tensor  # [2, S], differentiable; rmse_mae: squares and absolute values
    counts: Tensor  # [2], labels

    def statistics(self) -> Tensor:
        """Return sums and counts, detached, float64 [2, S + 1]: add them up over the data-parallel group."""
        return torch.cat([self.sums.detach(), self.counts[:, None]], dim=1).double()


def loss_terms(prediction: Prediction, batch: Batch, config: LossConfig, scale: Tensor | float) -> LossTerms:
    """Return the weighted sums of the residuals' penalties and the number of labels.

    A label that is NaN adds nothing to sums, counts and gradients. `scale` is the model's, in eV.
    Raises ValueError when the forces were not predicted although their weight is not 0.
    """
    num_atoms_M = torch.zeros_like(batch.fidelity).index_add_(0, batch.structure, torch.ones_like(batch.structure))
    energy = (prediction.energy - batch.energy) / (num_atoms_M * scale)
    return terms_of(energy, batch.energy.isnan(), batch.energy_weight, prediction, batch, config, scale)


def terms_of(
    energy: Tensor,
    absent: Tensor,
    weight: Tensor,
    prediction: Prediction,
    batch: Batch,
    config: LossConfig,
    scale: Tensor | float,
) -> LossTerms:
    """Return as `loss_terms` does, from residual energies of whatever is labelled: structures, reactions.

    `energy` are the residuals per atom in units of the scale [R], `absent` tells which have no label, `weight` [R];
    the forces are those of the batch.
    """
    if prediction.forces is None and config.forces_weight > 0:
        raise ValueError("loss.forces_weight is not 0: expected predicted forces, found none; predict with forces=True")
    dtype = batch.positions.dtype
    sums, counts = _penalties(energy.to(dtype), absent, weight, config)
    if prediction.forces is None:
        return LossTerms(torch.stack([sums, torch.zeros_like(sums)]), torch.stack([counts, torch.zeros_like(counts)]))
    forces = (prediction.forces - batch.forces) / scale
    weight_N1 = batch.forces_weight[batch.structure, None]
    force_sums, force_counts = _penalties(forces.to(dtype), batch.forces.isnan(), weight_N1, config)
    return LossTerms(torch.stack([sums, force_sums]), torch.stack([counts, force_counts]))


def total(terms: LossTerms, statistics: Tensor, config: LossConfig) -> Tensor:
    """Return this rank's share of the loss, a scalar; the shares of all ranks add up to it, and so do their gradients.

    `statistics` is the sum over the ranks of `terms.statistics()`; on one rank, that itself.
    """
    counts = statistics[:, -1:].clamp(min=1)  # a quantity without labels adds 0 / 1
    means = terms.sums / counts
    if config.kind == "rmse_mae":
        squares, absolutes = means.unbind(dim=1)
        rmse = (statistics[:, 0] / counts[:, 0]).clamp(min=1e-24).sqrt()
        # d sqrt(s) = ds / (2 sqrt(s)); the detached half brings the value of the shares' sum to sqrt(s).
        shares = (squares + squares.detach()) / (2 * rmse) + absolutes
    else:
        shares = means[:, 0]
    energy, forces = shares.to(terms.sums.dtype).unbind()
    return config.energy_weight * energy + config.forces_weight * forces


def penalties(residual: Tensor, config: LossConfig) -> list[Tensor]:
    """Return each residual's penalty, in the residuals' shape; rmse_mae: squares and magnitudes."""
    magnitude = residual.abs()
    if config.kind == "rmse_mae":
        return [residual.square(), magnitude]
    if config.kind == "l2":
        return [residual.square() / 2]
    delta = config.huber_delta
    return [torch.where(magnitude < delta, residual.square() / 2, delta * (magnitude - delta / 2))]


def mean_loss(means: Tensor, config: LossConfig) -> Tensor:
    """Return the loss of mean penalties [..., 2, S] (energies, forces): itself, its energy and its force part [..., 3].

    Both parts are without their weights.
    """
    parts = means[..., 0].sqrt() + means[..., 1] if config.kind == "rmse_mae" else means[..., 0]
    energy, forces = parts.unbind(-1)
    return torch.stack([config.energy_weight * energy + config.forces_weight * forces, energy, forces], dim=-1)


def _penalties(residual: Tensor, absent: Tensor, weight: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return the weighted sums [S] of the penalties of the labels that are there, and their number."""
    residual = residual.masked_fill(absent, 0)  # before any non-linear arithmetic: 0 * NaN in a gradient is NaN
    sums = torch.stack([(weight * penalty).sum() for penalty in penalties(residual, config)])
    return sums, (~absent).sum().to(sums.dtype)
