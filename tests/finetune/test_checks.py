"""Every kind of suspicious label is named, and nothing is dropped."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rung.data.structure import Labels, Structure
from rung.finetune import checks
from rung.finetune.config import ChecksConfig
from rung.finetune.dataset import absolute_rows

CONFIG = ChecksConfig()


def relabelled(structure: Structure, key: str, energy_change: float) -> Structure:
    """Return a copy that is rotated, reflected and in another order of atoms, with another energy."""
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    energy = structure.labels["high"].energy
    assert energy is not None
    return dataclasses.replace(
        structure,
        key=key,
        numbers=structure.numbers[::-1].copy(),
        positions=(structure.positions[::-1] @ rotation + 3.0).astype(np.float32),
        labels={"high": Labels(energy + energy_change)},
    )


def test_one_geometry_with_two_energies_is_named(shifted: list[Structure]) -> None:
    structures = [*shifted, relabelled(shifted[2], "again", 0.2)]
    findings = checks.duplicates(absolute_rows(structures, "high"), CONFIG)
    assert [finding.kind for finding in findings] == ["duplicate"]
    assert "'CH3OH-0' and 'again' are one geometry with two energies" in findings[0].message


def test_equal_duplicates_and_different_charges_are_no_contradiction(shifted: list[Structure]) -> None:
    charged = dataclasses.replace(relabelled(shifted[2], "cation", 8.0), charge=1, multiplicity=2)
    structures = [*shifted, relabelled(shifted[2], "again", 0.0), charged]
    assert checks.duplicates(absolute_rows(structures, "high"), CONFIG) == []


def test_a_training_structure_among_the_test_structures_is_named(shifted: list[Structure]) -> None:
    test = [*shifted[20:], relabelled(shifted[0], "copy", 0.0)]
    findings = checks.leaks(absolute_rows(shifted[:20], "high"), absolute_rows(test, "high"), CONFIG)
    assert [finding.message for finding in findings] == ["test structure 'copy' is training structure 'H2O-0'"]


def test_periodic_geometries_are_compared_with_their_cells(shifted: list[Structure]) -> None:
    cells = [np.eye(3, dtype=np.float32) * size for size in (5.0, 5.0, 6.0)]
    crystals = [dataclasses.replace(shifted[0], cell=cell, pbc=np.ones(3, np.bool_)) for cell in cells]
    assert checks.equal_geometries(crystals, 1e-3) == [(0, 1)]


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("kcal/mol", 96485.33212331 / 4184),  # CODATA 2018, the thermochemical calorie
        ("kJ/mol", 96485.33212331 / 1000),
        ("hartree", 1 / 27.211386245988),
        ("meV", 1000.0),
    ],
)
def test_a_wrong_unit_is_named(unit: str, factor: float) -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 8, (40, 3)).astype(np.float64)
    chemistry = generator.normal(0, 1.0, 40)
    predicted = counts @ [-13.0, -1000.0, -2000.0] + chemistry
    labels = counts @ [-16.0, -1010.0, -1990.0] + 1.05 * chemistry + generator.normal(0, 0.1, 40)
    assert checks.wrong_unit(labels, predicted, counts, "my.extxyz") == []
    findings = checks.wrong_unit(labels * factor, predicted, counts, "my.extxyz")
    assert [finding.kind for finding in findings] == ["unit"]
    assert f"the energies in my.extxyz look like {unit}, expected eV" in findings[0].message
    assert f"divide them by {factor:.8g}" in findings[0].message


def test_an_energy_outlier_is_named_with_its_distance(shifted: list[Structure]) -> None:
    residual = np.random.default_rng(0).normal(0, 0.01, len(shifted))
    assert checks.energy_outliers(shifted, residual, CONFIG) == []
    residual[5] = 0.5
    findings = checks.energy_outliers(shifted, residual, CONFIG)
    assert len(findings) == 1
    assert "energy of 'H2O2-0' is +0.500 eV/atom from what the parent fidelity" in findings[0].message


def test_findings_stop_the_run_unless_they_are_only_reported() -> None:
    findings = [checks.Finding("outlier", f"structure {i}") for i in range(30)]
    with pytest.raises(
        ValueError, match="30 suspicious labels; correct them, or pass checks.on_suspicion=report"
    ) as info:
        checks.settle(findings, CONFIG)
    assert "structure 19" in str(info.value)
    assert "and 10 more" in str(info.value)
    checks.settle(findings, ChecksConfig(on_suspicion="report"))
    checks.settle([], CONFIG)
