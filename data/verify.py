"""Hold a dataset to its manifest: digests, counts, keys, and groups that must stay in one split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rung.data.manifest import FidelityEntry, read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.shard import ShardInfo, file_sha256, read_packs
from rung.data.structure import Structure, validate


def verify(folder: str | Path) -> list[str]:
    """Return every fault of a dataset, one sentence each; an empty list says that all is as the manifest states."""
    folder = resolve_dataset(folder)
    manifest = read_manifest(folder)
    listed = {shard.file for shard in manifest.shards}
    faults = [f"{path.name}: not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    seen = _Seen()
    for shard in manifest.shards:
        fault = file_fault(folder / shard.file, shard)
        faults += [fault] if fault else _content_faults(folder / shard.file, shard, seen)
    faults += [f"key '{key}' names {count} structures" for key, count in seen.keys.items() if count > 1]
    if not faults:  # with a shard lost, every count below would be wrong as well
        faults += _label_faults(manifest.fidelities, seen)
    return faults


@dataclass
class _Seen:
    """What the shards read so far hold."""

    keys: Counter[str] = field(default_factory=Counter)
    split_of_group: dict[str, str] = field(default_factory=dict)
    labels: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (fidelity, energies or forces, split)

    def add(self, structure: Structure, split: str) -> None:
        self.keys[structure.key] += 1
        for fidelity, labels in structure.labels.items():
            self.labels[fidelity, "energies", split] += labels.energy is not None
            self.labels[fidelity, "forces", split] += labels.forces is not None


def file_fault(path: Path, shard: ShardInfo) -> str:
    """Return how a file differs from its row in the manifest (missing, size, digest); empty when it does not."""
    if not path.is_file():
        return f"{shard.file}: missing; fetch or build it again"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{shard.file}: manifest says {shard.bytes} bytes, found {size}; truncated? fetch or build it again"
    if (digest := file_sha256(path)) != shard.sha256:
        return f"{shard.file}: SHA-256 {digest[:12]}..., manifest says {shard.sha256[:12]}...; fetch or build it again"
    return ""


def _content_faults(path: Path, shard: ShardInfo, seen: _Seen) -> list[str]:
    try:
        packs = [decode(data, f"{shard.file}: {name}") for name, data in read_packs(path)]
        structures = [structure for pack in packs for structure in pack]
        for structure in structures:
            validate(structure)
    except ValueError as error:
        return [f"{shard.file}: {error}"]
    faults = []
    found = (len(packs), len(structures), sum(s.num_atoms for s in structures))
    if found != (stated := (shard.packs, shard.structures, shard.atoms)):
        faults.append(f"{shard.file}: packs, structures, atoms: manifest says {stated}, found {found}")
    for group in sorted({s.group for s in structures}):
        if (first := seen.split_of_group.setdefault(group, shard.split)) != shard.split:
            faults.append(f"{shard.file}: group '{group}' is in split '{shard.split}' and in '{first}'")
    for structure in structures:
        seen.add(structure, shard.split)
    return faults


def _label_faults(fidelities: Mapping[str, FidelityEntry], seen: _Seen) -> list[str]:
    stated: Counter[tuple[str, str, str]] = Counter()
    for name, entry in fidelities.items():
        stated.update({(name, "energies", split): count for split, count in entry.num_energies.items()})
        stated.update({(name, "forces", split): count for split, count in entry.num_forces.items()})
    return [
        f"{fidelity}: {label} in split '{split}': manifest says {stated[place]}, found {seen.labels[place]}"
        for place in sorted({*stated, *seen.labels})
        if stated[place] != seen.labels[place]
        for fidelity, label, split in [place]
    ]
