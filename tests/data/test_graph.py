"""The neighbour graph against ASE's neighbour list."""

from __future__ import annotations

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

from rung.data.graph import Graph, neighbour_graph


def graph_of(atoms: ase.Atoms, cutoff: float) -> Graph:
    return neighbour_graph(atoms.positions.astype(np.float32), atoms.cell.array, atoms.pbc, cutoff)


def random_atoms(num_atoms: int, pbc: tuple[bool, bool, bool], seed: int) -> ase.Atoms:
    rng = np.random.default_rng(seed)
    cell = np.diag([4.0, 5.0, 6.0]) + rng.uniform(-0.5, 0.5, (3, 3))
    # ASE's own list must see the positions that the graph sees: float32.
    positions = rng.uniform(-2, 8, (num_atoms, 3)).astype(np.float32)
    return ase.Atoms(f"C{num_atoms}", positions=positions, cell=cell, pbc=pbc)


CASES = {
    "molecule": (molecule("CH3CH2OH"), 3.0),
    "one atom": (ase.Atoms("He"), 5.0),
    "two atoms out of reach": (ase.Atoms("He2", positions=[[0, 0, 0], [0, 0, 9]]), 5.0),
    "one atom and its images": (bulk("Cu"), 5.0),
    "cell smaller than the cut-off": (random_atoms(3, (True, True, True), 0), 7.0),
    "periodic in two directions": (random_atoms(12, (True, True, False), 1), 5.0),
    "periodic in one direction": (random_atoms(12, (False, True, False), 2), 4.0),
    "atoms outside the cell": (random_atoms(30, (True, True, True), 3), 3.5),
    "large molecule": (random_atoms(200, (False, False, False), 4), 3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_edges_equal_those_of_ase(name: str) -> None:
    atoms, cutoff = CASES[name]
    graph = graph_of(atoms, cutoff)
    i, j, shift = neighbor_list("ijS", atoms, cutoff)
    expected = np.column_stack([i, j, shift]).reshape(-1, 5).astype(np.int64)
    expected = expected[np.lexsort(expected.T[::-1])]
    found = np.column_stack([graph.receivers, graph.senders, graph.shifts.astype(np.int64)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_reverse_edges_and_row_pointers(name: str) -> None:
    atoms, cutoff = CASES[name]
    graph = graph_of(atoms, cutoff)
    edges = np.arange(graph.num_edges)
    np.testing.assert_array_equal(graph.reverse[graph.reverse], edges)
    np.testing.assert_array_equal(graph.receivers[graph.reverse], graph.senders)
    np.testing.assert_array_equal(graph.shifts[graph.reverse], -graph.shifts)
    assert (graph.reverse != edges).all()
    np.testing.assert_array_equal(np.diff(graph.row_ptr), np.bincount(graph.receivers, minlength=len(atoms)))
    assert graph.row_ptr[0] == 0 and graph.row_ptr[-1] == graph.num_edges
    assert graph.receivers.dtype == graph.senders.dtype == graph.row_ptr.dtype == graph.reverse.dtype == np.int32
    assert graph.shifts.dtype == np.float32 and graph.shifts.shape == (graph.num_edges, 3)


def test_coincident_atoms_are_an_error() -> None:
    atoms = ase.Atoms("H3", positions=[[0, 0, 0], [1, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="atoms (1 and 2|2 and 1) are at the same place"):
        graph_of(atoms, 3.0)


def test_no_atoms_and_a_flat_cell_are_errors() -> None:
    with pytest.raises(ValueError, match="positions: expected at least one atom, found none"):
        graph_of(ase.Atoms(), 3.0)
    with pytest.raises(ValueError, match="cell: .*expected independent lattice vectors, found"):
        graph_of(ase.Atoms("H", cell=[3, 3, 0], pbc=True), 3.0)


def test_cutoff_must_be_positive() -> None:
    with pytest.raises(ValueError, match="cutoff: expected a positive length"):
        graph_of(molecule("H2O"), 0.0)
