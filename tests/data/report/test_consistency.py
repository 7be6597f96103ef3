"""Forces against energies on a potential with known gradient, and the units and signs that a slope gives away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rung.data.report import consistency
from rung.data.report.consistency import CloseGeometries
from rung.data.report.findings import energy_unit, slope_meaning
from rung.data.table import StructureTable
from rung.data.units import BOHR, HARTREE, HARTREE_BOHR, KCAL_MOL, KJ_MOL

ATOMS = 5
MINIMUM = np.random.default_rng(7).normal(size=(ATOMS, 3)) * 2


def springs(positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return energies [M] and forces [M, n, 3] of atoms on anharmonic springs to their places."""
    off = positions - MINIMUM
    return (15 * off**2 + 8 * off**3).sum(axis=(1, 2)), -30 * off - 24 * off**2


def trajectory(count: int = 400, group: str = "m") -> StructureTable:
    rng = np.random.default_rng(0)
    positions = MINIMUM + np.cumsum(rng.normal(scale=0.01, size=(count, ATOMS, 3)), axis=0)
    positions = positions.astype(np.float32).astype(np.float64)
    energies, forces = springs(positions)
    keys = [f"{group}{i}" for i in range(count)]
    labels = {"energy.pbe": energies - 100.0, "forces.pbe": forces}
    return StructureTable.make(keys, [group] * count, [ATOMS] * count, [6] * ATOMS * count, positions, labels=labels)


def check(table: StructureTable, energy: float = 1.0, forces: float = 1.0) -> consistency.Consistency:
    labels = {"energy.pbe": table.labels["energy.pbe"] * energy, "forces.pbe": table.labels["forces.pbe"] * forces}
    close = CloseGeometries()
    close.add(replace(table, labels={name: array.astype(table.labels[name].dtype) for name, array in labels.items()}))
    return close.consistency("pbe")


def test_right_labels_have_slope_one() -> None:
    found = check(trajectory())
    assert found.slope == pytest.approx(1, abs=1e-3) and found.correlation == pytest.approx(1, abs=1e-4)
    assert found.pairs > 200 and 0 < (found.displacement or 0) < consistency.MAX_DISPLACEMENT


@pytest.mark.parametrize(
    ("energy", "forces", "message"),
    [
        (1.0, -1.0, "the sign of the forces is flipped"),
        (1.0, 1 / HARTREE, "forces look like Hartree/angstrom"),
        (1.0, 1 / HARTREE_BOHR, "forces look like Hartree/bohr"),
        (1.0, 1 / KCAL_MOL, "forces look like kcal"),
        (1.0, BOHR, "forces look like eV/bohr"),
        (
            1.0,
            -1 / HARTREE_BOHR,
            "by 51.4221, and the sign of the forces is flipped",
        ),
        (1 / HARTREE, 1.0, "energies look like Hartree"),
        (1 / KCAL_MOL, 1.0, "energies look like kcal/mol"),
        (0.5, 1.0, "energies look halved"),
        (7.0, 1.0, "differ by a factor of 7 that is no unit's"),
    ],
)
def test_the_slope_names_the_unit(energy: float, forces: float, message: str) -> None:
    found = check(trajectory(), energy, forces)
    assert found.slope is not None and message in slope_meaning(found.slope)


def test_forces_of_something_else_do_not_correlate() -> None:
    table = trajectory()
    labels = {**table.labels, "forces.pbe": np.roll(table.labels["forces.pbe"], 1, axis=0)}
    assert abs(check(replace(table, labels=labels)).correlation or 0) < 0.5


def test_says_nothing_without_pairs() -> None:
    one = trajectory(1)
    assert check(one).pairs == 0 and check(one).slope is None
    periodic = replace(trajectory(), pbc=np.ones((400, 3), np.bool_))
    assert check(periodic).pairs == 0
    different = [replace(trajectory(1, group), labels={}) for group in "ab"]
    close = CloseGeometries()
    close.add(StructureTable.concatenate(different))
    assert close.consistency("pbe").pairs == 0


def test_memory_is_bounded_and_groups_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "_MAX_ATOMS", 1000)
    close = CloseGeometries()
    for part in range(2):
        for number in range(20):
            table = trajectory(40, f"molecule{number}")
            close.add(table.take(np.arange(part, 40, 2)))
    kept = StructureTable.concatenate(close.tables)
    assert 0 < len(kept.numbers) <= 1000
    groups, counts = np.unique(kept.groups.tolist(), return_counts=True)
    assert 0 < len(groups) < 20 and set(counts) == {40}
    assert close.consistency("pbe").slope == pytest.approx(1, abs=2e-3)


ATOM_COUNTS = {"H": 9, "C": 5, "N": 2, "O": 1}


def test_energies_per_element_name_the_unit() -> None:
    wb97x = {"H": -16.2, "C": -1035.95, "N": -1488.67, "O": -2045.68}  # eV
    assert energy_unit(wb97x, ATOM_COUNTS) == ""
    for unit, size in {"Hartree": HARTREE, "kcal/mol": KCAL_MOL, "kJ/mol": KJ_MOL}.items():
        assert energy_unit({symbol: value / size for symbol, value in wb97x.items()}, ATOM_COUNTS) == unit
    assert energy_unit({"H": -0.5}, ATOM_COUNTS) == ""
    assert energy_unit({"C": -150.0, "O": -430.0}, ATOM_COUNTS) == ""  # pseudopotentials


def test_energies_that_cannot_be_told_apart_name_the_unit_by_their_sum() -> None:
    ethanol = {"H": 6, "C": 2, "O": 1}
    total = 6 * -16.2 + 2 * -1035.95 - 2045.68  # eV
    share = total / sum(number**2 for number in ethanol.values())
    smallest = {symbol: number * share for symbol, number in ethanol.items()}  # least squares on one composition
    assert energy_unit(smallest, ethanol, "cannot be told apart") == ""
    kcal = {symbol: value / KCAL_MOL for symbol, value in smallest.items()}
    assert energy_unit(kcal, ethanol, "cannot be told apart") == "kcal/mol"
    assert energy_unit({**kcal, "Fe": -3e4}, {**ethanol, "Fe": 1}, "cannot be told apart") == ""
