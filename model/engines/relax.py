"""`rung relax`: move atoms (and the cell) to where a checkpoint's forces vanish, by one of ASE's optimizers."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import BFGS, FIRE, LBFGS

from rung.model.engines.progress import INTERRUPTED, Progress, stopping
from rung.model.engines.start import (
    add_structure_arguments,
    calculator_of,
    check_free,
    check_writable,
    describe,
    structure_of,
)
from rung.model.engines.trajectory import TrajectoryWriter, check_trajectory

OPTIMIZERS = {"lbfgs": LBFGS, "fire": FIRE, "bfgs": BFGS}
BAR = 1e5 * units.Pascal  # eV/angstrom^3


@dataclass(frozen=True)
class Relaxation:
    """How a relaxation ended."""

    converged: bool
    interrupted: bool
    steps: int
    energy: float  # eV
    largest_force: float  # eV/angstrom, with a cell that relaxes its generalised forces included


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.01,
    steps: int = 1000,
    optimizer: str = "lbfgs",
    cell: bool = False,
    pressure: float = 0.0,
    trajectory: TrajectoryWriter | None = None,
    progress: Progress | None = None,
) -> Relaxation:
    """Relax the atoms in place until no force is larger than `fmax` in eV/angstrom.

    `pressure` in bar is what the cell relaxes against. SIGINT and SIGTERM end it after a whole step.
    """
    target = FrechetCellFilter(atoms, scalar_pressure=pressure * BAR) if cell else atoms
    dynamics = OPTIMIZERS[optimizer](target, logfile=None)
    converged = interrupted = False
    largest = math.inf

    def text() -> str:
        return f"{atoms.get_potential_energy():.6f} eV, largest force {largest:.4f} eV/angstrom"

    with stopping() as stop_came:
        for converged in dynamics.irun(fmax=fmax, steps=steps):
            largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
            if trajectory is not None:
                trajectory.write(atoms)
            if progress is not None:
                progress.show(dynamics.nsteps, text)
            if not converged and stop_came():
                interrupted = True
                break
    energy = float(atoms.get_potential_energy())
    return Relaxation(bool(converged), interrupted, dynamics.nsteps, energy, largest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung relax` to `parser`."""
    add_structure_arguments(parser, dtype="float64")
    parser.add_argument("--fmax", type=float, default=0.01, help="largest force, eV/angstrom; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="at most so many; default: %(default)s")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="lbfgs", help="default: %(default)s")
    parser.add_argument("--cell", action="store_true", help="relax the cell, too")
    parser.add_argument("--pressure", type=float, help="of a cell that relaxes, bar; default: 0")
    parser.add_argument("--out", type=Path, help="the relaxed structure; default: STRUCTURE-relaxed.extxyz, here")
    parser.add_argument("--trajectory", type=Path, help="file for all steps: .extxyz, .xyz or .traj")


def run(args: argparse.Namespace) -> int:
    """Relax, write, and say how it ended; exit status 0 converged, 1 not converged, 130 interrupted."""
    atoms = structure_of(args)
    out = args.out or Path(f"{args.structure.stem}-relaxed.extxyz")
    _check(args, atoms, out)
    atoms.calc = calculator_of(args)
    print(describe(atoms, atoms.calc), flush=True)
    atoms.get_forces()  # what the potential does not know is named before a file is touched
    progress = Progress(None, every=1)
    options = {"fmax": args.fmax, "steps": args.steps, "optimizer": args.optimizer, "cell": args.cell}
    try:
        if args.trajectory is None:
            result = relax(atoms, **options, pressure=args.pressure or 0.0, progress=progress)
        else:
            with TrajectoryWriter(args.trajectory) as trajectory:
                result = relax(
                    atoms, **options, pressure=args.pressure or 0.0, progress=progress, trajectory=trajectory
                )
    finally:
        progress.close()
    write(out, atoms)
    return _report(args, result, out)


def _check(args: argparse.Namespace, atoms: Atoms, out: Path) -> None:
    if not (math.isfinite(args.fmax) and args.fmax > 0):
        raise ValueError(f"--fmax: expected a positive number of eV/angstrom, found {args.fmax}")
    if args.steps < 1:
        raise ValueError(f"--steps: expected a whole number >= 1, found {args.steps}")
    if args.pressure is not None and not args.cell:
        raise ValueError("--pressure: has no effect on a cell that stays; add --cell")
    if args.pressure is not None and not math.isfinite(args.pressure):
        raise ValueError(f"--pressure: expected a number of bar, found {args.pressure}")
    if args.cell and not atoms.pbc.all():
        raise ValueError(f"--cell: expected a structure periodic in three directions, found pbc {atoms.pbc.tolist()}")
    check_writable(out)
    check_free(out, overwrite=args.overwrite)
    if args.trajectory is not None:
        check_trajectory(args.trajectory)
        check_free(args.trajectory, overwrite=args.overwrite)
        if args.trajectory.absolute() == out.absolute():
            raise ValueError(f"--trajectory: {out} is where the relaxed structure goes; choose another file")


def _report(args: argparse.Namespace, result: Relaxation, out: Path) -> int:
    where = f"{result.energy:.6f} eV, largest force {result.largest_force:.4f} eV/angstrom"
    if result.converged:
        print(f"converged after {result.steps} steps: {where}; {out}")
        return 0
    how = "interrupted" if result.interrupted else "not converged"
    print(
        f"rung relax: {how} after {result.steps} steps: {where}, asked for {args.fmax}; {out} has the structure so "
        "far: go on from it, or allow more --steps",
        file=sys.stderr,
    )
    return INTERRUPTED if result.interrupted else 1
