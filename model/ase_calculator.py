"""A checkpoint as an ASE calculator, for relaxations, molecular dynamics and everything else that ASE drives."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.graph import Graph, structure_graph
from rung.data.sources.ase_file import charge_and_multiplicity
from rung.data.structure import Structure
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.direct import Composition, DirectPotential, operations_of
from rung.model.potential import Prediction
from rung.model.predict import check_structure, choose_fidelity

DTYPES = {"float32": torch.float32, "float64": torch.float64}
ARRAYS = ("positions", "numbers", "initial_charges", "initial_magmoms")  # that ASE's calculators look at
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
        self.potential = copy.deepcopy(checkpoint.potential).to(device=device, dtype=DTYPES[dtype]).eval()
        self._direct: DirectPotential | None = None  # made once: the potential is this calculator's own
        self._known: _Known | None = None

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what changed, however little, since the last calculation, charge and multiplicity included.

        ASE's own check ignores `info` and is ten times as slow, which a step of a small molecule would notice.
        """
        before = self.atoms
        if before is None:
            return list(all_changes)
        pairs: dict[str, tuple[Any, Any]] = {name: (before.arrays.get(name), atoms.arrays.get(name)) for name in ARRAYS}
        pairs |= {"cell": (before.cell.array, atoms.cell.array), "pbc": (before.pbc, atoms.pbc)}
        changes = [name for name, (old, new) in pairs.items() if not np.array_equal(old, new)]
        return changes + [key for key in INFO_KEYS if atoms.info.get(key) != before.info.get(key)]

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
        prediction = self._predict(_structure(self.atoms, np.dtype(self.dtype)), stress=periodic)
        energy = prediction.energy.item()
        self.results = {
            "energy": energy,
            "free_energy": energy,  # the labels are at zero electronic temperature
            "energies": _to_numpy(prediction.atomic_energy),
            "forces": _to_numpy(prediction.forces),
        }
        if prediction.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(_to_numpy(prediction.stress)[0])

    def _predict(self, structure: Structure, *, stress: bool) -> Prediction:
        known = self._known
        if known is None or not known.is_of(structure, self.fidelity):
            known = self._known = self._learn(structure)
        batch = known.moved_to(structure, structure_graph(structure, self.potential.config.cutoff))
        operations = operations_of(self.potential)
        if operations is None:
            prediction: Prediction = self.potential(batch, stress=stress)
            return prediction
        with torch.inference_mode():  # a twentieth faster than no_grad
            if self._direct is None:
                self._direct = DirectPotential(self.potential, operations)
            if known.composition is None:
                known.composition = self._direct.composition(batch)
            return self._direct(batch, known.composition, stress=stress)

    def _learn(self, structure: Structure) -> _Known:
        """Check a structure whose atoms, charge or multiplicity are new, and keep what does not change as it moves."""
        check_structure(self.potential, structure, self.fidelity)
        config = self.potential.config
        index = {name: row for row, name in enumerate(config.fidelities)}
        batch = collate([structure], fidelities=[self.fidelity], fidelity_index=index, cutoff=config.cutoff)
        weight = self.potential.embedding.element_SC
        return _Known(structure, self.fidelity, batch.to(weight.device, weight.dtype))


@dataclass
class _Known:
    """A structure that was seen before: another geometry of it is the same batch with other edges."""

    structure: Structure
    fidelity: str
    batch: Batch
    composition: Composition | None = None

    def is_of(self, other: Structure, fidelity: str) -> bool:
        """Return whether the other structure has the same atoms, charge and multiplicity, at the same fidelity."""
        mine = self.structure
        same_state = (mine.charge, mine.multiplicity, self.fidelity) == (other.charge, other.multiplicity, fidelity)
        return same_state and np.array_equal(mine.numbers, other.numbers)

    def moved_to(self, structure: Structure, graph: Graph) -> Batch:
        """Return the batch of the structure at another geometry; its labels are left as they are."""
        batch = self.batch
        geometry = {**graph._asdict(), "positions": structure.positions, "cell": structure.cell[None]}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in geometry.items()}
        device, dtype = batch.positions.device, batch.positions.dtype
        if device.type != "cpu":
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        tensors["shifts"] = tensors["shifts"].to(dtype)
        return replace(batch, **tensors)


def _to_numpy(tensor: Tensor | None) -> NDArray[np.float64]:
    assert tensor is not None
    array: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return array


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
