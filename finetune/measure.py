"""What is measured before and after: errors on the target, errors on what was known before, and drift."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Labels, Structure
from rung.data.units import KCAL_MOL
from rung.finetune.dataset import draw
from rung.finetune.reference import check_domain
from rung.model.errors import Errors, ErrorSums, StructurePrediction
from rung.model.potential import Potential
from rung.model.predict import evaluate, predict

if TYPE_CHECKING:
    from rung.finetune.replay import ReplayTask

MAX_STRUCTURES = 100  # per fidelity, for forgetting and drift
MIN_LABELS = 5  # fewer labels of an old fidelity on the target's geometries are no measurement


@dataclass(frozen=True)
class RowErrors:
    """Errors of total and of relative energies; those of disjoint sets of rows add up."""

    absolute: ErrorSums = field(default_factory=ErrorSums)
    relative: tuple[float, ...] = ()  # prediction less label, eV
    per_atom: tuple[float, ...] = ()  # of every row, eV/atom

    def __add__(self, other: RowErrors) -> RowErrors:
        return RowErrors(self.absolute + other.absolute, self.relative + other.relative, self.per_atom + other.per_atom)

    def metrics(self) -> dict[str, float | None]:
        """Return `rung.model.predict.evaluate`'s metrics, and those of relative energies where there are any.

        row_mae_mev_per_atom is of all rows: a relative energy counts per atom of its larger side.
        """
        found = self.absolute.metrics() | {"row_mae_mev_per_atom": 1000 * float(np.mean(np.abs(self.per_atom)))}
        if self.relative:
            errors = np.array(self.relative) / KCAL_MOL
            found |= {
                "num_relative": len(errors),
                "relative_mae_kcal_per_mol": float(np.mean(np.abs(errors))),
                "relative_rmse_kcal_per_mol": float(np.sqrt(np.mean(errors**2))),
                "relative_mean_kcal_per_mol": float(np.mean(errors)),
            }
        return found


def row_errors(potential: Potential, rows: Sequence[Reaction], fidelity: str) -> RowErrors:
    """Return the errors of the potential on labelled rows at `fidelity`."""
    predictions = predict_rows(potential, rows, fidelity)
    energy = {key: prediction.energy for key, prediction in predictions.items()}
    relative, per_atom = [], []
    for row in rows:
        error = row.combined(energy) - row.energy
        per_atom.append(error / row.num_atoms)
        if not row.is_absolute:
            relative.append(error)
    absolute_rows = [row for row in rows if row.is_absolute]
    labelled = [_with_energy(row, fidelity) for row in absolute_rows]
    absolute = Errors.of(labelled, [predictions[id(row.structures[0])] for row in absolute_rows], fidelity).sums()
    return RowErrors(absolute, tuple(relative), tuple(per_atom))


def predict_rows(potential: Potential, rows: Sequence[Reaction], fidelity: str) -> dict[int, StructurePrediction]:
    """Return the predictions of the rows' structures by their `id`; with forces where any has labels of them."""
    structures = structures_of(rows)
    forces = any(s.labels[fidelity].forces is not None for s in structures if fidelity in s.labels)
    predictions = predict(potential, structures, fidelity, forces=forces)
    return dict(zip(map(id, structures), predictions, strict=True))


def _with_energy(row: Reaction, fidelity: str) -> Structure:
    """Return the structure of a total energy with that label, which a structure of a table does not carry."""
    (structure,) = row.structures
    labels = dataclasses.replace(structure.labels.get(fidelity, Labels()), energy=row.energy)
    return dataclasses.replace(structure, labels={fidelity: labels})


def forgetting(
    before: Potential,
    after: Potential,
    source: Potential,
    target: Sequence[Structure],
    others: Sequence[ReplayTask],
) -> list[dict[str, Any]]:
    """Return, for every other fidelity with labels at hand, its errors before and after.

    Labels are at hand in the held-out structures of replay and `also` tasks, and on the target's geometries where its
    dataset carries fidelities of the source; those that the source was not trained on are left out.
    """
    sets = [(task.fidelity, f"{task.dataset}, held out", task.held_out) for task in others]
    for fidelity in source.config.fidelities:
        labelled = [s for s in target if fidelity in s.labels and knows(source, [s], fidelity)]
        if len(labelled) >= MIN_LABELS and fidelity not in {task.fidelity for task in others}:
            sets.append((fidelity, "target geometries", draw(labelled, MAX_STRUCTURES, 0)))
    return [
        {
            "fidelity": fidelity,
            "set": name,
            "before": evaluate(before, structures, fidelity),
            "after": evaluate(after, structures, fidelity),
        }
        for fidelity, name, structures in sets
    ]


def drift(
    before: Potential, after: Potential, fidelities: Sequence[str], structures: Sequence[Structure]
) -> dict[str, dict[str, float]]:
    """Return per fidelity how far predictions moved on `structures`, root mean square; it needs no labels.

    Fidelities that do not know an element of the structures are left out.
    """
    structures = draw(list(structures), MAX_STRUCTURES, 0)
    moved: dict[str, dict[str, float]] = {}
    for fidelity in fidelities:
        if not knows(before, structures, fidelity):
            continue
        old, new = predict(before, structures, fidelity), predict(after, structures, fidelity)
        energy = [(b.energy - a.energy) / s.num_atoms for a, b, s in zip(old, new, structures, strict=True)]
        forces = np.concatenate([forces_of(b) - forces_of(a) for a, b in zip(old, new, strict=True)])
        moved[fidelity] = {
            "energy_rms_mev_per_atom": _rms_milli(np.array(energy)),
            "force_rms_mev_per_angstrom": _rms_milli(forces),
        }
    return moved


def knows(potential: Potential, structures: Sequence[Structure], fidelity: str) -> bool:
    """Tell whether the potential was trained on every element, charge and multiplicity of the structures."""
    try:
        check_domain(potential, structures, fidelity)
    except ValueError:
        return False
    return True


def forces_of(prediction: StructurePrediction) -> NDArray[np.float64]:
    """Return the predicted forces of one structure, [n, 3] in eV/angstrom."""
    assert prediction.forces is not None  # predict() was asked for them
    return prediction.forces


def _rms_milli(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))) * 1000)
