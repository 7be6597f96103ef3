"""The dataset report that `rung data inspect` prints: labels, reference energies, outliers, duplicates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rung.data.manifest import FidelityEntry, Manifest, read_manifest
from rung.data.read import read_dataset
from rung.data.reference_energy import SUSPICIOUS_Z, outliers
from rung.data.structure import Structure

_SHOWN = 10  # rows of a list of findings; the rest is counted


def dataset_report(datasets: Sequence[str | Path]) -> str:
    """Return the report of one or several datasets as text; duplicates are looked for across all of them."""
    lines: list[str] = []
    places: dict[bytes, list[tuple[str, str]]] = defaultdict(list)  # geometry -> (dataset and split, key)
    for dataset in datasets:
        manifest = read_manifest(dataset)
        lines += _summary(manifest)
        everything: list[Structure] = []
        for split in manifest.splits:
            members = list(read_dataset(dataset, split=split))
            for structure in members:
                places[geometry_digest(structure)].append((f"{manifest.name}/{split}", structure.key))
            everything += members
        for fidelity in manifest.fidelities:
            lines += _outlier_lines(everything, fidelity)
    return "\n".join([*lines, *_duplicate_lines(places)])


def geometry_digest(structure: Structure) -> bytes:
    """Return a digest of elements, relative positions (to 1e-3 angstrom), cell, charge and multiplicity."""
    lengths = np.concatenate([structure.positions - structure.positions[0], structure.cell])
    state = np.array([*structure.pbc, structure.charge, structure.multiplicity], np.int64)
    digest = hashlib.blake2b(structure.numbers.tobytes())
    digest.update(np.rint(lengths * 1000).astype(np.int64).tobytes())
    digest.update(state.tobytes())
    return digest.digest()


def _summary(manifest: Manifest) -> list[str]:
    from ase.data import chemical_symbols

    shards = manifest.shards
    lines = [
        f"dataset {manifest.name}, version {manifest.version}, licence {manifest.licence or 'not stated'}",
        f"  source: {manifest.source or 'not stated'}",
        "  atoms: " + ", ".join(f"{chemical_symbols[z]} {count}" for z, count in manifest.elements.items()),
        f"  {'split':<8}{'structures':>12}{'atoms':>12}{f'edges({manifest.cutoff:g} A)':>16}{'packs':>8}{'shards':>8}",
    ]
    for split in manifest.splits:
        part = [shard for shard in shards if shard.split == split]
        structures, atoms = sum(s.structures for s in part), sum(s.atoms for s in part)
        edges, packs = sum(s.edges for s in part), sum(s.packs for s in part)
        lines.append(f"  {split:<8}{structures:>12}{atoms:>12}{edges:>16}{packs:>8}{len(part):>8}")
    for name, entry in manifest.fidelities.items():
        lines += _fidelity_lines(name, entry, manifest.elements)
    return lines


def _fidelity_lines(name: str, entry: FidelityEntry, elements: Iterable[int]) -> list[str]:
    from ase.data import chemical_symbols

    level = "/".join(part for part in (entry.descriptor.method, entry.descriptor.basis) if part)
    lines = [f"  fidelity {name} ({level or 'method not stated'})"]
    for label, counts in (("energies", entry.num_energies), ("forces", entry.num_forces)):
        lines.append(f"    {label}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    if entry.e0:
        values = ", ".join(f"{chemical_symbols[z]} {value:.4f}" for z, value in entry.e0.items())
        lines.append(f"    E0 in eV ({entry.e0_source.replace('_', ' ')}): {values}")
        spread = f"mean {entry.energy_mean:.4f}, standard deviation {entry.energy_std:.4f}"
        lines.append(f"    E - sum E0 in eV/atom: {spread}")
        if absent := [chemical_symbols[z] for z in elements if z not in entry.e0]:
            lines.append(f"    no E0 for {', '.join(absent)}: not among the structures it was taken on")
    if entry.e0_note:
        lines.append(f"    note: {entry.e0_note}")
    if entry.force_rms is not None:
        lines.append(f"    forces in eV/angstrom: RMS {entry.force_rms:.4f}, largest {entry.force_max:.2f}")
    return lines


def _outlier_lines(structures: Sequence[Structure], fidelity: str) -> list[str]:
    labelled = [(s, e) for s in structures if fidelity in s.labels and (e := s.labels[fidelity].energy) is not None]
    if not labelled:
        return []
    found = outliers([s.numbers for s, _ in labelled], [energy for _, energy in labelled])
    found.sort(key=lambda outlier: -abs(outlier.deviation))
    lines = [f"  energy outliers at {fidelity} (robust z-score over {SUSPICIOUS_Z:g}): {len(found)}"]
    for outlier in found[:_SHOWN]:
        key = labelled[outlier.index][0].key
        lines.append(f"    {key}: {outlier.deviation:+.3f} eV/atom from what composition explains, z {outlier.z:.0f}")
    return lines


def _duplicate_lines(places: dict[bytes, list[tuple[str, str]]]) -> list[str]:
    repeated = [found for found in places.values() if len(found) > 1]
    across = [found for found in repeated if len({place for place, _ in found}) > 1]
    lines = [f"duplicate geometries: {len(repeated)}, of which across splits or datasets: {len(across)}"]
    for found in across[:_SHOWN]:
        lines.append("  " + " = ".join(f"{key} ({place})" for place, key in found))
    return lines
