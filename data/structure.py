"""The record that every reader yields and every shard stores: one structure with its labels, keyed by fidelity.

Units everywhere: eV, angstrom, eV/angstrom, eV/angstrom^3 (ASE's sign), elementary charge.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_ATOMIC_NUMBER = 118
MAX_FORCE = 300.0  # eV/angstrom; beyond it a label is a unit error or a failed calculation (DESIGN.md section 7)


@dataclass(frozen=True)
class Labels:
    """Quantum-mechanical labels of one structure at one fidelity; a label that was not computed is None."""

    energy: float | None = None  # total energy, eV
    forces: NDArray[np.float32] | None = None  # [n, 3], eV/angstrom
    stress: NDArray[np.float32] | None = None  # [3, 3], eV/angstrom^3, ASE's sign
    dipole: NDArray[np.float32] | None = None  # [3], e angstrom


@dataclass(frozen=True)
class Structure:
    """Atoms of one molecule or one periodic cell, with labels at any number of fidelities.

    `group` is the identity by which a dataset is split (the molecule), `key` names this structure within its dataset.
    """

    key: str
    group: str
    numbers: NDArray[np.uint8]  # [n], atomic numbers
    positions: NDArray[np.float32]  # [n, 3], angstrom
    cell: NDArray[np.float32] = field(default_factory=lambda: np.zeros((3, 3), np.float32))  # rows are lattice vectors
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(3, np.bool_))
    charge: int = 0  # elementary charges
    multiplicity: int = 1  # 2S + 1
    labels: dict[str, Labels] = field(default_factory=dict)  # fidelity name -> labels

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)


def validate(structure: Structure) -> None:
    """Raise ValueError naming the structure and the field when a shape, a dtype or a magnitude cannot be right."""
    n = structure.num_atoms
    if structure.numbers.ndim != 1 or structure.numbers.dtype != np.uint8:
        found = f"{structure.numbers.dtype} {structure.numbers.shape}"
        raise _bad(structure, "numbers", "uint8 of one dimension", found)
    if n == 0:
        raise _bad(structure, "numbers", "at least one atom", "none")
    if structure.numbers.min() < 1 or structure.numbers.max() > MAX_ATOMIC_NUMBER:
        found = f"{structure.numbers.min()}..{structure.numbers.max()}"
        raise _bad(structure, "numbers", f"atomic numbers 1..{MAX_ATOMIC_NUMBER}", found)
    _check(structure, "positions", structure.positions, (n, 3))
    _check(structure, "cell", structure.cell, (3, 3))
    if structure.pbc.shape != (3,):
        raise _bad(structure, "pbc", "shape (3,)", f"shape {structure.pbc.shape}")
    if structure.pbc.any() and abs(np.linalg.det(structure.cell.astype(np.float64))) < 1e-6:
        raise _bad(structure, "cell", "a cell with volume, because pbc is set", f"{structure.cell.tolist()}")
    if not -128 <= structure.charge <= 127:  # int8 on disk
        raise _bad(structure, "charge", "-128..127 elementary charges", str(structure.charge))
    if not 1 <= structure.multiplicity <= 255:  # uint8 on disk
        raise _bad(structure, "multiplicity", "2S + 1 in 1..255", str(structure.multiplicity))
    for fidelity, labels in structure.labels.items():
        _validate_labels(structure, fidelity, labels)


def _validate_labels(structure: Structure, fidelity: str, labels: Labels) -> None:
    if labels.energy is not None and not np.isfinite(labels.energy):
        raise _bad(structure, f"energy.{fidelity}", "a finite energy in eV, or None when absent", str(labels.energy))
    shapes = {"forces": (structure.num_atoms, 3), "stress": (3, 3), "dipole": (3,)}
    for name, shape in shapes.items():
        value = getattr(labels, name)
        if value is not None:
            _check(structure, f"{name}.{fidelity}", value, shape)
    if labels.forces is not None and (largest := float(np.abs(labels.forces).max())) > MAX_FORCE:
        expected = f"|F| <= {MAX_FORCE:g} eV/angstrom"
        raise _bad(structure, f"forces.{fidelity}", expected, f"{largest:.4g}; are they in eV/angstrom?")


def _check(structure: Structure, name: str, value: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise _bad(structure, name, f"shape {shape}", f"shape {value.shape}")
    if value.dtype != np.float32:
        raise _bad(structure, name, "dtype float32", f"dtype {value.dtype}")
    if not np.isfinite(value).all():
        raise _bad(structure, name, "finite values", f"{int((~np.isfinite(value)).sum())} that are NaN or infinite")


def _bad(structure: Structure, name: str, expected: str, found: str) -> ValueError:
    return ValueError(f"structure {structure.key!r}: {name}: expected {expected}, found {found}")
