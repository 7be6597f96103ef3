"""The loss of a batch of rows: energies of structures, relative energies of reactions, and forces.

R rows, M structures, X terms (a structure in a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.reaction import Reaction
from rung.data.structure import Structure
from rung.model.loss import LossConfig, terms_of, total
from rung.model.potential import Prediction


class WeightedRow(NamedTuple):
    """A row with the fidelity of its labels and the weight of its loss terms."""

    reaction: Reaction
    fidelity: str
    weight: float = 1.0


@dataclass(frozen=True)
class RowBatch:
    """Rows, and the structures that occur in them as one batch, every structure once per fidelity."""

    batch: Batch  # its energy labels are not used: a row has its own
    row_X: Tensor  # int64 [X]
    structure_X: Tensor  # int64 [X]
    coefficient_X: Tensor  # float64 [X]
    energy_R: Tensor  # float64 [R], eV; NaN where a row has only forces
    atoms_R: Tensor  # float64 [R]
    weight_R: Tensor  # [R]
    keys: tuple[str, ...]  # of the rows

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to a device; the batch's floating-point tensors take the dtype, labels and coefficients stay float64."""
        names = ("row_X", "structure_X", "coefficient_X", "energy_R", "atoms_R")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, batch=self.batch.to(device, dtype), weight_R=self.weight_R.to(device, dtype), **moved)


def collate_rows(rows: Sequence[WeightedRow], fidelity_index: Mapping[str, int], cutoff: float) -> RowBatch:
    """Return rows as a batch; a structure's forces take the largest weight of the rows that it is in."""
    place: dict[tuple[int, str], int] = {}
    structures: list[Structure] = []
    fidelities: list[str] = []
    weights: list[float] = []
    terms: list[tuple[int, int, float]] = []
    for index, (reaction, fidelity, weight) in enumerate(rows):
        for structure, coefficient in zip(reaction.structures, reaction.coefficients, strict=True):
            where = place.setdefault((id(structure), fidelity), len(structures))
            if where == len(structures):
                structures.append(structure)
                fidelities.append(fidelity)
                weights.append(weight)
            weights[where] = max(weights[where], weight)
            terms.append((index, where, coefficient))
    row_X, structure_X, coefficient_X = zip(*terms, strict=True)
    return RowBatch(
        batch=collate(
            structures, fidelities=fidelities, fidelity_index=fidelity_index, cutoff=cutoff, forces_weights=weights
        ),
        row_X=torch.tensor(row_X),
        structure_X=torch.tensor(structure_X),
        coefficient_X=torch.tensor(coefficient_X, dtype=torch.float64),
        energy_R=torch.tensor([row.reaction.energy for row in rows], dtype=torch.float64),
        atoms_R=torch.tensor([row.reaction.num_atoms for row in rows], dtype=torch.float64),
        weight_R=torch.tensor([row.weight for row in rows]),
        keys=tuple(row.reaction.key for row in rows),
    )


def row_loss(prediction: Prediction, rows: RowBatch, config: LossConfig, scale: Tensor) -> Tensor:
    """Return the mean penalty of the rows' errors per atom and of the forces' errors, weighted; scalar."""
    terms_X = rows.coefficient_X * prediction.energy.index_select(0, rows.structure_X)
    energy_R = torch.zeros_like(rows.energy_R).index_add(0, rows.row_X, terms_X)
    residual_R = (energy_R - rows.energy_R) / (rows.atoms_R * scale)
    terms = terms_of(residual_R, rows.energy_R.isnan(), rows.weight_R, prediction, rows.batch, config, scale)
    return total(terms, terms.statistics(), config)
