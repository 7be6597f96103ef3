"""A tiny random potential as the pretrained one; small molecules labelled by it, or by an analytic change of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule

from rung.data.fidelity import Fidelity
from rung.data.reaction import Reaction
from rung.data.structure import Labels, Structure
from rung.finetune.dataset import absolute_rows
from rung.model.checkpoint import save_checkpoint
from rung.model.config import ModelConfig
from rung.model.potential import Potential
from rung.model.predict import predict

NAMES = ("H2O", "CH4", "CH3OH", "C2H6", "H2CO", "H2O2", "C2H4", "HCOOH")
E0 = {1: -13.0, 6: -1030.0, 8: -2040.0}
SHIFT = {1: 0.5, 6: -8.0, 8: 12.0}  # eV per atom, from the level `low` to the level `high`

WriteExtxyz = Callable[..., str]


@pytest.fixture(params=["film"])
def potential(request: pytest.FixtureRequest) -> Potential:
    config = ModelConfig(
        elements=(1, 6, 8),
        fidelities=("low", "other"),
        channels=8,
        l_max=1,
        num_radial=4,
        cutoff=3.0,
        conditioning=request.param,
    )
    potential = Potential(config)
    for name in config.fidelities:
        potential.set_reference(name, E0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # an untrained potential predicts the same at every fidelity
        for parameter in potential.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return potential.eval()


@pytest.fixture
def checkpoint(potential: Potential, tmp_path: Path) -> str:
    described = {name: Fidelity(name, "a random network") for name in potential.config.fidelities}
    training = {"seed": 0}
    datasets = [{"name": "none"}]
    folder = tmp_path / "pretrained"
    save_checkpoint(folder, potential, fidelities=described, training_config=training, datasets=datasets, evaluation={})
    return str(folder)


@pytest.fixture
def shifted(potential: Potential) -> list[Structure]:
    """32 structures: `low` labels are the potential's own, `high` ones those plus SHIFT per atom."""
    generator = np.random.default_rng(0)
    structures = []
    for index in range(4):
        for name in NAMES:
            atoms = molecule(name)
            positions = atoms.positions + generator.normal(0, 0.1, atoms.positions.shape)
            numbers = atoms.numbers.astype(np.uint8)
            structures.append(Structure(f"{name}-{index}", name, numbers, positions.astype(np.float32)))
    result = []
    for structure, prediction in zip(structures, predict(potential, structures, "low"), strict=True):
        assert prediction.forces is not None
        forces = prediction.forces.astype(np.float32)
        energy = prediction.energy + sum(SHIFT[int(z)] for z in structure.numbers)
        labels = {"low": Labels(prediction.energy, forces), "high": Labels(energy, forces)}
        result.append(dataclasses.replace(structure, labels=labels))
    return result


@pytest.fixture
def harder(shifted: list[Structure]) -> list[Structure]:
    """The same structures, with a repulsion of every pair of atoms in the energies and forces of `high`."""
    result = []
    for structure in shifted:
        positions = structure.positions.astype(np.float64)
        vectors = positions[:, None] - positions[None]
        pairs = 0.1 * np.exp(-(vectors**2).sum(-1) / 2) * (1 - np.eye(len(positions)))  # eV
        old = structure.labels["high"]
        assert old.energy is not None and old.forces is not None
        forces = old.forces + (pairs[..., None] * vectors).sum(1).astype(np.float32)
        high = Labels(old.energy + 0.5 * float(pairs.sum()), forces)
        result.append(dataclasses.replace(structure, labels=structure.labels | {"high": high}))
    return result


@pytest.fixture
def high(shifted: list[Structure]) -> list[Reaction]:
    """The total energies of `shifted` at `high` as rows."""
    return rows_of(shifted)


def rows_of(structures: Sequence[Structure], fidelity: str = "high") -> list[Reaction]:
    """Return the total energies of structures as rows."""
    return absolute_rows(structures, fidelity)


@pytest.fixture
def write_extxyz(tmp_path: Path) -> WriteExtxyz:
    """Return a function that writes the labels of one fidelity as extxyz and returns the path."""

    def write(structures: Sequence[Structure], name: str, fidelity: str = "high", forces: bool = False) -> str:
        frames = []
        for structure in structures:
            atoms = ase.Atoms(structure.numbers, structure.positions)
            atoms.info = {"REF_energy": structure.labels[fidelity].energy, "group": structure.group}
            if forces:
                atoms.arrays["REF_forces"] = np.asarray(structure.labels[fidelity].forces)
            frames.append(atoms)
        ase.io.write(tmp_path / name, frames, format="extxyz")
        return str(tmp_path / name)

    return write
