"""The target structures of a fine-tuning run: reading, the test set, and divisions that keep molecules whole."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from rung.data.manifest import is_dataset, read_manifest, resolve_dataset
from rung.data.reaction import Reaction, structures_of
from rung.data.reaction_file import is_reaction_file, reaction_sources, read_reactions
from rung.data.read import read_any
from rung.data.shard import file_sha256
from rung.data.structure import Labels, Structure
from rung.finetune.checks import equal_geometries
from rung.finetune.config import AUTO_FOLDS, AUTO_FOLDS_BELOW, FinetuneConfig

T = TypeVar("T")


@dataclass(frozen=True)
class TargetSet:
    """Rows with an energy at the target fidelity, and what was done to choose them."""

    train: list[Reaction]  # training and validation together: the labels that are used
    test: list[Reaction]  # never trained on; may be empty where folds measure the error
    sources: dict[str, str]  # path -> SHA-256 of the file or of the dataset's manifest
    notes: list[str]  # sentences for the report
    num_folds: int  # of cross-validation; 0: one validation set


def load_target(config: FinetuneConfig) -> TargetSet:
    """Read the target set and its test set as the configuration says.

    Raises ValueError when nothing is labelled, when a structure has no energy, or when the test set is empty.
    """
    notes: list[str] = []
    names = [config.data, *config.relative, *([config.test] if config.test else [])]
    sources = {name: digest(name) for name in names}
    if is_dataset(config.data) and not config.test:
        train = read_rows(config.data, config.fidelity, "train")
        test = read_rows(config.data, config.fidelity, "test")
        notes.append(f"test set: split 'test' of {config.data}")
    elif config.test:
        train = read_rows(config.data, config.fidelity, "train")
        test = read_rows(config.test, config.fidelity, "test")
        notes.append(f"test set: {config.test}")
    else:
        train, test = read_rows(config.data, config.fidelity, "train"), []
    train = draw(train, config.split.max_train, config.seed)
    train += [row for name in config.relative for row in read_rows(name, config.fidelity, "train")]
    train, test = with_equal_grouped(train, test, config.checks.duplicate_tolerance, notes)
    folds = num_folds(config, len(train))
    if test:
        test = draw(test, config.split.max_test, config.seed)
    elif is_dataset(config.data) or config.test:
        raise ValueError(f"{config.test or config.data}: no test structure has a label at '{config.fidelity}'")
    elif folds == 0:
        train, test = hold_out(train, config.split.test_fraction, config.seed, "test", notes)
    return TargetSet(train, test, sources, notes, folds)


def with_equal_grouped(
    train: list[Reaction], test: list[Reaction], tolerance: float, notes: list[str]
) -> tuple[list[Reaction], list[Reaction]]:
    """Return the rows where those of one geometry have one group, so that no division puts them on two sides."""
    rows = [*train, *test]
    absolute = [i for i, row in enumerate(rows) if row.is_absolute]
    groups = {row.group: row.group for row in rows}

    def root(group: str) -> str:
        while groups[group] != group:
            group = groups[group]
        return group

    merged = 0
    for a, b in equal_geometries([rows[i].structures[0] for i in absolute], tolerance):
        first, second = root(rows[absolute[a]].group), root(rows[absolute[b]].group)
        if first != second:
            groups[second] = first
            merged += 1
    if merged:
        notes.append(f"{merged} pairs of groups share a geometry and are treated as one molecule")
        train = [dataclasses.replace(row, group=root(row.group)) for row in train]
    return train, test


def read_rows(name: str, fidelity: str, split: str) -> list[Reaction]:
    """Return the labels of a dataset's split, of a file of structures, or of a file of relative energies.

    Raises ValueError naming the structures without an energy, and what the readers raise.
    """
    if is_reaction_file(name):
        return read_reactions(name, fidelity)
    if is_dataset(name) and split == "test":  # with the labels of other fidelities, on which forgetting is measured
        read_manifest(name).entry(fidelity)
        structures = [structure for structure in read_any(name, split=split) if fidelity in structure.labels]
    else:
        structures = read_any(name, fidelity, split=split if is_dataset(name) else None)
    require_energies(structures, fidelity, name)
    return absolute_rows(structures, fidelity)


def absolute_rows(structures: Sequence[Structure], fidelity: str) -> list[Reaction]:
    """Return the total energies of labelled structures as rows."""
    energies = [(structure, structure.labels[fidelity].energy) for structure in structures]
    return [Reaction.absolute(structure, energy) for structure, energy in energies if energy is not None]


def digest(name: str) -> str:
    """Return the SHA-256 of a file, of a dataset's manifest (which holds those of its shards), or of the digests of all
    files of a set of relative energies."""
    path = resolve_dataset(name) / "dataset.yaml" if is_dataset(name) else Path(name)
    if is_reaction_file(path):
        return hashlib.sha256("".join(map(file_sha256, reaction_sources(path))).encode()).hexdigest()
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


def training_view(rows: Sequence[Reaction], fidelity: str, use_forces: bool) -> list[Reaction]:
    """Return the rows with structures that have only the labels that may be trained on.

    A structure that several rows share stays one object.
    """
    seen: dict[int, Structure] = {}
    for structure in structures_of(rows):
        labels = structure.labels.get(fidelity, Labels())
        kept = Labels(energy=labels.energy, forces=labels.forces if use_forces else None)
        seen[id(structure)] = dataclasses.replace(structure, labels={fidelity: kept})
    return [dataclasses.replace(row, structures=tuple(seen[id(s)] for s in row.structures)) for row in rows]


def draw(items: list[T], count: int, seed: int) -> list[T]:
    """Return `count` items drawn at random in their first order; all when `count` is 0 or not smaller."""
    if count == 0 or count >= len(items):
        return items
    chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[:count])
    return [items[i] for i in chosen]


def num_folds(config: FinetuneConfig, num_rows: int) -> int:
    """Return the number of folds, 0 for a single held-out validation set."""
    if config.split.folds >= 0:
        return config.split.folds
    return AUTO_FOLDS if num_rows < AUTO_FOLDS_BELOW or config.uncertainty == "ensemble" else 0


class Grouped(Protocol):
    """What can be divided: a structure or a row."""

    @property
    def group(self) -> str: ...


G = TypeVar("G", bound=Grouped)


def hold_out(items: list[G], fraction: float, seed: int, name: str, notes: list[str]) -> tuple[list[G], list[G]]:
    """Return (kept, held out): whole molecules, drawn at random, until about `fraction` of the items is held out.

    A molecule that would make it much more than that is kept; where all are so large, the smallest is held out. One
    molecule alone is divided item by item, which a note says. Raises ValueError for fewer than two items.
    """
    units = units_of(items, 2, name, notes)
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    wanted = max(1, round(fraction * len(items)))
    names = sorted(members)
    held: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(names)):
        if len(held) < wanted and len(held) + len(members[names[i]]) <= 1.5 * wanted + 1:
            held += members[names[i]]
    held = held or min(members.values(), key=len)
    if not 0.5 * wanted <= len(held) <= 2 * wanted:
        notes.append(f"{name}: {len(held)} of {len(items)} rows are held out, because molecules stay whole")
    chosen = set(held)
    return [item for i, item in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]


def units_of(items: Sequence[Grouped], parts: int, purpose: str, notes: list[str]) -> list[str]:
    """Return what may not be divided: each item's group, or the item itself where there are fewer groups than parts.

    Raises ValueError for fewer items than parts.
    """
    if len(items) < parts:
        raise ValueError(
            f"{purpose}: expected at least {parts} structures to divide, found {len(items)}; give more data"
        )
    units = [item.group for item in items]
    if len(set(units)) >= parts:
        return units
    notes.append(
        f"{purpose}: only {len(set(units))} molecules, so it is divided by structure: "
        "its errors do not tell about other molecules"
    )
    return [str(i) for i in range(len(items))]


def partition(items: Sequence[Grouped], parts: int, seed: int, notes: list[str], purpose: str) -> list[list[int]]:
    """Divide the indices of the items into `parts` of about equal size; the items of a group stay together.

    A set with fewer groups than parts cannot be divided so; it is divided item by item, which a note says.
    Raises ValueError for fewer items than parts.
    """
    if len(items) < parts:
        raise ValueError(
            f"{purpose}: expected at least {parts} structures to divide, found {len(items)}; give more data"
        )
    units = [item.group for item in items]
    if len(set(units)) < parts:
        notes.append(
            f"{purpose}: only {len(set(units))} molecules, so it is divided by structure: "
            "its errors do not tell about other molecules"
        )
        units = [str(i) for i in range(len(items))]
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    filled: list[list[int]] = [[] for _ in range(parts)]
    for unit in sorted((names[i] for i in order), key=lambda name: -len(members[name])):
        min(filled, key=len).extend(members[unit])  # largest group first into the emptiest part
    return [sorted(part) for part in filled]
