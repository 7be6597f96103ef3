"""`rung publish`: a checkpoint that others can load by name, checked by loading it back in a fresh process.

The folder is the checkpoint's (DESIGN.md section 10) with a card for its readers and `reference.json`: energies and
forces of a few structures at every level of theory, computed before it was written, and how far others may be off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.data.manifest import MANIFEST_FILE, is_dataset, read_manifest, resolve_dataset
from rung.data.read import read_any
from rung.data.shard import file_sha256
from rung.data.structure import Structure
from rung.model import hub
from rung.model.card import data_digest, data_licences, without_secrets
from rung.model.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from rung.model.checkpoint_files import EVALUATION, INFO, REFERENCE, check_replaceable, replace_folder
from rung.model.potential import Potential
from rung.model.predict import choose_fidelity, evaluate
from rung.model.reference import Comparison, compare, make_reference


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

    name is the card's title; licence is an SPDX identifier (default: that of the data, when all have the same);
    repository is where the card says the checkpoint can be loaded from. Of a checkpoint that was published before, all
    three stay as they were unless given anew. data are `DATA[:FIDELITY]` whose errors go into evaluation.json and the
    card, and whose structures are the first choice for reference.json (else the one that the checkpoint has, which it
    must reproduce, else the built-in data's).
    Returns how well the fresh process reproduced the predictions. Raises ValueError, OSError, and what loading raises.
    """
    out = Path(out)
    check_replaceable(out)
    checkpoint = load_checkpoint(source)
    earlier = checkpoint.info.get("publication") or {}
    repository = repository or earlier.get("repository")
    publication = {
        "name": name or earlier.get("name") or (repository or out.name).rpartition("/")[2],
        "licence": licence or earlier.get("licence") or _licence_of_data(checkpoint.info),
        "repository": repository,
    }
    if checkpoint.reference is not None:
        _check_reproduced(source, checkpoint)
    sets = _held_out_sets(checkpoint, data)
    reference = checkpoint.reference
    if sets or reference is None:
        reference = make_reference(checkpoint.potential, [structure for one in sets for structure in one.structures])
    published = dataclasses.replace(
        checkpoint,
        info=without_secrets(checkpoint.info) | {"publication": publication},
        evaluation=checkpoint.evaluation | {one.title: _errors(checkpoint.potential, one) for one in sets},
        reference=reference,
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
    return _check_reproduced(name, checkpoint)


def _check_reproduced(name: Path | str, checkpoint: Checkpoint) -> list[Comparison]:
    assert checkpoint.reference is not None
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


@dataclass(frozen=True)
class HeldOut:
    """Structures with labels at one fidelity that the checkpoint was not trained on."""

    path: str
    title: str  # set/fidelity or set/test/fidelity: the name in evaluation.json
    fidelity: str
    digest: str  # SHA-256 of the file or of the dataset's manifest
    structures: list[Structure]


def _held_out_sets(checkpoint: Checkpoint, data: Iterable[str]) -> list[HeldOut]:
    """Return what `data` name (of a dataset the test split), read and checked: no titles twice, no training data."""
    sets: dict[str, HeldOut] = {}
    for words in data:
        for one in _read(checkpoint, words):
            if other := sets.get(one.title):
                raise ValueError(
                    f"--evaluate: the errors on {other.path} and on {one.path} would both be '{one.title}' in "
                    f"{EVALUATION}: give one of them another name"
                )
            old = checkpoint.evaluation.get(one.title)
            if old is not None and not (isinstance(old, Mapping) and old.get("sha256") == one.digest):
                stated = str(old.get("sha256", "not stated")) if isinstance(old, Mapping) else "not stated"
                raise ValueError(
                    f"--evaluate: the checkpoint's {EVALUATION} already has '{one.title}', on other data (SHA-256 "
                    f"{stated[:12]}) than {one.path} ({one.digest[:12]}): give {one.path} another name"
                )
            sets[one.title] = one
    return list(sets.values())


def _read(checkpoint: Checkpoint, words: str) -> list[HeldOut]:
    path, fidelity = _path_and_fidelity(words)
    known = checkpoint.potential.config.fidelities
    only = choose_fidelity(fidelity, known) if fidelity or len(known) == 1 else None
    has_test = is_dataset(path) and "test" in {shard.split for shard in read_manifest(path).shards}
    found = read_any(path, only, "test" if has_test else None)
    digest = file_sha256(resolve_dataset(path) / MANIFEST_FILE if is_dataset(path) else Path(path))
    if not has_test and digest in _trained_on(checkpoint.info):
        raise ValueError(
            f"--evaluate {path}: the checkpoint was trained on it (SHA-256 {digest[:12]}, see datasets in {INFO}), and "
            "it has no split 'test': give structures that are new to the checkpoint"
        )
    title = resolve_dataset(path).name if is_dataset(path) else Path(path).stem
    if has_test:  # training leaves its own errors, on the split that it was watched with, as set/fidelity
        title += "/test"
    levels = [level for level in known if any(level in structure.labels for structure in found)]
    if not levels:
        labels = ", ".join(sorted({level for structure in found for level in structure.labels})) or "none"
        raise ValueError(f"{path}: expected labels at {only or ', '.join(known)}, found labels at {labels}")
    return [
        HeldOut(path, f"{title}/{level}", level, digest, [one for one in found if level in one.labels])
        for level in levels
    ]


def _errors(potential: Potential, one: HeldOut) -> dict[str, Any]:
    return {**evaluate(potential, one.structures, one.fidelity), "sha256": one.digest}


def _trained_on(info: Mapping[str, Any]) -> set[str | None]:
    """Return the digests of the datasets but those that every fine-tuning run which lists them only tested on."""
    tested, trained = set(), set()
    training = info["training"]
    while isinstance(training, Mapping):
        run = training.get("finetune") or {}
        tested.add(run.get("test"))
        pairs = [*run.get("also", ()), *run.get("replay", ())]
        trained |= {run.get("data"), *run.get("relative", ()), *(pair.rpartition(":")[0] for pair in pairs)}
        training = (training.get("source") or {}).get("training")
    only_tested = {name for name in tested - trained if name}
    return {data_digest(data) for data in info["datasets"] if data.get("name") not in only_tested}


def _path_and_fidelity(words: str) -> tuple[str, str | None]:
    path, colon, fidelity = words.rpartition(":")
    if not colon or Path(words).exists():
        return words, None
    return path, fidelity


# What others may see


def _licence_of_data(info: Mapping[str, Any]) -> str:
    licences = data_licences(info)
    if len(distinct := {licence for _, licence in licences}) == 1 and (only := distinct.pop()):
        return only
    listed = ", ".join(f"{name}: {licence or 'not stated'}" for name, licence in licences) or "no data"
    raise ValueError(f"--licence: name the checkpoint's; the licences of its data do not decide it ({listed})")


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
    parser.add_argument(
        "--licence", "--license", default="", help="SPDX identifier; default: as published before, else the data's"
    )
    parser.add_argument(
        "--name", default="", help="title of the card; default: as published before, else of the repository or folder"
    )
    parser.add_argument(
        "--evaluate", nargs="+", action="extend", default=[], metavar="DATA[:FIDELITY]",
        help="put the errors on these (the test split, where there is one) into evaluation.json and the card",
    )  # fmt: skip
    parser.add_argument("--to", metavar="USER/REPOSITORY", help="upload there (HF_ENDPOINT and HF_TOKEN say how)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of that repository; default: main")
    parser.add_argument("--private", action="store_true", help="make a new repository private; an existing one must be")
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
    given = {"CHECKPOINT": args.checkpoint} | {
        f"--{name}": getattr(args, name) for name in ("out", "licence", "name", "evaluate", "to", "revision", "private")
    }
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
