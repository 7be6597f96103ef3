"""Stored predictions of a few structures, by which a published checkpoint can be checked wherever it is loaded.

`reference.json` holds, for every fidelity, structures (angstrom) with the energy in eV and the forces in eV/angstrom
that the potential gave before it was published, and how far others may be off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rung.data.read import read_any
from rung.data.structure import Structure
from rung.model.potential import Potential
from rung.model.predict import check_structure, predict

ENERGY_TOLERANCE = 2e-5  # eV/atom; float32 on other kernels is off by 3e-7, so this leaves room for other machines
FORCE_TOLERANCE = 5e-4  # eV/angstrom; the same: 2e-5
NUM_REFERENCES = 3  # structures per fidelity
MAX_REFERENCE_ATOMS = 100


@dataclass(frozen=True)
class Comparison:
    """The largest deviations from the stored predictions at one fidelity."""

    fidelity: str
    structures: int
    energy: float  # eV/atom
    force: float  # eV/angstrom
    energy_tolerance: float
    force_tolerance: float

    @property
    def is_within(self) -> bool:
        # Written so that NaN is not.
        return self.structures > 0 and self.energy <= self.energy_tolerance and self.force <= self.force_tolerance

    def __str__(self) -> str:
        return (
            f"{self.fidelity}: {self.structures} structures, energies within {self.energy:.1e} eV/atom "
            f"(allowed {self.energy_tolerance:.1e}), forces within {self.force:.1e} eV/angstrom "
            f"(allowed {self.force_tolerance:.1e})"
        )


def make_reference(potential: Potential, structures: Sequence[Structure] = ()) -> dict[str, Any]:
    """Return the content of reference.json: predictions of a few of `structures`, or of the built-in data, by fidelity.

    Raises ValueError for a fidelity that none of them fits.
    """
    built_in: list[Structure] = []
    entries = []
    for fidelity in potential.config.fidelities:
        if not (chosen := _choose(potential, structures, fidelity)):
            built_in = built_in or read_any("builtin", split="test")
            chosen = _choose(potential, built_in, fidelity)
        if not chosen:
            raise ValueError(
                f"fidelity '{fidelity}': no structure to store predictions of: neither the data given nor the built-in "
                f"ones have one of at most {MAX_REFERENCE_ATOMS} atoms that it knows; give some with --evaluate DATA"
            )
        for structure, prediction in zip(chosen, predict(potential, chosen, fidelity), strict=True):
            assert prediction.forces is not None
            forces = prediction.forces.tolist()
            entries.append(
                _as_values(structure) | {"fidelity": fidelity, "energy": prediction.energy, "forces": forces}
            )
    tolerance = {"energy_ev_per_atom": ENERGY_TOLERANCE, "force_ev_per_angstrom": FORCE_TOLERANCE}
    return {"tolerance": tolerance, "predictions": entries}


def compare(potential: Potential, reference: Mapping[str, Any]) -> list[Comparison]:
    """Return the deviations of a potential from the content of reference.json."""
    comparisons = []
    for fidelity in potential.config.fidelities:
        stored = [entry for entry in reference["predictions"] if entry["fidelity"] == fidelity]
        predictions = predict(potential, [_from_values(entry) for entry in stored], fidelity)
        energies, forces = [0.0], [0.0]
        for entry, found in zip(stored, predictions, strict=True):
            energies.append(abs(found.energy - entry["energy"]) / len(entry["numbers"]))
            forces.append(float(np.abs(found.forces - np.array(entry["forces"])).max()))
        worst = float(np.max(energies)), float(np.max(forces))  # NaN where one is, unlike Python's max
        allowed = reference["tolerance"]
        tolerances = allowed["energy_ev_per_atom"], allowed["force_ev_per_angstrom"]
        comparisons.append(Comparison(fidelity, len(stored), *worst, *tolerances))
    return comparisons


def _choose(potential: Potential, structures: Sequence[Structure], fidelity: str) -> list[Structure]:
    """Return up to NUM_REFERENCES structures, of different groups where there are, that the fidelity knows."""
    fitting: dict[str, Structure] = {}
    unknown = set()
    for structure in structures:
        kind = (structure.group, structure.charge, structure.multiplicity)
        if structure.group in fitting or kind in unknown or structure.num_atoms > MAX_REFERENCE_ATOMS:
            continue
        try:
            check_structure(potential, structure, fidelity)
        except ValueError:
            unknown.add(kind)  # others of the group have the same atoms
        else:
            fitting[structure.group] = structure
    found = list(fitting.values())
    return found[:: max(1, len(found) // NUM_REFERENCES)][:NUM_REFERENCES]


def _as_values(structure: Structure) -> dict[str, Any]:
    arrays = {name: getattr(structure, name).tolist() for name in ("numbers", "positions", "cell", "pbc")}
    return {"key": structure.key, **arrays, "charge": structure.charge, "multiplicity": structure.multiplicity}


def _from_values(entry: Mapping[str, Any]) -> Structure:
    return Structure(
        key=str(entry["key"]),
        group=str(entry["key"]),
        numbers=np.array(entry["numbers"], np.uint8),
        positions=np.array(entry["positions"], np.float32),
        cell=np.array(entry["cell"], np.float32),
        pbc=np.array(entry["pbc"], np.bool_),
        charge=int(entry["charge"]),
        multiplicity=int(entry["multiplicity"]),
    )
