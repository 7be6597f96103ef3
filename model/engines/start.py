"""What `rung relax` and `rung md` begin with: options, a structure from a file, a calculator, files to write to."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from ase.io.formats import UnknownFileTypeError, filetype, ioformats

from rung.model.ase_calculator import DTYPES, RungCalculator


def add_structure_arguments(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    """Add checkpoint, structure and what concerns the calculator; `dtype` is the default precision."""
    parser.add_argument("checkpoint", help="checkpoint folder, .tar, or published name")
    parser.add_argument("structure", type=Path, help="any file that ASE reads")
    parser.add_argument("--fidelity", help="level of theory; needed where the checkpoint has several")
    parser.add_argument("--frame", type=int, help="which frame of a file of several: 0 is the first, -1 the last")
    parser.add_argument("--charge", type=int, help="total charge; default: the file's, or 0")
    parser.add_argument("--multiplicity", type=int, help="spin multiplicity, 2S + 1; default: the file's, or 1")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def structure_of(args: argparse.Namespace) -> Atoms:
    """Return the structure that the arguments name, with the charge and multiplicity that they give.

    Raises FileNotFoundError, and ValueError for a file that ASE cannot read or that has several frames where none is
    chosen.
    """
    atoms = read_frame(args.structure, args.frame)
    if len(atoms) == 0:
        raise ValueError(f"{args.structure}: expected at least one atom, found none")
    if args.charge is not None:
        atoms.info["charge"] = args.charge
    if args.multiplicity is not None:
        atoms.info.pop("spin", None)
        atoms.info["multiplicity"] = args.multiplicity
    return atoms


def read_frame(path: Path, frame: int | None) -> Atoms:
    """Return a frame of a file, by its number; None: the only one. Raises as `structure_of` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a structure in a format that ASE reads")
    try:
        frames = read(path, index=":")
    except Exception as error:  # ASE's readers raise anything: KeyError, RuntimeError, XYZError, ...
        reason = str(error).strip() or "unknown format"
        raise ValueError(f"{path}: ASE cannot read it ({type(error).__name__}: {reason})") from error
    if not frames:
        raise ValueError(f"{path}: no frame in the file; expected at least one")
    if frame is None and len(frames) > 1:
        raise ValueError(f"{path}: {len(frames)} frames; choose one with --frame (0 is the first, -1 the last)")
    number = 0 if frame is None else frame
    if not -len(frames) <= number < len(frames):
        raise ValueError(f"--frame {number}: {path} has {len(frames)} frames (0 is the first, -1 the last)")
    atoms = frames[number]
    assert isinstance(atoms, Atoms)
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{path}: positions: expected finite numbers")
    return atoms


def calculator_of(args: argparse.Namespace) -> RungCalculator:
    """Return the calculator that the arguments name; raises ValueError or OSError for one that cannot be had."""
    return RungCalculator(args.checkpoint, args.fidelity, device=args.device, dtype=args.dtype)


def describe(atoms: Atoms, calculator: RungCalculator) -> str:
    """Return one line on what is calculated and by what."""
    what = f"{atoms.get_chemical_formula()}, {len(atoms)} atoms{' in a cell' if atoms.pbc.any() else ''}"
    weight = calculator.potential.embedding.element_SC
    return f"{what}; {calculator.fidelity}, {calculator.dtype} on {weight.device}; {calculator.potential.kernels()}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError for a file that exists, FileNotFoundError for one that has no folder to lie in."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another file, or --overwrite")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; make it first")


def check_writable(path: Path) -> None:
    """Raise ValueError for a file whose name is that of no format which ASE writes."""
    try:
        name = filetype(str(path), read=False)
    except UnknownFileTypeError:
        name = ""
    if name not in ioformats or not ioformats[name].can_write:
        raise ValueError(f"{path}: ASE writes no format with that name; .extxyz, .traj, .cif and .vasp are among those")
