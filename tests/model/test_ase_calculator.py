"""The calculator against predict, finite differences and ASE's own tools, in float64 where derivatives matter."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from rung.data.batch import Sample, batches
from rung.data.fidelity import Fidelity
from rung.data.structure import Structure
from rung.model.ase_calculator import TOGETHER_ATOMS, RungCalculator
from rung.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rung.model.potential import Potential
from rung.model.predict import DEFAULT_BUDGET, predict
from rung.model.uncertainty import LastLayer

FIDELITIES = {"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2")}


@pytest.fixture
def checkpoint(make_potential: Callable[..., Potential]) -> Checkpoint:
    return Checkpoint(make_potential(), info={}, evaluation={}, raw_state=None)


@pytest.fixture
def ethanol(checkpoint: Checkpoint) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    return atoms


@pytest.fixture
def crystal(checkpoint: Checkpoint) -> Atoms:
    """Return strained, displaced diamond: two atoms, every bond across the cell's faces."""
    atoms = bulk("C", "diamond", a=3.6)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + [[0.02, 0.01, 0], [0, -0.03, 0.02], [0, 0, 0.01]]), scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    return atoms


def test_it_agrees_with_predict(checkpoint: Checkpoint, molecules: list[Structure]) -> None:
    """In float64: the calculator counts positions from their mean, which float32 rounds otherwise."""
    calculator = RungCalculator(checkpoint, "low", dtype="float64")
    potential = copy.deepcopy(checkpoint.potential).double()
    for structure, expected in zip(molecules, predict(potential, molecules, "low"), strict=True):
        atoms = Atoms(structure.numbers, structure.positions, calculator=calculator)
        assert atoms.get_potential_energy() == pytest.approx(expected.energy, abs=1e-9)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), expected.forces, atol=1e-9)
        assert atoms.get_potential_energies().sum() == pytest.approx(expected.energy, abs=1e-9)


def test_forces_are_the_gradient(ethanol: Atoms) -> None:
    some = [0, 2, 5]  # carbon, oxygen, hydrogen
    numerical = calculate_numerical_forces(ethanol, eps=1e-4, iatoms=some)
    np.testing.assert_allclose(ethanol.get_forces()[some], numerical, atol=1e-6)


def test_forces_and_stress_of_a_crystal_are_the_gradient(crystal: Atoms) -> None:
    np.testing.assert_allclose(crystal.get_forces(), calculate_numerical_forces(crystal, eps=1e-4), atol=1e-6)
    stress = crystal.get_stress()
    assert stress.shape == (6,) and np.abs(stress).max() > 1e-3
    np.testing.assert_allclose(stress, calculate_numerical_stress(crystal, eps=1e-5), atol=1e-7)


def test_float32_and_float64_agree_and_leave_the_checkpoint_alone(checkpoint: Checkpoint, ethanol: Atoms) -> None:
    double = ethanol.get_forces()
    ethanol.calc = RungCalculator(checkpoint, "low")
    single = ethanol.get_forces()
    np.testing.assert_allclose(single, double, atol=1e-4)
    assert np.abs(single - double).max() > 0
    assert next(checkpoint.potential.parameters()).dtype == torch.float32


def test_relaxation_lowers_the_energy_until_no_force_is_left(crystal: Atoms) -> None:
    start = crystal.get_potential_energy()
    assert BFGS(crystal, logfile=io.StringIO()).run(fmax=1e-3, steps=100)
    assert crystal.get_potential_energy() < start


def test_dynamics_conserve_energy(ethanol: Atoms) -> None:
    width = np.sqrt(300 * units.kB / ethanol.get_masses())[:, None]  # Maxwell-Boltzmann at 300 K
    ethanol.set_velocities(width * np.random.default_rng(0).normal(size=(len(ethanol), 3)))
    kinetic, total = ethanol.get_kinetic_energy(), ethanol.get_total_energy()
    changes = []
    for time_step in (0.25, 0.125):
        atoms = ethanol.copy()
        atoms.calc = ethanol.calc
        VelocityVerlet(atoms, time_step * units.fs).run(round(10 / time_step))
        changes.append(abs(atoms.get_total_energy() - total))
    assert changes[1] < 1e-2 * kinetic
    assert changes[1] < changes[0] / 3  # of second order in the time step: 4 in the limit


def test_charge_and_multiplicity_come_from_info_and_are_not_cached(ethanol: Atoms) -> None:
    neutral = ethanol.get_potential_energy()
    ethanol.info["charge"] = 1
    charged = ethanol.get_potential_energy()
    ethanol.info["multiplicity"] = 2
    doublet = ethanol.get_potential_energy()
    assert len({neutral, charged, doublet}) == 3
    del ethanol.info["multiplicity"]
    ethanol.info["spin"] = 2
    assert ethanol.get_potential_energy() == doublet


def test_what_it_does_not_know_is_named(checkpoint: Checkpoint, ethanol: Atoms) -> None:
    with pytest.raises(ValueError, match="this potential knows 2, so name one: low, high"):
        RungCalculator(checkpoint)
    with pytest.raises(ValueError, match="unknown fidelity 'lo'; known: low, high"):
        RungCalculator(checkpoint, "lo")
    with pytest.raises(ValueError, match="dtype: expected one of float32, float64, found 'float16'"):
        RungCalculator(checkpoint, "low", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        ethanol.get_stress()
    with pytest.raises(ValueError, match="structure 'Au': fidelity 'low' was not trained on Au"):
        Atoms("Au", calculator=ethanol.calc).get_potential_energy()
    ethanol.info["charge"] = 0.5
    with pytest.raises(ValueError, match="charge: expected a whole number, found 0.5"):
        ethanol.get_potential_energy()
    ethanol.info.update(charge=0, multiplicity=1, spin=3)
    with pytest.raises(ValueError, match="multiplicity 1 and spin 3 differ"):
        ethanol.get_potential_energy()
    del ethanol.info["spin"]
    ethanol.info["charge"] = 5
    with pytest.raises(ValueError, match="charge 5 is not known; known charges: 0, 1"):
        ethanol.get_potential_energy()
    ethanol.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match="positions of 'C2OH6': expected finite numbers"):
        ethanol.get_potential_energy()


def test_one_fidelity_needs_no_name_and_a_path_will_do(
    tmp_path: Path, make_potential: Callable[..., Potential], ethanol: Atoms
) -> None:
    folder = save_checkpoint(
        tmp_path / "model",
        make_potential(fidelities=("low",)),
        fidelities=FIDELITIES,
        training_config={},
        datasets=[],
        evaluation={},
    )
    stored = _stored(ethanol)
    ethanol.positions = stored.positions
    ethanol.calc = RungCalculator(folder, dtype="float64")
    [expected] = predict(load_checkpoint(folder).potential.double(), [stored], "low")
    assert ethanol.get_potential_energy() == pytest.approx(expected.energy, abs=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neighbours_that_are_kept_change_nothing(checkpoint: Checkpoint, crystal: Atoms, dtype: str) -> None:
    box = crystal.repeat(2)
    box.rattle(0.05, seed=2)
    box.set_velocities(np.random.default_rng(0).normal(scale=0.05, size=box.positions.shape))
    paths = []
    for skin in (0.0, 0.4):
        atoms = box.copy()
        atoms.calc = RungCalculator(checkpoint, "low", dtype=dtype, skin=skin)  # type: ignore[arg-type]
        VelocityVerlet(atoms, 2.0 * units.fs).run(10)
        paths.append((atoms.positions, atoms.get_forces(), atoms.get_stress()))
    for path in paths[1:]:
        for kept, anew in zip(path, paths[0], strict=True):
            np.testing.assert_array_equal(kept, anew)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_batch_gives_what_each_structure_gives_alone(
    checkpoint: Checkpoint, ethanol: Atoms, crystal: Atoms, dtype: str
) -> None:
    charged = ethanol.copy()
    charged.info.update(charge=1, multiplicity=2)
    large = crystal.repeat((5, 5, 3))
    large.rattle(0.02, seed=3)
    structures = [ethanol, crystal, large, charged, molecule("CH4"), large[:140], molecule("H2")]
    assert len(large) > TOGETHER_ATOMS
    calculator = RungCalculator(checkpoint, "low", dtype=dtype)  # type: ignore[arg-type]
    results = calculator.batch(structures)
    assert calculator.results == {} and calculator.atoms is None
    tolerance = 2e-4 if dtype == "float32" else 1e-9
    for atoms, result in zip(structures, results, strict=True):
        alone = atoms.copy()
        alone.calc = calculator
        alone.get_forces()
        assert result.keys() == calculator.results.keys()
        for name, value in calculator.results.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-9, atol=tolerance, err_msg=name)
    assert calculator.batch([]) == []
    with pytest.raises(ValueError, match=r"structure '1 \(Au\)': fidelity 'low' was not trained on Au"):
        calculator.batch([ethanol, Atoms("Au")])


def test_what_is_kept_is_not_the_callers(checkpoint: Checkpoint) -> None:
    """ASE writes `pbc` in place: candidates of the crystal must not pass for those of the slab."""
    box = bulk("C", "diamond", a=3.6, cubic=True).repeat((3, 3, 2))
    assert len(box) > TOGETHER_ATOMS
    kept, anew = (RungCalculator(checkpoint, "low", dtype="float64", skin=skin) for skin in (0.5, 0.0))
    for _ in range(2):
        box.rattle(0.001, seed=1)
        kept.batch([box])
    box.pbc = [True, True, False]
    found, expected = (calculator.batch([box])[0] for calculator in (kept, anew))
    assert found["energy"] == pytest.approx(expected["energy"], abs=1e-9)
    np.testing.assert_allclose(found["forces"], expected["forces"], atol=1e-9)


def test_float32_is_as_good_far_from_the_origin(checkpoint: Checkpoint, ethanol: Atoms, crystal: Atoms) -> None:
    calculator = RungCalculator(checkpoint, "low")
    for near in (ethanol, crystal):
        far = near.copy()
        far.positions += [1e4, -2e4, 3e4]
        far.calc = calculator
        for forces in (far.get_forces(), calculator.batch([far, far])[1]["forces"]):
            np.testing.assert_allclose(forces, near.get_forces(), atol=1e-4)


def test_what_it_was_made_with_stays(checkpoint: Checkpoint) -> None:
    calculator = RungCalculator(checkpoint, "low")
    for name, value in (("fidelity", "high"), ("dtype", "float64")):
        with pytest.raises(AttributeError, match=f"{name}: cannot become '{value}'; .* make another RungCalculator"):
            setattr(calculator, name, value)
    with pytest.raises(ValueError, match="fidelity: cannot become 'high'"):
        calculator.set(fidelity="high")
    assert (calculator.fidelity, calculator.dtype) == ("low", "float32")


def test_no_atom_at_all_is_named(checkpoint: Checkpoint, ethanol: Atoms) -> None:
    calculator = RungCalculator(checkpoint, "low")
    with pytest.raises(ValueError, match="expected at least one atom, found none"):
        calculator.get_potential_energy(Atoms())
    with pytest.raises(ValueError, match="structure '1 .*: expected at least one atom, found none"):
        calculator.batch([ethanol, Atoms()])


def test_energy_std_is_the_spread_of_the_energy_over_the_posterior(checkpoint: Checkpoint, ethanol: Atoms) -> None:
    """The energy is linear in the read-outs, so a posterior along one direction has the spread of one step along it."""
    [batch] = batches(
        [Sample(_stored(ethanol), "low")],
        fidelity_index={"low": 0, "high": 1},
        cutoff=checkpoint.potential.config.cutoff,
        budget=DEFAULT_BUDGET,
    )
    size = checkpoint.potential.readout_derivatives(batch).shape[1]
    step = 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uncertainty = LastLayer(torch.outer(step, step), noise=0.002, factor=1.5)
    known = replace(checkpoint, uncertainty={"low": uncertainty})
    calculator = RungCalculator(known, "low", dtype="float64")
    energy = calculator.get_potential_energy(ethanol)
    assert "energy_std" not in calculator.results
    std = calculator.get_property("energy_std", ethanol)
    moved = copy.deepcopy(checkpoint)
    moved.potential.change_readouts("low", step)
    change = RungCalculator(moved, "low", dtype="float64").get_potential_energy(ethanol) - energy
    assert abs(change) > 1e-3
    assert std == pytest.approx(1.5 * np.hypot(change, 0.002 * len(ethanol)), rel=1e-5)
    assert calculator.get_potential_energy(ethanol) == energy

    every = RungCalculator(known, "low", dtype="float64", uncertainty=True)
    every.get_forces(ethanol)
    assert every.results["energy_std"] == std
    structures = [ethanol, molecule("CH4"), ethanol]
    assert [result["energy_std"] for result in every.batch(structures)][::2] == pytest.approx([std, std])
    assert "energy_std" in calculator.batch(structures, uncertainty=True)[1]
    assert "energy_std" not in calculator.batch(structures)[1]


def test_without_uncertainty_energy_std_says_how_to_get_it(checkpoint: Checkpoint, ethanol: Atoms) -> None:
    known = replace(checkpoint, uncertainty={"high": LastLayer(torch.zeros(1, 1), 0.1)})
    message = "energy_std: this checkpoint has no uncertainty for 'low'; `rung finetune`"
    for attempt in (
        lambda: RungCalculator(known, "low").get_property("energy_std", ethanol),
        lambda: RungCalculator(known, "low").batch([ethanol], uncertainty=True),
        lambda: RungCalculator(known, "low", uncertainty=True),
    ):
        with pytest.raises(PropertyNotImplementedError, match=message):
            attempt()


def _stored(atoms: Atoms) -> Structure:
    return Structure("a", "a", atoms.numbers.astype(np.uint8), atoms.positions.astype(np.float32))
