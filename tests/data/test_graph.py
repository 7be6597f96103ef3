"""The neighbour graph against ASE's neighbour list."""

from __future__ import annotations

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

from rung.data.graph import Graph, edge_counts, neighbour_graph, table_graph
from rung.data.structure import Structure
from rung.data.table import StructureTable


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


def structures(cases: list[ase.Atoms]) -> list[Structure]:
    return [
        Structure(
            key=f"s{index}",
            group="",
            numbers=atoms.numbers.astype(np.uint8),
            positions=atoms.positions.astype(np.float32),
            cell=atoms.cell.array.astype(np.float32),
            pbc=atoms.pbc,
        )
        for index, atoms in enumerate(cases)
    ]


def test_a_table_has_the_graphs_of_its_structures_side_by_side() -> None:
    """Sizes, periodic and large ones mixed: the edges come in the order of the structures, whatever was done first."""
    mixed = [
        atoms
        for name, (atoms, _) in CASES.items()
        for atoms in (atoms, molecule("H2O"), random_atoms(5, (False,) * 3, 9))
    ]
    mixed.append(random_atoms(250, (False, False, False), 5))
    table = StructureTable.of(structures(mixed))
    whole = table_graph(table, 3.5)
    atoms = edges = 0
    for structure, count in zip(table, edge_counts(table, 3.5), strict=True):
        alone = neighbour_graph(structure.positions, structure.cell, structure.pbc, 3.5)
        part = slice(edges, edges + alone.num_edges)
        assert count == alone.num_edges
        np.testing.assert_array_equal(whole.receivers[part] - atoms, alone.receivers)
        np.testing.assert_array_equal(whole.senders[part] - atoms, alone.senders)
        np.testing.assert_array_equal(whole.reverse[part] - edges, alone.reverse)
        np.testing.assert_array_equal(whole.shifts[part], alone.shifts)
        np.testing.assert_array_equal(whole.row_ptr[atoms : atoms + structure.num_atoms + 1] - edges, alone.row_ptr)
        atoms, edges = atoms + structure.num_atoms, edges + alone.num_edges
    assert (whole.num_edges, len(whole.row_ptr)) == (edges, atoms + 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pairs_at_the_cutoff_are_told_exactly(dtype: type) -> None:
    """The cut-off is the distance of a pair but for rounding: float32 arithmetic alone would get some wrong."""
    positions = np.random.default_rng(0).uniform(0, 5, (8, 3)).astype(dtype)
    vectors = positions[None].astype(np.float64) - positions[:, None]
    squared = (vectors**2).sum(-1)
    for distance in np.sqrt(squared[np.triu_indices(8, 1)]):
        for cutoff in (distance, distance * (1 + 1e-12), distance * (1 - 1e-12)):
            expected = np.argwhere((squared < float(cutoff) ** 2) & ~np.eye(8, dtype=bool))
            graph = neighbour_graph(positions, np.zeros((3, 3)), np.zeros(3, bool), float(cutoff))
            np.testing.assert_array_equal(np.column_stack([graph.receivers, graph.senders]), expected)


def test_coincident_atoms_of_a_table_are_named() -> None:
    twice = ase.Atoms("H3", positions=[[0, 0, 0], [1, 0, 0], [1, 0, 0]])
    table = StructureTable.of(structures([molecule("H2O"), twice]))
    with pytest.raises(ValueError, match="structure 's1': positions: atoms (1 and 2|2 and 1) are at the same place"):
        table_graph(table, 3.0)
