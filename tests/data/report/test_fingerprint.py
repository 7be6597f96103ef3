"""Equal structures are found whatever their pose, and unlike ones are not: against rotations and ASE's cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell, molecule
from numpy.typing import NDArray

from rung.data.read import read_tables
from rung.data.report import fingerprint
from rung.data.report.measure import element_counts
from rung.data.structure import Structure
from rung.data.table import StructureTable

MOLECULES = ("CH3CH2OH", "C6H6", "H2O", "CH4", "bicyclobutane", "CH3COCl", "C60")


def of_atoms(*frames: Atoms) -> StructureTable:
    return StructureTable.of(
        [
            Structure(
                f"s{i}",
                "g",
                atoms.numbers.astype(np.uint8),
                atoms.positions.astype(np.float32),
                np.asarray(atoms.cell.array, np.float32),
                atoms.pbc.copy(),
            )
            for i, atoms in enumerate(frames)
        ]
    )


def perturbed(name: str, rng: np.random.Generator) -> Atoms:
    atoms = molecule(name)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def posed(atoms: Atoms, rng: np.random.Generator, noise: float, mirror: bool = False) -> Atoms:
    """Return the molecule rotated, moved and with its atoms in another order; each atom is off by `noise` angstrom."""
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation)) * (-1 if mirror else 1)
    off = rng.normal(size=atoms.positions.shape)
    off *= noise / np.linalg.norm(off, axis=1, keepdims=True)
    order = rng.permutation(len(atoms))
    return Atoms(atoms.numbers[order], (atoms.positions @ rotation.T + off + 20 * rng.normal(size=3))[order])


def pairs_of(table: StructureTable) -> set[tuple[int, int]]:
    numbers = fingerprint.environments(table)
    keys = fingerprint.composition_keys(table, element_counts(table))
    sketches = fingerprint.sketch(table, numbers)
    found = fingerprint.twins(keys, sketches, fingerprint.profile(table, numbers))
    near = fingerprint.near(keys, sketches)
    assert near[found].all()
    return {(int(a), int(b)) for a, b in found}


@pytest.mark.parametrize("mirror", [False, True])
def test_finds_every_molecule_in_another_pose(mirror: bool) -> None:
    rng = np.random.default_rng(0)
    frames = [perturbed(name, rng) for name in MOLECULES for _ in range(20)]
    table = of_atoms(*frames, *(posed(atoms, rng, 0.95e-3, mirror) for atoms in frames))
    assert pairs_of(table) == {(i, i + len(frames)) for i in range(len(frames))}


def test_tells_an_atom_that_moved() -> None:
    rng = np.random.default_rng(1)
    for name in MOLECULES[:-1]:
        atoms = perturbed(name, rng)
        moved = posed(atoms, rng, 0.0)
        direction = moved.positions[0] - moved.positions[1]
        moved.positions[0] += 0.02 * direction / np.linalg.norm(direction)
        assert not pairs_of(of_atoms(atoms, moved)), name


def test_tells_elements_that_changed_places_charge_and_multiplicity() -> None:
    table = of_atoms(
        Atoms("NOH", [[0, 0, 0], [1.3, 0, 0], [0, 1.1, 0]]), Atoms("ONH", [[0, 0, 0], [1.3, 0, 0], [0, 1.1, 0]])
    )
    assert not pairs_of(table)
    same = of_atoms(*3 * [molecule("H2O")])
    assert pairs_of(same) == {(0, 1), (0, 2), (1, 2)}
    assert pairs_of(replace(same, charge=np.array([0, 1, 0], np.int8))) == {(0, 2)}
    assert pairs_of(replace(same, multiplicity=np.array([1, 1, 3], np.uint8))) == {(0, 1)}


def test_nothing_is_lost_at_the_boundaries_of_buckets() -> None:
    rng = np.random.default_rng(2)
    sketches = rng.uniform(0, 3, size=(20_000, 5)).astype(np.float32)
    other = sketches + rng.choice([-1, 1], sketches.shape) * np.float32(fingerprint.TOLERANCE)
    both = np.concatenate([sketches, other])
    found = fingerprint.twins(np.zeros(len(both), np.uint64), both, both)
    expected = np.stack([np.arange(len(sketches)), np.arange(len(sketches)) + len(sketches)], axis=1)
    assert (np.isin(expected @ [len(both), 1], found @ np.array([len(both), 1]))).all()
    assert fingerprint.near(np.zeros(len(both), np.uint64), both).all()
    assert not fingerprint.near(np.arange(len(both), dtype=np.uint64), both).any()


def test_many_equal_structures_are_one_component() -> None:
    values = np.zeros((3000, 5), np.float32)
    values[2000:] = 1.0
    pairs = fingerprint.twins(np.zeros(3000, np.uint64), values, values)
    assert len(pairs) < 150_000
    assert np.unique(fingerprint.components(3000, pairs)).tolist() == [0, 2000]


def test_the_sketch_tells_the_frames_of_a_trajectory_apart() -> None:
    rng = np.random.default_rng(6)
    atoms = molecule("CH3CH2OH")
    positions = atoms.positions + rng.normal(scale=0.05, size=(5000, len(atoms), 3))
    names = [f"s{i}" for i in range(5000)]
    table = StructureTable.make(names, names, [len(atoms)] * 5000, np.tile(atoms.numbers, 5000), positions)
    sketches = fingerprint.sketch(table, fingerprint.environments(table))
    assert fingerprint.near(np.zeros(5000, np.uint64), sketches).mean() < 0.01


def test_components_of_a_graph() -> None:
    pairs = np.array([[5, 4], [4, 3], [3, 2], [0, 6]])
    assert fingerprint.components(8, pairs).tolist() == [0, 1, 2, 2, 2, 2, 0, 7]


@pytest.mark.parametrize(
    "matrix", [np.diag([2, 1, 1]), np.diag([2, 2, 2]), np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 1]])]
)
def test_a_supercell_equals_its_cell(matrix: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(3)
    cell = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    cell.positions += rng.normal(scale=0.1, size=cell.positions.shape)
    larger = make_supercell(cell, matrix)
    larger = larger[rng.permutation(len(larger))]
    larger.rotate(37, (1, 2, 3), rotate_cell=True)
    larger.positions += 5e-4 * rng.choice([-1, 1], larger.positions.shape)
    assert pairs_of(of_atoms(cell, larger)) == {(0, 1)}


def test_tells_crystals_apart() -> None:
    silicon = bulk("Si", cubic=True)
    strained = silicon.copy()
    strained.set_cell(silicon.cell * 1.005, scale_atoms=True)
    moved = silicon.copy()
    moved.positions[0, 0] += 0.05
    diamond = Atoms("Si8", silicon.positions)  # the same atoms as a cluster
    assert not pairs_of(of_atoms(silicon, strained, moved, diamond, bulk("Ge", cubic=True)))


def test_a_large_molecule_is_seen_within_the_cutoff() -> None:
    rng = np.random.default_rng(4)
    grid = np.stack(np.meshgrid(*[np.arange(9.0)] * 3), axis=-1).reshape(-1, 3) * 1.6
    atoms = Atoms(f"C{len(grid)}", grid + rng.normal(scale=0.1, size=grid.shape))
    assert len(atoms) > fingerprint.DENSE_ATOMS
    assert pairs_of(of_atoms(atoms, posed(atoms, rng, 1e-4))) == {(0, 1)}


def test_numbers_are_the_sums_that_the_text_says() -> None:
    table = of_atoms(molecule("H2O"))
    distances = molecule("H2O").get_all_distances()
    z = table.numbers.astype(int)
    weights = 0.9 + 0.1 * np.cos(np.outer(z, np.arange(1, 6)))
    for k, q in enumerate([0.0, 1.0, 1.7, 2.3, 3.1]):
        values = distances if k == 0 else np.sin(q * distances) / q
        expected = weights[:, k] * (values @ weights[:, k]) / 2
        np.testing.assert_allclose(fingerprint.environments(table)[:, k], expected, atol=1e-5)


def test_the_built_in_structures_are_found_again_and_repeat_only_where_one_distance_is_all() -> None:
    table = StructureTable.concatenate(list(read_tables("builtin")))
    rng = np.random.default_rng(5)
    chosen = rng.choice(len(table), 1000, replace=False)
    frames = [Atoms(s.numbers, s.positions) for s in table.take(chosen)]
    again = replace(of_atoms(*(posed(atoms, rng, 1e-4) for atoms in frames)), multiplicity=table.multiplicity[chosen])
    found = pairs_of(StructureTable.concatenate([replace(table, labels={}), again]))
    assert {(int(old), len(table) + new) for new, old in enumerate(chosen)} <= found
    repeated = {member for a, b in found if b < len(table) for member in (a, b)}
    assert table.num_atoms[sorted(repeated)].tolist() == [2] * len(repeated)


def test_isolated_atoms_are_equal() -> None:
    assert pairs_of(of_atoms(Atoms("H"), Atoms("H", [[3.0, 0, 0]]), Atoms("O"))) == {(0, 1)}
