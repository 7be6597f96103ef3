"""Structures of one molecule: ETKDG conformers, relaxed by GFN2-xTB, then shaken by dynamics and by normal modes.

Everything is a pure function of (SMILES, number of structures): each conformer, trajectory and displacement draws from
its own seed, so a second run gives the same list. Geometries that reacted or fell apart are dropped and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPERATURES = (300.0, 500.0, 750.0, 1000.0)  # K
MAX_CONFORMERS = 3
DYNAMICS_FRACTION = 0.4  # of the structures; the rest are normal-mode displacements
TIME_STEP = 0.5  # fs; resolves X-H vibrations at 1000 K
SAMPLING_STEPS = 40  # time steps between two kept frames: 20 fs, two periods of an X-H stretch
EQUILIBRATION_STEPS = 100
FRICTION = 0.02  # 1/fs
RELAXED_FORCE = 0.02  # eV/angstrom
LOWEST_WAVENUMBER = 150.0  # 1/cm; softer modes are displaced as if this stiff, where the harmonic picture ends
# A geometry keeps its bonds when bonded pairs are closer, other pairs farther than these multiples of the sum of
# covalent radii (Cordero 2008, as in ASE).
BONDED_BELOW, NONBONDED_ABOVE = 1.5, 1.15

SAMPLING_SETTINGS = {
    "temperatures": list(TEMPERATURES),
    "max_conformers": MAX_CONFORMERS,
    "dynamics_fraction": DYNAMICS_FRACTION,
    "time_step": TIME_STEP,
    "sampling_steps": SAMPLING_STEPS,
    "equilibration_steps": EQUILIBRATION_STEPS,
    "friction": FRICTION,
    "relaxed_force": RELAXED_FORCE,
    "lowest_wavenumber": LOWEST_WAVENUMBER,
    "bonded_below": BONDED_BELOW,
    "nonbonded_above": NONBONDED_ABOVE,
}


@dataclass(frozen=True)
class Sample:
    """One unlabelled structure. `key` names its molecule, its origin and its index."""

    key: str
    smiles: str
    numbers: NDArray[np.uint8]  # [n]
    positions: NDArray[np.float32]  # [n, 3], angstrom


@dataclass(frozen=True)
class Sampled:
    """The structures of one molecule and why others were dropped."""

    samples: list[Sample]
    dropped: dict[str, int]  # reason -> count


def seed_of(*parts: object) -> int:
    """A 31-bit seed that depends only on `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def sample_molecule(smiles: str, count: int, seed: int) -> Sampled:
    """`count` structures of the molecule (fewer when some react): relaxed conformers, dynamics, normal modes."""
    atoms_list, bonds, dropped = _relaxed_conformers(smiles, seed)
    if not atoms_list:
        return Sampled([], dict(dropped))
    numbers = np.asarray(atoms_list[0].numbers, np.uint8)
    geometries = {f"minimum/{index}": atoms.positions for index, atoms in enumerate(atoms_list)}
    num_dynamics = round(DYNAMICS_FRACTION * count)
    geometries |= _dynamics(smiles, atoms_list, num_dynamics, seed, dropped)
    geometries |= _normal_modes(smiles, atoms_list, count - len(geometries), seed)
    samples = []
    for name, positions in geometries.items():
        rounded = np.asarray(positions - positions.mean(0), np.float32)  # labels belong to what is stored
        if keeps_bonds(numbers, rounded, bonds):
            samples.append(Sample(f"{smiles}:{name}", smiles, numbers, rounded))
        else:
            dropped[f"{name.split('/')[0]}: bonds broken or formed"] += 1
    return Sampled(samples[:count], dict(dropped))


def keeps_bonds(numbers: NDArray[np.uint8], positions: NDArray[np.floating[Any]], bonds: set[tuple[int, int]]) -> bool:
    """Whether the geometry still has exactly `bonds` (pairs i < j); `positions` [n, 3] in angstrom."""
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    for j in range(len(numbers)):
        for i in range(j):
            ratio = float(np.linalg.norm(positions[i] - positions[j]) / (radii[i] + radii[j]))
            if (i, j) in bonds and ratio > BONDED_BELOW or (i, j) not in bonds and ratio < NONBONDED_ABOVE:
                return False
    return True


def _relaxed_conformers(smiles: str, seed: int) -> tuple[list[Any], set[tuple[int, int]], Counter[str]]:
    """Distinct GFN2 minima with the molecule's own bonds, as ASE Atoms with a calculator."""
    from ase import Atoms
    from ase.calculators.calculator import CalculationFailed
    from ase.optimize import BFGS
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    bonds = {(min(pair), max(pair)) for pair in ends}
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    identifiers = rdDistGeom.EmbedMultipleConfs(molecule, MAX_CONFORMERS, randomSeed=seed_of(seed, smiles, "etkdg"))
    dropped: Counter[str] = Counter()
    if not identifiers:
        dropped["conformer: ETKDG cannot embed the molecule"] += 1
    kept: list[Any] = []
    for identifier in identifiers:
        atoms: Any = Atoms(numbers, molecule.GetConformer(identifier).GetPositions(), calculator=_gfn2())
        optimizer: Any = BFGS(atoms, logfile=None, maxstep=0.1)
        try:
            converged = optimizer.run(fmax=RELAXED_FORCE, steps=500)
        except CalculationFailed:
            converged = False
        if not converged:
            dropped["conformer: relaxation did not converge"] += 1
        elif not keeps_bonds(atoms.numbers, atoms.positions, bonds):
            dropped["conformer: bonds broken or formed"] += 1
        elif all(abs(atoms.get_potential_energy() - other.get_potential_energy()) > 1e-3 for other in kept):
            kept.append(atoms)
    return kept, bonds, dropped


def _gfn2() -> Any:
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


def _dynamics(
    smiles: str, minima: list[Any], count: int, seed: int, dropped: Counter[str]
) -> dict[str, NDArray[np.float64]]:
    """`count` frames of GFN2 Langevin trajectories, one per temperature, started from the minima in turn."""
    from ase import units
    from ase.calculators.calculator import CalculationFailed
    from ase.md.langevin import Langevin

    frames: dict[str, NDArray[np.float64]] = {}
    for run, temperature in enumerate(TEMPERATURES):
        num_frames = len(range(run, count, len(TEMPERATURES)))
        if not num_frames:
            continue
        atoms = minima[run % len(minima)].copy()
        atoms.calc = _gfn2()
        random = np.random.RandomState(seed_of(seed, smiles, "dynamics", temperature))
        spread = np.sqrt(atoms.get_masses() * units.kB * temperature)[:, None]
        atoms.set_momenta(random.standard_normal((len(atoms), 3)) * spread)
        dynamics: Any = Langevin(
            atoms,
            TIME_STEP * units.fs,
            temperature_K=temperature,
            friction=FRICTION / units.fs,
            rng=random,
            fixcm=False,  # the centre of mass may drift: frames are centred
        )
        try:
            dynamics.run(EQUILIBRATION_STEPS)
            for index in range(num_frames):
                dynamics.run(SAMPLING_STEPS)
                frames[f"dynamics/{temperature:g}K/{index}"] = atoms.positions.copy()
        except CalculationFailed:
            dropped["dynamics: trajectory ended by GFN2-xTB not converging"] += 1
    return frames


def _normal_modes(smiles: str, minima: list[Any], count: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """`count` displacements from the thermal (quantum harmonic) distribution of the minima's normal modes.

    A mode of angular frequency w has the variance hbar / (2 w) coth(hbar w / 2 k T) in its mass-weighted coordinate.
    """
    from ase import units

    hbar = units._hbar * units.J * units.second
    lowest = LOWEST_WAVENUMBER * units.invcm / hbar
    displaced: dict[str, NDArray[np.float64]] = {}
    for conformer, atoms in enumerate(minima):
        squares, modes = np.linalg.eigh(_mass_weighted_hessian(atoms))
        num_rigid = 5 if _is_linear(atoms.positions) else 6
        internal = np.argsort(np.abs(squares))[num_rigid:]
        frequencies = np.sqrt(np.maximum(squares[internal], lowest**2))
        root_masses = np.sqrt(np.repeat(atoms.get_masses(), 3))
        for index in range(conformer, count, len(minima)):
            random = np.random.default_rng(seed_of(seed, smiles, "normal mode", index))
            temperature = random.uniform(TEMPERATURES[0], TEMPERATURES[-1])
            half_ratio = hbar * frequencies / (2 * units.kB * temperature)
            widths = np.sqrt(hbar / (2 * frequencies) / np.tanh(half_ratio))
            amplitudes = random.normal(size=len(frequencies)) * widths
            shift = (modes[:, internal] @ amplitudes) / root_masses
            displaced[f"normal_mode/{index}"] = atoms.positions + shift.reshape(-1, 3)
    return displaced


def _mass_weighted_hessian(atoms: Any, step: float = 0.01) -> NDArray[np.float64]:
    """[3n, 3n] in eV/angstrom^2/amu, by central differences (`step` in angstrom) of GFN2 forces."""
    reference = atoms.positions.copy()
    hessian = np.zeros((reference.size, reference.size))
    for row in range(reference.size):
        for sign in (1, -1):
            atoms.positions = reference
            atoms.positions[row // 3, row % 3] += sign * step
            hessian[row] -= sign * atoms.get_forces().ravel() / (2 * step)
    atoms.positions = reference
    root_masses = np.sqrt(np.repeat(atoms.get_masses(), 3))
    weighted = (hessian + hessian.T) / 2 / np.outer(root_masses, root_masses)
    return np.asarray(weighted)


def _is_linear(positions: NDArray[np.float64]) -> bool:
    return int((np.linalg.svd(positions - positions.mean(0), compute_uv=False) > 0.05).sum()) < 2
