"""E0 fits against known answers, and the energies they cannot explain."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from numpy.typing import NDArray

from rung.data.reference_energy import check_energies, fit_e0, outliers
from rung.data.structure import Labels, Structure

E0 = {1: -13.6, 6: -1029.0, 8: -2041.0}


def compositions(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.choice(list(E0), rng.integers(1, 9)).astype(np.uint8) for _ in range(count)]


def energies(numbers: list[NDArray[np.uint8]], noise: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    return np.array([sum(E0[z] for z in atoms.tolist()) + len(atoms) * noise * rng.normal() for atoms in numbers])


def test_recovers_additive_energies() -> None:
    numbers = compositions(40)
    fit = fit_e0(numbers, energies(numbers))
    assert fit.e0 == pytest.approx(E0, abs=1e-6)
    assert fit.residual_rms < 1e-9 and fit.rank == 3 and fit.note == ""


def test_residual_is_the_noise_per_atom() -> None:
    numbers = compositions(2000)
    assert fit_e0(numbers, energies(numbers, noise=0.2)).residual_rms == pytest.approx(0.2, rel=0.05)


def test_ridge_has_its_closed_form_and_shrinks_to_zero() -> None:
    numbers = compositions(30)
    target = np.array([e / len(z) for e, z in zip(energies(numbers), numbers, strict=True)])
    design = np.array([[(z == element).mean() for element in E0] for z in numbers])
    expected = np.linalg.solve(design.T @ design / 30 + 0.3 * np.eye(3), design.T @ target / 30)
    assert list(fit_e0(numbers, energies(numbers), ridge=0.3).e0.values()) == pytest.approx(expected)
    assert max(map(abs, fit_e0(numbers, energies(numbers), ridge=1e9).e0.values())) < 1e-3


def test_names_the_elements_that_cannot_be_separated() -> None:
    water_and_dimer = [np.array([8, 1, 1], np.uint8), np.array([8, 1, 1, 8, 1, 1], np.uint8), np.array([6], np.uint8)]
    fit = fit_e0(water_and_dimer, [-76.0, -152.0, -38.0])
    assert (fit.rank, fit.unseparated) == (2, (1, 8))
    assert fit.e0[8] + 2 * fit.e0[1] == pytest.approx(-76.0)
    assert "the E0s of H, O cannot be told apart" in fit.note


def test_refuses_nan_and_mismatched_lengths() -> None:
    numbers = compositions(3)
    with pytest.raises(ValueError, match="leave out the structures without one"):
        fit_e0(numbers, [1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="found 3 and 2"):
        fit_e0(numbers, [1.0, 2.0])
    with pytest.raises(ValueError, match="ridge: expected >= 0"):
        fit_e0(numbers, [1.0, 2.0, 3.0], ridge=-1.0)


def test_outliers_survive_a_fit_that_they_bend() -> None:
    numbers = compositions(60)
    values = energies(numbers, noise=0.05)
    wrong = [3, 17, 30, 44]
    values[wrong] /= 27.211386  # hartree among eV
    assert [outlier.index for outlier in outliers(numbers, values)] == wrong


def test_the_z_score_is_in_standard_deviations_of_normal_noise() -> None:
    numbers = compositions(400)
    values = energies(numbers, noise=0.5)
    assert outliers(numbers, values) == []
    values[5] += len(numbers[5]) * 0.5 * 20
    (outlier,) = outliers(numbers, values)
    assert outlier.index == 5 and outlier.z == pytest.approx(20, abs=4)


def test_tiny_sets_say_nothing() -> None:
    numbers = compositions(10)
    values = energies(numbers)
    values[0] = 0.0
    assert outliers(numbers, values) == []


def labelled(values: NDArray[np.float64], numbers: list[NDArray[np.uint8]]) -> list[Structure]:
    return [
        Structure(f"s{i}", "g", z, np.zeros((len(z), 3), np.float32), labels={"pbe": Labels(float(e))})
        for i, (z, e) in enumerate(zip(numbers, values, strict=True))
    ]


def test_a_unit_error_is_refused_and_an_odd_energy_is_named(caplog: pytest.LogCaptureFixture) -> None:
    numbers = compositions(60)
    values = energies(numbers, noise=0.05)
    with caplog.at_level(logging.WARNING):
        check_energies(labelled(values, numbers), "pbe")
        assert not caplog.records
        values[7] += 2.0 * len(numbers[7])
        check_energies(labelled(values, numbers), "pbe")
    assert "energy.pbe: 1 outliers" in caplog.text and "'s7' by +" in caplog.text
    values[9] /= 27.211386
    with pytest.raises(ValueError, match=r"energy.pbe: expected energies within 10 eV/atom .* 's9' by .* in eV"):
        check_energies(labelled(values, numbers), "pbe")
