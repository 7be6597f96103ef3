"""A checkpoint as an ASE calculator, for relaxations, molecular dynamics and everything else that ASE drives."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from rung.data.batch import Budget
from rung.data.sources.ase_file import charge_and_multiplicity
from rung.data.structure import Structure
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.predict import choose_fidelity, predict

DTYPES = {"float32": torch.float32, "float64": torch.float64}
ANY_SIZE = Budget(max_atoms=sys.maxsize, max_edges=sys.maxsize)  # ASE hands over one structure: it must fit
INFO_KEYS = ("charge", "multiplicity", "spin")


class RungCalculator(Calculator):
    """Energy, forces, stress (periodic cells) and atomic energies of a checkpoint at one fidelity, in ASE's units.

    Total charge (elementary charges, default 0) and spin multiplicity (2S + 1, default 1) are read from
    `atoms.info["charge"]` and `atoms.info["multiplicity"]` (or "spin", which also means 2S + 1).
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        fidelity: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        """Load the checkpoint; `fidelity` may be left out only when it has one.

        Raises ValueError for an unknown fidelity or dtype, or when a fidelity must be chosen.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found '{dtype}'")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint)
        self.fidelity = choose_fidelity(fidelity, checkpoint.potential.config.fidelities)
        self.dtype = dtype
        self.potential = copy.deepcopy(checkpoint.potential).to(device=device, dtype=DTYPES[dtype])

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what changed since the last calculation, charge and multiplicity included (ASE ignores `info`)."""
        changes: list[str] = super().check_state(atoms, tol)  # type: ignore[no-untyped-call]
        if self.atoms is not None:
            changes += [key for key in INFO_KEYS if atoms.info.get(key) != self.atoms.info.get(key)]
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` for `atoms`; called by ASE.

        Raises PropertyNotImplementedError for the stress of anything but a cell periodic in three directions, and
        ValueError for positions that are not finite and for an element, charge or multiplicity that the potential does
        not know at this fidelity.
        """
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        if self.atoms is None:
            raise ValueError("atoms: expected a structure to calculate, found None")
        periodic = bool(self.atoms.pbc.all())
        if "stress" in (properties or []) and not periodic:
            raise PropertyNotImplementedError("stress: expected a cell periodic in three directions (pbc)")
        structure = _structure(self.atoms, np.dtype(self.dtype))
        [prediction] = predict(self.potential, [structure], self.fidelity, stress=periodic, budget=ANY_SIZE)
        self.results = {
            "energy": prediction.energy,
            "free_energy": prediction.energy,  # the labels are at zero electronic temperature
            "energies": prediction.atomic_energies,
            "forces": prediction.forces,
        }
        if prediction.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress)


def _structure(atoms: Atoms, dtype: np.dtype[Any]) -> Structure:
    """Return the structure in the calculator's own precision, where stored data would be float32."""
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"positions of '{atoms.symbols}': expected finite numbers; did the dynamics blow up?")
    charge, multiplicity = charge_and_multiplicity(atoms.info)
    return Structure(
        key=str(atoms.symbols),
        group="",
        numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions.astype(dtype),
        cell=atoms.cell.array.astype(dtype),
        pbc=atoms.pbc,
        charge=charge,
        multiplicity=multiplicity,
    )
