"""Build a dataset: a source's parts -> validate -> split by group -> sort by key -> packs -> shards and `dataset.yaml`.

Two passes, each a map over independent pieces of work, so that the memory is bounded by a part or a shard and the bytes
do not depend on how many processes share the work. The first reads each part once and leaves a spill, sorted by a hash
of the keys; the second gathers each shard's range of hashes from all spills. Finished pieces carry digests in
`FOLDER/.building`, so a build that was stopped goes on where it stood. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tqdm import tqdm

from rung.data.describe import describe
from rung.data.fidelity import Fidelity, check_name, unknown_fidelity
from rung.data.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from rung.data.pack import save_arrays
from rung.data.parallel import Item, Map, Result
from rung.data.reference_energy import EXTREME_DEVIATION, Compositions
from rung.data.shard import (
    PACK_ATOMS,
    SHARD_BYTES,
    write_beside,
    write_shard,
)
from rung.data.sources.memory import InMemory
from rung.data.sources.source import PART_ATOMS, PART_STRUCTURES, Part, Source
from rung.data.spill import Spill, find_rows, order_by_key, read_hashes, read_spill
from rung.data.split import SPLITS, SplitFractions
from rung.data.statistics import SAMPLE, EnergySample, Reference
from rung.data.structure import Structure, validate
from rung.data.table import Array, StructureTable, cut_by_atoms, faults, joined, offsets_of
from rung.data.tally import NAMED, Tally, tell_outliers
from rung.data.unfinished import (
    NEW,
    SPILLED,
    PartRecord,
    ShardRecord,
    SpillRecord,
    is_whole,
    read_record,
    unfinished,
    write_record,
)

WORK_FOLDER = ".building"
_HASHES = 1 << 64
_KEYS_AT_A_TIME = 20_000_000  # whose hashes are compared in memory
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
_MAX_BINDING = 30.0  # eV/atom; no compound is bound so strongly (diamond: 7.4): the E0s are of another method or unit


@dataclass(frozen=True)
class BuildConfig:
    """How a dataset is called and cut."""

    name: str
    split: Callable[[str], str] = SplitFractions()  # group -> 'train', 'val' or 'test'; may stratify
    e0: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # fidelity -> isolated atoms, eV; else fitted
    version: str = "1"
    source: str = ""
    doi: str = ""
    licence: str = ""
    citation: str = ""
    description: str = ""
    pack_atoms: int = PACK_ATOMS
    shard_bytes: int = SHARD_BYTES
    max_energy_deviation: float = EXTREME_DEVIATION  # eV/atom from what composition explains; beyond it is an error
    max_bad: int = 0  # structures that cannot be right and are left out, counted in the manifest
    overwrite: bool = False  # replace the dataset that the folder holds

    def __post_init__(self) -> None:
        check_name(self.name)
        for name, least in (("pack_atoms", 1), ("shard_bytes", 1), ("max_bad", 0), ("max_energy_deviation", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"build: {name}: expected a number >= {least}, found {getattr(self, name)}")
        for fidelity, e0 in self.e0.items():
            if not all(map(math.isfinite, e0.values())):
                raise ValueError(f"build: e0 of '{fidelity}': expected finite energies in eV, found {dict(e0)}")


@dataclass(frozen=True)
class _Job:
    """What every piece of work needs to know; it travels to the worker processes."""

    source: Source
    num_parts: int
    folder: Path
    config: BuildConfig

    @property
    def work(self) -> Path:
        return self.folder / WORK_FOLDER

    def record_of(self, part: int) -> Path:
        return self.work / f"{SPILLED}{part:06d}.json"


@dataclass(frozen=True)
class _ShardJob:
    """One shard: its name and the rows of every spill that belong in it."""

    file: str
    split: str
    rows: tuple[tuple[str, int, int], ...]  # (file of the spill, start, stop)


def build(source: Source, paths: Sequence[Path], folder: Path, config: BuildConfig, run: Map = map) -> Manifest:
    """Write the shards and the manifest of a source's files into `folder` and return the manifest.

    Structures are stored in the order of a hash of their keys, so that a shard mixes molecules; within a shard those
    with the same fidelities lie side by side, so that a pack spends nothing on fidelities it lacks. `run` does the work
    (`rung.data.parallel.workers`). A build of the same files and options goes on where a former one was stopped.

    Energies that composition does not explain (outliers by a robust z-score) are logged by name; those of them beyond
    `max_energy_deviation` are refused.
    Raises ValueError naming the structure for this and every other input that cannot be right, and FileExistsError when
    the folder holds a dataset and `overwrite` is false, or an unfinished build of something else.
    """
    return _build(source, paths, folder, config, run, resumable=True)


def build_dataset(
    structures: Iterable[Structure], folder: Path, *, fidelities: Mapping[str, Fidelity], **options: Any
) -> Manifest:
    """Write a dataset of structures that are in memory; `options` are the fields of `BuildConfig`. See `build`."""
    structures = list(structures)
    for structure in structures:
        validate(structure)  # a table takes NaN, which is an error here, for a label that is missing
    source = InMemory(StructureTable.of(structures), dict(fidelities))
    return _build(source, [], folder, BuildConfig(**options), map, resumable=False)


def _build(
    source: Source, paths: Sequence[Path], folder: Path, config: BuildConfig, run: Map, *, resumable: bool
) -> Manifest:
    for unknown in set(config.e0) - set(source.fidelities):
        raise unknown_fidelity(unknown, source.fidelities)
    for name, descriptor in source.fidelities.items():
        if name != descriptor.name:
            raise ValueError(f"build: fidelity '{name}' is described under another name, '{descriptor.name}'")
    if (folder / MANIFEST_FILE).is_file() and not config.overwrite:
        raise FileExistsError(f"{folder} already holds a dataset; choose another folder or pass overwrite")
    found = source.parts(paths)
    job = _Job(source, len(found), folder, config)
    wanted = repr((config.e0, config.pack_atoms, config.shard_bytes, config.max_energy_deviation))
    with unfinished(job.work, _identity(job, found), wanted, overwrite=config.overwrite, resumable=resumable):
        parts = _read_parts(job, found, run)
        _check_keys(job, parts)
        references, statistics_split = _references(job, parts)
        shards = _write_shards(job, parts, references, run)
        manifest = describe(config, source.fidelities, parts, shards, references, statistics_split)
        _publish(job, manifest)
    return manifest


# The first pass


def _read_parts(job: _Job, parts: Sequence[Part], run: Map) -> list[PartRecord]:
    records: list[PartRecord] = []
    rejected = 0
    with _results(run, partial(_read_part, job), list(enumerate(parts)), "reading", "part") as results:
        for record in results:
            records.append(record)
            rejected += sum(record.rejected.values())
            if rejected > job.config.max_bad:
                named = "; ".join(name for found in records for name in found.named)
                raise ValueError(
                    f"{named}. Found {rejected} such structure(s), max_bad is {job.config.max_bad}; correct them, or "
                    "raise max_bad to leave them out"
                )
    if not sum(spill.structures for record in records for spill in record.spills):
        raise ValueError("build: expected at least one structure, found none")
    return records


@contextmanager
def _results(
    run: Map, function: Callable[[Item], Result], items: Sequence[Item], title: str, unit: str
) -> Iterator[Iterable[Result]]:
    """Give the results of a map, with a progress bar; at the end nobody works on it any more, even after an error."""
    pieces = run(function, items)
    try:
        yield tqdm(pieces, title, len(items), unit=unit, disable=None)
    finally:
        if isinstance(pieces, Generator):
            pieces.close()


def _read_part(job: _Job, item: tuple[int, Part]) -> PartRecord:
    index, part = item
    path = job.record_of(index)
    known = read_record(PartRecord, path)
    if known and all(_is_there(job, spill) for spill in known.spills):
        return known
    rejected, named = Counter[str](), list[str]()
    spills: list[SpillRecord] = []
    # A file that cannot be entered in the middle is one part, of any size.
    for table in joined(_checked(job, part, rejected, named), PART_STRUCTURES, PART_ATOMS):
        number = f"-{len(spills):04d}" if spills else ""
        # A later spill of a part gives fewer samples, so that those of a file of any length fit in memory.
        limit = -(-SAMPLE // (job.num_parts * (len(spills) + 1)))
        spills.append(_write_spill(job, table, f"{path.stem}{number}.safetensors", limit))
    record = PartRecord(spills, dict(rejected), named[:NAMED])
    write_record(record, path)
    return record


def _is_there(job: _Job, spill: SpillRecord) -> bool:
    path = job.work / spill.file
    return is_whole(path, spill.sha256) and is_whole(path.with_suffix(".sample"), spill.sample_sha256)


def _checked(job: _Job, part: Part, rejected: Counter[str], named: list[str]) -> Iterator[StructureTable]:
    """Yield the tables of a part without the structures that cannot be right, which are counted and named."""
    for table in job.source.read(part):
        for fidelity in set(table.fidelities) - set(job.source.fidelities):
            raise unknown_fidelity(fidelity, job.source.fidelities)
        if bad := faults(table):
            rejected.update(_field(reason) for reason in bad.values())
            named += list(bad.values())[:NAMED]
            table = table.take(np.setdiff1d(np.arange(len(table)), list(bad)))
        yield table


def _write_spill(job: _Job, table: StructureTable, file: str, limit: int) -> SpillRecord:
    path = job.work / file
    spill = Spill.of(table, _splits(table, job.config.split), len(SPLITS))
    digest, sizes = spill.write(path)
    return SpillRecord(file, digest, _write_samples(spill, path.with_suffix(".sample"), limit), len(table), sizes)


def _splits(table: StructureTable, split: Callable[[str], str]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Return the number of each structure's split; [M]."""
    groups = table.groups.tolist()
    number = {group: _split_number(group, split(group)) for group in dict.fromkeys(groups)}
    return np.fromiter((number[group] for group in groups), np.int8, len(groups))


def _split_number(group: str, split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"group '{group}': split: expected one of {', '.join(SPLITS)}, found {split!r}")
    return SPLITS.index(split)


def _write_samples(spill: Spill, path: Path, limit: int) -> str:
    """Write what the E0 fits need of a spill; return the SHA-256."""
    arrays: dict[str, Array] = {}
    for number, split in enumerate(SPLITS):
        table = spill.split(number)
        for fidelity in table.fidelities:
            if (sample := EnergySample.of(table, fidelity, limit)) is not None:
                place = f"{split}.{fidelity}"
                arrays[f"{place}.elements"] = sample.compositions.elements
                arrays[f"{place}.counts"] = sample.compositions.counts
                arrays[f"{place}.energies"] = sample.energies
    data = save_arrays(arrays)
    write_beside(path, data)
    return hashlib.sha256(data).hexdigest()


# Between the passes


def _references(job: _Job, parts: Sequence[PartRecord]) -> tuple[dict[str, Reference], dict[str, tuple[str, ...]]]:
    """Return the reference energies of each fidelity that has energies, and the splits statistics are taken on."""
    samples: dict[tuple[str, str], list[EnergySample]] = {}
    for file in _spills(parts):
        arrays = load_file((job.work / file).with_suffix(".sample"))
        for place in sorted({name.rpartition(".")[0] for name in arrays}):
            split, fidelity = place.split(".")
            compositions = Compositions(arrays[f"{place}.elements"], arrays[f"{place}.counts"])
            samples.setdefault((split, fidelity), []).append(EnergySample(compositions, arrays[f"{place}.energies"]))
    references: dict[str, Reference] = {}
    splits: dict[str, tuple[str, ...]] = {}
    for fidelity in job.source.fidelities:
        by_split = {split: found for split in SPLITS if (found := samples.get((split, fidelity)))}
        everything = [sample for found in by_split.values() for sample in found]
        if everything:
            chosen = by_split.get("train", everything)
            known = dict(job.config.e0[fidelity]) if fidelity in job.config.e0 else None
            references[fidelity] = _reference(fidelity, chosen, everything, known)
        # Without any energies it is the forces that statistics are taken of.
        has_train = "train" in by_split if everything else True
        splits[fidelity] = ("train",) if has_train else SPLITS
    return references, splits


def _spills(parts: Sequence[PartRecord]) -> list[str]:
    return [spill.file for part in parts for spill in part.spills]


def _check_keys(job: _Job, parts: Sequence[PartRecord]) -> None:
    """Raise ValueError for a key that occurs twice, a range of hashes at a time."""
    files = _spills(parts)
    count = 1 + sum(spill.structures for part in parts for spill in part.spills) // _KEYS_AT_A_TIME
    bounds = [_HASHES * index // count for index in range(count + 1)]
    rows = [np.array([find_rows(job.work / file, number, bounds) for file in files]) for number in range(len(SPLITS))]
    for index in range(count):
        ranges = [
            (job.work / file, int(rows_of_split[i, index]), int(rows_of_split[i, index + 1]))
            for rows_of_split in rows
            for i, file in enumerate(files)
        ]
        hashes = np.concatenate([read_hashes(path, start, stop) for path, start, stop in ranges])
        order = np.argsort(hashes, kind="stable")
        places = offsets_of(np.array([stop - start for _, start, stop in ranges]))
        for twin in np.flatnonzero(np.diff(hashes[order]) == 0).tolist():
            one, other = (_key_at(ranges, places, int(order[twin + k])) for k in (0, 1))
            if one == other:
                raise ValueError(
                    f"build: key '{one}' names two structures, and keys must be unique in a dataset; keys of a "
                    "file's frames begin with its name, so rename one of two files of the same name"
                )


def _key_at(ranges: Sequence[tuple[Path, int, int]], places: NDArray[np.int64], at: int) -> str:
    number = int(np.searchsorted(places, at, "right")) - 1
    path, start, _ = ranges[number]
    row = start + at - int(places[number])
    return read_spill(path, row, row + 1)[0].keys[0]


def _reference(
    fidelity: str, chosen: list[EnergySample], everything: list[EnergySample], known: dict[int, float] | None
) -> Reference:
    statistics = EnergySample.concatenate(chosen)
    if known is not None and (missing := sorted(set(statistics.compositions.elements.tolist()) - set(known))):
        raise ValueError(f"fidelity '{fidelity}': isolated-atom energies are given, but none for Z = {missing}")
    reference = Reference.of(statistics, EnergySample.concatenate(everything), known)
    if known is not None and abs(reference.typical) > _MAX_BINDING:
        raise ValueError(
            f"fidelity '{fidelity}': energies differ from the isolated-atom energies by {reference.typical:.4g} "
            f"eV/atom, expected less than {_MAX_BINDING:g}; are both in eV and of the same method and code?"
        )
    return reference


# The second pass


def _write_shards(
    job: _Job, parts: Sequence[PartRecord], references: Mapping[str, Reference], run: Map
) -> list[ShardRecord]:
    pieces = [piece for number, split in enumerate(SPLITS) for piece in _shard_jobs(job, parts, number, split)]
    with _results(run, partial(_write_shard, job, dict(references)), pieces, "writing", "shard") as results:
        done = list(results)
    for fidelity in job.source.fidelities:
        tell_outliers(fidelity, done, job.config.max_energy_deviation)
    return done


def _shard_jobs(job: _Job, parts: Sequence[PartRecord], number: int, split: str) -> Iterator[_ShardJob]:
    """Yield the shards of a split: equal ranges of hashes, as many as its bytes ask for."""
    size = sum(spill.bytes[number] for part in parts for spill in part.spills)
    count = max(1, round(size / job.config.shard_bytes))
    bounds = [_HASHES * index // count for index in range(count + 1)]
    files = _spills(parts)
    rows = np.array([find_rows(job.work / file, number, bounds) for file in files])
    index = 0
    for start, stop in zip(rows.T[:-1], rows.T[1:], strict=True):
        chosen = [(files[i], int(start[i]), int(stop[i])) for i in np.flatnonzero(stop > start).tolist()]
        if chosen:
            yield _ShardJob(f"{split}-{index:06d}.tar", split, tuple(chosen))
            index += 1


def _write_shard(job: _Job, references: Mapping[str, Reference], shard: _ShardJob) -> ShardRecord:
    path = job.work / shard.file
    if known := read_record(ShardRecord, path):
        places = (path, job.folder / shard.file)  # there when a build was stopped while it moved them
        if any(is_whole(place, known.info.sha256) for place in places):
            return known
    tables, hashes = zip(*(read_spill(job.work / file, start, stop) for file, start, stop in shard.rows), strict=True)
    table = StructureTable.concatenate(tables)
    order = order_by_key(table, np.concatenate(hashes))
    order = order[np.argsort(_rank_of_labels(table)[order], kind="stable")]
    tally = Tally(references, job.config.max_energy_deviation)
    # A pack at a time: what is done to it finds it in the processor's cache.
    rows = cut_by_atoms(table.num_atoms[order], job.config.pack_atoms)
    packs = (tally.seen(table.take(order[start:stop])) for start, stop in rows)
    record = tally.record(write_shard(packs, path, shard.split))
    write_record(record, path)
    return record


def _rank_of_labels(table: StructureTable) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the rank of each structure's set of fidelities: the larger sets first, equal ones side by side."""
    names = table.fidelities
    carries = np.array([table.carries(name) for name in names]).reshape(len(names), len(table)).T
    kinds, kind = np.unique(carries, axis=0, return_inverse=True)
    signatures = [[name for name, carried in zip(names, row, strict=True) if carried] for row in kinds.tolist()]
    ranked = sorted(range(len(kinds)), key=lambda index: (-len(signatures[index]), signatures[index]))
    rank = np.argsort(ranked)
    return np.asarray(rank[kind.reshape(-1)], np.int64)


# The end


def _publish(job: _Job, manifest: Manifest) -> None:
    """Replace what the folder holds; at no moment does a manifest there describe shards that are not."""
    new = job.work / NEW
    new.mkdir(exist_ok=True)
    write_manifest(manifest, new)
    read_manifest(new)  # a text that cannot be read back must not replace one that can
    (job.folder / MANIFEST_FILE).unlink(missing_ok=True)
    for shard in manifest.shards:
        if (job.work / shard.file).is_file():
            (job.work / shard.file).replace(job.folder / shard.file)
    kept = {shard.file for shard in manifest.shards}
    for path in job.folder.glob("*.tar"):
        if _SHARD_NAME.fullmatch(path.name) and path.name not in kept:  # of the dataset before
            path.unlink()
    (new / MANIFEST_FILE).replace(job.folder / MANIFEST_FILE)
    shutil.rmtree(job.work, ignore_errors=True)


def _identity(job: _Job, parts: Sequence[Part]) -> dict[str, Any]:
    """Return what decides the spills of a build, as JSON has it."""
    files = {part.path: part.path.stat() for part in parts if part.path.exists()}
    return {
        "source": repr(job.source),
        "split": repr(job.config.split),
        "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in sorted(files.items())],
        "parts": [[part.path.name, part.start, part.stop] for part in parts],
    }


def _field(reason: str) -> str:
    """Return the field that a message of `rung.data.structure.validate` blames."""
    found = re.match(r"structure .*: ([^ :]+): expected", reason, re.DOTALL)
    return found[1] if found else "other"
