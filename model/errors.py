"""Predictions, and their errors against labels: the one place where error metrics are defined.

Errors are prediction minus label. Energies of structures are compared per atom; every component of the forces, and
each of the nine of the stress, counts alike. Reaction energies are compared as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.reaction import Reaction
from rung.data.structure import Labels, Structure
from rung.data.units import KCAL_MOL

MEV = 1000.0  # meV per eV
NO_LABELS = Labels()
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class StructurePrediction:
    """What the potential says about one structure of n atoms; None where it was not asked for."""

    key: str
    energy: float  # eV
    atomic_energies: NDArray[np.float64]  # [n], eV; they add up to the energy
    forces: NDArray[np.float64] | None  # [n, 3], eV/angstrom
    stress: NDArray[np.float64] | None  # [3, 3], eV/angstrom^3, ASE's sign


@dataclass(frozen=True)
class ErrorSums:
    """Sums over labels, from which errors follow; those of disjoint sets of structures add up (over ranks, too)."""

    num_energies: int = 0  # structures with an energy
    energy_absolute: float = 0.0  # sum of |error|, eV/atom
    energy_squared: float = 0.0  # sum of error^2, (eV/atom)^2
    num_forces: int = 0  # structures with forces
    num_force_components: int = 0
    force_absolute: float = 0.0  # sum over components, eV/angstrom
    force_squared: float = 0.0
    num_stresses: int = 0  # structures with a stress
    stress_absolute: float = 0.0  # sum over the nine components, eV/angstrom^3
    stress_squared: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        mine, theirs = vars(self).values(), vars(other).values()
        return ErrorSums(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def metrics(self) -> Metrics:
        """Return counts, mean absolute and root mean square errors in meV/atom and meV/angstrom (None: no labels).

        The errors of the stress, in meV/angstrom^3, are there only where there are labels of it.
        """
        metrics: Metrics = {
            "num_energies": self.num_energies,
            "energy_mae_mev_per_atom": _mean(self.energy_absolute, self.num_energies),
            "energy_rmse_mev_per_atom": _root_mean(self.energy_squared, self.num_energies),
            "num_forces": self.num_forces,
            "force_mae_mev_per_angstrom": _mean(self.force_absolute, self.num_force_components),
            "force_rmse_mev_per_angstrom": _root_mean(self.force_squared, self.num_force_components),
        }
        if self.num_stresses:
            metrics["num_stresses"] = self.num_stresses
            metrics["stress_mae_mev_per_angstrom3"] = _mean(self.stress_absolute, 9 * self.num_stresses)
            metrics["stress_rmse_mev_per_angstrom3"] = _root_mean(self.stress_squared, 9 * self.num_stresses)
        return metrics


@dataclass(frozen=True)
class Errors:
    """Prediction minus label of M structures with N atoms; 0 where there is no label or no prediction."""

    numbers_N: NDArray[np.uint8]  # atomic numbers
    structure_N: NDArray[np.int64]  # index of each atom's structure
    has_energy_M: NDArray[np.bool_]
    has_forces_M: NDArray[np.bool_]
    has_stress_M: NDArray[np.bool_]
    energy_M: NDArray[np.float64]  # eV/atom
    forces_N3: NDArray[np.float64]  # eV/angstrom
    stress_M33: NDArray[np.float64]  # eV/angstrom^3

    @classmethod
    def of(cls, structures: Sequence[Structure], predictions: Sequence[StructurePrediction], fidelity: str) -> Errors:
        """Return the errors of predictions, one for each of the structures, against their labels at `fidelity`."""
        energy: list[float | None] = []
        forces: list[NDArray[np.float64] | None] = []
        stress: list[NDArray[np.float64] | None] = []
        for structure, prediction in zip(structures, predictions, strict=True):
            labels = structure.labels.get(fidelity, NO_LABELS)
            energy.append(None if labels.energy is None else (prediction.energy - labels.energy) / structure.num_atoms)
            forces.append(_difference(prediction.forces, labels.forces))
            stress.append(_difference(prediction.stress, labels.stress))
        sizes = [structure.num_atoms for structure in structures]
        absent = [np.zeros((size, 3)) for size in sizes]
        of_atoms = [zero if one is None else one for zero, one in zip(absent, forces, strict=True)]
        return cls(
            numbers_N=np.concatenate([np.zeros(0, np.uint8), *(structure.numbers for structure in structures)]),
            structure_N=np.repeat(np.arange(len(structures)), np.array(sizes, np.int64)),
            has_energy_M=np.array([one is not None for one in energy], np.bool_),
            has_forces_M=np.array([one is not None for one in forces], np.bool_),
            has_stress_M=np.array([one is not None for one in stress], np.bool_),
            energy_M=np.array([0.0 if one is None else one for one in energy]),
            forces_N3=np.concatenate([np.zeros((0, 3)), *of_atoms]),  # of no structures, too
            stress_M33=np.array([np.zeros((3, 3)) if one is None else one for one in stress]).reshape(-1, 3, 3),
        )

    def sums(
        self, structures_M: NDArray[np.bool_] | None = None, atoms_N: NDArray[np.bool_] | None = None
    ) -> ErrorSums:
        """Return the sums over all, or over some structures; `atoms_N` says whose forces count (default: theirs)."""
        chosen_M = np.ones(len(self.has_energy_M), np.bool_) if structures_M is None else structures_M
        chosen_N = chosen_M[self.structure_N] if atoms_N is None else atoms_N
        energy = self.energy_M[chosen_M & self.has_energy_M]
        forces = self.forces_N3[chosen_N & self.has_forces_M[self.structure_N]]
        stress = self.stress_M33[chosen_M & self.has_stress_M]
        return ErrorSums(
            num_energies=len(energy),
            energy_absolute=float(np.abs(energy).sum()),
            energy_squared=float(np.square(energy).sum()),
            num_forces=int((chosen_M & self.has_forces_M).sum()),
            num_force_components=forces.size,
            force_absolute=float(np.abs(forces).sum()),
            force_squared=float(np.square(forces).sum()),
            num_stresses=len(stress),
            stress_absolute=float(np.abs(stress).sum()),
            stress_squared=float(np.square(stress).sum()),
        )

    def by_element(self) -> dict[int, ErrorSums]:
        """Return by atomic number: energies and stress of the structures with that element, forces on its atoms."""
        sums = {}
        for number in np.unique(self.numbers_N).tolist():
            atoms_N = self.numbers_N == number
            structures_M = np.zeros(len(self.has_energy_M), np.bool_)
            structures_M[self.structure_N[atoms_N]] = True
            sums[number] = self.sums(structures_M, atoms_N)
        return sums

    def by_size(self) -> dict[tuple[int, int], ErrorSums]:
        """Return by number of atoms, from - to: see `size_class`."""
        sizes = np.bincount(self.structure_N, minlength=len(self.has_energy_M)).tolist()
        first_M = np.array([size_class(size)[0] for size in sizes], np.int64)
        return {size_class(first): self.sums(first_M == first) for first in np.unique(first_M).tolist()}


def size_class(num_atoms: int) -> tuple[int, int]:
    """Return the range of sizes that a structure is counted in: 1, 2, 3-4, 5-8, 9-16, ..."""
    last = 1 << (num_atoms - 1).bit_length()
    return last // 2 + 1, last


def reaction_metrics(reactions: Sequence[Reaction], energies: NDArray[np.float64]) -> dict[str, Any]:
    """Return the errors of predicted reaction energies [R] in eV, in kcal/mol and in meV, and names the largest one.

    Raises ValueError for no reactions.
    """
    if not reactions:
        raise ValueError("expected at least one reaction, found none")
    errors = energies - np.array([reaction.energy for reaction in reactions])
    worst = int(np.abs(errors).argmax())
    values = {
        "mean_signed_error": float(errors.mean()),
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "largest_error": float(errors[worst]),
    }
    in_kcal = {f"{name}_kcal_per_mol": value / KCAL_MOL for name, value in values.items()}
    in_mev = {f"{name}_mev": value * MEV for name, value in values.items()}
    return {"num_reactions": len(reactions), **in_kcal, **in_mev, "largest_error_of": reactions[worst].key}


def _difference(predicted: NDArray[np.float64] | None, label: NDArray[np.float32] | None) -> NDArray[np.float64] | None:
    return None if predicted is None or label is None else predicted - label


def _mean(total: float, count: int) -> float | None:
    return MEV * total / count if count else None


def _root_mean(total: float, count: int) -> float | None:
    return MEV * float(np.sqrt(total / count)) if count else None
