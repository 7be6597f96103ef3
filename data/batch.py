"""Structures concatenated for one training step or one prediction, with their neighbour graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.data.fidelity import unknown_fidelity
from rung.data.graph import Graph, edgeless, table_graph
from rung.data.structure import Structure
from rung.data.table import StructureTable, cut_by_atoms

DRAWN = "drawn"  # the name under which Samples hold the labels of each structure's own fidelity
_PIECE_ATOMS = 8192  # whose graph is made at a time: a few hundred thousand edges
_PIECE_SAMPLES = 256


@dataclass(frozen=True)
class Batch:
    """M structures with N atoms and E directed edges i <- j; labels that are absent are NaN.

    Edges are sorted by receiver; `row_ptr` delimits each receiver's edges (CSR) and `reverse[e]` is the edge j <- i
    of edge i <- j (the neighbour list is full and symmetric). The vector of edge e, in angstrom, is
    positions[senders] - positions[receivers] + shifts @ cell[structure[receivers]].
    """

    keys: tuple[str, ...]  # names of the structures, for error messages and tests
    element_counts: Mapping[int, int]  # atoms of each atomic number: what the host must know without asking the device
    numbers: Tensor  # int64 [N], atomic numbers
    positions: Tensor  # float32 [N, 3], angstrom
    structure: Tensor  # int64 [N], index of each atom's structure
    cell: Tensor  # float32 [M, 3, 3], rows are lattice vectors, zeros for molecules
    charge: Tensor  # int64 [M]
    multiplicity: Tensor  # int64 [M]
    fidelity: Tensor  # int64 [M], row in the model's list of fidelities
    task: Tensor  # int64 [M], which of the stream's mixed tasks it was drawn from
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
class Samples:
    """M samples as arrays: what streams deal and batches are made of."""

    table: StructureTable  # labels: those that go into the batch, under the name DRAWN
    fidelities: tuple[str, ...]  # names that `fidelity` counts in
    fidelity: NDArray[np.int64]  # [M]
    energy_weight: NDArray[np.float32]  # [M]
    forces_weight: NDArray[np.float32]  # [M]

    @staticmethod
    def of(samples: Sequence[Sample], fidelities: Sequence[str]) -> Samples:
        """Return samples as arrays; raise ValueError for one whose fidelity is not among `fidelities`."""
        names = tuple(fidelities)
        for sample in samples:
            if sample.fidelity not in names:
                raise unknown_fidelity(sample.fidelity, names)
        drawn = [
            replace(s, labels={DRAWN: s.labels[fidelity]} if fidelity in s.labels else {})
            for s, fidelity, _, _ in samples
        ]
        return Samples(
            table=StructureTable.of(drawn),
            fidelities=names,
            fidelity=np.array([names.index(sample.fidelity) for sample in samples], np.int64),
            energy_weight=np.array([sample.energy_weight for sample in samples], np.float32),
            forces_weight=np.array([sample.forces_weight for sample in samples], np.float32),
        )

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """Return the samples of all parts, which count in the same names."""
        return Samples(
            table=StructureTable.concatenate([part.table for part in parts]),
            fidelities=parts[0].fidelities,
            fidelity=np.concatenate([part.fidelity for part in parts]),
            energy_weight=np.concatenate([part.energy_weight for part in parts]),
            forces_weight=np.concatenate([part.forces_weight for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.table)

    def part(self, start: int, stop: int) -> Samples:
        """Return samples start..stop."""
        return Samples(
            self.table.part(start, stop),
            self.fidelities,
            self.fidelity[start:stop],
            self.energy_weight[start:stop],
            self.forces_weight[start:stop],
        )


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
    """Cuts samples into batches filled, in order, to both numbers of a budget.

    `cutoff` is in angstrom; None leaves the batches without edges, for a model that has a neighbour list of its own.
    """

    def __init__(self, fidelity_index: Mapping[str, int], cutoff: float | None, budget: Budget) -> None:
        self._fidelity_index = fidelity_index
        self._cutoff = cutoff
        self._budget = budget
        self._open: list[tuple[Samples, Graph]] = []  # of the batch that is not full yet
        self._num_atoms = 0
        self._num_edges = 0

    def add(self, samples: Samples) -> Iterator[tuple[Batch, int]]:
        """Yield each batch that is complete because the next sample no longer fits, and how many samples are in by it.

        The count is of `samples`: a batch ends before sample `count`, which begins the next one.
        Raises ValueError naming a structure that is larger than the budget on its own.
        """
        for start, stop in cut_by_atoms(samples.table.num_atoms, _PIECE_ATOMS):
            piece = samples.part(start, stop)
            graph = edgeless(piece.table) if self._cutoff is None else table_graph(piece.table, self._cutoff)
            atoms = piece.table.offsets
            edges = graph.row_ptr[atoms].astype(np.int64)
            self._check_sizes(piece.table, np.diff(atoms), np.diff(edges))
            done = 0
            while True:
                # The open batch takes samples up to where either sum would exceed the budget.
                by_atoms = np.searchsorted(atoms, atoms[done] + self._budget.max_atoms - self._num_atoms, "right") - 1
                by_edges = np.searchsorted(edges, edges[done] + self._budget.max_edges - self._num_edges, "right") - 1
                end = int(min(by_atoms, by_edges))
                if end > done:
                    self._open.append((piece.part(done, end), _slice(graph, atoms[done], atoms[end])))
                    self._num_atoms += int(atoms[end] - atoms[done])
                    self._num_edges += int(edges[end] - edges[done])
                    done = end
                if done == len(piece):
                    break
                batch = self.rest()
                assert batch is not None
                yield batch, start + done

    def rest(self) -> Batch | None:
        """Return what is left, None when nothing is."""
        if not self._open:
            return None
        parts, graphs = zip(*self._open, strict=True)
        self._open, self._num_atoms, self._num_edges = [], 0, 0
        return _batch(Samples.concatenate(parts), _union(graphs), self._fidelity_index)

    def _check_sizes(self, table: StructureTable, atoms: NDArray[np.int64], edges: NDArray[np.int64]) -> None:
        too_large = np.flatnonzero((atoms > self._budget.max_atoms) | (edges > self._budget.max_edges)).tolist()
        if too_large:
            index = too_large[0]
            raise ValueError(
                f"structure '{table.keys[index]}': {atoms[index]} atoms and {edges[index]} edges within "
                f"{self._cutoff} angstrom exceed the budget of {self._budget.max_atoms} atoms and "
                f"{self._budget.max_edges} edges per batch; raise max_atoms and max_edges, or remove the structure"
            )


def batches(
    samples: Iterable[Sample], *, fidelity_index: Mapping[str, int], cutoff: float, budget: Budget
) -> Iterator[Batch]:
    """Yield a finite set of samples, in order and each once, as batches within `budget`."""
    batcher = Batcher(fidelity_index, cutoff, budget)
    remaining = iter(samples)
    while some := list(islice(remaining, _PIECE_SAMPLES)):
        yield from (batch for batch, _ in batcher.add(Samples.of(some, list(fidelity_index))))
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
    rows = list(map(Sample, structures, fidelities, energy_weights, forces_weights))
    samples = Samples.of(rows, list(fidelity_index))
    return _batch(samples, table_graph(samples.table, cutoff), fidelity_index)


def _slice(graph: Graph, first_atom: int, last_atom: int) -> Graph:
    """Return the graph of a range of atoms that has no edge to others."""
    rows = graph.row_ptr[first_atom : last_atom + 1]
    edges = slice(int(rows[0]), int(rows[-1]))
    atom, edge = np.int32(first_atom), rows[0]
    return Graph(
        graph.receivers[edges] - atom,
        graph.senders[edges] - atom,
        rows - edge,
        graph.reverse[edges] - edge,
        graph.shifts[edges],
    )


def _union(graphs: Sequence[Graph]) -> Graph:
    """Return the graphs of consecutive atoms as one."""
    if len(graphs) == 1:
        return graphs[0]
    atoms = np.cumsum([0, *(len(graph.row_ptr) - 1 for graph in graphs)], dtype=np.int32)
    edges = np.cumsum([0, *(graph.num_edges for graph in graphs)], dtype=np.int32)
    placed = list(zip(graphs, atoms, edges, strict=False))
    return Graph(
        np.concatenate([graph.receivers + atom for graph, atom, _ in placed]),
        np.concatenate([graph.senders + atom for graph, atom, _ in placed]),
        np.concatenate([*(graph.row_ptr[:-1] + edge for graph, _, edge in placed), edges[-1:]]),
        np.concatenate([graph.reverse + edge for graph, _, edge in placed]),
        np.concatenate([graph.shifts for graph in graphs]),
    )


def _batch(samples: Samples, graph: Graph, fidelity_index: Mapping[str, int]) -> Batch:
    table = samples.table
    rows = np.array([_row(name, fidelity_index) for name in samples.fidelities])
    arrays = {
        "numbers": table.numbers.astype(np.int64),
        "positions": table.positions,
        "structure": table.structure,
        "cell": table.cell,
        "charge": table.charge.astype(np.int64),
        "multiplicity": table.multiplicity.astype(np.int64),
        "fidelity": rows[samples.fidelity],
        "task": samples.fidelity,
        **graph._asdict(),
        **{kind: table.label(f"{kind}.{DRAWN}") for kind in ("energy", "forces", "stress")},
        "energy_weight": samples.energy_weight,
        "forces_weight": samples.forces_weight,
    }
    # Views of what a stream holds are copied, so that nothing that is done to a batch reaches the stream.
    tensors = {
        name: torch.from_numpy(np.require(array, requirements=["C", "W", "O"])) for name, array in arrays.items()
    }
    return Batch(keys=tuple(table.keys.tolist()), element_counts=count_elements(table.numbers), **tensors)


def count_elements(numbers: NDArray[np.integer[Any]]) -> dict[int, int]:
    """Return the number of atoms of each atomic number that occurs."""
    found, counts = np.unique(numbers, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _row(fidelity: str, fidelity_index: Mapping[str, int]) -> int:
    if fidelity not in fidelity_index:
        raise unknown_fidelity(fidelity, list(fidelity_index))
    return fidelity_index[fidelity]
