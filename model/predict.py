"""Predictions for structures, and the errors against their labels: the one place where error metrics are defined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rung.data.batch import Batch, Budget, Sample, batches
from rung.data.fidelity import unknown_fidelity
from rung.data.structure import Structure
from rung.model.direct import evaluator
from rung.model.potential import Potential, Prediction

DEFAULT_BUDGET = Budget(max_atoms=2048, max_edges=65536)  # a few hundred MB in float32
MEV = 1000.0  # meV per eV


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

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self) -> dict[str, float | None]:
        """Return counts, mean absolute and root mean square errors in meV/atom and meV/angstrom (None: no labels)."""
        return {
            "num_energies": self.num_energies,
            "energy_mae_mev_per_atom": _mean(self.energy_absolute, self.num_energies),
            "energy_rmse_mev_per_atom": _root_mean(self.energy_squared, self.num_energies),
            "num_forces": self.num_forces,
            "force_mae_mev_per_angstrom": _mean(self.force_absolute, self.num_force_components),
            "force_rmse_mev_per_angstrom": _root_mean(self.force_squared, self.num_force_components),
        }


def predict(
    potential: Potential,
    structures: Iterable[Structure],
    fidelity: str,
    *,
    forces: bool = True,
    stress: bool = False,
    budget: Budget = DEFAULT_BUDGET,
) -> list[StructurePrediction]:
    """Return the prediction of each structure at `fidelity`, in order, on the potential's device and in its dtype.

    Raises ValueError for a fidelity, element, charge or multiplicity that the potential does not know and for a
    structure larger than the budget, naming it.
    """
    predictions: list[StructurePrediction] = []
    with _evaluation_mode(potential):
        evaluate = evaluator(potential)  # of the weights as they are now, so not to be kept
        for batch in _batches(potential, structures, fidelity, budget):
            predictions.extend(_of_structures(batch, evaluate(batch, forces=forces, stress=stress)))
    return predictions


def evaluate(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget = DEFAULT_BUDGET
) -> dict[str, float | None]:
    """Return the errors of the potential against the structures' labels at `fidelity`.

    Keys: num_energies, energy_mae_mev_per_atom, energy_rmse_mev_per_atom, num_forces, force_mae_mev_per_angstrom,
    force_rmse_mev_per_angstrom; an error is None where no structure has the label.
    """
    return error_sums(potential, structures, fidelity, budget=budget).metrics()


def error_sums(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget = DEFAULT_BUDGET
) -> ErrorSums:
    """Return the sums behind `evaluate`, for a set of structures that is spread over ranks."""
    forces = any(
        (labels := structure.labels.get(fidelity)) is not None and labels.forces is not None for structure in structures
    )
    predictions = predict(potential, structures, fidelity, forces=forces, budget=budget)
    pairs = zip(structures, predictions, strict=True)
    return sum((_errors(structure, prediction, fidelity) for structure, prediction in pairs), ErrorSums())


def choose_fidelity(name: str | None, known: Sequence[str]) -> str:
    """Return `name`, or the only known fidelity when it is None; raise ValueError where that is not one of `known`."""
    if name is None:
        if len(known) > 1:
            raise ValueError(f"fidelity: this potential knows {len(known)}, so name one: {', '.join(known)}")
        return known[0]
    if name not in known:
        raise unknown_fidelity(name, known)
    return name


def check_structure(potential: Potential, structure: Structure, fidelity: str) -> None:
    """Raise ValueError naming the structure for what the potential was not trained on; see `check_domain`."""
    try:
        potential.check_domain(structure.numbers.tolist(), fidelity, structure.charge, structure.multiplicity)
    except ValueError as error:
        raise ValueError(f"structure '{structure.key}': {error}") from error


def _errors(structure: Structure, prediction: StructurePrediction, fidelity: str) -> ErrorSums:
    labels = structure.labels.get(fidelity)
    sums = ErrorSums()
    if labels is not None and labels.energy is not None:
        error = (prediction.energy - labels.energy) / structure.num_atoms
        sums += ErrorSums(num_energies=1, energy_absolute=abs(error), energy_squared=error**2)
    if labels is not None and labels.forces is not None and prediction.forces is not None:
        errors = prediction.forces - labels.forces
        sums += ErrorSums(
            num_forces=1,
            num_force_components=errors.size,
            force_absolute=float(np.abs(errors).sum()),
            force_squared=float(np.square(errors).sum()),
        )
    return sums


def _mean(total: float, count: int) -> float | None:
    return MEV * total / count if count else None


def _root_mean(total: float, count: int) -> float | None:
    return MEV * float(np.sqrt(total / count)) if count else None


def _batches(potential: Potential, structures: Iterable[Structure], fidelity: str, budget: Budget) -> Iterator[Batch]:
    known = potential.config.fidelities
    choose_fidelity(fidelity, known)
    weight = next(potential.parameters())
    index = {name: row for row, name in enumerate(known)}
    samples = (Sample(_checked(potential, structure, fidelity), fidelity) for structure in structures)
    for batch in batches(samples, fidelity_index=index, cutoff=potential.config.cutoff, budget=budget):
        yield batch.to(weight.device, weight.dtype)


def _checked(potential: Potential, structure: Structure, fidelity: str) -> Structure:
    check_structure(potential, structure, fidelity)
    return structure


def _of_structures(batch: Batch, prediction: Prediction) -> Iterator[StructurePrediction]:
    ends = torch.bincount(batch.structure, minlength=batch.num_structures).cumsum(0).tolist()
    energies = prediction.energy.tolist()
    atomic_energies_N = prediction.atomic_energy.detach().double().cpu().numpy()
    forces_N3 = None if prediction.forces is None else prediction.forces.detach().double().cpu().numpy()
    stress_M33 = None if prediction.stress is None else prediction.stress.detach().double().cpu().numpy()
    for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield StructurePrediction(
            key=batch.keys[index],
            energy=energies[index],
            atomic_energies=atomic_energies_N[start:end],
            forces=None if forces_N3 is None else forces_N3[start:end],
            stress=None if stress_M33 is None else stress_M33[index],
        )


@contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and back: forces then keep no graph of their own gradient."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
