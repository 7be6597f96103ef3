"""Where a new fidelity starts: a parent fidelity of the checkpoint plus a shift of the reference energy per element."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from rung.data.reaction import Reaction, structures_of
from rung.data.reference_energy import Compositions, fit_compositions
from rung.data.structure import Structure
from rung.model.potential import Potential
from rung.model.predict import predict, reaction_energies

# So weak that a shift which the data determine is exact (1000 eV, from a valence-only to an all-electron method, to
# 1e-4 eV); it settles what the compositions leave open (C and H in a set of one hydrocarbon) by the smallest shift.
RIDGE = 1e-12
BALANCED_NOTE = "every label is of a balanced reaction, so absolute energies at the new fidelity remain the parent's"
IDENTITY_TOLERANCE = 1e-4  # eV per atom; the network is float32, the reference energies float64


@dataclass(frozen=True)
class Shift:
    """Least-squares change of the reference energies, and what it leaves unexplained."""

    per_element: dict[int, float]  # eV
    residual_per_atom: NDArray[np.float64]  # [R], label - parent - shift, eV/atom
    note: str  # which elements the compositions cannot tell apart; empty when they can

    @property
    def rms_mev_per_atom(self) -> float:
        return float(np.sqrt(np.mean(self.residual_per_atom**2)) * 1000)


@dataclass(frozen=True)
class Parent:
    """A candidate parent and its fit to the training labels."""

    fidelity: str
    predicted: NDArray[np.float64]  # [R], eV
    shift: Shift


def composition(rows: Sequence[Reaction], elements: Sequence[int]) -> NDArray[np.float64]:
    """Return how many atoms of each element appear in each row, [R, elements]; of one structure: its atoms."""
    changes = [row.composition() for row in rows]
    return np.array([[change.get(z, 0.0) for z in elements] for change in changes], dtype=np.float64)


def elements_of(rows: Sequence[Reaction]) -> list[int]:
    """Return the atomic numbers that occur, ascending."""
    return sorted({int(z) for structure in structures_of(rows) for z in structure.numbers})


def check_covered(train: Sequence[Reaction], test: Sequence[Reaction], fidelity: str) -> None:
    """Raise ValueError naming the elements of test structures for which no reference energy can be fitted."""
    missing = sorted(set(elements_of(test)) - set(elements_of(train)))
    if missing:
        symbols = ", ".join(chemical_symbols[z] for z in missing)
        keys = [s.key for s in structures_of(test) if set(missing) & {int(z) for z in s.numbers}]
        raise ValueError(
            f"test structures contain {symbols}, but no structure to train on at '{fidelity}' does (first: {keys[0]}); "
            f"add training structures with {symbols}, or leave those test structures out"
        )


def label_energies(rows: Sequence[Reaction]) -> NDArray[np.float64]:
    """Return the energy labels in eV, [R]."""
    return np.array([row.energy for row in rows], dtype=np.float64)


def num_atoms(rows: Sequence[Reaction]) -> NDArray[np.float64]:
    """Return the number of atoms by which an error of each row is divided, [R]."""
    return np.array([row.num_atoms for row in rows], dtype=np.float64)


def fit_shift(rows: Sequence[Reaction], residual: NDArray[np.float64]) -> Shift:
    """Fit one energy per element to residual energies [R] in eV by ridge regression, each row per atom."""
    elements = elements_of(rows)
    counts, sizes = composition(rows, elements), num_atoms(rows)
    fit = fit_compositions(Compositions(np.array(elements), counts), residual, ridge=RIDGE, sizes=sizes)
    note = fit.note if counts.any() else BALANCED_NOTE
    return Shift(fit.e0, (residual - counts @ np.array(list(fit.e0.values()))) / sizes, note)


def check_domain(potential: Potential, structures: Sequence[Structure], fidelity: str) -> None:
    """Raise ValueError, listing the known ones, for an element, charge or multiplicity unknown at `fidelity`."""
    for numbers, charge, multiplicity in {(s.numbers.tobytes(), s.charge, s.multiplicity) for s in structures}:
        potential.check_domain(list(numbers), fidelity, charge, multiplicity)


def choose_parent(potential: Potential, rows: Sequence[Reaction], names: Sequence[str]) -> list[Parent]:
    """Return those of the fidelities `names` that know the elements, as candidate parents, best first.

    The best leaves the smallest residual of the labels after its shift.
    Raises ValueError when none of them knows all elements, with the reason for each.
    """
    labels, structures = label_energies(rows), structures_of(rows)
    candidates: list[Parent] = []
    refusals: list[str] = []
    for name in names:
        try:
            check_domain(potential, structures, name)
        except ValueError as error:
            refusals.append(f"{name}: {error}")
            continue
        predicted = reaction_energies(potential, rows, name)
        candidates.append(Parent(name, predicted, fit_shift(rows, labels - predicted)))
    if not candidates:
        raise ValueError("no fidelity of the checkpoint can be the parent:\n  " + "\n  ".join(refusals))
    # What differs by less than rounding is equal: the first of the checkpoint's fidelities then.
    return sorted(candidates, key=lambda parent: round(parent.shift.rms_mev_per_atom, 2))


def tie_note(parents: Sequence[Parent]) -> str:
    """Return a sentence where the labels cannot tell the best parents apart; empty where they can."""
    best = round(parents[0].shift.rms_mev_per_atom, 2)
    equal = [parent.fidelity for parent in parents if round(parent.shift.rms_mev_per_atom, 2) == best]
    if len(equal) < 2:
        return ""
    return f"the labels cannot tell which parent fits best ({', '.join(equal)}); name one with --parent, or give more"


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
    largest = 0.0
    predictions = [predict(potential, structures, name, forces=False) for name in (fidelity, parent.fidelity)]
    for structure, new, old in zip(structures, *predictions, strict=True):
        shift = sum(parent.shift.per_element[int(z)] for z in structure.numbers)
        largest = max(largest, abs(new.energy - old.energy - shift) / structure.num_atoms)
    if not largest <= IDENTITY_TOLERANCE:
        raise RuntimeError(
            f"step-0 identity: expected '{fidelity}' to equal '{parent.fidelity}' plus the shift within "
            f"{IDENTITY_TOLERANCE:g} eV/atom, found {largest:.3g}"
        )
    return largest
