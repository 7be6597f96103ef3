"""Small potentials with every parameter at work, and small molecules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule

from rung.data.structure import Labels, Structure
from rung.model.config import ModelConfig
from rung.model.potential import Potential

E0 = {"low": {1: -13.6, 6: -1027.0, 8: -2040.0}, "high": {1: -13.7, 6: -1029.5}}  # oxygen is not trained at "high"


@pytest.fixture
def make_potential() -> Callable[..., Potential]:
    """Return a function that makes a small potential of H, C, O at the fidelities low and high.

    Zero-initialised parameters get small random values, so that fidelity, charge and multiplicity matter.
    """

    def make(**changes: Any) -> Potential:
        sizes = {"channels": 4, "num_radial": 4, "fidelity_dim": 4, "readout_hidden": 4, "charges": (0, 1)}
        shape = {"elements": (1, 6, 8), "fidelities": ("low", "high"), "multiplicities": (1, 2)}
        potential = Potential(ModelConfig(**(sizes | shape | changes)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in potential.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for fidelity in potential.config.fidelities:
            e0 = E0[fidelity]
            potential.set_reference(fidelity, {z: e0[z] for z in e0 if z in potential.config.elements})
        potential.set_scale(5.0)
        return potential.eval()

    return make


@pytest.fixture
def molecules() -> list[Structure]:
    """Return displaced water, methane and ethanol with random labels: low E and F, high E (methane only)."""
    generator = np.random.default_rng(0)
    structures = []
    for name in ("H2O", "CH4", "CH3CH2OH"):
        atoms = molecule(name)
        atoms.positions += generator.normal(scale=0.05, size=atoms.positions.shape)
        forces = generator.normal(size=atoms.positions.shape).astype(np.float32)
        labels = {"low": Labels(energy=float(generator.normal()) - 100 * len(atoms), forces=forces)}
        if name == "CH4":
            labels["high"] = Labels(energy=-1084.0)
        structures.append(
            Structure(name, name, atoms.numbers.astype(np.uint8), atoms.positions.astype(np.float32), labels=labels)
        )
    return structures
