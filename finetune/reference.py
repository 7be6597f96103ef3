"""Where a new fidelity starts: a parent fidelity of the checkpoint plus a shift of the reference energy per element."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from rung.data.reference_energy import fit_e0
from rung.data.structure import Structure
from rung.model.potential import Potential
from rung.model.predict import predict

# So weak that a shift which the data determine is exact (1000 eV, from a valence-only to an all-electron method, to
# 1e-4 eV); it settles what the compositions leave open (C and H in a set of one hydrocarbon) by the smallest shift.
RIDGE = 1e-12
IDENTITY_TOLERANCE = 1e-4  # eV per atom; the network is float32, the reference energies float64


@dataclass(frozen=True)
class Shift:
    """Least-squares change of the reference energies, and what it leaves unexplained."""

    per_element: dict[int, float]  # eV
    residual_per_atom: NDArray[np.float64]  # [M], label - parent - shift, eV/atom
    note: str  # which elements the compositions cannot tell apart; empty when they can

    @property
    def rms_mev_per_atom(self) -> float:
        return float(np.sqrt(np.mean(self.residual_per_atom**2)) * 1000)


@dataclass(frozen=True)
class Parent:
    """A candidate parent and its fit to the training labels."""

    fidelity: str
    predicted: NDArray[np.float64]  # [M], eV
    shift: Shift


def composition(structures: Sequence[Structure], elements: Sequence[int]) -> NDArray[np.float64]:
    """Return the number of atoms of each element in each structure, [M, elements]."""
    return np.array([[np.count_nonzero(s.numbers == z) for z in elements] for s in structures], dtype=np.float64)


def elements_of(structures: Sequence[Structure]) -> list[int]:
    """Return the atomic numbers that occur, ascending."""
    return sorted({int(z) for structure in structures for z in structure.numbers})


def check_covered(train: Sequence[Structure], test: Sequence[Structure], fidelity: str) -> None:
    """Raise ValueError naming the elements of test structures for which no reference energy can be fitted."""
    missing = sorted(set(elements_of(test)) - set(elements_of(train)))
    if missing:
        symbols = ", ".join(chemical_symbols[z] for z in missing)
        keys = [s.key for s in test if set(missing) & {int(z) for z in s.numbers}]
        raise ValueError(
            f"test structures contain {symbols}, but no structure to train on at '{fidelity}' does (first: {keys[0]}); "
            f"add training structures with {symbols}, or leave those test structures out"
        )


def label_energies(structures: Sequence[Structure], fidelity: str) -> NDArray[np.float64]:
    """Return the energy labels at `fidelity` in eV, [M]; every structure has one."""
    energies = [structure.labels[fidelity].energy for structure in structures]
    return np.array(energies, dtype=np.float64)


def predicted_energies(potential: Potential, structures: Sequence[Structure], fidelity: str) -> NDArray[np.float64]:
    """Return predicted energies in eV, [M]."""
    return np.array([p.energy for p in predict(potential, structures, fidelity, forces=False)], dtype=np.float64)


def fit_shift(structures: Sequence[Structure], residual: NDArray[np.float64]) -> Shift:
    """Fit one energy per element to residual energies [M] in eV by ridge regression, each structure per atom."""
    fit = fit_e0([s.numbers for s in structures], residual, ridge=RIDGE)
    explained = composition(structures, list(fit.e0)) @ np.array(list(fit.e0.values()))
    atoms = np.array([s.num_atoms for s in structures], dtype=np.float64)
    return Shift(fit.e0, (residual - explained) / atoms, fit.note)


def check_domain(potential: Potential, structures: Sequence[Structure], fidelity: str) -> None:
    """Raise ValueError, listing the known ones, for an element, charge or multiplicity unknown at `fidelity`."""
    for numbers, charge, multiplicity in {(s.numbers.tobytes(), s.charge, s.multiplicity) for s in structures}:
        potential.check_domain(list(numbers), fidelity, charge, multiplicity)


def choose_parent(potential: Potential, structures: Sequence[Structure], fidelity: str, wanted: str) -> list[Parent]:
    """Return the candidate parents, best first: `wanted` alone, or every fidelity that knows the elements.

    The best leaves the smallest residual of the labels after its shift.
    Raises ValueError when `wanted` does not know an element, or when no fidelity knows them all.
    """
    labels = label_energies(structures, fidelity)
    candidates: list[Parent] = []
    refusals: list[str] = []
    for name in [wanted] if wanted else potential.config.fidelities:
        try:
            check_domain(potential, structures, name)
        except ValueError as error:
            refusals.append(f"{name}: {error}")
            continue
        predicted = predicted_energies(potential, structures, name)
        candidates.append(Parent(name, predicted, fit_shift(structures, labels - predicted)))
    if not candidates:
        raise ValueError("no fidelity of the checkpoint can be the parent:\n  " + "\n  ".join(refusals))
    return sorted(candidates, key=lambda parent: parent.shift.rms_mev_per_atom)


def with_new_fidelity(potential: Potential, fidelity: str, parent: Parent) -> Potential:
    """Return a copy of the potential that knows `fidelity`: the parent's rows, the parent's E0s plus the shift."""
    if fidelity in potential.config.fidelities:
        raise ValueError(
            f"the checkpoint already has the fidelity '{fidelity}'; give the new data another name with --fidelity"
        )
    potential = copy.deepcopy(potential)
    potential.add_fidelity(fidelity, parent.fidelity, e0=shifted_references(potential, parent))
    return potential


def shifted_references(potential: Potential, parent: Parent) -> dict[int, float]:
    """Return the E0 of the new fidelity for the elements of the data, in eV; other elements stay unknown to it."""
    row = potential.e0_FZ[potential.config.fidelities.index(parent.fidelity)]
    columns = {z: i for i, z in enumerate(potential.config.elements)}
    return {z: float(row[columns[z]]) + shift for z, shift in parent.shift.per_element.items()}


def check_identity(potential: Potential, structures: Sequence[Structure], fidelity: str, parent: Parent) -> float:
    """Return the largest deviation (eV/atom) of the new fidelity from parent + shift; raise if it is not rounding.

    Raises RuntimeError: the potential's `add_fidelity` did not copy the parent, so no adaptation can be trusted.
    """
    elements = elements_of(structures)
    shift = composition(structures, elements) @ np.array([parent.shift.per_element[z] for z in elements])
    deviation = predicted_energies(potential, structures, fidelity) - parent.predicted - shift
    largest = float(np.max(np.abs(deviation) / [s.num_atoms for s in structures]))
    if largest > IDENTITY_TOLERANCE:
        raise RuntimeError(
            f"step-0 identity: expected '{fidelity}' to equal '{parent.fidelity}' plus the shift within "
            f"{IDENTITY_TOLERANCE:g} eV/atom, found {largest:.3g}"
        )
    return largest
