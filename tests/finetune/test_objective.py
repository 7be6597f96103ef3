"""The loss of rows: equal to the structures' own loss for total energies, by hand for relative ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rung.data.batch import collate
from rung.data.reaction import Reaction
from rung.data.structure import Structure
from rung.finetune.dataset import absolute_rows
from rung.finetune.objective import WeightedRow, collate_rows, row_loss
from rung.model.loss import LossConfig, loss_terms, total
from rung.model.potential import Potential
from rung.model.predict import predict

CONFIG = LossConfig(huber_delta=0.05)


def index(potential: Potential) -> dict[str, int]:
    return {name: row for row, name in enumerate(potential.config.fidelities)}


@pytest.mark.parametrize("forces", [False, True])
def test_total_energies_have_the_loss_of_their_structures(
    potential: Potential, harder: list[Structure], forces: bool
) -> None:
    potential.add_fidelity("high", "low")
    config = LossConfig(huber_delta=0.05, forces_weight=float(forces))
    cutoff, names = potential.config.cutoff, ["high"] * len(harder)
    weights = np.linspace(0.5, 1.5, len(harder)).tolist()
    batch = collate(
        harder,
        fidelities=names,
        fidelity_index=index(potential),
        cutoff=cutoff,
        energy_weights=weights,
        forces_weights=weights,
    )
    terms = loss_terms(potential(batch, forces=forces), batch, config, potential.scale)
    expected = total(terms, terms.statistics(), config).detach()

    rows = [WeightedRow(r, "high", w) for r, w in zip(absolute_rows(harder, "high"), weights, strict=True)]
    collated = collate_rows(rows, index(potential), cutoff)
    found = row_loss(potential(collated.batch, forces=forces), collated, config, potential.scale).detach()
    assert float(found) > 0
    torch.testing.assert_close(found, expected)


def test_a_reaction_counts_per_atom_of_its_larger_side_and_shares_structures(
    potential: Potential, shifted: list[Structure]
) -> None:
    a, b, c = shifted[0], shifted[1], shifted[2]
    energy = {s.key: p.energy for s, p in zip(shifted, predict(potential, shifted, "low"), strict=True)}
    reactions = [Reaction("1", "g", (c, a, b), (1.0, -1.0, -0.5), 0.1), Reaction("2", "g", (c, b), (1.0, -1.0), -0.2)]
    rows = collate_rows([WeightedRow(r, "low") for r in reactions], index(potential), potential.config.cutoff)
    assert rows.batch.num_structures == 3
    found = row_loss(potential(rows.batch, forces=False), rows, LossConfig(kind="l2", forces_weight=0), potential.scale)
    residuals = [
        (energy[c.key] - energy[a.key] - 0.5 * energy[b.key] - 0.1) / max(c.num_atoms, a.num_atoms + b.num_atoms / 2),
        (energy[c.key] - energy[b.key] + 0.2) / max(c.num_atoms, b.num_atoms),
    ]
    scale = float(potential.scale)
    assert found.item() == pytest.approx(np.mean([0.5 * (r / scale) ** 2 for r in residuals]), rel=1e-5)


def test_one_structure_at_two_fidelities_is_two(potential: Potential, shifted: list[Structure]) -> None:
    rows = [WeightedRow(Reaction.absolute(shifted[0], -1.0), name) for name in ("low", "other")]
    batch = collate_rows(rows, index(potential), potential.config.cutoff).batch
    assert batch.fidelity.tolist() == [0, 1]


def test_a_row_without_an_energy_counts_by_its_forces_only(potential: Potential, shifted: list[Structure]) -> None:
    row = WeightedRow(Reaction.absolute(shifted[0], float("nan")), "other")
    other = WeightedRow(Reaction.absolute(shifted[1], -1.0), "other")
    losses = []
    for some in ([row, other], [other]):
        rows = collate_rows(some, index(potential), potential.config.cutoff)
        losses.append(row_loss(potential(rows.batch), rows, CONFIG, potential.scale))
    torch.testing.assert_close(losses[0], losses[1])  # no label at `other` has forces here
