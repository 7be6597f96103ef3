"""Build, inspect, verify and generate datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.reference_energy import EXTREME_DEVIATION
from rung.data.report import dataset_report
from rung.data.sources import ase_file
from rung.data.split import SplitFractions
from rung.data.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of `rung data` to `parser`."""
    from rung.data.generate import cli as generate

    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    build = commands.add_parser("build", help="make a dataset (shards and dataset.yaml) of labelled structures")
    _add_build_arguments(build)
    build.set_defaults(run_command=_build)
    inspect = commands.add_parser("inspect", help="print labels, E0 fits, outliers and duplicates of datasets")
    inspect.add_argument("datasets", nargs="+", help="dataset folder, dataset.yaml or 'builtin'")
    inspect.set_defaults(run_command=_inspect)
    check = commands.add_parser("verify", help="hold datasets to the digests and counts of their manifests")
    check.add_argument("datasets", nargs="+", help="dataset folder, dataset.yaml or 'builtin'")
    check.set_defaults(run_command=_verify)
    make = commands.add_parser("generate", help="compute quantum-chemical labels (needs rung[generate])")
    generate.add_arguments(make)
    make.set_defaults(run_command=generate.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command; return 0, or 1 when `verify` found a fault."""
    return int(args.run_command(args))


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="+", type=Path, help="extxyz or other files that ASE reads, in eV and angstrom"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the new dataset")
    parser.add_argument("--name", required=True, help="name of the dataset: lower case, digits, underscores")
    parser.add_argument("--fidelity", required=True, help="name of the labels' level of theory, such as wb97x_631gd")
    parser.add_argument("--energy-key", default=ase_file.ENERGY_KEY, help="key in info (default %(default)s, energy)")
    parser.add_argument("--forces-key", default=ase_file.FORCES_KEY, help="array (default %(default)s, forces)")
    parser.add_argument("--group-key", default=ase_file.GROUP_KEY, help="info key to split by (default %(default)s)")
    parser.add_argument("--split", nargs=3, type=float, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VAL", "TEST"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default %(default)s)")
    parser.add_argument(
        "--e0", nargs="+", type=_element_energy, metavar="H=-13.6", help="isolated-atom energies in eV; else fitted"
    )
    parser.add_argument(
        "--max-energy-deviation",
        type=float,
        default=EXTREME_DEVIATION,
        help="refuse energies further than this, in eV/atom, from what composition explains (default %(default)s)",
    )
    for text in ("method", "basis", "dispersion", "code"):
        parser.add_argument(f"--{text}", default="", help=f"{text} of the level of theory")
    for text in ("source", "doi", "licence", "citation", "description"):
        parser.add_argument(f"--{text}", default="", help=f"{text} of the dataset")
    parser.add_argument("--version", default="1", help="version of the dataset (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset that the folder holds")


def _build(args: argparse.Namespace) -> int:
    train, val, test = args.split
    structures = [
        structure
        for source in args.sources
        for structure in ase_file.read_structures(
            source,
            fidelity=args.fidelity,
            energy_key=args.energy_key,
            forces_key=args.forces_key,
            group_key=args.group_key,
        )
    ]
    level = Fidelity(args.fidelity, args.method, args.basis, args.dispersion, args.code)
    build_dataset(
        structures,
        args.out,
        name=args.name,
        fidelities={args.fidelity: level},
        split=SplitFractions(train, val, test, args.seed),
        e0={args.fidelity: dict(args.e0)} if args.e0 else None,
        version=args.version,
        source=args.source,
        doi=args.doi,
        licence=args.licence,
        citation=args.citation,
        description=args.description,
        max_energy_deviation=args.max_energy_deviation,
        overwrite=args.overwrite,
    )
    print(dataset_report([args.out]))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    print(dataset_report(args.datasets))
    return 0


def _verify(args: argparse.Namespace) -> int:
    num_faults = 0
    for dataset in args.datasets:
        faults = verify(dataset)
        for fault in faults:
            print(f"{dataset}: {fault}")
        if not faults:
            print(f"{dataset}: every shard is as its manifest states")
        num_faults += len(faults)
    return 1 if num_faults else 0


def _element_energy(text: str) -> tuple[int, float]:
    from ase.data import atomic_numbers

    symbol, _, value = text.partition("=")
    try:
        return atomic_numbers[symbol], float(value)
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected SYMBOL=ENERGY such as H=-13.6, found '{text}'") from error
