"""Read structures from whatever holds them: a dataset, the built-in data, an extxyz or another file that ASE reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rung.data.manifest import is_dataset, read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.reference_energy import check_energies
from rung.data.shard import read_packs
from rung.data.sources.ase_file import read_structures
from rung.data.structure import Structure
from rung.data.table import StructureTable
from rung.data.verify import file_fault


def read_any(path: str | Path, fidelity: str | None = None, split: str | None = None) -> list[Structure]:
    """Return the structures of a file or a dataset, all in memory.

    From a dataset (folder, `dataset.yaml` or `builtin`) come those of `split` that have a label at `fidelity`; either
    may be None for all. A file has no splits, and its labels take the name `fidelity`, which is then required. Energies
    that composition does not explain are logged, and refused when they can only be a unit error.
    Raises ValueError or FileNotFoundError; never returns an empty list.
    """
    if is_dataset(path):
        structures = list(read_dataset(path, fidelity, split))
        if not structures:
            raise ValueError(f"{path}: no structure with a label at '{fidelity}' in split '{split}'")
        return structures
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file or dataset")
    if fidelity is None:
        raise ValueError(f"{path}: a file does not say at which fidelity its labels are; name it")
    if split is not None:
        raise ValueError(f"{path}: a file has no splits, so '{split}' cannot be selected; build a dataset of it")
    structures = list(read_structures(path, fidelity=fidelity))
    check_energies(structures, fidelity)
    return structures


def read_dataset(dataset: str | Path, fidelity: str | None = None, split: str | None = None) -> Iterator[Structure]:
    """Yield the structures of a dataset; see `read_tables`."""
    for table in read_tables(dataset, fidelity, split):
        yield from table


def read_tables(dataset: str | Path, fidelity: str | None = None, split: str | None = None) -> Iterator[StructureTable]:
    """Yield the packs of a dataset in the order of its shards; each shard is held to its digest first.

    With `fidelity`, only the structures that carry it, with the labels of no other. Raises ValueError for an unknown
    split or fidelity (listing the known ones) and for a damaged shard.
    """
    folder = resolve_dataset(dataset)
    manifest = read_manifest(folder)
    if fidelity is not None:
        manifest.entry(fidelity)
    for shard in manifest.shards if split is None else manifest.shards_of(split):
        if fault := file_fault(folder / shard.file, shard):
            raise ValueError(f"{folder}: {fault}")
        for name, data in read_packs(folder / shard.file):
            table = decode(data, f"{shard.file}: {name}")
            if fidelity is not None:
                table = table.at(fidelity)
            if len(table):
                yield table
