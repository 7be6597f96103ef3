"""What the manifest of a build says, put together from the records of its parts and shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rung.data.fidelity import Fidelity
from rung.data.manifest import FidelityEntry, Manifest
from rung.data.shard import EDGE_CUTOFF
from rung.data.split import SPLITS
from rung.data.statistics import LabelSums, Reference
from rung.data.unfinished import PartRecord, ShardRecord

if TYPE_CHECKING:
    from rung.data.build import BuildConfig


def describe(
    config: BuildConfig,
    fidelities: Mapping[str, Fidelity],
    parts: Sequence[PartRecord],
    shards: Sequence[ShardRecord],
    references: Mapping[str, Reference],
    statistics_splits: Mapping[str, tuple[str, ...]],
) -> Manifest:
    """Return the manifest of a build from the records of its pieces; `statistics_splits` are those of each fidelity.

    Raises ValueError for a fidelity at which no structure has a label.
    """
    elements, rejected = Counter[int](), Counter[str]()
    for shard in shards:
        elements.update(shard.elements)
    for part in parts:
        rejected.update(part.rejected)
    return Manifest(
        name=config.name,
        version=config.version,
        source=config.source,
        doi=config.doi,
        licence=config.licence,
        citation=config.citation,
        description=config.description,
        cutoff=EDGE_CUTOFF,
        fidelities={
            name: _entry(descriptor, shards, references.get(name), name in config.e0, statistics_splits[name])
            for name, descriptor in fidelities.items()
        },
        elements=dict(sorted(elements.items())),
        splits=tuple(split for split in SPLITS if any(shard.info.split == split for shard in shards)),
        shards=[shard.info for shard in shards],
        rejected=dict(sorted(rejected.items())),
    )


def _entry(
    descriptor: Fidelity,
    shards: Sequence[ShardRecord],
    reference: Reference | None,
    isolated: bool,
    statistics_splits: tuple[str, ...],
) -> FidelityEntry:
    name = descriptor.name
    by_split: dict[str, LabelSums] = {}
    for shard in shards:
        by_split.setdefault(shard.info.split, LabelSums())
        by_split[shard.info.split] += shard.sums.get(name, LabelSums())
    if not any(sum(shard.info.labels.get(name, ())) for shard in shards):
        raise ValueError(f"fidelity '{name}': no structure has a label at it; leave it out, or check the name")
    chosen = sum((by_split.get(split, LabelSums()) for split in statistics_splits), LabelSums())
    entry: dict[str, Any] = dict(chosen.force_statistics())
    if reference is not None:
        entry |= {
            "e0": reference.e0,
            "e0_source": "isolated_atoms" if isolated else "least_squares",
            "e0_fit": reference.fit.e0,
            "e0_note": reference.fit.note,
            **chosen.energy_statistics(),
        }
    return FidelityEntry(
        descriptor=descriptor,
        num_energies={split: sums.num_energies for split, sums in by_split.items()},
        num_forces={split: sums.num_forces for split, sums in by_split.items()},
        statistics_split="train" if statistics_splits == ("train",) else "all",
        **entry,
    )
