"""Every row that was not trained on, before and after, and where the errors are: by element and by size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Structure
from rung.finetune import measure
from rung.finetune.recipe import Judged, Outcome
from rung.finetune.reference import label_energies, num_atoms
from rung.model.errors import MEV, Errors, StructurePrediction, size_class
from rung.model.uncertainty import LastLayer

Floats = NDArray[np.float64]
ROW, FORCE = "row_mae_mev_per_atom", "force_mae_mev_per_angstrom"


@dataclass(frozen=True)
class Predictions:
    """What each stage of a run (before, ridge, after) predicts of R rows that were not trained on."""

    rows: list[Reaction]
    energy: Mapping[str, Floats]  # of each stage: [R], eV
    std: Floats | None  # [R], eV, predicted for the last stage
    structures: list[Structure]  # of the rows, fold by fold
    errors: Mapping[str, Errors]  # of each stage: of the structures; only the forces are used
    label_forces: Floats  # [components], eV/angstrom, of the structures that have them

    def table(self) -> list[dict[str, Any]]:
        """Return the rows as plain values; energies in eV, an error is a prediction less the label."""
        found = []
        for i, row in enumerate(self.rows):
            what = {"formula": formula(row.structures[0])} if row.is_absolute else {"reaction": equation(row)}
            predicted = {f"{stage}_ev": float(energy[i]) for stage, energy in self.energy.items()}
            std = {} if self.std is None else {"std_ev": float(self.std[i])}
            named = {"key": row.key, "group": row.group, **what, "num_atoms": row.num_atoms}
            found.append({**named, "label_ev": row.energy, **predicted, **std})
        return found

    def per_atom(self, stage: str) -> Floats:
        """Return the errors of the rows, [R] in eV/atom; a relative energy counts per atom of its larger side."""
        errors: Floats = (self.energy[stage] - label_energies(self.rows)) / num_atoms(self.rows)
        return errors

    def by_element(self) -> dict[str, dict[str, Any]]:
        """Return by symbol the errors of the rows with that element, and of the forces on its atoms, of every stage."""
        contained = [{number for s in row.structures for number in s.numbers.tolist()} for row in self.rows]
        forces = {stage: errors.by_element() for stage, errors in self.errors.items()}
        found = {}
        for number in sorted(set().union(*contained)):
            some = self._of([number in numbers for numbers in contained])
            for stage in self.energy:
                some[stage][FORCE] = forces[stage][number].metrics()[FORCE]
            found[chemical_symbols[number]] = some
        return found

    def by_size(self) -> dict[str, dict[str, Any]]:
        """Return by number of atoms, in `size_class`es, the errors of the rows of every stage."""
        classes = [size_class(math.ceil(row.num_atoms)) for row in self.rows]
        return {
            str(first) if first == last else f"{first}-{last}": self._of([one == (first, last) for one in classes])
            for first, last in sorted(set(classes))
        }

    def _of(self, chosen: Sequence[bool]) -> dict[str, Any]:
        stages = {stage: {ROW: MEV * float(np.abs(self.per_atom(stage)[chosen]).mean())} for stage in self.energy}
        return {"num_rows": sum(chosen), **stages}

    def forces(self) -> Mapping[str, Floats]:
        """Return the predicted force components of each stage where there are labels, in their order."""
        return {
            stage: self.label_forces + errors.forces_N3[errors.has_forces_M[errors.structure_N]].ravel()
            for stage, errors in self.errors.items()
        }


def predict_rows(outcome: Outcome, fidelity: str) -> Predictions:
    """Predict the judged rows of a run with the potentials of every stage; forces only where they are labelled."""
    parts = outcome.judged
    stages = outcome.stages()
    energy: dict[str, Floats] = {}
    errors = {}
    structures = [s for part in parts for s in structures_of(part.rows)]
    for stage, some in stages.items():
        predicted = [measure.predict_rows(p, part.rows, fidelity) for p, part in zip(some, parts, strict=True)]
        energy[stage] = np.concatenate([_energies(one, part) for one, part in zip(predicted, parts, strict=True)])
        errors[stage] = Errors.of(structures, [p for one in predicted for p in one.values()], fidelity)
    labelled = [s.labels[fidelity].forces for s in structures if fidelity in s.labels]
    forces = [np.ravel(one).astype(np.float64) for one in labelled if one is not None]
    rows = [row for part in parts for row in part.rows]
    return Predictions(rows, energy, row_std(outcome), structures, errors, np.concatenate([np.zeros(0), *forces]))


def row_std(outcome: Outcome) -> Floats | None:
    """Return the standard deviations of the judged rows, [R] in eV; None where none were predicted for them."""
    if outcome.test_scores is not None:
        return outcome.test_scores.std
    # Without a test set the folds are judged, and a last layer is calibrated on the same rows; an ensemble is not.
    return outcome.scores.std if outcome.scores is not None and isinstance(outcome.uncertainty, LastLayer) else None


def formula(structure: Structure) -> str:
    """Return the chemical formula in Hill's order."""
    return str(Atoms(structure.numbers).get_chemical_formula())


def equation(row: Reaction) -> str:
    """Return a relative energy as an equation of the structures' names: `2 water -> dimer`."""
    sides: tuple[list[str], list[str]] = ([], [])
    for structure, coefficient in zip(row.structures, row.coefficients, strict=True):
        count = "" if abs(coefficient) == 1 else f"{abs(coefficient):g} "
        sides[coefficient > 0].append(count + structure.key)
    return " -> ".join(" + ".join(side) for side in sides)


def _energies(predicted: Mapping[int, StructurePrediction], part: Judged) -> Floats:
    energy = {key: one.energy for key, one in predicted.items()}
    return np.array([row.combined(energy) for row in part.rows])
