"""Degrees of freedom counted by hand, and thermostats that keep the motions that are left at the temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms, FixBondLengths, FixCom, FixedPlane
from ase.stress import full_3x3_to_voigt_6_stress

from rung.model.engines.freedom import Freedom, resting
from rung.model.engines.md import Dynamics, draw_velocities

ETHANOL = 9  # atoms
CASES: dict[str, tuple[Atoms, Any, int, int]] = {  # atoms, constraint, degrees of freedom, those of the whole
    "water": (molecule("H2O"), None, 3, 6),
    "linear": (molecule("CO2"), None, 4, 5),
    "two atoms": (molecule("H2"), None, 1, 5),
    "lone atom": (Atoms("H"), None, 3, 0),
    "crystal": (bulk("C", cubic=True), None, 21, 3),
    "chain": (Atoms("H2", [[0, 0, 0], [0, 0, 1]], cell=[9, 9, 2], pbc=[False, False, True]), None, 3, 3),
    "one atom held": (molecule("CH3CH2OH"), FixAtoms([0]), 3 * ETHANOL - 6, 3),  # it turns about that atom
    "two atoms held": (molecule("CH3CH2OH"), FixAtoms([0, 1]), 3 * ETHANOL - 7, 1),
    "crystal held": (bulk("C", cubic=True), FixAtoms([0]), 21, 0),
    "rigid water": (molecule("H2O"), FixBondLengths([[0, 1], [0, 2]]), 1, 6),
    "centre held": (bulk("C", cubic=True), FixCom(), 21, 0),
    "in a plane": (bulk("C", cubic=True), FixedPlane(range(8), [1, 1, 0]), 14, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_that_of_the_motions_left(case: str) -> None:
    atoms, constraint, count, whole = CASES[case]
    atoms = atoms.copy()
    atoms.set_constraint(constraint)
    freedom = Freedom.of(atoms, whole=False)
    assert (freedom.count, freedom.whole) == (count, whole)
    draw_velocities(atoms, 300.0, seed=0)
    assert atoms.get_kinetic_energy() == pytest.approx(count * units.kB * 300 / 2)
    assert freedom.temperature(atoms) == pytest.approx(300)
    draw_velocities(atoms, 300.0, seed=0, whole=True)
    assert atoms.get_temperature() == pytest.approx(300)


def test_at_rest_neither_moves_nor_turns_and_its_temperature_is_the_same() -> None:
    atoms = molecule("CH3CH2OH")
    draw_velocities(atoms, 300.0, seed=0)
    freedom, momenta = Freedom.of(atoms, whole=False), atoms.get_momenta()
    np.testing.assert_allclose(resting(atoms), momenta, atol=1e-12)
    turning = np.cross([0.1, 0.2, -0.3], atoms.positions)
    atoms.set_momenta(momenta + atoms.get_masses()[:, None] * (turning + [1.0, 2.0, 3.0]))
    assert freedom.temperature(atoms) == pytest.approx(300)
    np.testing.assert_allclose(resting(atoms), momenta, atol=1e-12)
    assert "21 degrees of freedom, 6 less than ASE's get_temperature()" in str(freedom)


class Springs(Calculator):
    """A spring of 1 angstrom between any two atoms; no images."""

    implemented_properties = ["energy", "forces", "stress"]

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        vectors = atoms.positions[:, None] - atoms.positions[None]
        lengths = np.linalg.norm(vectors, axis=2) + np.eye(len(atoms))
        pulls = -((lengths - 1) / lengths)[..., None] * vectors
        volume = atoms.cell.volume or 1.0
        self.results = {
            "energy": ((lengths - 1) ** 2).sum() / 4,
            "forces": pulls.sum(1),
            "stress": full_3x3_to_voigt_6_stress(-np.einsum("ijx,ijy->xy", vectors, pulls) / (2 * volume)),
        }


@pytest.mark.parametrize(
    ("ensemble", "thermostat", "count"), [("nvt", "bussi", 6), ("npt", "langevin", 9), ("nvt", "langevin", 12)]
)
def test_thermostats_heat_what_moves(ensemble: str, thermostat: str, count: int) -> None:
    """Mean kinetic energy of four atoms against equipartition: over 3 n it would be off by a third or more."""
    atoms = Atoms("C4", np.vstack([np.zeros(3), np.eye(3)]) * 0.7, cell=[5] * 3, pbc=ensemble == "npt")
    atoms.calc = Springs()
    settings = Dynamics(ensemble, 2.0, 300.0, thermostat=thermostat, tau=10.0, friction=50.0, pressure=0.0, seed=1)
    draw_velocities(atoms, 300.0, seed=0, whole=settings.moves_whole)
    dynamics = settings.of(atoms)
    kinetic = [atoms.get_kinetic_energy() for _ in dynamics.irun(1500)]
    assert 2 * np.mean(kinetic) / units.kB == pytest.approx(count * 300, rel=0.12)
    assert settings.freedom(atoms).count == count
