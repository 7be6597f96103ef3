"""`rung evaluate`: the errors of a checkpoint against labelled structures or reaction energies, per fidelity.

Structures: mean absolute and root mean square errors of energies (meV/atom), forces (meV/angstrom) and stress
(meV/angstrom^3), of all and of the structures with each element (forces: on the atoms of that element). Reactions:
errors of their energies in kcal/mol and meV. Errors are prediction minus label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from tqdm import tqdm

from rung.data.reaction import Reaction
from rung.data.reaction_file import is_reaction_file, read_reactions
from rung.data.read import read_any
from rung.data.shard import write_beside
from rung.data.structure import Labels, Structure
from rung.model.checkpoint import load_checkpoint
from rung.model.errors import Errors, ErrorSums, Metrics, reaction_metrics
from rung.model.potential import Potential
from rung.model.predict import (
    choose_fidelity,
    known_structures,
    predict,
    reaction_energies,
    to_device,
)
from rung.model.prediction_file import (
    SUFFIXES,
    Predicted,
    check_target,
    reaction_row,
    write_predictions,
    write_reaction_predictions,
)

COLUMNS = {
    "num_energies": "energies",
    "energy_mae_mev_per_atom": "energy MAE",
    "energy_rmse_mev_per_atom": "energy RMSE",
    "num_forces": "forces",
    "force_mae_mev_per_angstrom": "force MAE",
    "force_rmse_mev_per_angstrom": "force RMSE",
}
STRESS_COLUMNS = {
    "num_stresses": "stresses",
    "stress_mae_mev_per_angstrom3": "stress MAE",
    "stress_rmse_mev_per_angstrom3": "stress RMSE",
}
PARTS = ("element", "size")
MOST_NAMED = 10  # structures, in a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung evaluate` to `parser`."""
    parser.add_argument("checkpoint", help="checkpoint folder or .tar, or user/repository[@revision] on a hub")
    parser.add_argument(
        "data",
        help="dataset folder, dataset.yaml, 'builtin', or any file that ASE reads; or reaction energies: a .yaml or "
        ".csv table (see rung/data/reaction_file.py), or a folder of GMTKN55",
    )
    parser.add_argument("--fidelity", help="level of theory; default: every one that checkpoint and data share")
    parser.add_argument("--split", help="only this split of a dataset: train, val or test")
    parser.add_argument(
        "--by", action="append", choices=PARTS, help="the rows of the table (may be repeated); default: element"
    )
    parser.add_argument(
        "--skip-unknown",
        action="store_true",
        help="leave out, and name, what the checkpoint was not trained on (an element, a charge); default: an error",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number of the tables, by size too")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write predictions and labels: .csv, or .extxyz with forces"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; default: cuda where there is one")


def run(args: argparse.Namespace) -> int:
    """Print a table of errors and, as the last line, its main numbers as JSON (fidelity -> metrics)."""
    for path, suffixes in ((args.json, (".json",)), (args.predictions, SUFFIXES)):
        if path is not None:
            check_target(path, suffixes)
            if path.exists() and Path(args.data).exists() and path.samefile(args.data):
                raise ValueError(f"{path}: expected another file than the data that are read")
    potential = to_device(load_checkpoint(args.checkpoint).potential, args.device)
    about = {"checkpoint": str(args.checkpoint), "data": str(args.data)}
    report = _reactions(args, potential) if is_reaction_file(args.data) else _structures(args, potential)
    if args.json is not None:
        write_beside(args.json, (json.dumps(about | report, indent=2) + "\n").encode())
    return 0


# Structures


def _structures(args: argparse.Namespace, potential: Potential) -> dict[str, Any]:
    structures, fidelities = _read(args, potential)
    results: dict[str, Errors] = {}
    skipped: dict[str, list[str]] = {}
    rows: list[Predicted] = []
    for fidelity in fidelities:
        labelled = [structure for structure in structures if fidelity in structure.labels]
        known, skipped[fidelity] = known_structures(potential, labelled, fidelity)
        _settle(skipped[fidelity], len(labelled), f"structures at '{fidelity}'", args.skip_unknown)
        predicted = _predict(potential, known, fidelity, everything=args.predictions is not None)
        results[fidelity] = Errors.of(known, [row.prediction for row in predicted], fidelity)
        if args.predictions is not None:
            rows += predicted
    print(_table(results, args.by or PARTS[:1]))
    totals = {fidelity: result.sums().metrics() for fidelity, result in results.items()}
    if args.predictions is not None:
        write_predictions(args.predictions, rows)
    print(json.dumps(totals))
    return {
        "split": args.split,
        "fidelities": {
            fidelity: {
                "all": totals[fidelity],
                **{f"by_{part}": {name: one.metrics() for name, one in _parts(result, part)} for part in PARTS},
                "skipped": skipped[fidelity],
            }
            for fidelity, result in results.items()
        },
    }


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


def _predict(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, everything: bool
) -> list[Predicted]:
    labels = [structure.labels.get(fidelity, Labels()) for structure in structures]
    predictions = predict(
        potential,
        _progress(structures, fidelity),
        fidelity,
        forces=everything or any(one.forces is not None for one in labels),
        stress=any(one.stress is not None for one in labels),
    )
    return [Predicted(fidelity, *pair) for pair in zip(structures, predictions, strict=True)]


def _progress(structures: Sequence[Structure], title: str) -> Iterable[Structure]:
    """Show a bar on a terminal, nothing elsewhere."""
    return tqdm(structures, desc=title, unit=" structures", disable=None, leave=False)


def _table(results: dict[str, Errors], parts: Sequence[str]) -> str:
    """Return the table: a row per fidelity, and below it one per part."""
    rows: list[tuple[str, Metrics]] = []
    for fidelity, result in results.items():
        rows.append((fidelity, result.sums().metrics()))
        for part in parts:
            unit = " atoms" if part == "size" else ""
            rows += [(f"  {name}{unit}", sums.metrics()) for name, sums in _parts(result, part)]
    has_stress = any("num_stresses" in metrics for _, metrics in rows)
    columns = COLUMNS | STRESS_COLUMNS if has_stress else COLUMNS
    width = max(len(name) for name, _ in [("fidelity", {}), *rows])
    lines = ["fidelity".ljust(width) + "".join(f"{title:>13}" for title in columns.values())]
    for name, metrics in rows:
        cells = ["-" if (value := metrics.get(key)) is None else f"{value:.5g}" for key in columns]
        lines.append(name.ljust(width) + "".join(f"{cell:>13}" for cell in cells))
    lines.append("errors in meV/atom and meV/angstrom" + (", of the stress in meV/angstrom^3" if has_stress else ""))
    if "element" in parts:
        lines.append("rows of an element: energies of the structures that contain it, forces on its atoms")
    return "\n".join(lines)


def _parts(result: Errors, part: str) -> list[tuple[str, ErrorSums]]:
    if part == "element":
        return [(chemical_symbols[number], sums) for number, sums in result.by_element().items()]
    return [(str(a) if a == b else f"{a}-{b}", sums) for (a, b), sums in result.by_size().items()]


# Reactions


def _reactions(args: argparse.Namespace, potential: Potential) -> dict[str, Any]:
    if args.split is not None:
        raise ValueError(f"{args.data}: a table of reactions has no splits, so '{args.split}' cannot be selected")
    if args.by:
        raise ValueError(f"--by {args.by[0]}: only errors of structures are counted by {' or '.join(PARTS)}")
    if args.predictions is not None:
        check_target(args.predictions, (".csv",))
    fidelity = choose_fidelity(args.fidelity, potential.config.fidelities)
    reactions, skipped = _known_reactions(potential, read_reactions(args.data, fidelity), fidelity)
    _settle(skipped, len(reactions) + len(skipped), f"reactions at '{fidelity}'", args.skip_unknown)
    energies = reaction_energies(potential, reactions, fidelity)
    metrics = reaction_metrics(reactions, energies)
    print(_reaction_table(fidelity, metrics))
    if args.predictions is not None:
        write_reaction_predictions(args.predictions, reactions, energies)
    print(json.dumps({fidelity: metrics}))
    rows = [reaction_row(r, float(energy)) for r, energy in zip(reactions, energies, strict=True)]
    return {"fidelities": {fidelity: {"all": metrics, "reactions": rows, "skipped": skipped}}}


def _known_reactions(
    potential: Potential, reactions: Sequence[Reaction], fidelity: str
) -> tuple[list[Reaction], list[str]]:
    known, skipped = [], []
    for reaction in reactions:
        reasons = known_structures(potential, reaction.structures, fidelity)[1]
        if reasons:
            skipped.append(f"reaction '{reaction.key}': {'; '.join(reasons)}")
        else:
            known.append(reaction)
    return known, skipped


def _reaction_table(fidelity: str, metrics: dict[str, Any]) -> str:
    columns = {"mae": "MAE", "rmse": "RMSE", "mean_signed_error": "mean signed", "largest_error": "largest"}
    width = max(len("fidelity"), len(fidelity))
    lines = ["fidelity".ljust(width) + f"{'reactions':>11}{'unit':>10}" + "".join(f"{t:>13}" for t in columns.values())]
    for unit, suffix in (("kcal/mol", "kcal_per_mol"), ("meV", "mev")):
        cells = "".join(f"{metrics[f'{name}_{suffix}']:>13.5g}" for name in columns)
        lines.append(fidelity.ljust(width) + f"{metrics['num_reactions']:>11}{unit:>10}{cells}")
    lines.append(
        f"errors of reaction energies, prediction minus label; the largest is of '{metrics['largest_error_of']}'"
    )
    return "\n".join(lines)


def _settle(reasons: Sequence[str], total: int, what: str, skip: bool) -> None:
    """Raise ValueError for what cannot be evaluated, or print it where it is to be left out."""
    if not reasons:
        return
    more = f"\n  and {len(reasons) - MOST_NAMED} more" if len(reasons) > MOST_NAMED else ""
    named = "".join(f"\n  {reason}" for reason in reasons[:MOST_NAMED]) + more
    if not skip:
        hint = "leave them out of the data, or pass --skip-unknown"
        raise ValueError(f"{len(reasons)} of {total} {what} cannot be evaluated; {hint}:{named}")
    if len(reasons) == total:
        raise ValueError(f"none of the {total} {what} can be evaluated:{named}")
    print(f"left out {len(reasons)} of {total} {what}:{named}")
