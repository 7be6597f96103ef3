"""Conservation of energy: nothing drifts in 10 ps, and what fluctuates does so because of the time step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.optimize import FIRE
from numpy.typing import NDArray

from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import Checkpoint
from rung.model.config import ModelConfig
from rung.model.engines.md import Dynamics, draw_velocities
from rung.model.potential import Potential

TEMPERATURE = 200.0  # K
DRIFT = 0.05  # meV/atom in 10 ps: 1/500 of the kinetic energy at 200 K


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Return a random potential that binds CO2 and diamond; two layers with vectors, on the native kernels."""
    sizes = {"channels": 16, "num_radial": 8, "num_layers": 2, "l_max": 2, "fidelity_dim": 4, "readout_hidden": 16}
    config = ModelConfig(elements=(1, 6, 8), fidelities=("low",), cutoff=3.5, seed=2, **sizes)
    potential = Potential(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    potential.set_reference("low", {1: -13.0, 6: -1027.0, 8: -2040.0})
    potential.set_scale(2.0)
    return Checkpoint(potential.eval(), info={}, evaluation={}, raw_state=None)


def at_rest(checkpoint: Checkpoint, name: str) -> Atoms:
    """Return a molecule or a periodic box in a minimum of the potential."""
    atoms = molecule("CO2") if name == "molecule" else bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    assert FIRE(atoms, logfile=None).run(fmax=0.01, steps=300)
    return atoms


def total_energies(atoms: Atoms, timestep: float, femtoseconds: float, every: float) -> NDArray[np.float64]:
    """Return the total energies in meV/atom, one every so many fs."""
    draw_velocities(atoms, TEMPERATURE, seed=0, whole=True)
    dynamics = Dynamics("nve", timestep=timestep).of(atoms)
    steps, stride = round(femtoseconds / timestep), round(every / timestep)
    found = [atoms.get_total_energy() for _ in dynamics.irun(steps=steps) if dynamics.nsteps % stride == 0]
    assert 0.2 * TEMPERATURE < atoms.get_temperature() < 2 * TEMPERATURE  # it moves, and nothing came apart
    return 1e3 * np.array(found) / len(atoms)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["molecule", "box"])
def test_no_energy_is_won_or_lost_in_10_ps(checkpoint: Checkpoint, name: str) -> None:
    """In float32, as it is used; float64 has less to lose."""
    atoms = at_rest(checkpoint, name)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float32")
    found = total_energies(atoms, timestep=1.0, femtoseconds=10_000, every=5)
    tenth = len(found) // 10
    assert abs(found[-tenth:].mean() - found[:tenth].mean()) < DRIFT
    assert found.std() < 20 * DRIFT


class Unbalanced(RungCalculator):
    """One atom's forces are too large, so that all of them together are the gradient of nothing."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.results["forces"][0] *= 1.2


@pytest.mark.parametrize("name", ["molecule", "box"])
def test_half_the_time_step_quarters_the_error(checkpoint: Checkpoint, name: str) -> None:
    """Velocity Verlet's error is of second order in the time step; that of a force that is no gradient stays."""
    start = at_rest(checkpoint, name)
    ratios = []
    for calculator in (RungCalculator, Unbalanced):
        spreads = []
        for timestep in (0.5, 0.25):
            atoms = start.copy()
            atoms.calc = calculator(checkpoint, "low", dtype="float64")
            spreads.append(total_energies(atoms, timestep, femtoseconds=150, every=0.5).std())
        ratios.append(spreads[0] / spreads[1])
    assert ratios[0] == pytest.approx(4, rel=0.1)
    assert ratios[1] < 1.5
