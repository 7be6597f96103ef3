"""From label store to dataset: what is shipped, what is not, and that it is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rung.data.generate.export import CARD_FILE, export, split_molecules
from rung.data.generate.levels import ATOM_MULTIPLICITY, LEVELS
from rung.data.generate.sampling import Sample, Sampled
from rung.data.generate.store import LabelRow, LabelStore
from rung.data.read import read_any
from rung.data.structure import Structure

COUNTS = {"gfn2_xtb": None, "mp2_ccpvdz": 6, "ccsdt_ccpvdz": 6}
ATOM_ENERGIES = {1: -10.0, 6: -20.0, 7: -30.0, 8: -40.0}


def _samples() -> list[Sample]:
    """Twenty invented methane-like structures in four groups."""
    random = np.random.default_rng(0)
    numbers = np.array([6, 1, 1, 1, 1], np.uint8)
    ideal = np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.63
    return [
        Sample(f"m{i % 4}:{i}", f"m{i % 4}", numbers, (ideal + random.normal(0, 0.02, (5, 3))).astype(np.float32))
        for i in range(20)
    ]


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """A store in which one MP2 calculation failed and CCSD(T) stopped before its last structure."""
    from rung.data.generate.engine import isolated_atoms, prefixes

    folder = tmp_path / "store"
    with LabelStore(folder / "labels.sqlite") as store:
        store.check_meta(seed=0, versions={"pyscf": "2.0", "tblite": "0.4"})
        store.add_molecule("all", Sampled(_samples(), {"dynamics: bonds broken or formed": 3}))
        store.add_geometries(isolated_atoms())
        for fidelity, prefix in prefixes(list(store.geometries()), COUNTS, 0).items():
            for number in ATOM_MULTIPLICITY:
                store.add_label(LabelRow(f"atom:{number}", fidelity, ATOM_ENERGIES[number], None, None, 0.0))
            for rank, geometry in enumerate(prefix):
                if fidelity == "ccsdt_ccpvdz" and rank == 4:
                    continue
                failure = "SCF not converged" if fidelity == "mp2_ccpvdz" and rank == 2 else None
                energy = None if failure else -75.0 - 0.01 * rank
                forces = np.full((5, 3), 0.1, np.float32) if LEVELS[fidelity].has_forces and not failure else None
                store.add_label(LabelRow(geometry.key, fidelity, energy, forces, failure, 0.0))
    return folder


def test_failures_and_labels_beyond_the_complete_prefix_are_not_shipped(store_folder: Path, tmp_path: Path) -> None:
    manifest = export(store_folder, tmp_path / "out", name="small", counts=COUNTS)
    totals = {name: sum(entry.num_energies.values()) for name, entry in manifest.fidelities.items()}
    assert totals == {"gfn2_xtb": 20, "mp2_ccpvdz": 5, "ccsdt_ccpvdz": 4}
    assert sum(manifest.entry("ccsdt_ccpvdz").num_forces.values()) == 0
    assert manifest.entry("mp2_ccpvdz").e0 == ATOM_ENERGIES
    assert manifest.licence == "CC0-1.0"
    card = (tmp_path / "out" / CARD_FILE).read_text()
    assert "| `mp2_ccpvdz` | SCF not converged | 1 |" in card
    assert "| dynamics: bonds broken or formed | 3 |" in card


def test_the_same_store_gives_the_same_bytes(store_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(store_folder, tmp_path / name, name="small", counts=COUNTS)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_what_is_read_back_is_what_was_stored(store_folder: Path, tmp_path: Path) -> None:
    export(store_folder, tmp_path / "out", name="small", counts=COUNTS)
    stored = {sample.key: sample for sample in _samples()}
    structures = read_any(tmp_path / "out")
    assert {structure.key for structure in structures} == set(stored)
    for structure in structures:
        np.testing.assert_array_equal(structure.positions, stored[structure.key].positions)
        assert structure.group == stored[structure.key].smiles


def test_a_level_without_its_atoms_is_an_error(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "labels.sqlite") as store:
        store.check_meta(seed=0, versions={})
        store.add_molecule("all", Sampled(_samples(), {}))
    with pytest.raises(
        ValueError, match=r"gfn2_xtb: expected isolated-atom energies, found none for Z = \[1, 6, 7, 8\]"
    ):
        export(tmp_path, tmp_path / "out", name="small", counts=COUNTS)


def test_molecules_are_split_within_affordable_and_larger_ones() -> None:
    def structures(group: str, numbers: list[int]) -> list[Structure]:
        array = np.array(numbers, np.uint8)
        return [Structure(f"{group}:{i}", group, array, np.zeros((len(array), 3), np.float32)) for i in range(5)]

    small = [s for i in range(50) for s in structures(f"small{i}", [8, 1, 1])]
    large = [s for i in range(50) for s in structures(f"large{i}", [6] * 6 + [1] * 6)]
    split = split_molecules(small + large)
    for members, shares in ((small, (0.60, 0.10, 0.30)), (large, (0.80, 0.10, 0.10))):
        found = [sum(split[s.group] == part for s in members) / len(members) for part in ("train", "val", "test")]
        np.testing.assert_allclose(found, shares, atol=0.021)
