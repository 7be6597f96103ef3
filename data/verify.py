"""Hold a dataset to its manifest: digests, counts, keys, and groups that must stay in one split.

Every shard is read once, pack by pack. Of each structure 32 bytes stay in memory, so that ten million fit in 1 GB: the
digests of its key and of its group. Edges are not counted again.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from rung.data.manifest import Manifest, read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.shard import ShardInfo, check_pack, file_sha256, read_packs
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import Strings, StructureTable, faults
from rung.data.tar import members

_LISTED = 10  # faults of one kind that are named; the rest is counted
_CHUNK = 1 << 20
_NAMED = {"energies": "energy", "forces": "forces"}  # what a manifest counts -> the kind of label

Digests = NDArray[np.uint64]  # [n, 2], 16 bytes a text


def verify(folder: str | Path) -> list[str]:
    """Return every fault of a dataset, one sentence each; an empty list says that all is as the manifest states.

    Raises FileNotFoundError where there is no dataset, ValueError for a manifest that `read_manifest` refuses.
    """
    folder = resolve_dataset(folder)
    manifest = read_manifest(folder)
    found = _stray_files(folder, manifest) + _stray_splits(manifest)
    scans = [_scan(folder / shard.file, shard) for shard in manifest.shards]
    found += [fault for scan in scans for fault in scan.faults]
    whole = [scan for scan in scans if scan.whole]
    found += _repeated_keys(folder, whole) + _leaking_groups(folder, whole)
    if len(whole) == len(scans):  # with a shard lost, every count below would be wrong as well
        found += _label_faults(manifest, whole) + _element_faults(manifest, whole)
    return found


def file_fault(path: Path, shard: ShardInfo) -> str:
    """Return how a file differs from its row in the manifest (missing, size, digest); empty when it does not."""
    return _size_fault(path, shard) or _digest_fault(file_sha256(path), shard)


def _size_fault(path: Path, shard: ShardInfo) -> str:
    if not path.is_file():
        return f"{shard.file}: missing; fetch or build it again"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{shard.file}: manifest says {shard.bytes} bytes, found {size}; truncated? fetch or build it again"
    return ""


def _digest_fault(digest: str, shard: ShardInfo) -> str:
    if digest == shard.sha256:
        return ""
    return f"{shard.file}: SHA-256 {digest[:12]}..., manifest says {shard.sha256[:12]}...; fetch or build it again"


def _stray_files(folder: Path, manifest: Manifest) -> list[str]:
    listed = {shard.file for shard in manifest.shards}
    strays = []
    for name in sorted(path.name for path in folder.iterdir()):
        if name.endswith(".tar") and name not in listed:
            strays.append(f"{name}: not in the manifest")
        elif name.endswith(".partial") or name == ".building":
            strays.append(f"{name}: left by a build that runs or was stopped; delete it when none runs")
    return strays


def _stray_splits(manifest: Manifest) -> list[str]:
    expected = f"split: expected one of {', '.join(manifest.splits)}"
    strays = [shard for shard in manifest.shards if shard.split not in manifest.splits]  # which no stream would read
    return [f"{shard.file}: {expected}, found {shard.split!r}" for shard in strays]


@dataclass
class _Scan:
    """What reading one shard gave; `whole` tells whether all of it could be read."""

    shard: ShardInfo
    faults: list[str] = field(default_factory=list)
    whole: bool = False
    packs: int = 0
    atoms: int = 0
    keys: list[Digests] = field(default_factory=list)  # of each pack
    groups: list[Digests] = field(default_factory=list)
    labels: Counter[tuple[str, str]] = field(default_factory=Counter)  # (fidelity, "energies" or "forces") -> number
    labels_of_pack: list[dict[str, int]] = field(default_factory=list)  # fidelity -> structures that carry it
    elements: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))  # atoms of each number

    def add(self, table: StructureTable) -> None:
        self.packs += 1
        self.atoms += len(table.numbers)
        self.keys.append(_digests(table.keys))
        self.groups.append(_digests(table.groups))
        self.elements += np.bincount(table.numbers, minlength=256)
        for fidelity in table.fidelities:
            for what, kind in _NAMED.items():
                self.labels[fidelity, what] += int(table.has(kind, fidelity).sum())
        self.labels_of_pack.append({name: int(table.carries(name).sum()) for name in table.fidelities})

    @property
    def structures(self) -> int:
        return sum(map(len, self.keys))


def _scan(path: Path, shard: ShardInfo) -> _Scan:
    """Read a shard once, hashing all of its bytes; a wrong digest explains what else is wrong in it."""
    scan = _Scan(shard)
    if fault := _size_fault(path, shard):
        scan.faults.append(fault)
        return scan
    digest = hashlib.sha256()
    with path.open("rb") as file:
        reasons = _add_packs(file, scan, digest)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if fault := _digest_fault(digest.hexdigest(), shard):
        scan.faults.append(fault + (f" (first: {reasons[0]})" if reasons else ""))
    elif reasons:
        scan.faults += _shortened(reasons)
    else:
        scan.whole = True
        scan.faults += _count_faults(scan)
    return scan


def _add_packs(file: BinaryIO, scan: _Scan, digest: hashlib._Hash) -> list[str]:
    """Add the packs of a shard to `scan` and hash what is read; return why some, or the tar, cannot be read."""
    try:
        found = members(file, scan.shard.file)
    except ValueError as error:
        return [str(error)]
    finally:
        file.seek(0)
    reasons = []
    for name, offset, size in found:
        digest.update(file.read(offset - file.tell()))  # padding and header
        data = file.read(size)
        digest.update(data)
        try:
            scan.add(_valid(name, data, scan.shard.file))
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def _valid(name: str, data: bytes, source: str) -> StructureTable:
    """Return a pack; raise ValueError for a damaged one and for structures that are not valid, by name."""
    check_pack(name, data, source)
    table = decode(data, f"{source}: {name}")
    if reasons := list(faults(table).values()):
        raise ValueError(f"{source}: {name}: {'; '.join(_shortened(reasons))}")
    return table


def _count_faults(scan: _Scan) -> list[str]:
    shard, reasons = scan.shard, []
    found = (scan.packs, scan.structures, scan.atoms)
    if found != (stated := (shard.packs, shard.structures, shard.atoms)):
        reasons.append(f"{shard.file}: packs, structures, atoms: manifest says {stated}, found {found}")
    for fidelity in sorted({*shard.labels, *(name for pack in scan.labels_of_pack for name in pack)}):
        counts = [pack.get(fidelity, 0) for pack in scan.labels_of_pack]
        said = shard.labels.get(fidelity, [0] * len(counts))
        if counts != said:
            differ = f"manifest says {reprlib.repr(said)}, found {reprlib.repr(counts)}"
            reasons.append(f"{shard.file}: structures of each pack labelled at '{fidelity}': {differ}")
    return reasons


def _digests(strings: Strings) -> Digests:
    parts = [hashlib.blake2b(text, digest_size=16).digest() for text in strings.tobytes()]
    return np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2)


def _joined(packs: Iterator[Digests]) -> Digests:
    return np.concatenate([np.zeros((0, 2), np.uint64), *packs])


def _equal(digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return an order in which equal rows are neighbours, in their own order, and which rows equal the one before."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    same = np.zeros(len(order), np.bool_)
    same[1:] = True
    for column in digests.T:
        values = column[order]
        same[1:] &= values[1:] == values[:-1]
    return order, same


def _repeated_keys(folder: Path, scans: Sequence[_Scan]) -> list[str]:
    order, same = _equal(_joined(pack for scan in scans for pack in scan.keys))
    starts = np.flatnonzero(same & ~np.roll(same, 1)) - 1  # of runs of equal keys
    reasons = []
    for start in starts[:_LISTED].tolist():
        count = 1 + int(np.argmin(np.append(same[start + 1 :], False)))
        places = [_place(scans, int(row)) for row in order[start : start + min(count, 3)]]
        files = ", ".join(dict.fromkeys(scan.shard.file for scan, _ in places))
        key = _text(folder, *places[0], "keys")
        reasons.append(f"key {key!r} names {count} structures, in {files}; keys must be unique in a dataset")
    return _shortened(reasons, len(starts))


def _leaking_groups(folder: Path, scans: Sequence[_Scan]) -> list[str]:
    order, same = _equal(_joined(pack for scan in scans for pack in scan.groups))
    names = list(dict.fromkeys(scan.shard.split for scan in scans))
    numbers = np.array([names.index(scan.shard.split) for scan in scans], np.int32)
    split = np.repeat(numbers, [scan.structures for scan in scans])[order]
    changes = np.flatnonzero(same & (split != np.roll(split, 1)))
    run = np.cumsum(~same)[changes]
    changes = changes[np.unique(run, return_index=True)[1]]  # the first of each group
    reasons = []
    for row in changes[:_LISTED].tolist():
        scan, local = _place(scans, int(order[row]))
        group, other = _text(folder, scan, local, "groups"), names[split[row - 1]]
        reasons.append(f"{scan.shard.file}: group {group!r} is in split '{scan.shard.split}' and in '{other}'")
    return _shortened(reasons, len(changes))


def _place(scans: Sequence[_Scan], row: int) -> tuple[_Scan, int]:
    """Return the shard of a row of all structures, and the row in it."""
    for scan in scans:
        if row < scan.structures:
            return scan, row
        row -= scan.structures
    raise IndexError(row)


def _text(folder: Path, scan: _Scan, row: int, column: str) -> str:
    """Read again the key or group of one structure, of which only the digest was kept."""
    for name, data in read_packs(folder / scan.shard.file):
        table = decode(data, f"{scan.shard.file}: {name}")
        if row < len(table):
            strings: Strings = getattr(table, column)
            return strings[row]
        row -= len(table)
    raise IndexError(row)


def _label_faults(manifest: Manifest, scans: Sequence[_Scan]) -> list[str]:
    stated: Counter[tuple[str, str, str]] = Counter()
    for name, entry in manifest.fidelities.items():
        for what, counts in (("energies", entry.num_energies), ("forces", entry.num_forces)):
            stated.update({(name, what, split): count for split, count in counts.items()})
    found: Counter[tuple[str, str, str]] = Counter()
    for scan in scans:
        found.update({(*place, scan.shard.split): count for place, count in scan.labels.items()})
    return [
        f"{fidelity}: {what} in split '{split}': manifest says {stated[place]}, found {found[place]}"
        for place in sorted({*stated, *found})
        if stated[place] != found[place]
        for fidelity, what, split in [place]
    ]


def _element_faults(manifest: Manifest, scans: Sequence[_Scan]) -> list[str]:
    found = sum((scan.elements for scan in scans), np.zeros(256, np.int64))
    return [
        f"elements: atoms of Z = {number}: manifest says {stated}, found {found[number]}"
        for number in range(1, MAX_ATOMIC_NUMBER + 1)
        if (stated := manifest.elements.get(number, 0)) != found[number]
    ]


def _shortened(reasons: list[str], total: int | None = None) -> list[str]:
    """Return the first of many faults and how many more there are."""
    more = (len(reasons) if total is None else total) - _LISTED
    return [*reasons[:_LISTED], f"... and {more} more of this kind"] if more > 0 else reasons
