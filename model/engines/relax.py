"""`rung relax`: move atoms (and the cell) to where a checkpoint's forces vanish, by one of ASE's optimizers."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from rung.model.engines.trajectory import TrajectoryWriter, check_trajectory, note_uncertainty

OPTIMIZERS = {"lbfgs": LBFGS, "fire": FIRE, "bfgs": BFGS}
BAR = 1e5 * units.Pascal  # eV/angstrom^3
SMAX = 100.0  # bar; CP2K's PRESSURE_TOLERANCE


@dataclass(frozen=True)
class Relaxation:
    """How a relaxation ended."""

    converged: bool
    interrupted: bool
    steps: int
    energy: float  # eV
    largest_force: float  # eV/angstrom
    largest_stress: float | None  # bar, of a cell that relaxes: the largest component less the pressure asked for

    def __str__(self) -> str:
        stress = "" if self.largest_stress is None else f", stress off by {self.largest_stress:.3g} bar"
        return f"{self.energy:.6f} eV, largest force {self.largest_force:.4f} eV/angstrom{stress}"


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.01,
    smax: float = SMAX,
    steps: int = 1000,
    optimizer: str = "lbfgs",
    cell: bool = False,
    pressure: float = 0.0,
    trajectory: TrajectoryWriter | None = None,
    progress: Progress | None = None,
) -> Relaxation:
    """Relax the atoms in place until no force is larger than `fmax` in eV/angstrom.

    `pressure` in bar is what a cell relaxes against, until no component of its stress is off by more than `smax` in
    bar. SIGINT and SIGTERM end it after a whole step; whatever else ends it, the atoms are left where their forces were
    last calculated.
    """
    target = FrechetCellFilter(atoms, scalar_pressure=pressure * BAR) if cell else atoms
    dynamics = OPTIMIZERS[optimizer](target, logfile=None)
    state = Relaxation(False, False, 0, math.nan, math.inf, math.inf if cell else None)
    positions, lattice = atoms.positions.copy(), atoms.cell.array.copy()
    try:
        with stopping() as stop_came, warnings.catch_warnings():
            # SciPy says so of errors of 10^-13 in the strain, whose use is to choose the next step.
            warnings.filterwarnings("ignore", message="logm result may be inaccurate", category=RuntimeWarning)
            for _ in dynamics.irun(fmax=0.0, steps=steps):  # ASE divides the stress by the number of atoms
                state = _state(atoms, dynamics.nsteps, fmax, smax, pressure if cell else None)
                positions, lattice = atoms.positions.copy(), atoms.cell.array.copy()
                if trajectory is not None:
                    trajectory.write(atoms)
                if progress is not None:
                    progress.show(dynamics.nsteps, state.__str__)
                if state.converged:
                    break
                if stop_came():
                    state = replace(state, interrupted=True)
                    break
    except BaseException:
        atoms.set_cell(lattice, apply_constraint=False)
        atoms.set_positions(positions, apply_constraint=False)
        raise
    return state


def _state(atoms: Atoms, steps: int, fmax: float, smax: float, pressure: float | None) -> Relaxation:
    force = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
    stress, converged = None, force < fmax
    if pressure is not None:
        stress = float(np.abs(atoms.get_stress(voigt=False) / BAR + pressure * np.eye(3)).max())
        converged = converged and stress < smax
    return Relaxation(converged, False, steps, float(atoms.get_potential_energy()), force, stress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung relax` to `parser`."""
    add_structure_arguments(parser, dtype="float64")
    parser.add_argument("--fmax", type=float, default=0.01, help="largest force, eV/angstrom; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="at most so many; default: %(default)s")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="lbfgs", help="default: %(default)s")
    parser.add_argument("--cell", action="store_true", help="relax the cell, too")
    parser.add_argument("--pressure", type=float, help="of a cell that relaxes, bar; default: 0")
    parser.add_argument("--smax", type=float, help=f"largest error of such a cell's stress, bar; default: {SMAX:g}")
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
    options |= {"smax": args.smax or SMAX, "pressure": args.pressure or 0.0}
    try:
        with ExitStack() as stack:
            trajectory = stack.enter_context(TrajectoryWriter(args.trajectory)) if args.trajectory else None
            result = relax(atoms, **options, progress=progress, trajectory=trajectory)
    except BaseException as error:  # a second Ctrl-C, too
        write(out, atoms)
        where = f"{out} has the structure so far"
        if isinstance(error, ValueError):  # the calculator's
            raise ValueError(f"{error}; {where}") from error
        print(f"rung relax: {where}", file=sys.stderr)
        raise
    finally:
        progress.close()
    note_uncertainty(atoms)
    write(out, atoms)
    return _report(args, result, out)


def _check(args: argparse.Namespace, atoms: Atoms, out: Path) -> None:
    if not (math.isfinite(args.fmax) and args.fmax > 0):
        raise ValueError(f"--fmax: expected a positive number of eV/angstrom, found {args.fmax}")
    if args.steps < 1:
        raise ValueError(f"--steps: expected a whole number >= 1, found {args.steps}")
    for name in ("pressure", "smax"):
        if getattr(args, name) is not None and not args.cell:
            raise ValueError(f"--{name}: has no effect on a cell that stays; add --cell")
    if args.smax is not None and not (math.isfinite(args.smax) and args.smax > 0):
        raise ValueError(f"--smax: expected a positive number of bar, found {args.smax}")
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
    if result.converged:
        print(f"converged after {result.steps} steps: {result}; {out}")
        return 0
    how = "interrupted" if result.interrupted else "not converged"
    asked = f"{args.fmax} eV/angstrom" + (f" and {args.smax or SMAX:g} bar" if args.cell else "")
    print(
        f"rung relax: {how} after {result.steps} steps: {result}, asked for {asked}; {out} has the structure so far: "
        "go on from it, or allow more --steps",
        file=sys.stderr,
    )
    return INTERRUPTED if result.interrupted else 1
