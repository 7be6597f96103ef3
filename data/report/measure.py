"""First reading of a dataset, table by table: counts, histograms, outliers, and the sketch of every structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from rung.data.manifest import FidelityEntry, Manifest, read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.reference_energy import SUSPICIOUS_Z, Compositions, RobustReference
from rung.data.report import fingerprint
from rung.data.report.consistency import CloseGeometries
from rung.data.report.offset import Differences, binding
from rung.data.report.result import (
    DatasetReport,
    ElementCounts,
    ElementLabels,
    EnergyOutlier,
    FidelityReport,
    Histogram,
    Offset,
    SplitCounts,
)
from rung.data.shard import read_packs
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import LABEL_KINDS, Strings, StructureTable
from rung.data.verify import file_fault

Array = NDArray[Any]

_BINS = 60
_SPAN = 5.0  # standard deviations on either side that a histogram shows
_PER_DECADE = 8  # bins of force norms
_NORM_EDGES = np.logspace(-4, 3, 7 * _PER_DECADE + 1)  # eV/angstrom
_KEPT_OUTLIERS = 10
_FIT_STRUCTURES = 50_000  # energies of one fidelity whose outliers are looked for together
_MAX_SIZE = 1 << 20  # atoms; larger structures count as of this size


@dataclass(frozen=True)
class Sketches:
    """What is kept of every structure of a dataset for the search of duplicates: 28 bytes each."""

    keys: NDArray[np.uint64]  # [M], `fingerprint.composition_keys`
    sketches: NDArray[np.float32]  # [M, 5], `fingerprint.sketch`


@dataclass(frozen=True)
class Measured:
    """One dataset after the first reading."""

    dataset: str | Path
    manifest: Manifest
    report: DatasetReport
    offsets: list[Offset]  # between its fidelities
    sketches: Sketches
    pack_sizes: list[int]  # structures in each pack, in order


def packs(dataset: str | Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (split, name for errors, bytes) of each pack of a dataset in order, without a look at the digests."""
    folder = resolve_dataset(dataset)
    for shard in read_manifest(folder).shards:
        for name, data in read_packs(folder / shard.file):
            yield shard.split, f"{shard.file}: {name}", data


def element_counts(table: StructureTable) -> NDArray[np.int32]:
    """Return the atoms of each element in each structure, [M, 119]."""
    width = MAX_ATOMIC_NUMBER + 1
    flat = np.bincount(table.structure * width + table.numbers, minlength=len(table) * width)
    return flat.reshape(len(table), width).astype(np.int32)


def measure(dataset: str | Path, title: str) -> Measured:
    """Read a dataset once and return what it holds, under the name `title`.

    Raises ValueError for a shard that is not as its manifest says.
    """
    folder = resolve_dataset(dataset)
    manifest = replace(read_manifest(folder), name=title)
    for shard in manifest.shards:
        if fault := file_fault(folder / shard.file, shard):
            raise ValueError(f"{folder}: {fault}")
    tally = _Tally({name: _FidelityTally(entry) for name, entry in manifest.fidelities.items()})
    for split, place, data in packs(folder):
        tally.add(decode(data, place), split)
    sketches = Sketches(np.concatenate(tally.keys), np.concatenate(tally.sketches))
    offsets = [
        Offset(manifest.name, a, manifest.name, b, sums.number, *sums.summary())
        for (a, b), sums in tally.differences.items()
        if sums.number
    ]
    return Measured(
        dataset, manifest, _dataset_report(manifest, tally), offsets, sketches, [len(k) for k in tally.keys]
    )


class _Energies(NamedTuple):
    """Energies of some structures that wait until there are enough for a fit."""

    compositions: Compositions
    energies: Array  # eV
    keys: Strings


@dataclass
class _FidelityTally:
    """What the tables read so far hold at one fidelity."""

    entry: FidelityEntry
    labels: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, split)
    element_energies: Array = field(default_factory=lambda: np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64))
    element_forces: Array = field(default_factory=lambda: np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64))
    histograms: dict[str, Histogram] = field(default_factory=dict)
    waiting: list[_Energies] = field(default_factory=list)
    num_outliers: int = 0
    outliers: list[EnergyOutlier] = field(default_factory=list)

    def add(self, name: str, table: StructureTable, counts: NDArray[np.int32], split: str) -> None:
        has = {kind: table.has(kind, name) for kind in LABEL_KINDS}
        for kind, found in has.items():
            self.labels[kind, split] += int(found.sum())
        self.element_energies += (counts[has["energy"]] > 0).sum(axis=0)
        self.element_forces += (counts[has["forces"]] > 0).sum(axis=0)
        if has["energy"].any():
            self._add_energies(table.where(has["energy"]), counts[has["energy"]], name)
        if has["forces"].any():
            forces = table.where(has["forces"]).labels[f"forces.{name}"].astype(np.float64)
            self._add_forces(forces)

    def settle(self) -> None:
        """Look for outliers among the energies that wait."""
        if not self.waiting:
            return
        compositions = Compositions.concatenate([some.compositions for some in self.waiting])
        energies = np.concatenate([some.energies for some in self.waiting])
        if reference := RobustReference.fit(compositions, energies):
            deviations = reference.deviations(compositions, energies)
            far = np.flatnonzero(np.abs(deviations) > SUSPICIOUS_Z * reference.spread)
            self.num_outliers += len(far)
            far = far[np.argsort(-np.abs(deviations[far]), kind="stable")][:_KEPT_OUTLIERS]
            keys = [key for some in self.waiting for key in some.keys.tolist()] if len(far) else []
            found = [(keys[i], float(deviations[i])) for i in far]
            self.outliers += [EnergyOutlier(key, value, abs(value) / reference.spread) for key, value in found]
            self.outliers = sorted(self.outliers, key=lambda o: -abs(o.deviation))[:_KEPT_OUTLIERS]
        self.waiting = []

    def _add_energies(self, table: StructureTable, counts: NDArray[np.int32], name: str) -> None:
        energies = table.labels[f"energy.{name}"]
        self.waiting.append(_Energies(Compositions.of(table.numbers, table.num_atoms), energies, table.keys))
        sizes = np.cumsum([len(some.energies) for some in self.waiting])
        if sizes[-1] >= 2 * _FIT_STRUCTURES:  # what is left at the end is then enough for a fit of its own
            middle = int(np.searchsorted(sizes, _FIT_STRUCTURES)) + 1
            self.waiting, rest = self.waiting[:middle], self.waiting[middle:]
            self.settle()
            self.waiting = rest
        if self.entry.energy_mean is not None:
            half = _SPAN * max(self.entry.energy_std or 0.0, 1e-3)
            edges = np.linspace(self.entry.energy_mean - half, self.entry.energy_mean + half, _BINS + 1)
            self._count("energies", binding(energies, counts, self.entry.e0), edges)

    def _add_forces(self, forces: Array) -> None:
        half = _SPAN * max(self.entry.force_rms or float(np.sqrt(np.mean(forces**2))), 1e-3)
        self._count("components", forces.ravel(), np.linspace(-half, half, _BINS + 1))
        self._count("norms", np.sqrt((forces**2).sum(axis=1)), _NORM_EDGES)

    def _count(self, name: str, values: Array, edges: Array) -> None:
        """Add values to a histogram, whose edges stay those of its first values."""
        old = self.histograms.get(name) or Histogram(edges.tolist(), [0] * (len(edges) - 1))
        counts = np.histogram(values, np.array(old.edges))[0] + old.counts
        below, above = int((values < old.edges[0]).sum()), int((values > old.edges[-1]).sum())
        self.histograms[name] = Histogram(old.edges, counts.tolist(), old.below + below, old.above + above)


@dataclass
class _Tally:
    """What the tables of a dataset read so far hold."""

    fidelities: dict[str, _FidelityTally]
    structures: Array = field(default_factory=lambda: np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64))  # with the element
    atoms: Array = field(default_factory=lambda: np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64))
    sizes: Counter[int] = field(default_factory=Counter)
    differences: dict[tuple[str, str], Differences] = field(default_factory=dict)
    close: CloseGeometries = field(default_factory=CloseGeometries)
    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    sketches: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, table: StructureTable, split: str) -> None:
        counts = element_counts(table)
        self.structures += (counts > 0).sum(axis=0)
        self.atoms += counts.sum(axis=0)
        self.sizes.update(np.minimum(table.num_atoms, _MAX_SIZE).tolist())
        for name, tally in self.fidelities.items():
            tally.add(name, table, counts, split)
        self._add_differences(table, counts)
        self.close.add(table)
        self.keys.append(fingerprint.composition_keys(table, counts))
        self.sketches.append(fingerprint.sketch(table, fingerprint.environments(table)))

    def _add_differences(self, table: StructureTable, counts: NDArray[np.int32]) -> None:
        energies = {
            name: binding(table.labels[f"energy.{name}"], counts, tally.entry.e0)
            for name, tally in self.fidelities.items()
            if f"energy.{name}" in table.labels
        }
        fractions = counts / table.num_atoms[:, None]
        for a, b in combinations(energies, 2):
            difference = energies[b] - energies[a]
            both = np.isfinite(difference)
            self.differences.setdefault((a, b), Differences()).add(fractions[both], difference[both])


def _dataset_report(manifest: Manifest, tally: _Tally) -> DatasetReport:
    return DatasetReport(
        name=manifest.name,
        version=manifest.version,
        source=manifest.source,
        licence=manifest.licence,
        cutoff=manifest.cutoff,
        splits={split: _split_counts(manifest, split) for split in manifest.splits},
        elements={
            chemical_symbols[z]: ElementCounts(int(tally.structures[z]), int(tally.atoms[z]))
            for z in np.flatnonzero(tally.atoms)
        },
        sizes=_size_histogram(tally.sizes),
        fidelities={name: _fidelity_report(name, manifest, tally) for name in manifest.fidelities},
    )


def _split_counts(manifest: Manifest, split: str) -> SplitCounts:
    shards = manifest.shards_of(split)
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("structures", "atoms", "edges", "packs")}
    return SplitCounts(**totals, shards=len(shards))


def _fidelity_report(name: str, manifest: Manifest, tally: _Tally) -> FidelityReport:
    found, entry = tally.fidelities[name], manifest.fidelities[name]
    found.settle()
    kinds = [kind for kind in LABEL_KINDS if any(found.labels[kind, split] for split in manifest.splits)]
    return FidelityReport(
        level="/".join(part for part in (entry.descriptor.method, entry.descriptor.basis) if part),
        labels={kind: {split: found.labels[kind, split] for split in manifest.splits} for kind in kinds},
        elements={
            chemical_symbols[z]: ElementLabels(int(found.element_energies[z]), int(found.element_forces[z]))
            for z in np.flatnonzero(tally.atoms)
        },
        e0=_by_symbol(entry.e0),
        e0_source=entry.e0_source,
        e0_residual=entry.e0_residual,
        e0_fit=_by_symbol(entry.e0_fit),
        e0_note=entry.e0_note,
        energy_mean=entry.energy_mean,
        energy_std=entry.energy_std,
        force_rms=entry.force_rms,
        force_max=entry.force_max,
        energies=found.histograms.get("energies"),
        components=found.histograms.get("components"),
        norms=_whole_decades(found.histograms.get("norms")),
        num_outliers=found.num_outliers,
        outliers=found.outliers,
        consistency=tally.close.consistency(name),
    )


def _by_symbol(energies: dict[int, float]) -> dict[str, float]:
    return {chemical_symbols[z]: value for z, value in energies.items()}


def _whole_decades(norms: Histogram | None) -> Histogram | None:
    """Return the histogram of force norms without the empty decades on either side."""
    if norms is None or not any(norms.counts):
        return norms
    decades = np.flatnonzero(norms.counts) // _PER_DECADE
    start, stop = int(decades[0]) * _PER_DECADE, int(decades[-1] + 1) * _PER_DECADE
    return replace(norms, edges=norms.edges[start : stop + 1], counts=norms.counts[start:stop])


def _size_histogram(sizes: Counter[int]) -> Histogram:
    """Return structures by their number of atoms, in at most 60 bins of equally many whole numbers."""
    low, high = min(sizes), max(sizes)
    width = -(-(high - low + 1) // _BINS)
    counts = [0] * (-(-(high - low + 1) // width))
    for size, number in sizes.items():
        counts[(size - low) // width] += number
    return Histogram([low - 0.5 + width * i for i in range(len(counts) + 1)], counts)
