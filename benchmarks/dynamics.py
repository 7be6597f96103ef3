"""What molecular dynamics with a checkpoint costs and conserves, through ASE, as JSON lines; one thread.

    python benchmarks/dynamics.py [--checkpoint FOLDER] [--fidelity NAME] [--only SECTION ...] [--out FILE]

md_step   per system, precision and skin: a step of velocity Verlet, the potential's evaluation alone (neighbours and
          composition given), the rest relative to the step (`overhead`), the rate at 0.5 fs
batch     many molecules through `RungCalculator.batch` and one at a time
nve_drift total energy over 10 ps at 0.5 fs and 300 K: change from the first tenth to the last, slope, fluctuation, and
          the fluctuation at twice the step over that at the step, over 1 ps (4: an error of second order)

Milliseconds are of the process's own time, which other processes on the host disturb least. Steps with and without
skin alternate, so that both see the same host.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from rung.data.batch import collate
from rung.data.bench import machine
from rung.data.structure import Structure
from rung.model.ase_calculator import DTYPES, RungCalculator
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.direct import DirectPotential, operations_of
from rung.model.engines.md import draw_velocities

Line = dict[str, Any]
TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K
SPACING = 3.107  # angstrom, of a cube that holds a water molecule at 1 g/cm^3
SECTIONS = ("md_step", "batch", "nve_drift")


def hexane() -> Atoms:
    """Return an alkane of 20 atoms, C6H14, stretched out."""
    atoms = Atoms()
    for i in range(6):
        side = (-1) ** i
        hydrogens = [(1.27 * i, 1.07 * side, z) for z in (0.89, -0.89)]
        atoms += Atoms("CH2", [(1.27 * i, 0.44 * side, 0), *hydrogens])
    ends = [(-0.9, -0.19, 0), (6.35 + 0.9, 0.19, 0)]
    return atoms + Atoms("H2", ends)


def water(edge: int) -> Atoms:
    """Return a periodic box of edge^3 water molecules at 1 g/cm^3, turned at random."""
    random = np.random.default_rng(0)
    box = Atoms(cell=[SPACING * edge] * 3, pbc=True)
    for place in np.ndindex(edge, edge, edge):
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3), center="COM")
        one.positions += (np.array(place) + 0.5) * SPACING - one.get_center_of_mass()
        box += one
    return box


SYSTEMS: dict[str, tuple[Callable[[], Atoms], int]] = {  # name -> (structure, steps in a turn)
    "molecule": (hexane, 100),
    "box": (lambda: water(4), 20),
    "large_box": (lambda: water(9), 10),
}


def settled(atoms: Atoms, checkpoint: Checkpoint, fidelity: str, steps: int) -> Atoms:
    """Return the atoms after some steps downhill, moving at 300 K."""
    atoms.calc = RungCalculator(checkpoint, fidelity)
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=steps)
    draw_velocities(atoms, TEMPERATURE, seed=0)
    return atoms


def evaluation(calculator: RungCalculator, atoms: Atoms) -> Callable[[], object]:
    """Return the evaluation of the potential alone: the batch and what depends on the atoms alone are there."""
    config, weight = calculator.potential.config, calculator.potential.embedding.element_SC
    structure = Structure("", "", atoms.numbers.astype(np.uint8), atoms.positions, atoms.cell.array, atoms.pbc)
    index = {name: row for row, name in enumerate(config.fidelities)}
    batch = collate([structure], fidelities=[calculator.fidelity], fidelity_index=index, cutoff=config.cutoff)
    batch = batch.to(weight.device, weight.dtype)
    operations = operations_of(calculator.potential)
    if operations is None:
        raise ValueError("the potential runs on the PyTorch reference here, which is not what is to be measured")
    direct = DirectPotential(calculator.potential, operations)
    composition = direct.composition(batch)

    def evaluate() -> None:
        with torch.inference_mode():
            direct(batch, composition, stress=bool(atoms.pbc.all()))

    return evaluate


def milliseconds(function: Callable[[], object], count: int) -> float:
    """Return the process's time of one call, mean over `count` calls."""
    begin = time.process_time()
    for _ in range(count):
        function()
    return 1e3 * (time.process_time() - begin) / count


def measure_step(checkpoint: Checkpoint, fidelity: str, name: str, dtype: str, turns: int) -> Iterator[Line]:
    """Yield a line without skin and one with the calculator's choice."""
    make, count = SYSTEMS[name]
    start = settled(make(), checkpoint, fidelity, steps=40)
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for label, skin in (("none", 0.0), ("chosen", None)):
        atoms = start.copy()
        atoms.calc = RungCalculator(checkpoint, fidelity, dtype=dtype, skin=skin)  # type: ignore[arg-type]
        dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
        dynamics.run(3)
        runs[label] = (lambda dynamics=dynamics: dynamics.run(1), evaluation(atoms.calc, atoms))
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
    for _ in range(turns):
        for label, (step, alone) in runs.items():
            found[label].append((milliseconds(step, count), milliseconds(alone, count)))
    for label, pairs in found.items():
        step_ms, alone_ms = (mean(pair[i] for pair in pairs) for i in (0, 1))
        yield {
            "name": "md_step",
            "system": name,
            "atoms": len(start),
            "dtype": dtype,
            "skin": label,
            "step_ms": round(step_ms, 3),
            "potential_ms": round(alone_ms, 3),
            "overhead": round(1 - alone_ms / step_ms, 3),
            "ns_per_day": round(86400 / (step_ms * 1e-3) * TIMESTEP * 1e-6, 2),
        }


def measure_batch(checkpoint: Checkpoint, fidelity: str, dtype: str, count: int = 400) -> Line:
    """Return the line of molecules of 20 atoms together and one at a time."""
    random = np.random.default_rng(0)
    structures = []
    for _ in range(count):
        atoms = hexane()
        atoms.rattle(0.05, rng=random)
        structures.append(atoms)
    calculator = RungCalculator(checkpoint, fidelity, dtype=dtype)  # type: ignore[arg-type]
    calculator.batch(structures[:10])
    together = milliseconds(lambda: calculator.batch(structures), 2) / count
    alone = milliseconds(lambda: [calculator.get_property("forces", atoms) for atoms in structures], 2) / count
    return {
        "name": "batch",
        "atoms": len(structures[0]),
        "structures": count,
        "dtype": dtype,
        "together_ms": round(together, 3),
        "one_by_one_ms": round(alone, 3),
        "ratio": round(alone / together, 2),
    }


def total_energies(start: Atoms, timestep: float, picoseconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the total energies in meV/atom, one every 5 fs."""
    atoms = start.copy()
    atoms.calc = start.calc
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    stride, steps = round(5 / timestep), round(1000 * picoseconds / timestep)
    found = [atoms.get_total_energy() for _ in dynamics.irun(steps=steps) if dynamics.nsteps % stride == 0]
    return 1e3 * np.array(found) / len(atoms)


def measure_drift(checkpoint: Checkpoint, fidelity: str, name: str, dtype: str, picoseconds: float) -> Line:
    """Return the line of a molecule (ethanol) or a periodic box (8 water molecules)."""
    atoms = settled(molecule("CH3CH2OH") if name == "molecule" else water(2), checkpoint, fidelity, steps=200)
    atoms.calc = RungCalculator(checkpoint, fidelity, dtype=dtype)  # type: ignore[arg-type]
    energies = total_energies(atoms, TIMESTEP, picoseconds)
    tenth = len(energies) // 10
    slope = np.polyfit(np.linspace(0, 1, len(energies)), energies, 1)[0]
    coarse, fine = (total_energies(atoms, step, picoseconds / 10).std() for step in (TIMESTEP, TIMESTEP / 2))
    return {
        "name": "nve_drift",
        "system": name,
        "atoms": len(atoms),
        "dtype": dtype,
        "picoseconds": picoseconds,
        "timestep_fs": TIMESTEP,
        "change_mev_per_atom": float(f"{energies[-tenth:].mean() - energies[:tenth].mean():.3g}"),
        "slope_mev_per_atom": float(f"{slope:.3g}"),  # times the run's length
        "fluctuation_mev_per_atom": float(f"{energies.std():.3g}"),
        "ratio_of_fluctuations": round(coarse / fine, 2),
    }


def measure(args: argparse.Namespace) -> Iterator[Line]:
    """Yield the lines of the sections asked for."""
    checkpoint = load_checkpoint(args.checkpoint)
    dtypes = sorted(DTYPES)
    if "md_step" in args.only:
        for name in SYSTEMS:
            for dtype in dtypes:
                yield from measure_step(checkpoint, args.fidelity, name, dtype, args.turns)
    if "batch" in args.only:
        yield from (measure_batch(checkpoint, args.fidelity, dtype) for dtype in dtypes)
    if "nve_drift" in args.only:
        for name in ("molecule", "box"):
            for dtype in dtypes:
                yield measure_drift(checkpoint, args.fidelity, name, dtype, args.picoseconds)


def main() -> None:
    """Print the lines, and add them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/pretrain/checkpoint", help="default: %(default)s")
    parser.add_argument("--fidelity", default="gfn2_xtb", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--turns", type=int, default=5, help="how often each step is measured; default: %(default)s")
    parser.add_argument("--picoseconds", type=float, default=10.0, help="of nve_drift; default: %(default)s")
    parser.add_argument("--out", type=Path, help="file to add the lines to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python benchmarks/dynamics.py", *sys.argv[1:]])
    first = machine() | {"command": command, "load_average": round(os.getloadavg()[0], 2)}
    for line in itertools.chain([first], measure(args)):
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
