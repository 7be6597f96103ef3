"""`rung data generate`: compute the built-in data set, or one like it."""

from __future__ import annotations

import argparse
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

EXTRA = ("rdkit", "tblite", "pyscf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="work folder; a stopped run continues in the same one")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smiles", nargs="+", help="only these molecules (default: the built-in list)")
    parser.add_argument("--structures-per-mode", type=float, help="structures per vibrational mode of a molecule")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="then write what is labelled as a dataset into DIR")
    parser.add_argument("--name", default="builtin", help="name of the dataset (default: builtin)")
    parser.add_argument("--export-only", action="store_true", help="compute nothing; needs --dataset")
    parser.add_argument(
        "--count",
        nargs="+",
        default=[],
        metavar="LEVEL=N",
        help="labels per level, 0 for none, 'all' for every structure",
    )


def run(args: argparse.Namespace) -> int:
    if args.export_only and args.dataset is None:
        raise ValueError("--export-only: expected --dataset DIR to say where the dataset goes, found none")
    require_extra()
    from rung.data.generate.engine import COUNTS, STRUCTURES_PER_MODE, Plan, generate
    from rung.data.generate.export import export
    from rung.data.generate.molecules import canonical, molecules

    plan = Plan(
        smiles=sorted({canonical(smiles) for smiles in args.smiles}) if args.smiles else molecules(),
        counts={**COUNTS, **parse_counts(args.count)},
        seed=args.seed,
        structures_per_mode=args.structures_per_mode or STRUCTURES_PER_MODE,
    )
    if not args.export_only:
        try:
            outcomes = generate(plan, args.out, args.jobs)
        except KeyboardInterrupt:
            print(f"\nstopped; everything finished is in {args.out}. The same command continues from there.")
            return 130
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:7d}  {outcome}")
    if args.dataset is not None:
        manifest = export(args.out, args.dataset, name=args.name, counts=plan.counts, options=_options(args))
        print(f"{args.dataset}: {sum(shard.structures for shard in manifest.shards)} structures")
    return 0


def _options(args: argparse.Namespace) -> str:
    """The options that, beside the counts, decide what is computed."""
    words = [f"--name {args.name}"] if args.name != "builtin" else []
    words += [f"--seed {args.seed}"] if args.seed else []
    words += [f"--structures-per-mode {args.structures_per_mode:g}"] if args.structures_per_mode else []
    words += [f"--smiles {' '.join(map(shlex.quote, args.smiles))}"] if args.smiles else []
    return " ".join(words)


def require_extra() -> None:
    """Raise ValueError naming the extra to install when a quantum chemistry package is missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"rung data generate: expected the packages {', '.join(EXTRA)}, found no {', '.join(missing)}; "
            'install them with: pip install "rung[generate]"'
        )


def parse_counts(texts: list[str]) -> dict[str, int | None]:
    """`["gfn2_xtb=all", "mp2_ccpvdz=20"]` -> `{"gfn2_xtb": None, "mp2_ccpvdz": 20}`; ValueError naming a bad one."""
    from rung.data.generate.levels import LEVELS

    counts: dict[str, int | None] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in LEVELS:
            raise ValueError(f"--count {text}: expected one of the levels {', '.join(LEVELS)}, found '{name}'")
        if number != "all" and not number.isdigit():
            raise ValueError(f"--count {text}: expected LEVEL=N with N a number or 'all', found '{number}'")
        counts[name] = None if number == "all" else int(number)
    return counts
