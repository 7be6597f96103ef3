"""Build, inspect, verify and generate datasets, and list the public ones that Rung reads."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from rung.data.build import BuildConfig, build
from rung.data.manifest import Manifest
from rung.data.parallel import workers
from rung.data.report import dataset_report, inspect, to_text, write_report
from rung.data.sources.registry import open_source, source_class, source_names
from rung.data.sources.source import Source, SourceInfo
from rung.data.split import SplitFractions
from rung.data.verify import verify

# Arguments of `rung data build` that are options of readers.
_READER_ARGUMENTS = {
    "fidelity": "name of the labels' level of theory, such as wb97x_631gd, where the files do not say it",
    "method": "method of the level of theory",
    "basis": "basis of the level of theory",
    "dispersion": "dispersion correction of the level of theory",
    "code": "program and version that made the labels",
    "energy_key": "key of the energy in a frame's info (default REF_energy, else energy)",
    "forces_key": "array of the forces of a frame (default REF_forces, else forces)",
    "group_key": "key in a frame's info to split by (default group, else the formula)",
    "levels": "comma-separated levels of theory to take from a set that has several",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of `rung data` to `parser`."""
    from rung.data.generate import cli as generate

    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    make = commands.add_parser("build", help="make a dataset (shards and dataset.yaml) of labelled structures")
    _add_build_arguments(make)
    make.set_defaults(run_command=_build)
    known = commands.add_parser("sources", help="list the public datasets and formats that 'build' reads")
    known.add_argument("names", nargs="*", help="sources to describe in full; all in a table when none is named")
    known.set_defaults(run_command=_sources)
    report = commands.add_parser("inspect", help="report labels, E0 fits, outliers, leakage and suspicions of datasets")
    report.add_argument("datasets", nargs="+", help="dataset folder, dataset.yaml or 'builtin'")
    report.add_argument("--out", type=Path, help="folder for report.json and report.html, which has the plots")
    report.set_defaults(run_command=_inspect)
    check = commands.add_parser("verify", help="hold datasets to the digests and counts of their manifests")
    check.add_argument("datasets", nargs="+", help="dataset folder, dataset.yaml or 'builtin'")
    check.set_defaults(run_command=_verify)
    label = commands.add_parser("generate", help="compute quantum-chemical labels (needs rung[generate])")
    generate.add_arguments(label)
    label.set_defaults(run_command=generate.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command; return 0, or 1 when `verify` found a fault."""
    return int(args.run_command(args))


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = BuildConfig(name="defaults")
    parser.add_argument("files", nargs="+", type=Path, help="files or folders of the source")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new dataset")
    parser.add_argument("--source", default="ase", help="what the files are: see 'rung data sources' (default ase)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the source")
    for name, text in _READER_ARGUMENTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument("--name", help="name of the dataset: lower case, digits, underscores (default: the source's)")
    parser.add_argument("--split", nargs=3, type=float, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VAL", "TEST"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default %(default)s)")
    parser.add_argument(
        "--e0", nargs="+", type=_element_energy, metavar="H=-13.6", help="isolated-atom energies in eV; else fitted"
    )
    for name, kind, text in (
        (
            "max_energy_deviation",
            float,
            "refuse energies further than this, in eV/atom, from what composition explains",
        ),
        ("max_bad", int, "leave out, and count in the manifest, up to this many structures that cannot be right"),
        ("shard_bytes", int, "size of a shard"),
        ("pack_atoms", int, "atoms of a pack"),
    ):
        default = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default %(default)s)")
    for name in ("url", "doi", "licence", "citation", "description"):
        parser.add_argument(f"--{name}", help=f"{name} of the dataset (default: the source's)")
    parser.add_argument("--version", default=defaults.version, help="version of the dataset (default %(default)s)")
    parser.add_argument("-j", "--processes", type=int, default=1, help="processes (or start the command with mpirun)")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset that the folder holds")


def _build(args: argparse.Namespace) -> int:
    source = _source(args)
    config = _config(args, source)
    start = time.perf_counter()
    with workers(args.processes) as run_all:
        if run_all is None:  # a rank of mpirun whose work is done
            return 0
        manifest = build(source, args.files, args.out, config, run_all)
    print(_built(manifest, time.perf_counter() - start))
    print(dataset_report([args.out]))
    return 0


def _source(args: argparse.Namespace) -> Source:
    options: dict[str, str] = {}
    for text in args.option:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--option: expected KEY=VALUE, found '{text}'")
        options[key] = value
    return open_source(
        args.source, options | {name: value for name in _READER_ARGUMENTS if (value := getattr(args, name)) is not None}
    )


def _config(args: argparse.Namespace, source: Source) -> BuildConfig:
    info, fidelities = source.info, source.fidelities
    train, val, test = args.split
    if args.e0 and len(fidelities) > 1:
        raise ValueError(
            f"--e0: the source has {len(fidelities)} levels ({', '.join(fidelities)}); build one at a time"
        )

    def published(name: str) -> str:
        """Return what is known of a public dataset; of a format, which says no level of theory, nothing is."""
        return str(getattr(info, name)) if info.fidelities else ""

    known = {name: e0 for name, e0 in info.e0.items() if name in fidelities}
    return BuildConfig(
        name=args.name or info.name,
        split=SplitFractions(train, val, test, args.seed),
        e0={next(iter(fidelities)): dict(args.e0)} if args.e0 else known,
        source=_first(args.url, published("url")),
        description=_first(args.description, published("title")),
        doi=_first(args.doi, published("doi")),
        licence=_first(args.licence, published("licence")),
        citation=_first(args.citation, published("citation")),
        version=args.version,
        pack_atoms=args.pack_atoms,
        shard_bytes=args.shard_bytes,
        max_energy_deviation=args.max_energy_deviation,
        max_bad=args.max_bad,
        overwrite=args.overwrite,
    )


def _first(given: str | None, default: str) -> str:
    return default if given is None else given


def _built(manifest: Manifest, seconds: float) -> str:
    structures = sum(shard.structures for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
    rate = f"{structures / seconds:,.0f} structures/s"
    left_out = f"; left out {sum(manifest.rejected.values())}: {manifest.rejected}" if manifest.rejected else ""
    return f"built {structures:,} structures, {size:,.1f} MB in {shards}, in {seconds:.1f} s ({rate}){left_out}"


def _sources(args: argparse.Namespace) -> int:
    if args.names:
        print("\n\n".join(_description(source_class(name)) for name in args.names))
        return 0
    print(f"{'source':<14}{'structures':>12}  {'size':<18}{'licence':<20}data")
    for name in source_names():
        try:
            info = source_class(name).info
        except ValueError as error:  # a reader whose library is not installed
            print(f"{name:<14}{error}")
            continue
        count = "" if info.structures is None else f"{info.structures:,}"
        print(f"{name:<14}{count:>12}  {info.size:<18}{info.licence or 'not stated':<20}{info.title}")
        if info.citation:
            print(f"{'':<14}{info.citation}")
    print("\n'rung data sources NAME' tells files, layout, levels of theory and options.")
    return 0


def _description(cls: type[Source]) -> str:
    info: SourceInfo = cls.info
    options = [f"{item.name} (default {_default(item)})" for item in dataclasses.fields(cls)]
    rows = {
        "title": info.title,
        "files": info.files,
        "layout": info.layout,
        "levels": "; ".join(_level(fidelity) for fidelity in info.fidelities) or "as you name them",
        "options": ", ".join(options) or "none",
        "structures": "" if info.structures is None else f"{info.structures:,}",
        **{name: getattr(info, name) for name in ("size", "url", "doi", "licence", "citation")},
    }
    lines = [f"  {name + ':':<12}{text}" for name, text in rows.items() if text]
    return "\n".join([info.name, *lines])


def _level(fidelity: Any) -> str:
    parts = (fidelity.method, fidelity.basis, fidelity.dispersion)
    return f"{fidelity.name} ({'/'.join(part for part in parts if part)})"


def _default(item: Any) -> str:
    if item.default is dataclasses.MISSING:
        return "none: give it"
    return ",".join(item.default) if isinstance(item.default, tuple) else repr(item.default)


def _inspect(args: argparse.Namespace) -> int:
    report = inspect(args.datasets)
    if args.out is not None:
        write_report(report, args.out)
    print(to_text(report))
    if args.out is not None:
        print(f"\nwritten: {args.out / 'report.json'} and {args.out / 'report.html'}")
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
