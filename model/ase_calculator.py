"""A checkpoint as an ASE calculator, for relaxations, molecular dynamics and everything else that ASE drives."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
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

from rung.data.batch import Batch, Sample, batches, collate
from rung.data.sources.ase_file import charge_and_multiplicity
from rung.data.structure import Structure
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.direct import Composition, DirectPotential, operations_of
from rung.model.neighbours import Neighbours
from rung.model.potential import Prediction
from rung.model.predict import DEFAULT_BUDGET, check_structure, choose_fidelity, to_device
from rung.model.uncertainty import Uncertainty

DTYPES = {"float32": torch.float32, "float64": torch.float64}
ARRAYS = ("positions", "numbers", "initial_charges", "initial_magmoms")  # that ASE's calculators look at
INFO_KEYS = ("charge", "multiplicity", "spin")
TOGETHER_ATOMS = 128  # `batch` evaluates structures up to this size together; larger ones keep a core busy alone


class RungCalculator(Calculator):
    """Energy, forces, stress (periodic cells) and atomic energies of a checkpoint at one fidelity, in ASE's units.

    Total charge (elementary charges, default 0) and spin multiplicity (2S + 1, default 1) are read from
    `atoms.info["charge"]` and `atoms.info["multiplicity"]` (or "spin", which also means 2S + 1). Where the checkpoint
    knows the uncertainty of the fidelity, `get_property("energy_std")` is the energy's standard deviation in eV.

    ASE does not know `energy_std`: its writers leave it out, and SinglePointCalculator refuses it among the results.
    Copy it to `atoms.info["energy_std"]` where it is to be kept, as Rung's own trajectories do. What the calculator was
    made with stays: another fidelity takes another calculator.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "energy_std"]

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        fidelity: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "float64"] = "float32",
        *,
        uncertainty: bool = False,
        skin: float | None = None,
    ) -> None:
        """Load the checkpoint; `fidelity` may be left out only when it has one.

        With `uncertainty` every calculation gives `energy_std`. Neighbours within the cut-off + `skin` (angstrom) are
        kept while the atoms move little; 0 keeps none, None keeps them where that was measured to be faster. The
        results do not depend on it.

        Raises ValueError for an unknown fidelity or dtype, or when a fidelity must be chosen, and
        PropertyNotImplementedError for the uncertainty of a fidelity that has none.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found '{dtype}'")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint)
        self._fidelity = choose_fidelity(fidelity, checkpoint.potential.config.fidelities)
        self._dtype = dtype
        self.potential = to_device(copy.deepcopy(checkpoint.potential), device).to(dtype=DTYPES[dtype]).eval()
        self._uncertainty = checkpoint.uncertainty.get(self.fidelity)
        self._every_std = uncertainty
        if uncertainty:
            self._known_uncertainty()
        self._neighbours = Neighbours(self.potential.config.cutoff, skin, self.potential.embedding.element_SC.device)
        self._direct: DirectPotential | None = None  # made once: the potential is this calculator's own
        self._known: _Known | None = None

    @property
    def fidelity(self) -> str:
        """The level of theory; it stays, as results that are kept would not follow."""
        return self._fidelity

    @fidelity.setter
    def fidelity(self, value: str) -> None:
        raise AttributeError(_fixed("fidelity", value))

    @property
    def dtype(self) -> str:
        """The precision of the network: float32 or float64; it stays."""
        return self._dtype

    @dtype.setter
    def dtype(self, value: str) -> None:
        raise AttributeError(_fixed("dtype", value))

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Raise ValueError for any parameter: there is none to set; called by ASE with none."""
        for name, value in kwargs.items():
            raise ValueError(_fixed(name, value))
        return {}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what changed, however little, since the last calculation, charge and multiplicity included.

        ASE's own check ignores `info` and is a hundred times as slow, which a step of a small molecule would notice.
        """
        before = self.atoms
        if before is None:
            return list(all_changes)
        pairs: dict[str, tuple[Any, Any]] = {name: (before.arrays.get(name), atoms.arrays.get(name)) for name in ARRAYS}
        pairs |= {"cell": (before.cell.array, atoms.cell.array), "pbc": (before.pbc, atoms.pbc)}
        changes = [name for name, (old, new) in pairs.items() if _bytes(old) != _bytes(new)]
        return changes + [key for key in INFO_KEYS if atoms.info.get(key) != before.info.get(key)]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` for `atoms`; called by ASE.

        Raises PropertyNotImplementedError for the stress of anything but a cell periodic in three directions and for
        `energy_std` where the checkpoint has no uncertainty, and ValueError for no atom at all, for positions that are
        not finite and for an element, charge or multiplicity that the potential does not know at this fidelity.
        """
        if atoms is not None and self.check_state(atoms):  # `get_property` has just kept a copy of its own
            self.atoms = atoms.copy()
        if self.atoms is None:
            raise ValueError("atoms: expected a structure to calculate, found None")
        periodic = bool(self.atoms.pbc.all())
        if "stress" in (properties or []) and not periodic:
            raise PropertyNotImplementedError("stress: expected a cell periodic in three directions (pbc)")
        std = self._every_std or "energy_std" in (properties or [])
        if std:
            self._known_uncertainty()
        batch, known = self._batch_of(_structure(self.atoms, np.dtype(self.dtype), self._name(self.atoms)))
        [self.results] = self._evaluate(batch, [periodic], std=std, known=known)

    def batch(self, structures: Sequence[Atoms], *, uncertainty: bool | None = None) -> list[dict[str, Any]]:
        """Return the results of many structures, in order, each with the keys that `results` has for it alone.

        Small ones are evaluated together, which is faster than one at a time. `uncertainty` None: as chosen for the
        calculator. Nothing of the calculator's own state (atoms, results) changes. Raises as `calculate` does; an error
        names the structure by its number and formula.
        """
        std = self._every_std if uncertainty is None else uncertainty
        if std:
            self._known_uncertainty()
        converted = []
        for index, atoms in enumerate(structures):
            structure = _structure(atoms, np.dtype(self.dtype), f"{index} ({atoms.symbols})")
            check_structure(self.potential, structure, self.fidelity)
            converted.append(structure)
        small = [structure.num_atoms <= TOGETHER_ATOMS for structure in converted]
        together = self._together(list(itertools.compress(converted, small)), std)
        alone = self._one_by_one(list(itertools.compress(converted, map(operator.not_, small))), std)
        return [next(together if is_small else alone) for is_small in small]

    def _together(self, structures: Sequence[Structure], std: bool) -> Iterator[dict[str, Any]]:
        config, weight = self.potential.config, self.potential.embedding.element_SC
        index = {name: row for row, name in enumerate(config.fidelities)}
        samples = (Sample(structure, self.fidelity) for structure in structures)
        first = 0
        for batch in batches(samples, fidelity_index=index, cutoff=config.cutoff, budget=DEFAULT_BUDGET):
            some = structures[first : first + batch.num_structures]
            first += batch.num_structures
            # Stored structures are float32; these are not rounded.
            positions = torch.from_numpy(np.concatenate([structure.positions for structure in some]))
            cell = torch.from_numpy(np.stack([structure.cell for structure in some]))
            batch = replace(batch.to(weight.device, weight.dtype), positions=positions.to(weight), cell=cell.to(weight))
            yield from self._evaluate(batch, [bool(structure.pbc.all()) for structure in some], std=std)

    def _one_by_one(self, structures: Sequence[Structure], std: bool) -> Iterator[dict[str, Any]]:
        for structure in structures:
            batch, known = self._batch_of(structure)
            yield from self._evaluate(batch, [bool(structure.pbc.all())], std=std, known=known)

    def _evaluate(
        self, batch: Batch, periodic: Sequence[bool], *, std: bool, known: _Known | None = None
    ) -> list[dict[str, Any]]:
        """Return the results of the structures of a batch, those that are periodic with their stress."""
        prediction = self._predict(batch, known, stress=any(periodic))
        energies, atomic_energies = prediction.energy.tolist(), _to_numpy(prediction.atomic_energy)
        forces = _to_numpy(prediction.forces)
        stress = _to_numpy(prediction.stress) if any(periodic) else None
        stds: list[float] = self._stds(batch) if std else []
        counts = [len(forces)] if len(periodic) == 1 else torch.bincount(batch.structure).tolist()
        results, start = [], 0
        for row, count in enumerate(counts):
            atoms, start = slice(start, start + count), start + count
            result = {
                "energy": energies[row],
                "free_energy": energies[row],  # the labels are at zero electronic temperature
                "energies": atomic_energies[atoms],
                "forces": forces[atoms],
            }
            if periodic[row] and stress is not None:
                result["stress"] = full_3x3_to_voigt_6_stress(stress[row])
            if std:
                result["energy_std"] = stds[row]
            results.append(result)
        return results

    def _predict(self, batch: Batch, known: _Known | None, *, stress: bool) -> Prediction:
        operations = operations_of(self.potential)
        if operations is None:
            prediction: Prediction = self.potential(batch, stress=stress)
            return prediction
        with torch.inference_mode():  # a twentieth faster than no_grad
            if self._direct is None:
                self._direct = DirectPotential(self.potential, operations)
            if known is None:
                return self._direct(batch, stress=stress)
            if known.composition is None:
                known.composition = self._direct.composition(batch)
            return self._direct(batch, known.composition, stress=stress)

    def _stds(self, batch: Batch) -> list[float]:
        with torch.no_grad():
            stds: list[float] = self._known_uncertainty().variance(self.potential, batch).sqrt().tolist()
        return stds

    def _known_uncertainty(self) -> Uncertainty:
        if self._uncertainty is None:
            raise PropertyNotImplementedError(
                f"energy_std: this checkpoint has no uncertainty for '{self.fidelity}'; `rung finetune` to that "
                "fidelity stores one with the checkpoint that it writes"
            )
        return self._uncertainty

    def _batch_of(self, structure: Structure) -> tuple[Batch, _Known]:
        """Return a structure as a batch, with what is kept of it while it moves."""
        known = self._known
        if known is None or not known.is_of(structure, self.fidelity):
            known = self._known = self._learn(structure)
        return known.moved_to(structure, self._neighbours.edges(structure)), known

    def _name(self, atoms: Atoms) -> str:
        """Return the formula; that of a structure which only moved is not written anew, as that takes a while."""
        known = self._known.structure if self._known is not None else None
        moved = known is not None and np.array_equal(known.numbers, atoms.numbers)
        return known.key if known is not None and moved else str(atoms.symbols)

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

    def moved_to(self, structure: Structure, edges: Mapping[str, Tensor]) -> Batch:
        """Return the batch of the structure at another geometry; its labels are left as they are."""
        like = self.batch.positions
        positions, cell = torch.from_numpy(structure.positions), torch.from_numpy(structure.cell[None])
        if like.device.type != "cpu":
            positions, cell = positions.to(like.device), cell.to(like.device)
        tensors: dict[str, Any] = {**edges, "shifts": edges["shifts"].to(like.dtype)}
        return replace(self.batch, positions=positions, cell=cell, **tensors)


def _fixed(name: str, value: Any) -> str:
    return f"{name}: cannot become {value!r}; a calculator stays what it was made as, so make another RungCalculator"


def _to_numpy(tensor: Tensor | None) -> NDArray[np.float64]:
    assert tensor is not None
    array: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return array


def _bytes(array: NDArray[Any] | None) -> bytes | None:
    return None if array is None else array.tobytes()  # compared ten times as fast as arrays of a few atoms are


def _structure(atoms: Atoms, dtype: np.dtype[Any], name: str) -> Structure:
    """Return the structure in the calculator's own precision, where stored data would be float32.

    Nothing of it is shared with `atoms`, which change in place. Positions are counted from their mean, as float32 is
    coarse far from the origin: at 10^4 angstrom, two of its numbers are 10^-3 apart.
    """
    if len(atoms) == 0:
        raise ValueError(f"structure '{name or 'Atoms()'}': expected at least one atom, found none")
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"positions of '{name}': expected finite numbers; did the dynamics blow up?")
    charge, multiplicity = charge_and_multiplicity(atoms.info)
    return Structure(
        key=name,
        group="",
        numbers=atoms.numbers.astype(np.uint8),
        positions=(atoms.positions - atoms.positions.mean(axis=0)).astype(dtype),
        cell=atoms.cell.array.astype(dtype),
        pbc=atoms.pbc.copy(),
        charge=charge,
        multiplicity=multiplicity,
    )
