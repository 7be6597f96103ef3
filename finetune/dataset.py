"""The target structures of a fine-tuning run: reading, the test set, and divisions that keep molecules whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rung.data.manifest import is_dataset, resolve_dataset
from rung.data.read import read_any
from rung.data.shard import file_sha256
from rung.data.structure import Labels, Structure
from rung.finetune.config import AUTO_FOLDS, AUTO_FOLDS_BELOW, FinetuneConfig, SplitConfig


@dataclass(frozen=True)
class TargetSet:
    """Structures with an energy at the target fidelity, and what was done to choose them."""

    train: list[Structure]  # training and validation together: the labels that are used
    test: list[Structure]  # never trained on; may be empty where folds measure the error
    sources: dict[str, str]  # path -> SHA-256 of the file or of the dataset's manifest
    notes: list[str]  # sentences for the report


def load_target(config: FinetuneConfig) -> TargetSet:
    """Read the target set and its test set as the configuration says.

    Raises ValueError when nothing is labelled, when a structure has no energy, or when the test set is empty.
    """
    notes: list[str] = []
    sources = {config.data: digest(config.data)}
    if is_dataset(config.data) and not config.test:
        train = read_any(config.data, config.fidelity, split="train")
        test = read_any(config.data, config.fidelity, split="test")
        notes.append(f"test set: split 'test' of {config.data}")
    elif config.test:
        train = read_any(config.data, config.fidelity, split="train" if is_dataset(config.data) else None)
        test = read_any(config.test, config.fidelity, split="test" if is_dataset(config.test) else None)
        sources[config.test] = digest(config.test)
        notes.append(f"test set: {config.test}")
    else:
        train, test = read_any(config.data, config.fidelity), []
    require_energies(train, config.fidelity, config.data)
    require_energies(test, config.fidelity, config.test or config.data)
    train = draw(train, config.split.max_train, config.seed)
    if test:
        test = draw(test, config.split.max_test, config.seed)
    elif is_dataset(config.data) or config.test:
        raise ValueError(f"{config.test or config.data}: no test structure has a label at '{config.fidelity}'")
    elif num_folds(config.split, len(train)) == 0:
        train, test = hold_out(train, config.split.test_fraction, config.seed, "test", notes)
    return TargetSet(train, test, sources, notes)


def digest(name: str) -> str:
    """Return the SHA-256 of a file, or of a dataset's manifest, which holds those of its shards."""
    path = resolve_dataset(name) / "dataset.yaml" if is_dataset(name) else Path(name)
    return file_sha256(path)


def require_energies(structures: Sequence[Structure], fidelity: str, source: str) -> None:
    """Raise ValueError naming the structures that have no energy at `fidelity`."""
    missing = [s.key for s in structures if fidelity not in s.labels or s.labels[fidelity].energy is None]
    if missing:
        some = ", ".join(missing[:5])
        raise ValueError(
            f"{source}: expected an energy at '{fidelity}' for every structure, {len(missing)} have none "
            f"(first: {some}); remove or label them"
        )


def training_view(structures: Sequence[Structure], fidelity: str, use_forces: bool) -> list[Structure]:
    """Return the structures with only the labels that may be trained on."""
    view = []
    for structure in structures:
        labels = structure.labels[fidelity]
        kept = Labels(energy=labels.energy, forces=labels.forces if use_forces else None)
        view.append(dataclasses.replace(structure, labels={fidelity: kept}))
    return view


def draw(structures: list[Structure], count: int, seed: int) -> list[Structure]:
    """Return `count` structures drawn at random in their first order; all when `count` is 0 or not smaller."""
    if count == 0 or count >= len(structures):
        return structures
    chosen = np.sort(np.random.default_rng(seed).permutation(len(structures))[:count])
    return [structures[i] for i in chosen]


def num_folds(split: SplitConfig, num_structures: int) -> int:
    """Return the number of folds, 0 for a single held-out validation set."""
    if split.folds >= 0:
        return split.folds
    return AUTO_FOLDS if num_structures < AUTO_FOLDS_BELOW else 0


def hold_out(
    structures: list[Structure], fraction: float, seed: int, name: str, notes: list[str]
) -> tuple[list[Structure], list[Structure]]:
    """Return (kept, held out): whole molecules until about `fraction` of the structures is held out."""
    parts = partition(structures, max(2, round(1 / fraction)), seed, notes, name)
    held = set(parts[0])
    return [s for i, s in enumerate(structures) if i not in held], [structures[i] for i in parts[0]]


def partition(
    structures: Sequence[Structure], parts: int, seed: int, notes: list[str], purpose: str
) -> list[list[int]]:
    """Divide the indices of the structures into `parts` of about equal size; the structures of a group stay together.

    A set with fewer groups than parts cannot be divided so; it is divided by structure, which a note says.
    Raises ValueError for fewer structures than parts.
    """
    if len(structures) < parts:
        raise ValueError(
            f"{purpose}: expected at least {parts} structures to divide, found {len(structures)}; give more data"
        )
    units = [structure.group for structure in structures]
    if len(set(units)) < parts:
        notes.append(
            f"{purpose}: only {len(set(units))} molecules, so it is divided by structure: "
            "its errors do not tell about other molecules"
        )
        units = [str(i) for i in range(len(structures))]
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    filled: list[list[int]] = [[] for _ in range(parts)]
    for unit in sorted((names[i] for i in order), key=lambda name: -len(members[name])):
        min(filled, key=len).extend(members[unit])  # largest group first into the emptiest part
    return [sorted(part) for part in filled]
