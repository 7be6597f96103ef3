"""A checkpoint as a model of torch-sim: many systems at a time in its integrators, optimizers and autobatchers.

torch-sim is the extra `torchsim`. Its cells are columns, ours are rows; units are the same (eV, angstrom).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.formula import Formula
from numpy.typing import NDArray
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.graph import ALL_PAIRS_ATOMS, table_graph
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import StructureTable
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.direct import Composition, DirectPotential, evaluator
from rung.model.neighbours import Neighbours
from rung.model.predict import check_structure, choose_fidelity, to_device

try:
    from torch_sim import SimState
    from torch_sim.models.interface import ModelInterface
    from torch_sim.typing import MemoryScaling
except ImportError as error:
    raise ImportError(f"{error}; torch-sim is needed here: pip install 'rung[torchsim]'") from error

DTYPES = (torch.float32, torch.float64)
PerFormula = int | Mapping[str, int]


class RungModel(ModelInterface):  # type: ignore[misc]  # torch-sim ships no types
    """Energies, forces and stress of a batch of systems with a checkpoint at one fidelity.

    torch-sim's states carry no charge and its integrators drop attributes that they do not know, so charge and
    multiplicity belong to the model: one number for all systems, or numbers by chemical formula ({"NH4": 1}; systems
    whose formula is left out have charge 0 and multiplicity 1). Systems of one formula in different states of charge
    need a model each; models of one `Checkpoint` object read it once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        fidelity: str | None = None,
        *,
        charge: PerFormula = 0,
        multiplicity: PerFormula = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_forces: bool = True,
        compute_stress: bool = True,
        memory_scales_with: MemoryScaling = "n_atoms",
    ) -> None:
        """Load the checkpoint; `fidelity` may be left out only when it has one.

        `dtype` is that of forces and stress and of the states to be passed; energies are float64 always. By
        `memory_scales_with` torch-sim's autobatchers size batches; its "n_atoms_x_density" is better where densities
        differ, but divides by the cell's volume, which molecules do not have. Raises ValueError for an unknown
        fidelity, device, dtype or formula, or when a fidelity must be chosen.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, found {dtype}")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(checkpoint)
        self.fidelity = choose_fidelity(fidelity, checkpoint.potential.config.fidelities)
        self._charge = _by_formula("charge", charge, default=0)
        self._multiplicity = _by_formula("multiplicity", multiplicity, default=1)
        self._potential = to_device(copy.deepcopy(checkpoint.potential), str(device)).to(dtype=dtype).eval()
        self._evaluate = evaluator(self._potential)
        self._known: _Known | None = None
        self._device = self._potential.e0_FZ.device
        self._dtype = dtype
        self._compute_forces = compute_forces
        self._compute_stress = compute_stress
        self._memory_scales_with = memory_scales_with

    @property
    def compute_forces(self) -> bool:
        """Whether results have forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether results have the stress, which is NaN for systems that are not periodic."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    def _apply(self, fn: Any, recurse: bool = True) -> RungModel:
        raise ValueError("a RungModel cannot be moved or recast: make a new one with `device` and `dtype`")

    @torch.no_grad()
    def forward(self, state: SimState | dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Return energy (float64 [M], eV) and, as switched on, forces [N, 3] and stress [M, 3, 3] (eV/angstrom^3).

        The tensors are detached: gradients with respect to the state do not exist. Raises ValueError for a state of
        another device or dtype, positions that are not finite, atoms at one place, and elements, charges or
        multiplicities that the potential does not know at this fidelity, naming the system.
        """
        if isinstance(state, dict):
            state = SimState(**{"masses": torch.ones_like(state["positions"][:, 0]), **state})
        self._check_kind(state)
        numbers_N, system_N = state.atomic_numbers.cpu().numpy(), state.system_idx.cpu().numpy()
        periodic = bool(torch.as_tensor(state.pbc).all())
        known = self._known
        if known is None or not known.is_of(numbers_N, system_N, periodic):
            known = self._known = self._learn(state, numbers_N, system_N, periodic)
        batch = known.moved_to(state)
        stress = self._compute_stress and periodic
        options: dict[str, Any] = {"forces": self._compute_forces, "stress": stress}
        if isinstance(self._evaluate, DirectPotential):
            if known.composition is None:
                known.composition = self._evaluate.composition(batch)
            options["composition"] = known.composition
        prediction = self._evaluate(batch, **options)
        results = {"energy": prediction.energy}
        if prediction.forces is not None and self._compute_forces:
            results["forces"] = prediction.forces
        if self._compute_stress:
            absent = batch.cell.new_full((batch.num_structures, 3, 3), torch.nan)
            results["stress"] = prediction.stress if prediction.stress is not None else absent
        return results

    def _check_kind(self, state: SimState) -> None:
        found, expected = (state.device, state.dtype), (self._device, self._dtype)
        if found != expected:
            raise ValueError(
                f"state: expected the model's {expected[1]} on {expected[0]}, found {found[1]} on {found[0]}; "
                "make the state with device=model.device, dtype=model.dtype"
            )
        pbc = torch.as_tensor(state.pbc)
        if pbc.any() and not pbc.all():
            raise ValueError(f"pbc: expected all directions periodic or none, found {pbc.tolist()}")

    def _learn(self, state: SimState, numbers_N: NDArray[Any], system_N: NDArray[Any], periodic: bool) -> _Known:
        """Check systems that are new and keep what does not change as they move."""
        if len(numbers_N) == 0 or numbers_N.min() < 1 or numbers_N.max() > MAX_ATOMIC_NUMBER:
            raise ValueError(
                f"atomic_numbers: expected 1..{MAX_ATOMIC_NUMBER}, found {sorted(set(numbers_N.tolist()))}"
            )
        num_atoms = np.bincount(system_N)
        formulas = [_formula(part) for part in np.split(numbers_N, np.cumsum(num_atoms)[:-1])]
        table = StructureTable.make(
            keys=[f"{formula} (system {m})" for m, formula in enumerate(formulas)],
            groups=[""] * len(formulas),
            num_atoms=num_atoms,
            numbers=numbers_N,
            positions=np.zeros((len(numbers_N), 3)),
            pbc=periodic,
            charge=[self._charge(formula) for formula in formulas],
            multiplicity=[self._multiplicity(formula) for formula in formulas],
        )
        table = _placed(table, state)
        structures = list(table)
        for structure in structures:
            check_structure(self._potential, structure, self.fidelity)
        config = self._potential.config
        batch = collate(
            structures,
            fidelities=[self.fidelity] * len(structures),
            fidelity_index={name: row for row, name in enumerate(config.fidelities)},
            cutoff=config.cutoff,
        )
        neighbours = None
        if periodic or num_atoms.min() > ALL_PAIRS_ATOMS:
            neighbours = [Neighbours(config.cutoff, None, self._device) for _ in structures]
        batch = batch.to(self._device, self._dtype)
        return _Known(numbers_N.copy(), system_N.copy(), periodic, config.cutoff, table, batch, neighbours)


@dataclass
class _Known:
    """Systems that were seen before: other geometries of them are the same batch with other edges."""

    numbers_N: NDArray[Any]
    system_N: NDArray[Any]
    periodic: bool
    cutoff: float  # angstrom
    table: StructureTable
    batch: Batch
    neighbours: list[Neighbours] | None  # of each system; None: small molecules, done together
    composition: Composition | None = None

    def is_of(self, numbers_N: NDArray[Any], system_N: NDArray[Any], periodic: bool) -> bool:
        same_atoms = np.array_equal(self.numbers_N, numbers_N) and np.array_equal(self.system_N, system_N)
        return same_atoms and self.periodic == periodic

    def moved_to(self, state: SimState) -> Batch:
        """Return the batch of the systems at another geometry."""
        table, batch = _placed(self.table, state), self.batch
        device, dtype = batch.positions.device, batch.positions.dtype
        if self.neighbours is None:
            graph = table_graph(table, self.cutoff)._asdict()
            edges: dict[str, Any] = {name: torch.from_numpy(array).to(device) for name, array in graph.items()}
        else:
            edges = _union([one.edges(system) for one, system in zip(self.neighbours, table, strict=True)])
        edges["shifts"] = edges["shifts"].to(dtype)
        return replace(batch, positions=state.positions.detach(), cell=torch.from_numpy(table.cell).to(device), **edges)


def _union(graphs: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the graphs of consecutive systems as one, its tensors named as in `Graph`."""
    first_atom = list(accumulate((len(graph["row_ptr"]) - 1 for graph in graphs), initial=0))
    first_edge = list(accumulate((len(graph["senders"]) for graph in graphs), initial=0))
    parts = {name: [graph[name] for graph in graphs] for name in graphs[0]}
    parts["row_ptr"] = [row_ptr[bool(m) :] for m, row_ptr in enumerate(parts["row_ptr"])]  # the 0 of the first alone
    offsets = {"receivers": first_atom, "senders": first_atom, "reverse": first_edge, "row_ptr": first_edge}
    for name, firsts in offsets.items():
        parts[name] = [part + first for part, first in zip(parts[name], firsts, strict=False)]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _placed(table: StructureTable, state: SimState) -> StructureTable:
    """Return the table with the geometries of the state, in the state's own precision."""
    positions = state.positions.detach().cpu().numpy()
    if not np.isfinite(positions).all():
        system = int(state.system_idx[int(np.flatnonzero(~np.isfinite(positions).all(1))[0])])
        raise ValueError(f"positions of '{table.keys[system]}': expected finite numbers; did the dynamics blow up?")
    cell = np.ascontiguousarray(state.row_vector_cell.detach().cpu().numpy())
    return replace(table, positions=positions, cell=cell)


def _by_formula(name: str, value: PerFormula, default: int) -> Callable[[str], int]:
    """Return what maps a formula in Hill's order to its number."""
    if not isinstance(value, Mapping):
        number = int(value)
        return lambda formula: number
    numbers = {_hill(name, formula): int(number) for formula, number in value.items()}
    return lambda formula: numbers.get(formula, default)


def _hill(name: str, formula: str) -> str:
    try:
        return str(Formula(formula).convert("hill"))
    except ValueError as error:
        raise ValueError(f"{name}: '{formula}' is not a chemical formula; expected one such as 'NH4'") from error


def _formula(numbers: NDArray[Any]) -> str:
    return str(Formula.from_list([chemical_symbols[number] for number in numbers]).convert("hill"))
