"""`rung evaluate`: the errors of a checkpoint against labelled structures, per fidelity."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from rung.data.read import read_any
from rung.data.structure import Structure
from rung.model.checkpoint import load_checkpoint
from rung.model.potential import Potential
from rung.model.predict import choose_fidelity, evaluate

COLUMNS = {
    "num_energies": "energies",
    "energy_mae_mev_per_atom": "energy MAE",
    "energy_rmse_mev_per_atom": "energy RMSE",
    "num_forces": "forces",
    "force_mae_mev_per_angstrom": "force MAE",
    "force_rmse_mev_per_angstrom": "force RMSE",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung evaluate` to `parser`."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder or .tar")
    parser.add_argument("data", help="dataset folder, dataset.yaml, 'builtin', or any file that ASE reads")
    parser.add_argument("--fidelity", help="level of theory; default: every one that checkpoint and data share")
    parser.add_argument("--split", help="only this split of a dataset: train, val or test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Print a table of errors and, as the last line, the same numbers as JSON (fidelity -> metrics)."""
    potential = load_checkpoint(args.checkpoint).potential
    try:
        potential.to(args.device)
    except (RuntimeError, AssertionError) as error:  # torch: an unknown word, or a GPU that is not there
        raise ValueError(f"device '{args.device}': {str(error).splitlines()[0]}") from error
    structures, fidelities = _read(args, potential)
    results = {fidelity: evaluate(potential, _labelled(structures, fidelity), fidelity) for fidelity in fidelities}
    print(_table(results))
    print(json.dumps(results))
    return 0


def _read(args: argparse.Namespace, potential: Potential) -> tuple[list[Structure], list[str]]:
    """Return the structures and the fidelities to evaluate, each of which labels at least one structure."""
    known = potential.config.fidelities
    only = choose_fidelity(args.fidelity, known) if args.fidelity or len(known) == 1 else None
    structures = read_any(args.data, fidelity=only, split=args.split)
    labelled = {name for structure in structures for name in structure.labels}
    fidelities = [name for name in known if name in labelled and only in (None, name)]
    if not fidelities:
        wanted = only or ", ".join(known)
        found = ", ".join(sorted(labelled)) or "none"
        raise ValueError(f"{args.data}: expected labels at {wanted}, found labels at {found}")
    return structures, fidelities


def _labelled(structures: Sequence[Structure], fidelity: str) -> list[Structure]:
    return [structure for structure in structures if fidelity in structure.labels]


def _table(results: dict[str, dict[str, float | None]]) -> str:
    width = max(map(len, ["fidelity", *results]))
    lines = ["fidelity".ljust(width) + "".join(f"{title:>13}" for title in COLUMNS.values())]
    for fidelity, metrics in results.items():
        cells = ["-" if (value := metrics[key]) is None else f"{value:.5g}" for key in COLUMNS]
        lines.append(fidelity.ljust(width) + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join([*lines, "errors in meV/atom and meV/angstrom"])
