"""Build a dataset: structures -> validate -> split by group -> packs -> shards and `dataset.yaml`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rung.data.fidelity import Fidelity, check_name, unknown_fidelity
from rung.data.manifest import MANIFEST_FILE, FidelityEntry, Manifest, read_manifest, write_manifest
from rung.data.reference_energy import EXTREME_DEVIATION, check_energies, fit_e0
from rung.data.shard import EDGE_CUTOFF, ShardInfo, write_shards
from rung.data.split import SPLITS, SplitFractions, split_of_group
from rung.data.structure import Structure, validate

_DIGITS = 9  # decimals of fitted and averaged numbers: what differs between linear algebra libraries is rounded off
_MAX_BINDING = 30.0  # eV/atom; no compound is bound so strongly (diamond: 7.4): the E0s are of another method or unit


def build_dataset(
    structures: Iterable[Structure],
    folder: Path,
    *,
    name: str,
    fidelities: Mapping[str, Fidelity],
    split: Callable[[Structure], str] | SplitFractions = SplitFractions(),  # noqa: B008 (frozen)
    e0: Mapping[str, Mapping[int, float]] | None = None,
    version: str = "1",
    source: str = "",
    doi: str = "",
    licence: str = "",
    citation: str = "",
    description: str = "",
    pack_atoms: int = 16384,
    shard_bytes: int = 100_000_000,
    max_energy_deviation: float = EXTREME_DEVIATION,
    sort_by_labels: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write the shards and the manifest of `structures` into `folder` and return the manifest.

    All structures are held in memory. They are stored in the order of a hash of their keys, so that a pack mixes
    molecules and the bytes do not depend on the order in which labels were computed. `split` returns 'train', 'val' or
    'test' (a function may stratify; it must keep a group together). `e0` gives isolated-atom energies in eV per
    fidelity where they are known; other fidelities are fitted on train. `sort_by_labels` stores structures with the
    same fidelities side by side: fewer bytes, as a pack spends none on a fidelity it lacks, but only for a dataset of
    few packs, because consumers that deal whole packs would get unequal shares of the sparse fidelities.

    Energies that composition does not explain are logged by name; beyond `max_energy_deviation` eV/atom they are
    refused. Raises ValueError naming the structure for this and every other input that cannot be right, and
    FileExistsError when the folder holds a dataset and `overwrite` is false. The manifest is written last.
    """
    check_name(name)
    if (folder / MANIFEST_FILE).is_file() and not overwrite:
        raise FileExistsError(f"{folder} already holds a dataset; choose another folder or pass overwrite")
    structures = sorted(structures, key=lambda s: (hashlib.blake2b(s.key.encode()).digest(), s.key))
    _check_structures(structures, fidelities)
    if sort_by_labels:
        structures.sort(key=lambda s: (-len(s.labels), sorted(s.labels)))  # the sparse fidelities fill the same packs
    by_split = _split(structures, split)
    entries = {
        fidelity: describe_fidelity(by_split, descriptor, (e0 or {}).get(fidelity))
        for fidelity, descriptor in fidelities.items()
    }
    for unknown in set(e0 or {}) - set(fidelities):
        raise unknown_fidelity(unknown, fidelities)
    for fidelity in fidelities:
        check_energies(structures, fidelity, max_energy_deviation)
    shards: list[ShardInfo] = []
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".building-", dir=folder) as beside:  # a failure leaves the old dataset whole
        for part, members in by_split.items():
            shards += write_shards(members, Path(beside), part, pack_atoms=pack_atoms, shard_bytes=shard_bytes)
        _clear(folder)
        for shard in shards:
            os.replace(Path(beside) / shard.file, folder / shard.file)
    elements: Counter[int] = Counter()
    for structure in structures:
        elements.update(structure.numbers.tolist())
    manifest = Manifest(
        name=name,
        version=version,
        source=source,
        doi=doi,
        licence=licence,
        citation=citation,
        description=description,
        cutoff=EDGE_CUTOFF,
        fidelities=entries,
        elements=dict(sorted(elements.items())),
        splits=tuple(by_split),
        shards=shards,
    )
    write_manifest(manifest, folder)
    return manifest


def describe_fidelity(
    by_split: Mapping[str, Sequence[Structure]], descriptor: Fidelity, known_e0: Mapping[int, float] | None
) -> FidelityEntry:
    """Return counts, E0s and statistics of one fidelity, taken on train, or on everything when train has no labels."""
    name = descriptor.name
    labelled = {part: [s for s in members if name in s.labels] for part, members in by_split.items()}
    chosen, statistics_split = labelled.get("train", []), "train"
    if not chosen:
        chosen, statistics_split = [s for members in labelled.values() for s in members], "all"
    if not chosen:
        raise ValueError(f"fidelity '{name}': no structure has a label at it; leave it out, or check the name")
    forces = [f.ravel() for s in chosen if (f := s.labels[name].forces) is not None]
    components = np.concatenate(forces).astype(np.float64) if forces else None
    return FidelityEntry(
        descriptor=descriptor,
        num_energies={p: sum(s.labels[name].energy is not None for s in m) for p, m in labelled.items()},
        num_forces={p: sum(s.labels[name].forces is not None for s in m) for p, m in labelled.items()},
        statistics_split="train" if statistics_split == "train" else "all",
        force_rms=None if components is None else round(float(np.sqrt(np.mean(components**2))), _DIGITS),
        force_max=None if components is None else float(np.abs(components).max()),
        **_energy_statistics(chosen, name, known_e0),
    )


def _energy_statistics(chosen: Sequence[Structure], name: str, known_e0: Mapping[int, float] | None) -> dict[str, Any]:
    labelled = [s for s in chosen if s.labels[name].energy is not None]
    if not labelled:
        return {}
    numbers = [s.numbers for s in labelled]
    energies = np.array([s.labels[name].energy for s in labelled], np.float64)
    fit = fit_e0(numbers, energies)
    fitted = {z: round(value, _DIGITS) for z, value in fit.e0.items()}
    e0 = fitted if known_e0 is None else dict(sorted(known_e0.items()))
    if missing := sorted(set(fit.e0) - set(e0)):
        raise ValueError(f"fidelity '{name}': isolated-atom energies are given, but none for Z = {missing}")
    reference = np.array([sum(e0[z] for z in atoms.tolist()) for atoms in numbers])
    residual = (energies - reference) / np.array([len(atoms) for atoms in numbers])
    if known_e0 is not None and abs(typical := float(np.median(residual))) > _MAX_BINDING:
        raise ValueError(
            f"fidelity '{name}': energies differ from the isolated-atom energies by {typical:.4g} eV/atom, expected "
            f"less than {_MAX_BINDING:g}; are both in eV and of the same method and code?"
        )
    return {
        "e0": e0,
        "e0_source": "least_squares" if known_e0 is None else "isolated_atoms",
        "e0_residual": round(float(np.sqrt(np.mean(residual**2))), _DIGITS),
        "e0_fit": fitted,
        "e0_note": fit.note,
        "energy_mean": round(float(residual.mean()), _DIGITS),
        "energy_std": round(float(residual.std()), _DIGITS),
    }


def _check_structures(structures: Sequence[Structure], fidelities: Mapping[str, Fidelity]) -> None:
    if not structures:
        raise ValueError("build: expected at least one structure, found none")
    for name, descriptor in fidelities.items():
        if name != descriptor.name:
            raise ValueError(f"build: fidelity '{name}' is described under another name, '{descriptor.name}'")
    for previous, structure in pairwise(structures):  # sorted: equal keys are neighbours
        if previous.key == structure.key:
            raise ValueError(
                f"build: key '{structure.key}' names two structures, and keys must be unique in a dataset; keys of a "
                "file's frames begin with its name, so rename one of two files of the same name"
            )
    for structure in structures:
        validate(structure)
        for fidelity in structure.labels:
            if fidelity not in fidelities:
                raise ValueError(f"structure '{structure.key}': {unknown_fidelity(fidelity, fidelities)}")


def _split(
    structures: Sequence[Structure], split: Callable[[Structure], str] | SplitFractions
) -> dict[str, list[Structure]]:
    """Return the non-empty splits in the order train, val, test; raise ValueError when a group falls into two."""
    parts: dict[str, list[Structure]] = {part: [] for part in SPLITS}
    part_of_group: dict[str, str] = {}
    for structure in structures:
        if isinstance(split, SplitFractions):
            part = split_of_group(structure.group, (split.train, split.val, split.test), split.seed)
        else:
            part = split(structure)
        if part not in parts:
            raise ValueError(f"structure '{structure.key}': split: expected one of {', '.join(SPLITS)}, found {part!r}")
        if part_of_group.setdefault(structure.group, part) != part:
            raise ValueError(
                f"group '{structure.group}': in splits '{part_of_group[structure.group]}' and '{part}'; "
                "a group must stay in one split, or the test set leaks into training"
            )
        parts[part].append(structure)
    return {part: members for part, members in parts.items() if members}


def _clear(folder: Path) -> None:
    """Remove the dataset that `folder` holds, manifest first, so that no manifest ever describes missing shards."""
    if not (folder / MANIFEST_FILE).is_file():
        return
    shards = read_manifest(folder).shards
    (folder / MANIFEST_FILE).unlink()
    for shard in shards:
        (folder / shard.file).unlink(missing_ok=True)
