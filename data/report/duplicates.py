"""Second reading: of the structures with a near one, which are equal, where they are, and whether labels agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rung.data.pack import decode
from rung.data.report import fingerprint
from rung.data.report.measure import Measured, element_counts, packs
from rung.data.report.offset import Differences, binding
from rung.data.report.result import Conflict, Duplicates, Offset, Shared
from rung.data.table import Strings, StructureTable

CONFLICT = 1e-3  # eV/atom
_STEEPNESS = 10.0  # eV/angstrom; what energies per atom may differ by for each angstrom that equal geometries differ by
_EXAMPLES = 3

Index = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Copies:
    """The C structures that are equal to another, sorted by geometry; `place` counts the splits of all datasets."""

    geometry: Index  # [C]
    place: Index  # [C], into `places`
    places: list[tuple[int, str]]  # dataset, split
    names: list[str]  # of the datasets
    keys: Strings  # [C]
    counts: NDArray[np.int32]  # [C, 119]
    energies: dict[tuple[int, str], Floats]  # (dataset, fidelity) -> [C], eV, NaN where there is none
    differs: Floats  # [C], angstrom: how far its geometry's copies are apart

    @property
    def dataset(self) -> Index:
        return np.array([dataset for dataset, _ in self.places], np.int64)[self.place]

    def title(self, copy: int) -> str:
        """Return "dataset/split key"."""
        dataset, split = self.places[self.place[copy]]
        return f"{self.names[dataset]}/{split} {self.keys[copy]}"


def find_duplicates(measured: Sequence[Measured]) -> tuple[Duplicates, list[Offset]]:
    """Return the duplicates within and across datasets, and the offsets between datasets on what they share."""
    copies = _copies(measured)
    if copies is None:
        return Duplicates(0, 0, {}), []
    return _duplicates(copies), _offsets(copies, measured)


def _copies(measured: Sequence[Measured]) -> _Copies | None:
    keys = np.concatenate([m.sketches.keys for m in measured])
    sketches = np.concatenate([m.sketches.sketches for m in measured])
    candidates = fingerprint.near(keys, sketches)
    tables, place, places = _read(measured, candidates)
    if not tables:
        return None
    profiles = np.concatenate([fingerprint.profile(t, fingerprint.environments(t)) for t in tables])
    pairs = fingerprint.twins(keys[candidates], sketches[candidates], profiles)
    geometry = fingerprint.components(len(profiles), pairs)
    chosen = np.unique(pairs)
    if not len(chosen):
        return None
    chosen = chosen[np.argsort(geometry[chosen], kind="stable")]
    _, first, geometry = np.unique(geometry[chosen], return_index=True, return_inverse=True)
    highest, lowest = (f.reduceat(profiles[chosen], first, axis=0) for f in (np.maximum, np.minimum))
    return _Copies(
        geometry=geometry,
        place=place[chosen],
        places=places,
        names=[m.manifest.name for m in measured],
        keys=StructureTable.concatenate(tables).keys.take(chosen),
        counts=np.concatenate([element_counts(t) for t in tables])[chosen],
        energies=_energies(measured, tables, place, places, chosen),
        differs=(highest - lowest).max(axis=1).astype(np.float64)[geometry],
    )


def _read(
    measured: Sequence[Measured], candidates: NDArray[np.bool_]
) -> tuple[list[StructureTable], Index, list[tuple[int, str]]]:
    """Return the candidates as tables, the place of each one, and the places; packs without any are not decoded."""
    places: dict[tuple[int, str], int] = {}
    tables, place, start = [], [], 0
    for number, one in enumerate(measured):
        for (split, name, data), size in zip(packs(one.dataset), one.pack_sizes, strict=True):
            wanted = candidates[start : start + size]
            start += size
            index = places.setdefault((number, split), len(places))
            if wanted.any():
                tables.append(_with_energies_only(decode(data, name).where(wanted)))
                place.append(np.full(len(tables[-1]), index))
    return tables, np.concatenate([*place, np.zeros(0, np.int64)]).astype(np.int64), list(places)


def _with_energies_only(table: StructureTable) -> StructureTable:
    energies = {name: array for name, array in table.labels.items() if name.startswith("energy.")}
    return replace(table, labels=energies)


def _energies(
    measured: Sequence[Measured],
    tables: Sequence[StructureTable],
    place: Index,
    places: Sequence[tuple[int, str]],
    chosen: Index,
) -> dict[tuple[int, str], Floats]:
    """Return the energies of the chosen candidates by dataset and fidelity."""
    found: dict[tuple[int, str], Floats] = {}
    dataset = np.array([number for number, _ in places], np.int64)[place]
    for number, one in enumerate(measured):
        for name in one.manifest.fidelities:
            values = [t.labels.get(f"energy.{name}", np.full(len(t), np.nan)) for t in tables]
            found[number, name] = np.where(dataset == number, np.concatenate(values), np.nan)[chosen]
    return found


def _duplicates(copies: _Copies) -> Duplicates:
    geometries = int(copies.geometry.max()) + 1
    distinct = np.unique(np.stack([copies.geometry, copies.place], axis=1), axis=0)
    across = int((np.bincount(distinct[:, 0], minlength=geometries) > 1).sum())
    repeats = np.bincount(copies.place, minlength=len(copies.places)) - np.bincount(
        distinct[:, 1], minlength=len(copies.places)
    )
    named = [f"{copies.names[dataset]}/{split}" for dataset, split in copies.places]
    return Duplicates(
        geometries=geometries,
        across=across,
        repeats={name: int(count) for name, count in zip(named, repeats, strict=True) if count},
        shared=[shared for a, b in combinations(range(len(named)), 2) if (shared := _shared(copies, a, b))],
        conflicts=[conflict for name in _fidelities(copies) if (conflict := _conflict(copies, name))],
    )


def _shared(copies: _Copies, a: int, b: int) -> Shared | None:
    in_a, in_b = (np.flatnonzero(copies.place == place) for place in (a, b))
    geometries, first, other = np.intersect1d(copies.geometry[in_a], copies.geometry[in_b], return_indices=True)
    if not len(geometries):
        return None
    (dataset_a, split_a), (dataset_b, split_b) = copies.places[a], copies.places[b]
    pairs = zip(in_a[first[:_EXAMPLES]].tolist(), in_b[other[:_EXAMPLES]].tolist(), strict=True)
    return Shared(
        copies.names[dataset_a],
        split_a,
        copies.names[dataset_b],
        split_b,
        len(geometries),
        [(copies.keys[i], copies.keys[j]) for i, j in pairs],
    )


def _fidelities(copies: _Copies) -> list[str]:
    return sorted({name for _, name in copies.energies})


def _conflict(copies: _Copies, fidelity: str) -> Conflict | None:
    """Return the geometries whose copies have unlike energies at a fidelity of one name, wherever they are."""
    total = np.full(len(copies.geometry), np.nan)
    for (_, name), values in copies.energies.items():
        if name == fidelity:
            total = np.where(np.isnan(values), total, values)
    known = np.flatnonzero(np.isfinite(total))
    if not len(known):
        return None
    energy = total[known] / copies.counts[known].sum(axis=1)
    order = np.lexsort((energy, copies.geometry[known]))
    known, energy = known[order], energy[order]
    geometry = copies.geometry[known]
    first = np.flatnonzero(np.diff(geometry, prepend=-1))
    last = np.append(first[1:], len(known)) - 1
    spread = energy[last] - energy[first]
    bad = np.flatnonzero(spread > CONFLICT + _STEEPNESS * copies.differs[known[first]])
    if not len(bad):
        return None
    worst = bad[np.argsort(-spread[bad], kind="stable")][:_EXAMPLES]
    examples = [(copies.title(known[first[i]]), copies.title(known[last[i]])) for i in worst]
    return Conflict(fidelity, len(bad), float(spread[worst[0]]), examples)


def _offsets(copies: _Copies, measured: Sequence[Measured]) -> list[Offset]:
    """Return the differences between each fidelity of one dataset and each of another, one copy of a geometry each."""
    offsets = []
    size = copies.counts.sum(axis=1)[:, None]
    for (a, fidelity_a), (b, fidelity_b) in combinations(copies.energies, 2):
        if a == b:
            continue
        in_a, in_b = (
            np.flatnonzero(np.isfinite(copies.energies[level])) for level in ((a, fidelity_a), (b, fidelity_b))
        )
        _, first, other = np.intersect1d(copies.geometry[in_a], copies.geometry[in_b], return_indices=True)
        if not len(first):
            continue
        i, j = in_a[first], in_b[other]
        e0_a, e0_b = measured[a].manifest.fidelities[fidelity_a].e0, measured[b].manifest.fidelities[fidelity_b].e0
        energy_a = binding(copies.energies[a, fidelity_a][i], copies.counts[i], e0_a)
        energy_b = binding(copies.energies[b, fidelity_b][j], copies.counts[j], e0_b)
        sums = Differences()
        sums.add((copies.counts / size)[i], energy_b - energy_a)
        names = (copies.names[a], fidelity_a, copies.names[b], fidelity_b)
        offsets.append(Offset(*names, len(i), *sums.summary()))
    return offsets
