"""`rung lammps`: run a LAMMPS input script with a checkpoint as its potential.

The script is one of LAMMPS's own, with the line `fix ID all external pf/callback 1 1` after the atoms and masses and
before the first run or minimisation, and no pair_style (or one whose forces shall be added). The lines up to that one
are run first, then the checkpoint is attached, then the rest: `jump SELF` finds labels of the part it is in.
On several ranks: `mpiexec -n 2 rung lammps ...`, with the mpiexec of LAMMPS's MPI.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rung.model.ase_calculator import DTYPES
from rung.model.checkpoint import load_checkpoint
from rung.model.engines.lammps import FIX, Attached, OtherRankFailed, attach, import_lammps

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung lammps`."""
    parser.add_argument("script", type=Path, help=f"LAMMPS input script with the line '{FIX}'")
    parser.add_argument("--potential", required=True, help="checkpoint folder or .tar")
    parser.add_argument("--fidelity", help="level of theory; may be left out where the checkpoint has one")
    parser.add_argument("--elements", help="symbols of the atom types 1, 2, ...: C,H,O (default: by the types' masses)")
    parser.add_argument("--any-masses", action="store_true", help="do not compare the types' masses with the elements'")
    parser.add_argument("--charge", type=int, default=0, help="of the whole box (default: %(default)s)")
    parser.add_argument("--multiplicity", type=int, default=1, help="2S + 1 (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--log", default="log.lammps", help="LAMMPS's log file, or none (default: %(default)s)")
    parser.add_argument("--screen", help="file for what LAMMPS prints, or none (default: standard output)")
    parser.add_argument(
        "--var", action="append", default=[], metavar="NAME=VALUE", help="variable of the script; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Run the script; on several ranks only the first one reports an error."""
    before, after = split_script(args.script)
    checkpoint = load_checkpoint(args.potential)
    options = ["-log", args.log, *(["-screen", args.screen] if args.screen else [])]
    for variable in args.var:
        name, equals, value = variable.partition("=")
        if not (name and equals):
            raise ValueError(f"--var: expected NAME=VALUE, found '{variable}'")
        options += ["-var", name, *value.split()]
    module = import_lammps()
    try:
        lmp = module.lammps(cmdargs=options)
    except OSError as error:
        raise ValueError(f"LAMMPS: {error}") from error
    first = lmp.extract_setting("world_rank") == 0
    try:
        with tempfile.TemporaryDirectory(prefix="rung-lammps-") as folder:
            run_lines(lmp, before, Path(folder, "before"))
            attached = attach(
                lmp,
                checkpoint,
                args.fidelity,
                elements=args.elements.replace(" ", "").split(",") if args.elements else None,
                charge=args.charge,
                multiplicity=args.multiplicity,
                device=args.device,
                dtype=args.dtype,
                check_masses=not args.any_masses,
                on_error=lambda error: stop_all(lmp, attached, error),
            )
            _share_cores(attached.comm)
            run_lines(lmp, after, Path(folder, "after"))
    except module.MPIAbortException as error:  # on one rank alone: the others wait for it
        print(f"rung lammps: error: {args.script}: {_line(error)}", file=sys.stderr, flush=True)
        lmp.get_mpi_comm().Abort(EXIT_BAD_INPUT)
    except LammpsError as error:
        if first:
            raise ValueError(f"{args.script}: {error}") from error
        return EXIT_BAD_INPUT
    except (ValueError, OSError):
        if first:
            raise
        return EXIT_BAD_INPUT
    finally:
        lmp.finalize()
    return 0


class LammpsError(Exception):
    """LAMMPS's own error, on all ranks."""


def run_lines(lmp: Any, lines: Sequence[str], path: Path) -> None:
    """Run lines of a script from a file, as `jump SELF` needs; raises LammpsError."""
    path.write_text("\n".join(lines) + "\n")
    try:
        lmp.file(str(path))
    except Exception as error:
        if type(error) is Exception:  # what the lammps module raises
            raise LammpsError(_line(error)) from error
        raise


def split_script(path: Path) -> tuple[list[str], list[str]]:
    """Return the lines of a script up to the `fix external` with it, and the rest.

    Raises ValueError saying what to write when there is no such line, or one that would not apply all forces at every
    step.
    """
    lines = path.read_text().splitlines()
    command = ""
    for index, line in enumerate(lines):
        command = command.removesuffix("&") + line.partition("#")[0].rstrip()
        if command.endswith("&"):  # goes on in the next line
            continue
        words, command = command.split(), ""
        if words[:1] == ["fix"] and words[3:4] == ["external"]:
            if [words[2], *words[4:]] != ["all", "pf/callback", "1", "1"]:
                raise ValueError(f"{path}, line {index + 1}: expected '{FIX}', found '{' '.join(words)}'")
            return lines[: index + 1], lines[index + 1 :]
    raise ValueError(
        f"{path}: expected a line '{FIX}', found none: write it after the atoms and before the first run; "
        "the potential is attached there"
    )


def stop_all(lmp: Any, attached: Attached, error: BaseException) -> None:
    """End the process, on every rank, after an error in a step: LAMMPS would go on with the script."""
    lmp.flush_buffers()
    comm = attached.comm
    text = "" if isinstance(error, OtherRankFailed) else f"error: {_line(error)}"
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else text
    texts = [text] if comm is None else comm.allgather(text)
    text = next(filter(None, texts))
    if lmp.extract_setting("world_rank") == 0:
        print(f"rung lammps: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    lmp.lib.lammps_mpi_finalize()  # or mpiexec would call it a crash
    os._exit(EXIT_INTERRUPTED if text == "interrupted" else EXIT_BAD_INPUT)


def _line(error: BaseException) -> str:
    text = str(error) if isinstance(error, (ValueError, OSError)) or type(error) is Exception else repr(error)
    return re.sub(r"\s*\n\s*", "; ", text.strip()).removeprefix("ERROR: ")


def _share_cores(comm: Any) -> None:
    """Give each rank of a machine its share of the cores, unless OMP_NUM_THREADS says how many."""
    if comm is not None and "OMP_NUM_THREADS" not in os.environ:
        from mpi4py import MPI

        ranks = comm.Split_type(MPI.COMM_TYPE_SHARED).size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
