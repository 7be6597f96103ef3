"""`rung md`: molecular dynamics with a checkpoint, by ASE's integrators; what was started can be continued."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKBarostat, IsotropicMTKNPT, NoseHooverChainThermostat
from ase.md.verlet import VelocityVerlet

from rung.model.engines.freedom import Freedom, resting
from rung.model.engines.progress import INTERRUPTED, Progress, stopping
from rung.model.engines.restart import FIDELITY, STEP, TIME, WEIGHTS, continue_from, digest_of, frame_to_continue
from rung.model.engines.start import add_structure_arguments, calculator_of, check_free, describe, structure_of
from rung.model.engines.trajectory import TrajectoryWriter, check_trajectory

BAR = 1e5 * units.Pascal  # eV/angstrom^3
ENSEMBLES = ("nve", "nvt", "npt")
THERMOSTATS = ("langevin", "bussi")
MOVING = 1e-6  # of the kinetic energy: more than rounding


@dataclass(frozen=True)
class Dynamics:
    """What is integrated, and how."""

    ensemble: str = "nve"
    timestep: float = 0.5  # fs
    temperature: float = 300.0  # K
    thermostat: str = "langevin"  # of nvt
    friction: float = 10.0  # 1/ps, of langevin
    tau: float = 100.0  # fs, of bussi and of npt's thermostat
    pressure: float = 1.01325  # bar, of npt
    barostat_tau: float = 1000.0  # fs, of npt
    seed: int = 0

    @property
    def moves_whole(self) -> bool:
        """Whether the motion of the structure as a whole has its share of the kinetic energy: Langevin's noise does it.

        All else keeps it as it is, or scales it with the rest.
        """
        return self.ensemble == "nvt" and self.thermostat == "langevin"

    def freedom(self, atoms: Atoms) -> Freedom:
        """Return the degrees of freedom that the temperature is of."""
        return Freedom.of(atoms, whole=self.moves_whole)

    def of(self, atoms: Atoms, start: int = 0) -> MolecularDynamics:
        """Return ASE's integrator at step `start`, whose random numbers are the seed's and that step's.

        Bussi's thermostat and NPT expect a structure that rests as a whole. NPT is Martyna, Tobias and Klein's, of the
        volume alone. Raises ValueError for what the integrator cannot do.
        """
        step = self.timestep * units.fs
        random = np.random.default_rng([self.seed, start])
        dynamics: MolecularDynamics
        if self.ensemble == "nve":
            dynamics = VelocityVerlet(atoms, step)
        elif self.ensemble == "npt":
            dynamics = self._npt(atoms, step)
        elif self.thermostat == "bussi":
            dynamics = Bussi(atoms, step, temperature_K=self.temperature, taut=self.tau * units.fs, rng=random)
            dynamics.ndof = self.freedom(atoms).count
            dynamics.target_kinetic_energy = dynamics.ndof * units.kB * self.temperature / 2
        else:
            friction = self.friction / (1000 * units.fs)
            dynamics = Langevin(atoms, step, temperature_K=self.temperature, friction=friction, fixcm=False, rng=random)
        dynamics.nsteps = start
        return dynamics

    def _npt(self, atoms: Atoms, step: float) -> MolecularDynamics:
        if not atoms.pbc.all():
            raise ValueError(f"npt: expected a structure periodic in three directions, found pbc {atoms.pbc.tolist()}")
        if atoms.constraints:
            raise ValueError("npt: expected a structure without constraints, found some; take nvt, or remove them")
        temperature, tdamp, pdamp = self.temperature, self.tau * units.fs, self.barostat_tau * units.fs
        pressure = self.pressure * BAR
        dynamics = IsotropicMTKNPT(
            atoms, step, temperature_K=temperature, pressure_au=pressure, tdamp=tdamp, pdamp=pdamp
        )
        # ASE takes 3 n degrees of freedom; at rest as a whole, n atoms have those of n - 1.
        num = dynamics._num_atoms_global = self.freedom(atoms).count // 3
        dynamics._thermostat = NoseHooverChainThermostat(num, dynamics.masses, temperature, tdamp)
        dynamics._barostat = IsotropicMTKBarostat(num, temperature, pdamp)
        return dynamics


def draw_velocities(atoms: Atoms, temperature: float, seed: int, *, whole: bool = False) -> None:
    """Give the atoms Maxwell-Boltzmann velocities at a temperature in K, scaled to it exactly.

    Unless `whole`, the centre of mass rests and a molecule does not rotate as a whole, and the temperature is that of
    the other degrees of freedom (see rung.model.engines.freedom).
    """
    width = np.sqrt(temperature * units.kB * atoms.get_masses())[:, None]
    atoms.set_momenta(width * np.random.default_rng(seed).standard_normal((len(atoms), 3)))
    freedom = Freedom.of(atoms, whole=whole)
    if freedom.whole:
        atoms.set_momenta(resting(atoms))
    if (found := freedom.temperature(atoms)) > 0:
        atoms.set_momenta(atoms.get_momenta() * math.sqrt(temperature / found))


@dataclass(frozen=True)
class Outcome:
    """How far a run came."""

    step: int
    interrupted: bool
    energy_change: float  # eV, of the total energy


def simulate(
    dynamics: MolecularDynamics,
    steps: int,
    trajectory: TrajectoryWriter,
    *,
    interval: int,
    freedom: Freedom,
    progress: Progress,
) -> Outcome:
    """Integrate until step `steps`, writing the first frame (of a new run), every `interval`-th and the last.

    `freedom` is what the temperatures shown are of. SIGINT and SIGTERM end it after a whole step.
    """
    atoms, start = dynamics.atoms, dynamics.nsteps
    fidelity = atoms.calc.fidelity
    begin = atoms.get_total_energy()
    clock = time.perf_counter()

    def text() -> str:
        femtoseconds = step * dynamics.dt / units.fs
        rate = (step - start) * dynamics.dt / units.fs * 1e-6 / (time.perf_counter() - clock) * 86400
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        return (
            f"{femtoseconds / 1000:.4f} ps, {freedom.temperature(atoms):.0f} K, potential {potential:.4f} eV, "
            f"total {potential + kinetic:.4f} eV, {rate:.3g} ns/day"
        )

    with stopping() as stop_came:
        for _ in dynamics.irun(steps=steps - start):
            step = dynamics.nsteps
            stop = stop_came()
            if (step % interval == 0 or step == steps or stop) and (step > start or start == 0):
                atoms.info |= {STEP: step, TIME: round(step * dynamics.dt / units.fs, 6), FIDELITY: fidelity}
                trajectory.write(atoms)
            progress.show(step, text)
            if stop and step < steps:
                break
    return Outcome(step, step < steps, atoms.get_total_energy() - begin)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung md` to `parser`."""
    own = Dynamics()
    add_structure_arguments(parser, dtype="float32")
    parser.add_argument("--ensemble", choices=ENSEMBLES, required=True)
    parser.add_argument("--steps", type=int, required=True, help="in all, those before a restart included")
    parser.add_argument("--timestep", type=float, default=own.timestep, help="fs; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=own.temperature, help="K; default: %(default)s")
    parser.add_argument("--thermostat", choices=THERMOSTATS, help=f"of nvt; default: {own.thermostat}")
    parser.add_argument("--friction", type=float, help=f"of langevin, 1/ps; default: {own.friction:g}")
    parser.add_argument("--tau", type=float, help=f"of bussi and npt's thermostat, fs; default: {own.tau:g}")
    parser.add_argument("--pressure", type=float, help=f"of npt, bar; default: {own.pressure}")
    parser.add_argument("--barostat-tau", type=float, help=f"of npt, fs; default: {own.barostat_tau:g}")
    parser.add_argument("--seed", type=int, default=0, help="of velocities and thermostat; default: %(default)s")
    parser.add_argument("--new-velocities", action="store_true", help="draw them even if the file has some")
    parser.add_argument("--interval", type=int, default=50, help="steps between two frames; default: %(default)s")
    parser.add_argument("--out", type=Path, help=".extxyz, .xyz or .traj; default: STRUCTURE-md.extxyz, here")
    parser.add_argument("--restart", action="store_true", help="continue --out from its last frame to --steps")


def run(args: argparse.Namespace) -> int:
    """Integrate and write; exit status 0, or 130 when it was interrupted."""
    settings = _settings(args)
    out = args.out or Path(f"{args.structure.stem}-md.extxyz")
    check_trajectory(out)
    atoms = structure_of(args)
    if args.restart:
        frame = frame_to_continue(atoms, out, settings.timestep)
        start = int(frame.info[STEP])
    else:
        check_free(out, overwrite=args.overwrite)
        frame, start = None, 0
    atoms.calc = calculator_of(args)
    atoms.info |= {FIDELITY: atoms.calc.fidelity, WEIGHTS: digest_of(atoms.calc.potential)}
    if frame is not None:
        continue_from(frame, atoms, out)
    if start >= args.steps:
        print(f"{out} is at step {start} already; raise --steps to go on")
        return 0
    print(describe(atoms, atoms.calc))
    if start == 0:
        print(_begin(atoms, settings, new=args.new_velocities))
    _rest(atoms, settings)
    freedom = settings.freedom(atoms)
    print(f"temperatures: of {freedom}")
    atoms.get_forces()  # what the potential does not know is named before a file is touched
    dynamics = settings.of(atoms, start)
    progress = Progress(args.steps, start)
    with TrajectoryWriter(out, append=start > 0) as trajectory:
        try:
            options = {"interval": args.interval, "freedom": freedom, "progress": progress}
            outcome = simulate(dynamics, args.steps, trajectory, **options)
        except ValueError as error:  # the calculator's
            kept = f"{out} has the {trajectory.num_frames} frames before it; try a smaller --timestep"
            raise ValueError(f"after step {dynamics.nsteps}: {error}; {kept}") from error
        finally:
            progress.close()
    return _report(outcome, settings, len(atoms), trajectory)


def _settings(args: argparse.Namespace) -> Dynamics:
    """Return what the arguments say; raises ValueError for a number that makes no sense or an option without effect."""
    for name in ("timestep", "temperature", "friction", "tau", "barostat_tau"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, found {value}")
    for name in ("steps", "interval"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected a whole number >= 1, found {getattr(args, name)}")
    for name in ("new_velocities", "overwrite"):
        if args.restart and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: --restart keeps what is there; leave out one of the two")
    if args.seed < 0:
        raise ValueError(f"--seed: expected a whole number >= 0, found {args.seed}")
    if args.pressure is not None and not math.isfinite(args.pressure):
        raise ValueError(f"--pressure: expected a number of bar, found {args.pressure}")
    nvt, npt = args.ensemble == "nvt", args.ensemble == "npt"
    bussi = nvt and args.thermostat == "bussi"
    effects = {"thermostat": nvt, "friction": nvt and not bussi, "tau": bussi or npt, "pressure": npt}
    chosen = {}
    for name, has_effect in (effects | {"barostat_tau": npt}).items():
        if (value := getattr(args, name)) is None:
            continue
        if not has_effect:
            kind = f"{args.ensemble} with {args.thermostat or THERMOSTATS[0]}" if nvt else args.ensemble
            raise ValueError(f"--{name.replace('_', '-')}: has no effect in {kind}; leave it out")
        chosen[name] = value
    own = Dynamics(args.ensemble, args.timestep, args.temperature, seed=args.seed)
    return replace(own, **chosen)


def _begin(atoms: Atoms, settings: Dynamics, *, new: bool) -> str:
    """Give the atoms velocities unless they have some, and return a line that says which."""
    if atoms.has("momenta") and np.any(atoms.get_momenta()) and not new:
        temperature = settings.freedom(atoms).temperature(atoms)
        return f"velocities: the file's, {temperature:.0f} K; --new-velocities draws others"
    draw_velocities(atoms, settings.temperature, settings.seed, whole=settings.moves_whole)
    return f"velocities: drawn at {settings.temperature:g} K with seed {settings.seed}"


def _rest(atoms: Atoms, settings: Dynamics) -> None:
    """Take away the motion as a whole that an integrator would scale with the rest instead of leaving it alone."""
    if settings.ensemble == "nve" or not settings.freedom(atoms).whole:
        return
    before, momenta = atoms.get_kinetic_energy(), resting(atoms)
    whole = before - float((momenta**2 / (2 * atoms.get_masses()[:, None])).sum())
    if whole > MOVING * before:
        atoms.set_momenta(momenta)
        print(f"velocities: the structure moved as a whole ({whole:.3g} eV); in {settings.ensemble} it is put at rest")


def _report(outcome: Outcome, settings: Dynamics, num_atoms: int, trajectory: TrajectoryWriter) -> int:
    picoseconds = outcome.step * settings.timestep / 1000
    done = f"step {outcome.step}, {picoseconds:g} ps; {trajectory.num_frames} frames written to {trajectory.path}"
    if settings.ensemble == "nve":
        done += f"; total energy changed by {1e3 * outcome.energy_change / num_atoms:.3g} meV/atom"
    if outcome.interrupted:
        print(f"rung md: interrupted at {done}; the same command with --restart goes on", file=sys.stderr)
        return INTERRUPTED
    print(done)
    return 0
