"""Graphs cut down from candidates against graphs built anew, over moves of every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from rung.data.graph import structure_graph
from rung.data.structure import Structure
from rung.model import neighbours
from rung.model.neighbours import Candidates, Neighbours, reach

CUTOFF = 4.0
CPU = torch.device("cpu")


def molecule_of(name: str) -> Structure:
    atoms = molecule(name)
    return Structure(name, name, atoms.numbers.astype(np.uint8), atoms.positions.copy())


def crystal(pbc: tuple[bool, bool, bool] = (True, True, True)) -> Structure:
    """Return displaced, sheared silicon whose first atom is outside the cell."""
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.positions[0] -= 7.0
    cell = atoms.cell.array + [[0, 0, 0], [0.3, 0, 0], [0, 0.1, 0]]
    return Structure("Si8", "Si", atoms.numbers.astype(np.uint8), atoms.positions, cell=cell, pbc=np.array(pbc))


def slab() -> Structure:
    return crystal((True, True, False))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Structure]:
    """Return the list of the structures whose candidates were looked for."""
    structures: list[Structure] = []
    of = Candidates.of

    def recorded(structure: Structure, cutoff: float, skin: float, device: torch.device) -> Candidates:
        structures.append(structure)
        return of(structure, cutoff, skin, device)

    monkeypatch.setattr(Candidates, "of", recorded)
    return structures


def check(kept: Neighbours, structure: Structure) -> None:
    """Assert that the edges, their order, rows, reverses and shifts are those of a graph built anew."""
    expected = structure_graph(structure, CUTOFF)._asdict()
    found = kept.edges(structure)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == torch.from_numpy(array).dtype, name
        np.testing.assert_array_equal(found[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("structure", [molecule_of("C6H6"), crystal(), slab()], ids=["benzene", "crystal", "slab"])
def test_a_walk_has_the_graphs_that_building_anew_gives(
    structure: Structure, dtype: type, built: list[Structure]
) -> None:
    random = np.random.default_rng(0)
    kept = Neighbours(CUTOFF, 0.6, CPU)
    for _ in range(30):
        moved = structure.positions + random.normal(scale=0.04, size=structure.positions.shape)
        structure = replace(structure, positions=moved.astype(dtype), cell=structure.cell.astype(dtype))
        check(kept, structure)
    assert 2 < len(built) < 20  # neither one list for all steps nor a new one at every step


def test_a_strained_cell_keeps_its_candidates_until_the_strain_is_large(built: list[Structure]) -> None:
    kept, start = Neighbours(CUTOFF, 0.6, CPU), crystal()
    for strain in np.linspace(0, 0.1, 21):
        matrix = np.eye(3) + strain * np.array([[-1.0, 0.3, 0], [0, -0.5, 0.2], [0, 0, 1.0]])
        check(kept, replace(start, positions=start.positions @ matrix, cell=start.cell @ matrix))
    assert len(built) == 1
    check(kept, replace(start, positions=start.positions * 0.7, cell=start.cell * 0.7))
    assert len(built) == 1  # so far from the last one that none are looked for


def test_reach_is_never_short() -> None:
    """Brute force: every pair that is now closer than the cut-off was within `reach`."""
    random = np.random.default_rng(1)
    old = crystal()
    for _ in range(20):
        matrix = np.eye(3) + random.normal(scale=0.05, size=(3, 3))
        positions = (old.positions + random.normal(scale=0.2, size=old.positions.shape)) @ matrix
        new = replace(old, positions=positions, cell=old.cell @ matrix)
        graph = structure_graph(new, CUTOFF)
        before = old.positions[graph.senders] - old.positions[graph.receivers] + graph.shifts @ old.cell
        assert np.linalg.norm(before, axis=1).max() <= reach(old, new, CUTOFF)


def test_what_it_cannot_follow_is_built_anew() -> None:
    benzene, silicon = molecule_of("C6H6"), crystal()
    kept = Neighbours(CUTOFF, 0.5, CPU)
    swapped = replace(benzene, numbers=benzene.numbers[::-1].copy())
    for structure in (benzene, benzene, swapped, silicon, silicon, slab(), slab(), crystal(), benzene):
        check(kept, structure)
    assert reach(silicon, slab(), CUTOFF) == np.inf
    tilted = replace(slab(), cell=slab().cell * 1.001)
    assert reach(slab(), tilted, CUTOFF) == np.inf  # a strain is followed in three periodic directions only
    assert reach(silicon, silicon, CUTOFF) == pytest.approx(CUTOFF, abs=1e-8)


def test_arrays_that_are_written_to_in_place_are_noticed() -> None:
    kept, structure = Neighbours(CUTOFF, 0.5, CPU), crystal()
    check(kept, structure)
    check(kept, structure)
    assert kept._candidates is not None
    structure.pbc[2] = False
    check(kept, structure)


def test_atoms_at_one_place_are_named_with_candidates_too() -> None:
    kept, structure = Neighbours(CUTOFF, 4.0, CPU), crystal()
    check(kept, structure)
    check(kept, structure)
    assert kept._candidates is not None
    together = structure.positions.copy()
    together[3] = together[2] + (together[3] - together[2]) * 0.4
    check(kept, replace(structure, positions=together))
    lattice = replace(structure, positions=np.where(np.arange(8)[:, None] == 3, together[2], together))
    with pytest.raises(ValueError, match="structure 'Si8': positions: atoms [23] and [23] are at the same place"):
        kept.edges(lattice)


def test_small_molecules_keep_no_candidates_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Neighbours(CUTOFF, None, CPU)
    for _ in range(3):
        check(kept, molecule_of("C6H6"))
    assert kept._candidates is None
    monkeypatch.setattr(neighbours, "ALL_PAIRS_ATOMS", 11)
    for _ in range(3):
        check(kept, molecule_of("C6H6"))
    assert kept._candidates is not None


@pytest.mark.parametrize("skin", [-0.1, np.inf, np.nan])
def test_a_skin_that_is_no_length_is_named(skin: float) -> None:
    with pytest.raises(ValueError, match=f"skin: expected a length >= 0 in angstrom, found {skin}"):
        Neighbours(CUTOFF, skin, CPU)
