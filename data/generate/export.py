"""Label store -> dataset: shards, manifest and a data card, the same bytes for the same store.

Each level ships the longest prefix of the plan's order in which every calculation has ended. Failures in it are counted
in the card and are no labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.generate.engine import is_affordable, prefixes
from rung.data.generate.levels import ATOM_MULTIPLICITY, LEVELS
from rung.data.generate.store import Geometry, LabelRow, LabelStore
from rung.data.manifest import Manifest
from rung.data.structure import Labels, Structure

CARD_FILE = "README.md"
# Shares of test and val, in structures. Molecules with correlated labels are few: their test share is larger, so that
# the error at the highest fidelity is measured on more than a handful of molecules.
_SHARES = {True: {"test": 0.30, "val": 0.10}, False: {"test": 0.10, "val": 0.10}}
_SPLIT_SEED = 0


@dataclass(frozen=True)
class _Level:
    """What is shipped of one level: rows of its prefix by key (failures included), and the isolated atoms."""

    rows: dict[str, LabelRow]
    e0: dict[int, float]  # atomic number -> eV

    @property
    def failures(self) -> Counter[str]:
        return Counter(row.failure for row in self.rows.values() if row.failure is not None)


def export(
    store_folder: Path, folder: Path, *, name: str, counts: Mapping[str, int | None], options: str = ""
) -> Manifest:
    """Write the dataset `name` and its card into `folder` from the label store in `store_folder`.

    `counts` are the plan's (labels per level), `options` those of the command that made the store, beside the counts.
    Raises ValueError when the store lacks a label of an isolated atom, or has none of a level.
    """
    with LabelStore(store_folder / "labels.sqlite") as store:
        geometries = list(store.geometries())
        seed, versions = store.meta("seed"), store.meta("versions")
        levels = {
            fidelity: _complete_prefix(store.labels(fidelity), fidelity, [geometry.key for geometry in prefix])
            for fidelity, prefix in prefixes(geometries, counts, seed).items()
        }
        molecules = store.molecules()
    shipped_counts = [f"{fidelity}={len(level.rows)}" for fidelity, level in levels.items()]
    command = " ".join(["rung data generate --out WORK --dataset DIR", *options.split(), "--count", *shipped_counts])
    molecular = [_structure(geometry, levels) for geometry in geometries if geometry.smiles]
    structures = [structure for structure in molecular if structure.labels]
    split_of = split_molecules(structures)
    manifest = build_dataset(
        structures,
        folder,
        name=name,
        fidelities={fidelity: _describe(fidelity, versions) for fidelity in levels},
        split=split_of.__getitem__,
        e0={fidelity: level.e0 for fidelity, level in levels.items()},
        source=f"computed with: {command}",
        licence="CC0-1.0",
        description=_description(structures, versions),
        overwrite=True,
    )
    card = _card(manifest, levels, structures, split_of, molecules, command)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return manifest


def split_molecules(structures: Sequence[Structure]) -> dict[str, str]:
    """Return the split of each molecule (group), in the order of a seeded hash, affordable and larger ones apart."""
    sizes = Counter(structure.group for structure in structures)
    affordable = {structure.group: is_affordable(structure.numbers) for structure in structures}
    split: dict[str, str] = {}
    for stratum, shares in _SHARES.items():
        groups = sorted((g for g in sizes if affordable[g] is stratum), key=_hash_of_group)
        total, position = sum(sizes[group] for group in groups), 0
        for group in groups:
            share = position / total
            is_val = share < shares["test"] + shares["val"]
            split[group] = "test" if share < shares["test"] else "val" if is_val else "train"
            position += sizes[group]
    return split


def _hash_of_group(group: str) -> bytes:
    return hashlib.sha256(f"split/{_SPLIT_SEED}/{group}".encode()).digest()


def _complete_prefix(rows: Mapping[str, LabelRow], fidelity: str, keys: Sequence[str]) -> _Level:
    atoms = {number: rows.get(f"atom:{number}") for number in ATOM_MULTIPLICITY}
    e0 = {number: row.energy for number, row in atoms.items() if row is not None and row.energy is not None}
    if missing := sorted(set(atoms) - set(e0)):
        raise ValueError(f"{fidelity}: expected isolated-atom energies, found none for Z = {missing}; continue the run")
    prefix: dict[str, LabelRow] = {}
    for key in keys:
        if key not in rows:
            break
        prefix[key] = rows[key]
    if not prefix:
        raise ValueError(f"{fidelity}: expected labels, found none; continue the run, or pass --count {fidelity}=0")
    return _Level(prefix, e0)


def _structure(geometry: Geometry, levels: Mapping[str, _Level]) -> Structure:
    labels = {}
    for fidelity, level in levels.items():
        row = level.rows.get(geometry.key)
        if row is not None and row.failure is None:
            labels[fidelity] = Labels(energy=row.energy, forces=row.forces)
    return Structure(geometry.key, geometry.smiles, geometry.numbers, geometry.positions, labels=labels)


def _describe(fidelity: str, versions: Mapping[str, str]) -> Fidelity:
    level = LEVELS[fidelity]
    settings = ", ".join(f"{key}={value}" for key, value in level.settings.items())
    return Fidelity(
        name=fidelity,
        method=level.method,
        basis=level.basis,
        dispersion=level.dispersion,
        code=f"{level.code} {versions[level.code.lower()]}",
        description=f"{level.description}; {settings}",
    )


def _description(structures: Sequence[Structure], versions: Mapping[str, str]) -> str:
    groups = {structure.group for structure in structures}
    codes = ", ".join(f"{code} {version}" for code, version in sorted(versions.items()))
    return (
        f"{len(structures)} structures of {len(groups)} neutral closed-shell H, C, N, O molecules: relaxed conformers, "
        f"GFN2-xTB Langevin dynamics at 300-1000 K and normal-mode displacements. Split by molecule. Codes: {codes}. "
        f"Molecules, settings and failures: {CARD_FILE}."
    )


def _card(
    manifest: Manifest,
    levels: Mapping[str, _Level],
    structures: Sequence[Structure],
    split_of: Mapping[str, str],
    molecules: Mapping[str, tuple[int, dict[str, int], str | None]],
    command: str,
) -> str:
    label_rows = [
        [f"`{fidelity}`", entry.descriptor.method, entry.descriptor.basis, entry.descriptor.code]
        + [f"{entry.num_energies.get(part, 0)}" for part in manifest.splits]
        + ["yes" if any(entry.num_forces.values()) else "no", entry.descriptor.description]
        for fidelity, entry in manifest.fidelities.items()
    ]
    failure_rows = [
        [f"`{fidelity}`", reason, str(count)]
        for fidelity, level in levels.items()
        for reason, count in sorted(level.failures.items())
    ]
    dropped: Counter[str] = Counter()
    for _, reasons, error in molecules.values():
        dropped.update(reasons)
        if error is not None:
            dropped[f"molecule: {error}"] += 1
    unfit = [smiles for smiles, (count, _, _) in molecules.items() if not count]
    return f"""# The built-in data

{manifest.description}

Licence: CC0 1.0 (public domain). Units: eV, eV/angstrom. Made with

    {command}

(other code versions, or another processor, give dynamics that part ways after a while: similar structures, not equal).

The energies are total energies; the manifest has those of the isolated atoms, computed at the same levels. Each level
labels a prefix of one random order, so the higher fidelities nest in the lower ones; molecules beyond a size that
CCSD(T) affords have xTB labels only.

## Labels

{_table(["fidelity", "method", "basis", "code", *manifest.splits, "forces", "settings"], label_rows)}

Calculations that failed (no labels were written for them):

{_table(["fidelity", "reason", "calculations"], failure_rows) if failure_rows else "none."}

## Structures

Dropped while sampling, by origin and reason:

{_table(["reason", "structures"], [[reason, str(count)] for reason, count in sorted(dropped.items())])}

Molecules that did not survive embedding or GFN2-xTB relaxation: {_code_list(unfit) or "none"}.

## Molecules

{_table(["split", "molecules (SMILES)"], _molecule_rows(structures, split_of, manifest.splits))}
"""


def _molecule_rows(
    structures: Iterable[Structure], split_of: Mapping[str, str], splits: Iterable[str]
) -> list[list[str]]:
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for structure in structures:
        groups[split_of[structure.group]].add(structure.group)
    return [[split, _code_list(sorted(groups[split], key=lambda smiles: (len(smiles), smiles)))] for split in splits]


def _code_list(texts: Iterable[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
