"""Every level against finite differences, full configuration interaction, ASE's own calculators and known atoms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rung.data.generate.levels import ATOM_MULTIPLICITY, LEVELS, LabelError, compute_label

for _package in ("rdkit", "tblite", "pyscf"):
    pytest.importorskip(_package, reason="needs rung[generate]")

WATER = np.array([8, 1, 1], np.uint8), np.array([[0, 0, 0.01], [0.97, 0, 0], [-0.25, 0.9, 0]], np.float32)
HYDROGEN = np.array([1, 1], np.uint8), np.array([[0, 0, 0], [0.2, 0.3, 0.7]], np.float32)
HARTREE = 27.211386  # eV


@pytest.mark.parametrize(
    ("name", "molecule", "tolerance"),
    [
        ("gfn1_xtb", WATER, 1e-3),
        ("gfn2_xtb", WATER, 1e-3),
        ("pbe_def2svp", HYDROGEN, 5e-3),  # the quadrature grid moves with the atoms; its response is left out
        ("wb97x_631gd", HYDROGEN, 5e-3),
        ("mp2_ccpvdz", HYDROGEN, 1e-3),
        ("mp2_ccpvdz", WATER, 1e-3),
    ],
)
def test_forces_are_the_negative_gradient(
    name: str, molecule: tuple[NDArray[np.uint8], NDArray[np.float32]], tolerance: float
) -> None:
    numbers, positions = molecule
    forces = compute_label(LEVELS[name], numbers, positions)[1]
    assert forces is not None
    step = np.float32(2.0**-8)  # angstrom, exact in float32
    energies = []
    for sign in (1, -1):
        moved = positions.copy()
        moved[1, 0] += sign * step
        energies.append(compute_label(LEVELS[name], numbers, moved)[0])
    assert forces[1, 0] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=tolerance)


@pytest.mark.parametrize("name", ["gfn1_xtb", "gfn2_xtb"])
def test_xtb_equals_the_ase_calculator(name: str) -> None:
    from ase import Atoms
    from tblite.ase import TBLite

    level = LEVELS[name]
    atoms = Atoms(*WATER, calculator=TBLite(method=level.method, accuracy=level.settings["accuracy"], verbosity=0))
    energy, forces = compute_label(level, *WATER)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-5)


def test_coupled_cluster_of_two_electrons_is_full_configuration_interaction() -> None:
    from pyscf import fci, gto, scf

    numbers, positions = HYDROGEN
    atoms = [("H", position) for position in positions.astype(float)]
    molecule = gto.M(atom=atoms, unit="Angstrom", basis="cc-pvdz", verbose=0)
    exact = fci.FCI(scf.RHF(molecule).run()).kernel()[0]
    energy, forces = compute_label(LEVELS["ccsdt_ccpvdz"], numbers, positions)
    assert energy == pytest.approx(exact * HARTREE, abs=1e-5)
    assert forces is None


def test_the_correlated_levels_freeze_the_core() -> None:
    from pyscf import gto, mp, scf

    atoms = list(zip("OHH", WATER[1].astype(float), strict=True))
    reference = scf.RHF(gto.M(atom=atoms, basis="cc-pvdz", verbose=0)).run()
    expected = mp.MP2(reference, frozen=1).run().e_tot
    assert compute_label(LEVELS["mp2_ccpvdz"], *WATER)[0] == pytest.approx(expected * HARTREE, abs=1e-4)


def test_the_hydrogen_atom_has_its_known_energy_in_this_basis() -> None:
    energy, forces = _atom("ccsdt_ccpvdz", 1, 2)
    assert energy == pytest.approx(-0.499278 * HARTREE, abs=1e-4)  # UHF/cc-pVDZ, NIST CCCBDB
    assert forces is None


@pytest.mark.parametrize("name", ["wb97x_631gd", "ccsdt_ccpvdz"])
@pytest.mark.parametrize("number", [6, 7, 8])
def test_atoms_are_in_their_ground_state_multiplicity(name: str, number: int) -> None:
    multiplicity = ATOM_MULTIPLICITY[number]
    assert _atom(name, number, multiplicity)[0] < _atom(name, number, multiplicity - 2)[0] - 0.5


def _atom(name: str, number: int, multiplicity: int) -> tuple[float, NDArray[np.float32] | None]:
    return compute_label(LEVELS[name], np.array([number], np.uint8), np.zeros((1, 3), np.float32), multiplicity)


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("gfn2_xtb", {"max_iter": 1}, "SCF not converged"),
        ("pbe_def2svp", {"max_cycle": 1}, "SCF not converged"),
        ("mp2_ccpvdz", {"max_cycle": 1}, "SCF not converged"),
        ("ccsdt_ccpvdz", {"max_cycle": 30, "cc_conv_tol": 0.0}, "CCSD not converged"),
    ],
)
def test_what_does_not_converge_is_an_error_not_a_number(name: str, setting: dict[str, float], reason: str) -> None:
    level = LEVELS[name]
    with pytest.raises(LabelError, match=reason):
        compute_label(replace(level, settings={**level.settings, **setting}), *WATER)


def test_a_force_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(LabelError, match="a force beyond 300 eV/angstrom"):
        compute_label(LEVELS["mp2_ccpvdz"], np.array([1, 1], np.uint8), np.array([[0, 0, 0], [0, 0, 0.12]], np.float32))
