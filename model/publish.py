"""`rung publish`: a checkpoint that others can load by name, checked by loading it back in a fresh process.

The folder is the checkpoint's (DESIGN.md section 10) with a card for its readers and `reference.json`: energies and
forces of a few structures at every level of theory, computed before it was written, and how far others may be off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rung.data.manifest import is_dataset, read_manifest, resolve_dataset
from rung.data.read import read_any
from rung.data.structure import Structure
from rung.model import hub
from rung.model.card import data_licences
from rung.model.checkpoint import load_checkpoint, write_checkpoint
from rung.model.checkpoint_files import REFERENCE, check_replaceable, replace_folder
from rung.model.potential import Potential
from rung.model.predict import choose_fidelity, evaluate
from rung.model.reference import Comparison, compare, make_reference

WITHHELD = "(withheld)"


def publish(
    source: Path | str,
    out: Path | str,
    *,
    name: str = "",
    licence: str = "",
    data: Sequence[str] = (),
    repository: str | None = None,
) -> list[Comparison]:
    """Write the publishable folder of a checkpoint to `out`, which appears only when a fresh process reproduces it.

    name is the card's title; licence is an SPDX identifier (default: that of the data, when all have the same). data
    are `DATA[:FIDELITY]` whose errors go into evaluation.json and the card, and whose structures are the first choice
    for reference.json (else the built-in data's). repository is where the card says the checkpoint can be loaded from.
    Returns how well the fresh process reproduced the predictions. Raises ValueError, OSError, and what loading raises.
    """
    out = Path(out)
    check_replaceable(out)
    checkpoint = load_checkpoint(source)
    results, structures = _evaluate(checkpoint.potential, data)
    publication = {
        "name": name or (repository or out.name).rpartition("/")[2],
        "licence": licence or _licence_of_data(checkpoint.info),
        "repository": repository,
    }
    published = dataclasses.replace(
        checkpoint,
        info=_without_secrets(checkpoint.info) | {"publication": publication},
        evaluation=checkpoint.evaluation | results,
        reference=make_reference(checkpoint.potential, structures),
    )
    unchecked = out.with_name(f".{out.name}.unchecked.{os.getpid()}")
    try:
        write_checkpoint(unchecked, published)
        comparisons = verify_in_fresh_process(unchecked)
        replace_folder(unchecked, out)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return comparisons


def verify(name: Path | str) -> list[Comparison]:
    """Compute a checkpoint's stored energies and forces again and return how far they are off, for every fidelity.

    Raises ValueError, with the numbers, when they are off by more than reference.json allows and when there is no such
    file, and what `load_checkpoint` raises.
    """
    checkpoint = load_checkpoint(name)
    if checkpoint.reference is None:
        raise ValueError(f"{name}: expected {REFERENCE}, found none; only what `rung publish` wrote can be verified")
    try:
        comparisons = compare(checkpoint.potential, checkpoint.reference)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: {REFERENCE}: {error!r}; it was not written by `rung publish`") from error
    if bad := [str(one) for one in comparisons if not one.is_within]:
        raise ValueError(f"{name} does not reproduce its stored predictions: {'; '.join(bad)}")
    return comparisons


def verify_in_fresh_process(folder: Path) -> list[Comparison]:
    """Do what `verify` does in a new Python, which knows nothing but the files."""
    # -P: a folder `data` in the current directory is not to be imported.
    command = [sys.executable, "-P", "-m", "rung.model.publish", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise ValueError(f"the checkpoint cannot be published: loaded back in a fresh process, {said}")
    return [Comparison(**values) for values in json.loads(result.stdout)]


# Data


def _evaluate(potential: Potential, data: Iterable[str]) -> tuple[dict[str, Any], list[Structure]]:
    """Return the errors, as "set/fidelity" -> metrics, on the data (their test split), and their structures."""
    results: dict[str, Any] = {}
    structures: list[Structure] = []
    for words in data:
        path, fidelity = _path_and_fidelity(words)
        known = potential.config.fidelities
        only = choose_fidelity(fidelity, known) if fidelity or len(known) == 1 else None
        splits = {shard.split for shard in read_manifest(path).shards} if is_dataset(path) else set()
        found = read_any(path, only, "test" if "test" in splits else None)
        title = resolve_dataset(path).name if is_dataset(path) else Path(path).stem
        levels = [level for level in known if any(level in structure.labels for structure in found)]
        if not levels:
            labels = ", ".join(sorted({level for structure in found for level in structure.labels})) or "none"
            raise ValueError(f"{path}: expected labels at {only or ', '.join(known)}, found labels at {labels}")
        for level in levels:
            labelled = [structure for structure in found if level in structure.labels]
            results[f"{title}/{level}"] = evaluate(potential, labelled, level)
        structures += found
    return results, structures


def _path_and_fidelity(words: str) -> tuple[str, str | None]:
    path, colon, fidelity = words.rpartition(":")
    if not colon or Path(words).exists():
        return words, None
    return path, fidelity


# What others may see


def _licence_of_data(info: Mapping[str, Any]) -> str:
    licences = data_licences(info)
    if len(distinct := set(licences.values())) == 1 and (only := distinct.pop()):
        return only
    listed = ", ".join(f"{name}: {licence or 'not stated'}" for name, licence in licences.items()) or "no data"
    raise ValueError(f"--licence: name the checkpoint's; the licences of its data do not decide it ({listed})")


def _without_secrets(value: Any) -> Any:
    """Return rung.yaml's contents without the passwords, queries and commands of remote shards."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return f"pipe:{WITHHELD}"
    value = re.sub(r"://[^/\s@]*@", "://", value)
    return re.sub(r"(https?://[^\s?#]*)[?#]\S*", r"\1", value)


def _local_paths(value: Any, key: str = "") -> list[str]:
    """Return the keys of rung.yaml whose values are absolute paths."""
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in _local_paths(item, f"{key}.{name}" if key else name)]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _local_paths(item, f"{key}[{i}]")]
    return [key] if isinstance(value, str) and value.startswith(("/", "~")) else []


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rung publish` to `parser`."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint folder, .tar or name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the publishable checkpoint goes")
    parser.add_argument("--licence", "--license", default="", help="SPDX identifier; default: the data's, if all agree")
    parser.add_argument("--name", default="", help="title of the card; default: the repository's or the folder's name")
    parser.add_argument(
        "--evaluate", nargs="+", action="extend", default=[], metavar="DATA[:FIDELITY]",
        help="put the errors on these (the test split, where there is one) into evaluation.json and the card",
    )  # fmt: skip
    parser.add_argument("--to", metavar="USER/REPOSITORY", help="upload there (HF_ENDPOINT and HF_TOKEN say how)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of that repository; default: main")
    parser.add_argument("--private", action="store_true", help="make the repository a private one if it is new")
    parser.add_argument("--verify", metavar="CHECKPOINT", help="only compute the stored predictions again")


def run(args: argparse.Namespace) -> int:
    """Publish, and upload where asked, or verify; print how well the stored predictions are reproduced."""
    _check_arguments(args)
    if args.verify:
        _print(verify(args.verify))
        return 0
    comparisons = publish(
        args.checkpoint, args.out, name=args.name, licence=args.licence, data=args.evaluate, repository=args.to
    )
    _print(comparisons)
    if paths := _local_paths(load_checkpoint(args.out).info):
        print(f"note: rung.yaml shows absolute paths of the machine that trained: {', '.join(paths)}")
    print(f"wrote {args.out}")
    if args.to:
        commit = hub.upload(args.out, args.to, args.revision, private=args.private)
        print(f'uploaded; load it with rung.model.load("{args.to}@{commit}")')
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    given = {"CHECKPOINT": args.checkpoint, "--out": args.out, "--to": args.to, "--evaluate": args.evaluate}
    if args.verify and any(given.values()):
        extra = ", ".join(name for name, value in given.items() if value)
        raise ValueError(f"--verify only checks what is there: leave out {extra}")
    if not args.verify and not (args.checkpoint and args.out):
        raise ValueError("expected CHECKPOINT and --out FOLDER, or --verify CHECKPOINT")
    if (args.revision or args.private) and not args.to:
        raise ValueError("--revision and --private belong to an upload: add --to USER/REPOSITORY")
    if args.to:
        hub.check_upload(args.to)


def _print(comparisons: Iterable[Comparison]) -> None:
    print("reproduced by a newly loaded checkpoint:")
    for comparison in comparisons:
        print(f"  {comparison}")


def main(folder: str) -> int:
    """Verify and print the comparisons as JSON: what `verify_in_fresh_process` starts."""
    try:
        print(json.dumps([dataclasses.asdict(one) for one in verify(folder)]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
