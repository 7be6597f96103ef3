"""The enumeration is what chemistry says, and sampled structures are what statistical mechanics says."""

from __future__ import annotations

import numpy as np
import pytest

from rung.data.generate.molecules import COMMON, canonical, enumerate_small, molecules
from rung.data.generate.sampling import keeps_bonds, sample_molecule

Chem = pytest.importorskip("rdkit.Chem", reason="needs rung[generate]")
pytest.importorskip("tblite", reason="needs rung[generate]")


def test_hydrocarbons_are_complete() -> None:
    hydrocarbons = {smiles for smiles in enumerate_small() if set(smiles) <= set("C=#1")}
    assert hydrocarbons == {"C", "CC", "C=C", "C#C", "CCC", "C=CC", "C#CC", "C=C=C", "C1CC1", "C1=CC1"}


def test_two_heavy_atoms_are_complete() -> None:
    expected = ["CC", "C=C", "C#C", "CN", "C=N", "C#N", "CO", "C=O", "NN", "N=N", "N#N", "NO", "N=O", "OO"]
    found = {smiles for smiles in enumerate_small(2) if Chem.MolFromSmiles(smiles).GetNumAtoms() == 2} - {"[H][H]"}
    assert found == set(expected)


def test_molecules_are_neutral_closed_shell_distinct_and_of_four_elements() -> None:
    found = molecules()
    assert found == sorted({canonical(smiles) for smiles in found})
    for smiles in found:
        atoms = Chem.AddHs(Chem.MolFromSmiles(smiles)).GetAtoms()
        assert {atom.GetSymbol() for atom in atoms} <= set("HCNO"), smiles
        assert sum(atom.GetFormalCharge() for atom in atoms) == 0, smiles
        assert not any(atom.GetNumRadicalElectrons() for atom in atoms), smiles


def test_enumerated_molecules_have_the_normal_valences() -> None:
    for smiles in enumerate_small():
        for atom in Chem.AddHs(Chem.MolFromSmiles(smiles)).GetAtoms():
            assert atom.GetTotalValence() == {"H": 1, "C": 4, "N": 3, "O": 2}[atom.GetSymbol()], smiles


@pytest.mark.parametrize("smiles", ["O=O", "OOO", "NNN", "C1#CC1", "O1OO1"])
def test_the_rule_excludes(smiles: str) -> None:
    assert canonical(smiles) not in molecules()


def test_common_molecules_are_distinct() -> None:
    assert len({canonical(smiles) for smiles in COMMON.values()}) == len(COMMON)


def test_bad_smiles_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="SMILES 'C1C': expected a valid molecule"):
        canonical("C1C")
    with pytest.raises(ValueError, match=r"max_heavy_atoms: expected 1\.\.3, found 4"):
        enumerate_small(4)


def test_sampling_is_a_pure_function_of_its_arguments() -> None:
    first, second = (sample_molecule("CO", 12, seed=3) for _ in range(2))
    assert [sample.key for sample in first.samples] == [sample.key for sample in second.samples]
    for a, b in zip(first.samples, second.samples, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    other = sample_molecule("CO", 12, seed=4).samples
    assert any(not np.array_equal(a.positions, b.positions) for a, b in zip(first.samples, other, strict=True))


def test_samples_have_unique_keys_three_origins_and_zero_centroid() -> None:
    samples = sample_molecule("CO", 20, seed=0).samples
    assert len({sample.key for sample in samples}) == len(samples) == 20
    assert {sample.key.split(":")[1].split("/")[0] for sample in samples} == {"minimum", "dynamics", "normal_mode"}
    for sample in samples:
        np.testing.assert_allclose(sample.positions.mean(0), 0, atol=1e-6)


def test_nitrogen_vibrates_with_its_known_amplitude() -> None:
    """Up to 1000 K N2 stays in its ground state: rms amplitude (hbar / 2 mu w)^1/2 = 0.0319 angstrom at 2359 / cm."""
    samples = [s for s in sample_molecule("N#N", 400, seed=0).samples if "normal_mode" in s.key]
    lengths = [np.linalg.norm(sample.positions[0] - sample.positions[1]) for sample in samples]
    assert np.std(lengths) == pytest.approx(0.032, rel=0.15)


def test_a_broken_bond_and_a_new_bond_are_seen() -> None:
    numbers = np.array([8, 1, 1], np.uint8)
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    bonds = {(0, 1), (0, 2)}
    assert keeps_bonds(numbers, water, bonds)
    assert not keeps_bonds(numbers, water * [2, 1, 1], bonds)
    assert not keeps_bonds(numbers, np.array([[0, 0, 0], [0.96, 0, 0], [0.96, 0.6, 0]]), bonds)
