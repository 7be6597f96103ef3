"""Spills: what the first pass of a build leaves of each part, sorted so that the second pass reads a slice of each.

A spill is a safetensors file with the arrays of a pack and, beside them, `hash` uint64 [M] of each structure's key,
`atom_offsets` int64 [M + 1], and `split_offsets` int64 [S + 1]: structures are sorted by split, then by hash and key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from rung.data.pack import arrays_of, save_arrays, table_of
from rung.data.shard import write_beside
from rung.data.table import LABEL_KINDS, StructureTable

Hashes = NDArray[np.uint64]


def key_hashes(table: StructureTable) -> Hashes:
    """Return the first 64 bits of the BLAKE2b digest of each key, which decides its place in a dataset; [M]."""
    digests = b"".join([hashlib.blake2b(key).digest()[:8] for key in table.keys.tobytes()])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def order_by_key(table: StructureTable, hashes: Hashes) -> NDArray[np.int64]:
    """Return the order of the structures by hash, then by key."""
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():
        keys = table.keys.tobytes()
        order = np.array(sorted(range(len(table)), key=lambda m: (hashes[m], keys[m])), np.int64)
    return order


@dataclass(frozen=True)
class Spill:
    """Structures sorted by split, then by hash and key."""

    table: StructureTable
    hashes: Hashes  # [M]
    split_offsets: NDArray[np.int64]  # [S + 1]

    @staticmethod
    def of(table: StructureTable, split: NDArray[np.integer], num_splits: int) -> Spill:
        """Return the structures of a part, sorted; `split` [M] is that of each as a number."""
        hashes = key_hashes(table)
        order = order_by_key(table, hashes)
        order = order[np.argsort(split[order], kind="stable")]
        offsets = np.searchsorted(split[order], np.arange(num_splits + 1)).astype(np.int64)
        return Spill(table.take(order), hashes[order], offsets)

    def split(self, number: int) -> StructureTable:
        """Return the structures of one split."""
        return self.table.part(int(self.split_offsets[number]), int(self.split_offsets[number + 1]))

    def write(self, path: Path) -> tuple[str, list[int]]:
        """Write the spill; return its SHA-256 and about how many bytes each split has."""
        arrays = arrays_of(self.table)
        extra = {"hash": self.hashes, "atom_offsets": self.table.offsets, "split_offsets": self.split_offsets}
        data = save_arrays(arrays | extra)
        write_beside(path, data)
        per_structure = sum(array.nbytes for array in arrays.values()) / max(1, len(self.table))
        sizes = [round(per_structure * count) for count in np.diff(self.split_offsets).tolist()]
        return hashlib.sha256(data).hexdigest(), sizes


def find_rows(path: Path, split: int, bounds: Sequence[int]) -> NDArray[np.int64]:
    """Return where in a spill the hashes of a split reach each bound; [len(bounds)]."""
    with safe_open(path, "numpy") as file:
        start, stop = file.get_slice("split_offsets")[split : split + 2].tolist()
        if start == stop:  # safetensors gives no empty slice at an end
            return np.full(len(bounds), start)
        hashes = file.get_slice("hash")[start:stop]
    rows: NDArray[np.int64] = start + np.searchsorted(hashes, np.array(bounds[:-1], np.uint64))
    return np.append(rows, stop)  # the last bound, 2^64, is no uint64


def read_hashes(path: Path, start: int, stop: int) -> Hashes:
    """Return the hashes of structures start..stop of a spill."""
    if start == stop:
        return np.zeros(0, np.uint64)
    with safe_open(path, "numpy") as file:
        hashes: Hashes = file.get_slice("hash")[start:stop]
    return hashes


def read_spill(path: Path, start: int, stop: int) -> tuple[StructureTable, Hashes]:
    """Return structures start..stop of a spill and the hashes of their keys, reading no others."""
    with safe_open(path, "numpy") as file:
        atoms = slice(*file.get_slice("atom_offsets")[start : stop + 1][[0, -1]].tolist())
        some = slice(start, stop)
        hashes = file.get_slice("hash")[some]
        arrays = {}
        for name in sorted(set(file.keys()) - {"hash", "atom_offsets", "split_offsets", "key", "group"}):
            if name in ("key_offsets", "group_offsets"):
                offsets = file.get_slice(name)[start : stop + 1]
                text = name.removesuffix("_offsets")
                empty = offsets[0] == offsets[-1]  # of which safetensors gives no slice
                arrays[text] = np.zeros(0, np.uint8) if empty else file.get_slice(text)[offsets[0] : offsets[-1]]
                arrays[name] = offsets - offsets[0]
            else:
                kind = LABEL_KINDS.get(name.partition(".")[0])
                per_atom = name in ("numbers", "positions") or (kind is not None and kind.per_atom)
                arrays[name] = file.get_slice(name)[atoms if per_atom else some]
    return table_of(arrays, str(path)), hashes
