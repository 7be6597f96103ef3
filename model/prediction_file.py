"""Predictions of single structures and reactions in files: CSV, or extxyz with everything that was predicted."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.io import write
from numpy.typing import NDArray

from rung.data.reaction import Reaction
from rung.data.shard import write_beside
from rung.data.structure import Labels, Structure
from rung.data.units import KCAL_MOL
from rung.model.errors import MEV, Errors, StructurePrediction

SUFFIXES = (".csv", ".extxyz", ".xyz")


class Predicted(NamedTuple):
    """A structure and what was predicted for it at a fidelity."""

    fidelity: str
    structure: Structure
    prediction: StructurePrediction


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise ValueError for a file name that does not say its format, OSError where there is no folder for it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in a folder that exists")


def write_predictions(path: Path, rows: Iterable[Predicted]) -> None:
    """Write predictions beside their labels: CSV with a row each, or extxyz with a frame each; units are in the header.

    Frames have rung_energy, rung_forces, rung_stress (predicted) and REF_energy, REF_forces, REF_stress (labels), in
    eV and angstrom. Raises ValueError for a suffix that is not one of `SUFFIXES`.
    """
    check_target(path)
    if path.suffix.lower() == ".csv":
        _write_csv(path, [_row(*row) for row in rows])
        return
    text = io.StringIO()
    write(text, [_frame(*row) for row in rows], format="extxyz")
    write_beside(path, text.getvalue().encode())


def write_reaction_predictions(path: Path, reactions: Sequence[Reaction], energies: NDArray[np.float64]) -> None:
    """Write the labels and predicted energies [R] (eV) of reactions as CSV."""
    check_target(path, (".csv",))
    _write_csv(path, [reaction_row(r, float(energy)) for r, energy in zip(reactions, energies, strict=True)])


def reaction_row(reaction: Reaction, energy: float) -> dict[str, Any]:
    """Return name, group, label, predicted energy (eV) and error of a reaction."""
    return {
        "name": reaction.key,
        "group": reaction.group,
        "label_ev": reaction.energy,
        "predicted_ev": energy,
        "error_mev": (energy - reaction.energy) * MEV,
        "error_kcal_per_mol": (energy - reaction.energy) / KCAL_MOL,
    }


def _row(fidelity: str, structure: Structure, prediction: StructurePrediction) -> dict[str, Any]:
    labels = structure.labels.get(fidelity, Labels())
    metrics = Errors.of([structure], [prediction], fidelity).sums().metrics()
    difference = None if labels.energy is None else prediction.energy - labels.energy
    return {
        "fidelity": fidelity,
        "key": structure.key,
        "group": structure.group,
        "formula": Atoms(structure.numbers).get_chemical_formula(),
        "num_atoms": structure.num_atoms,
        "charge": structure.charge,
        "multiplicity": structure.multiplicity,
        "energy_label_ev": labels.energy,
        "energy_predicted_ev": prediction.energy,
        "energy_error_mev_per_atom": None if difference is None else difference * MEV / structure.num_atoms,
        "force_mae_mev_per_angstrom": metrics["force_mae_mev_per_angstrom"],
        "stress_mae_mev_per_angstrom3": metrics.get("stress_mae_mev_per_angstrom3"),
    }


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_beside(path, text.getvalue().encode())


def _frame(fidelity: str, structure: Structure, prediction: StructurePrediction) -> Atoms:
    labels = structure.labels.get(fidelity, Labels())
    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
    info = {
        "key": structure.key,
        "group": structure.group,
        "fidelity": fidelity,
        "charge": structure.charge,
        "multiplicity": structure.multiplicity,
        "REF_energy": labels.energy,
        "REF_stress": labels.stress,
        "rung_energy": prediction.energy,
        "rung_stress": prediction.stress if structure.pbc.any() else None,
    }
    atoms.info = {name: value for name, value in info.items() if value is not None}
    for name, forces in (("REF_forces", labels.forces), ("rung_forces", prediction.forces)):
        if forces is not None:
            atoms.set_array(name, np.asarray(forces, np.float64))
    return atoms
