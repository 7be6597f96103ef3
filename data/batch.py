"""Structures concatenated for one training step or one prediction, with their neighbour graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.data.fidelity import unknown_fidelity
from rung.data.graph import Graph, structure_graph
from rung.data.structure import Structure


@dataclass(frozen=True)
class Batch:
    """M structures with N atoms and E directed edges i <- j; labels that are absent are NaN.

    Edges are sorted by receiver; `row_ptr` delimits each receiver's edges (CSR) and `reverse[e]` is the edge j <- i
    of edge i <- j (the neighbour list is full and symmetric). The vector of edge e, in angstrom, is
    positions[senders] - positions[receivers] + shifts @ cell[structure[receivers]].
    """

    keys: tuple[str, ...]  # names of the structures, for error messages and tests
    numbers: Tensor  # int64 [N], atomic numbers
    positions: Tensor  # float32 [N, 3], angstrom
    structure: Tensor  # int64 [N], index of each atom's structure
    cell: Tensor  # float32 [M, 3, 3], rows are lattice vectors, zeros for molecules
    charge: Tensor  # int64 [M]
    multiplicity: Tensor  # int64 [M]
    fidelity: Tensor  # int64 [M], row in the model's list of fidelities
    receivers: Tensor  # int32 [E]
    senders: Tensor  # int32 [E]
    row_ptr: Tensor  # int32 [N + 1]
    reverse: Tensor  # int32 [E]
    shifts: Tensor  # float32 [E, 3], whole lattice vectors
    energy: Tensor  # float64 [M], eV
    forces: Tensor  # float32 [N, 3], eV/angstrom
    stress: Tensor  # float32 [M, 3, 3], eV/angstrom^3
    energy_weight: Tensor  # float32 [M], weight of the structure's energy term (its task's weight)
    forces_weight: Tensor  # float32 [M]

    @property
    def num_structures(self) -> int:
        return len(self.charge)

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    @property
    def num_edges(self) -> int:
        return len(self.senders)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on `device`; `dtype` (float32 or float64) recasts what the network computes with.

        The energy stays float64 whatever `dtype` is.
        """

        def move(name: str, value: Tensor) -> Tensor:
            recast = dtype is not None and value.is_floating_point() and name != "energy"
            return value.to(device, dtype if recast else value.dtype, non_blocking=True)

        return self._map(move)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._map(lambda _, value: value.pin_memory())

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], Batch], tuple[dict[str, Any]]]:
        """Travel between processes as arrays: torch would open a file descriptor and a socket for every tensor."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return _from_arrays, ({n: v.numpy() if isinstance(v, Tensor) else v for n, v in values.items()},)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        tensors = {name: function(name, value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**(values | tensors))


def _from_arrays(values: Mapping[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    return Batch(**{**values, **tensors})


class Sample(NamedTuple):
    """A structure and the fidelity whose labels it carries into a batch, with the weights of its two loss terms."""

    structure: Structure
    fidelity: str
    energy_weight: float = 1.0
    forces_weight: float = 1.0


@dataclass(frozen=True)
class Budget:
    """The largest batch that fits in memory: both numbers hold."""

    max_atoms: int
    max_edges: int

    def __post_init__(self) -> None:
        for name in ("max_atoms", "max_edges"):
            if getattr(self, name) < 1:
                raise ValueError(f"budget.{name}: expected a whole number >= 1, found {getattr(self, name)}")


class Batcher:
    """Collects samples into batches filled, in order, to both numbers of a budget.

    `add` returns the batch that is complete because the new sample no longer fits (that sample then starts the next
    batch), else None. `rest` returns what is left, None when nothing is.
    """

    def __init__(self, fidelity_index: Mapping[str, int], cutoff: float, budget: Budget) -> None:
        self._fidelity_index = fidelity_index
        self._cutoff = cutoff
        self._budget = budget
        self._samples: list[Sample] = []
        self._graphs: list[Graph] = []
        self._num_atoms = 0
        self._num_edges = 0

    def add(self, sample: Sample) -> Batch | None:
        """Raises ValueError naming the structure when it is larger than the budget on its own."""
        graph = structure_graph(sample.structure, self._cutoff)
        atoms, edges = sample.structure.num_atoms, graph.num_edges
        if atoms > self._budget.max_atoms or edges > self._budget.max_edges:
            raise ValueError(
                f"structure '{sample.structure.key}': {atoms} atoms and {edges} edges within {self._cutoff:g} angstrom "
                f"exceed the budget of {self._budget.max_atoms} atoms and {self._budget.max_edges} edges per batch; "
                "raise max_atoms and max_edges, or remove the structure"
            )
        too_many_atoms = self._num_atoms + atoms > self._budget.max_atoms
        too_many_edges = self._num_edges + edges > self._budget.max_edges
        full = self.rest() if too_many_atoms or too_many_edges else None
        self._samples.append(sample)
        self._graphs.append(graph)
        self._num_atoms += atoms
        self._num_edges += edges
        return full

    def rest(self) -> Batch | None:
        if not self._samples:
            return None
        samples, graphs = self._samples, self._graphs
        self._samples, self._graphs, self._num_atoms, self._num_edges = [], [], 0, 0
        return _collate(samples, graphs, self._fidelity_index)


def batches(
    samples: Iterable[Sample], *, fidelity_index: Mapping[str, int], cutoff: float, budget: Budget
) -> Iterator[Batch]:
    """Yield a finite set of samples, in order and each once, as batches within `budget`."""
    batcher = Batcher(fidelity_index, cutoff, budget)
    for sample in samples:
        if (full := batcher.add(sample)) is not None:
            yield full
    if (rest := batcher.rest()) is not None:
        yield rest


def collate(
    structures: Sequence[Structure],
    *,
    fidelities: Sequence[str],
    fidelity_index: Mapping[str, int],
    cutoff: float,
    energy_weights: Sequence[float] | None = None,
    forces_weights: Sequence[float] | None = None,
) -> Batch:
    """Concatenate structures into one batch, the i-th with its labels at fidelities[i] (NaN where it has none).

    `fidelity_index` maps a name to the model's row; `cutoff` is in angstrom; weights default to 1.
    Raises ValueError for an empty list, lists of different lengths, an unknown fidelity or coincident atoms.
    """
    ones = [1.0] * len(structures)
    energy_weights = ones if energy_weights is None else energy_weights
    forces_weights = ones if forces_weights is None else forces_weights
    if not structures:
        raise ValueError("collate: expected at least one structure, found none")
    for name, values in (
        ("fidelities", fidelities),
        ("energy_weights", energy_weights),
        ("forces_weights", forces_weights),
    ):
        if len(values) != len(structures):
            raise ValueError(f"collate: {name}: expected one per structure ({len(structures)}), found {len(values)}")
    samples = list(map(Sample, structures, fidelities, energy_weights, forces_weights))
    return _collate(samples, [structure_graph(structure, cutoff) for structure in structures], fidelity_index)


def _collate(samples: Sequence[Sample], graphs: Sequence[Graph], fidelity_index: Mapping[str, int]) -> Batch:
    structures = [sample.structure for sample in samples]
    num_atoms = np.array([structure.num_atoms for structure in structures])
    num_edges = np.array([graph.num_edges for graph in graphs])
    atom_offsets = np.cumsum(num_atoms) - num_atoms
    edge_offsets = np.cumsum(num_edges) - num_edges
    edge_atom_offset = np.repeat(atom_offsets, num_edges).astype(np.int32)
    edge_edge_offset = np.repeat(edge_offsets, num_edges).astype(np.int32)
    row_starts = [graph.row_ptr[:-1] + offset for graph, offset in zip(graphs, edge_offsets, strict=True)]
    row_ptr = np.concatenate([*row_starts, [num_edges.sum()]]).astype(np.int32)
    energy, forces, stress = _labels(samples, num_atoms, atom_offsets)
    return Batch(
        keys=tuple(structure.key for structure in structures),
        numbers=torch.from_numpy(np.concatenate([structure.numbers for structure in structures]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([structure.positions for structure in structures])),
        structure=torch.from_numpy(np.repeat(np.arange(len(structures)), num_atoms)),
        cell=torch.from_numpy(np.stack([structure.cell for structure in structures])),
        charge=torch.tensor([structure.charge for structure in structures]),
        multiplicity=torch.tensor([structure.multiplicity for structure in structures]),
        fidelity=torch.tensor([_row(sample, fidelity_index) for sample in samples]),
        receivers=torch.from_numpy(np.concatenate([graph.receivers for graph in graphs]) + edge_atom_offset),
        senders=torch.from_numpy(np.concatenate([graph.senders for graph in graphs]) + edge_atom_offset),
        row_ptr=torch.from_numpy(row_ptr),
        reverse=torch.from_numpy(np.concatenate([graph.reverse for graph in graphs]) + edge_edge_offset),
        shifts=torch.from_numpy(np.concatenate([graph.shifts for graph in graphs])),
        energy=torch.from_numpy(energy),
        forces=torch.from_numpy(forces),
        stress=torch.from_numpy(stress),
        energy_weight=torch.tensor([sample.energy_weight for sample in samples], dtype=torch.float32),
        forces_weight=torch.tensor([sample.forces_weight for sample in samples], dtype=torch.float32),
    )


def _row(sample: Sample, fidelity_index: Mapping[str, int]) -> int:
    if sample.fidelity not in fidelity_index:
        raise unknown_fidelity(sample.fidelity, list(fidelity_index))
    return fidelity_index[sample.fidelity]


def _labels(
    samples: Sequence[Sample], num_atoms: NDArray[np.int64], atom_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Return energy [M], forces [N, 3] and stress [M, 3, 3], NaN where a structure has no such label."""
    energy = np.full(len(samples), np.nan)
    forces = np.full((int(num_atoms.sum()), 3), np.nan, np.float32)
    stress = np.full((len(samples), 3, 3), np.nan, np.float32)
    for index, sample in enumerate(samples):
        labels = sample.structure.labels.get(sample.fidelity)
        if labels is None:
            continue
        if labels.energy is not None:
            energy[index] = labels.energy
        if labels.forces is not None:
            start = atom_offsets[index]
            forces[start : start + num_atoms[index]] = labels.forces
        if labels.stress is not None:
            stress[index] = labels.stress
    return energy, forces, stress
