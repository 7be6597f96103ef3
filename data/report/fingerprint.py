"""Find structures that are equal up to rotation, reflection, translation and the order of like atoms.

Every atom gets a few numbers that are smooth in the distances to its neighbours: for a molecule the mean over all other
atoms j of w_k(Z_i) w_k(Z_j) f_k(d_ij) with |w_k| <= 1, f_0(d) = d and f_k(d) = sin(q_k d) / q_k, whose slopes are at
most one. If no atom moves by more than 1e-3 angstrom, no distance changes by more than 2e-3, nor does any number: equal
molecules cannot be missed. For a periodic structure (and a molecule of more than DENSE_ATOMS atoms) the sum runs over
the neighbours within CUTOFF with a smooth weight, divided by one plus the sum of the weights, per atom: a supercell
equals its cell. Mirror images have the same distances and count as equal. Charge, multiplicity, periodic directions and
composition must be the same.

`profile` keeps two of these numbers, sorted within each element, as means over 32 equal shares of the atoms, with the
sorted distances of molecules: this confirms. `sketch` is five of the shares: cheap to keep for every structure. `near`
and `twins` search without loss at the boundaries of buckets: structures are hashed on G of their numbers in G + 1
grids, each shifted by one tolerance, where a cell is G + 1 tolerances wide; each number can separate two equal
structures in one of the grids only, so that one grid is left where none does.
"""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy.typing import NDArray

from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import StructureTable, offsets_of, pair_grid

Floats = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

TOLERANCE = 2e-3  # angstrom, of a distance: each atom may be off by half of it
CUTOFF = 5.0  # angstrom, periodic structures
DENSE_ATOMS = 512  # molecules beyond it see neighbours within CUTOFF only: n^2 distances are too many
_SLACK = 2e-5  # angstrom, rounding of float32 sums
_WAVES = np.array([1.0, 1.7, 2.3, 3.1], np.float32)  # 1/angstrom
_NUM = 1 + len(_WAVES)  # numbers per atom
_GRID = 4  # of them make the cells of the grids; the last one is sorted
_PROFILED = (0, 2)  # the numbers that `profile` keeps
_RUNS = 32  # shares; up to 32 atoms and, in molecules of up to 8 atoms, distances are kept one by one
_SKETCHED = (0, 8, 16, 24, 31)  # of the shares: single atoms differ more between frames than their mean does
_PROFILE_PAIRS = 1 << 20  # distances sorted at a time
_BLOCK_PAIRS = 1 << 16  # distances at a time: they stay in cache
_EVERY_PAIR = 32  # twins of up to so many equal structures are all paired; of more, each has at least one pair

_Z = np.arange(MAX_ATOMIC_NUMBER + 1)
_WEIGHTS = (0.9 + 0.1 * np.cos(np.arange(1, _NUM + 1) * _Z[:, None])).astype(np.float32)
_RANDOM = np.random.default_rng(0).integers(2**64, size=len(_Z) + 3, dtype=np.uint64)


def environments(table: StructureTable) -> Floats:
    """Return the numbers of each atom, [N, 5]; raise ValueError naming a structure whose cell has no neighbour list."""
    found = np.zeros((len(table.numbers), _NUM), np.float32)
    offsets = table.offsets
    local = table.pbc.any(axis=1) | (table.num_atoms > DENSE_ATOMS)
    for m in np.flatnonzero(local):
        found[offsets[m] : offsets[m + 1]] = _local_environments(table, int(m), slice(offsets[m], offsets[m + 1]))
    for size in np.unique(table.num_atoms[~local]):
        members = np.flatnonzero(~local & (table.num_atoms == size))
        block = max(1, _BLOCK_PAIRS // int(size) ** 2)
        for start in range(0, len(members), block):
            atoms = offsets[members[start : start + block], None] + np.arange(size)
            found[atoms] = _dense_environments(table.positions[atoms], table.numbers[atoms])
    return found


def composition_keys(table: StructureTable, counts: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return a hash of what equal structures have in common, [M]; `counts` [M, 119] holds the atoms per element.

    The counts of a periodic structure are divided by their greatest common divisor.
    """
    periodic = table.pbc.any(axis=1)
    divisor = np.where(periodic, np.gcd.reduce(counts, axis=1), 1)
    reduced = (counts // divisor[:, None]).astype(np.uint64)
    state = np.stack([table.charge, table.multiplicity, table.pbc @ np.array([1, 2, 4])], axis=1).astype(np.int64)
    present = np.flatnonzero(counts.any(axis=0))
    keys: NDArray[np.uint64] = reduced[:, present] @ _RANDOM[present] + state.astype(np.uint64) @ _RANDOM[len(_Z) :]
    return keys


def sketch(table: StructureTable, numbers: Floats) -> Floats:
    """Return five values of each structure's `profile`, of the first of the `numbers` of `environments`, [M, 5]."""
    return np.ascontiguousarray(_shares(numbers[:, 0], table.numbers, table.structure, table.num_atoms)[:, _SKETCHED])


def profile(table: StructureTable, numbers: Floats) -> Floats:
    """Return sorted values of each structure, averaged over 32 equal shares of them, [M, 96].

    The values are two of the `numbers` of its atoms, sorted within each element, and the distances of a small molecule,
    sorted within each pair of elements: with few atoms, sums hide what single distances show.
    """
    parts = [_shares(numbers[:, k], table.numbers, table.structure, table.num_atoms) for k in _PROFILED]
    small = ~table.pbc.any(axis=1) & (table.num_atoms <= DENSE_ATOMS) & (table.num_atoms > 1)
    distances = np.zeros((len(table), _RUNS), np.float32)
    members = np.flatnonzero(small)
    blocks = np.cumsum(np.square(table.num_atoms[members], dtype=np.int64)) // _PROFILE_PAIRS
    for block in np.split(members, np.flatnonzero(np.diff(blocks)) + 1):
        if len(block):
            distances[block] = _distance_shares(table.take(block))
    return np.concatenate([*parts, distances], axis=1)


def near(keys: NDArray[np.uint64], sketches: Floats) -> Mask:
    """Return which structures have another one with the same key and a sketch within the tolerance, [M]."""
    return _search(keys, sketches, sketches, 0)[0]


def twins(keys: NDArray[np.uint64], sketches: Floats, profiles: Floats) -> Index:
    """Return pairs of structures with the same key whose sketches and profiles agree to the tolerance, [P, 2].

    Of up to 32 equal structures every pair is found; of more, each structure is in one pair at least.
    """
    return _search(keys, sketches, profiles, _EVERY_PAIR)[1]


def components(size: int, pairs: Index) -> Index:
    """Return for each of `size` items the least item that it is connected with by `pairs` [P, 2]."""
    root = np.arange(size)
    while True:
        ends = root[pairs]
        low, high = ends.min(axis=1), ends.max(axis=1)
        if (low == high).all():
            return root
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]


def _distance_shares(table: StructureTable) -> Floats:
    i, j = pair_grid(table.num_atoms)
    i, j = i[i < j], j[i < j]
    values = np.sqrt(np.square(table.positions[i] - table.positions[j]).sum(axis=1))
    low, high = np.minimum(table.numbers[i], table.numbers[j]), np.maximum(table.numbers[i], table.numbers[j])
    kinds = low.astype(np.int64) * len(_Z) + high
    return _shares(values, kinds, table.structure[i], table.num_atoms * (table.num_atoms - 1) // 2)


def _shares(values: Floats, kinds: NDArray[np.integer], structure: Index, lengths: NDArray[np.integer]) -> Floats:
    """Return the means over equal shares of each structure's values, sorted by kind and value, [M, 32].

    Where a share ends between two values, it has its part of both: a list written several times over gives the same.
    """
    order = np.lexsort((values, kinds, structure))
    sums = np.concatenate([[0.0], np.cumsum(values[order], dtype=np.float64)])
    bounds = offsets_of(lengths)[:-1, None] + lengths[:, None] * (np.arange(_RUNS + 1) / _RUNS)
    means: Floats = np.diff(np.interp(bounds, np.arange(len(sums)), sums)).astype(np.float32)
    return means * (np.float32(_RUNS) / lengths[:, None].astype(np.float32))


def _dense_environments(positions: Floats, numbers: NDArray[np.uint8]) -> Floats:
    """Return the numbers of each atom of B molecules of n atoms, [B, n, 5]."""
    distances = _distances(positions)
    weights = _WEIGHTS[numbers]
    found: Floats = np.empty_like(weights)
    for k in range(_NUM):
        found[..., k] = (_function(k, distances) @ weights[..., k, None])[..., 0]
    found *= weights / np.float32(max(1, numbers.shape[1] - 1))
    return found


def _distances(positions: Floats) -> Floats:
    squares: Floats = np.zeros((*positions.shape[:2], positions.shape[1]), np.float32)
    for axis in range(3):
        x = positions[..., axis]
        squares += np.square(x[:, :, None] - x[:, None, :])
    return np.sqrt(squares, out=squares)


def _local_environments(table: StructureTable, index: int, atoms: slice) -> Floats:
    from vesin import NeighborList  # here, because it imports torch; see rung.data.graph

    neighbours = NeighborList(cutoff=CUTOFF, full_list=True, sorted=False, n_threads=1)
    positions, cell = table.positions[atoms].astype(np.float64), table.cell[index].astype(np.float64)
    try:
        i, j, distances = neighbours.compute(positions, cell, table.pbc[index], "ijd", copy=False)
    except RuntimeError as error:
        raise ValueError(f"structure '{table.keys[index]}': cell: {error}, found {cell.tolist()}") from error
    smooth = 0.5 + 0.5 * np.cos(np.pi / CUTOFF * distances)
    weights, size = _WEIGHTS[table.numbers[atoms]], len(positions)
    sums = [np.bincount(i, smooth * weights[j, k] * _function(k, distances), minlength=size) for k in range(_NUM)]
    total = 1 + np.bincount(i, smooth, minlength=size)
    found: Floats = (np.stack(sums, axis=1) * weights / total[:, None]).astype(np.float32)
    return found


def _function(k: int, distances: NDArray[np.floating]) -> NDArray[np.floating]:
    return distances if k == 0 else np.sin(distances * _WAVES[k - 1]) / _WAVES[k - 1]


def _search(keys: NDArray[np.uint64], sketches: Floats, profiles: Floats, every: int) -> tuple[Mask, Index]:
    """Return which structures are in a pair, and pairs: all within `every` places, beyond it only of those in none."""
    linked = np.zeros(len(keys), np.bool_)
    pairs = [np.zeros(0, np.int64)]  # the lower of two, times the number of all, plus the higher
    tolerance = TOLERANCE + _SLACK
    for grid in range(_GRID + 1):
        order, first, last = _windows(keys, sketches, grid)
        seeking = np.arange(len(keys))
        for step in count(1):
            if step > every:
                seeking = seeking[~linked[order[seeking]]]
            forward, backward = last[seeking] >= seeking + step, first[seeking] <= seeking - step
            ahead, behind = seeking[forward], seeking[backward if step > every else slice(0)]
            seeking = seeking[forward | backward]
            if not len(seeking):
                break
            a = order[np.concatenate([ahead, behind])]
            b = order[np.concatenate([ahead + step, behind - step])]
            close = keys[a] == keys[b]
            for values in (sketches, profiles):
                a, b = a[close], b[close]
                close = (np.abs(values[a] - values[b]) <= tolerance).all(axis=1)
            linked[a[close]] = linked[b[close]] = True
            pairs.append(np.minimum(a, b)[close] * len(keys) + np.maximum(a, b)[close])
    return linked, np.stack(np.divmod(np.unique(np.concatenate(pairs)), max(1, len(keys))), axis=1)


def _windows(keys: NDArray[np.uint64], sketches: Floats, grid: int) -> tuple[Index, Index, Index]:
    """Return an order of the structures, and the first and last place in it where each one's equals can be."""
    tolerance = TOLERANCE + _SLACK
    cells = np.floor(sketches[:, :_GRID] / (tolerance * (_GRID + 1)) + grid / (_GRID + 1)).astype(np.int64)
    bucket = keys.copy()
    for column in cells.T.astype(np.uint64):
        bucket = (bucket ^ column) * np.uint64(0x9E3779B97F4A7C15)
        bucket ^= bucket >> np.uint64(29)
    value = sketches[:, _GRID].astype(np.float64)
    order = np.lexsort((value, bucket))
    bucket, value = bucket[order], value[order]
    span = np.ptp(value) + 1 if len(value) else 1.0
    line = np.concatenate([[0], np.cumsum(bucket[1:] != bucket[:-1])])[: len(value)] * (span + 2 * tolerance) + value
    return order, np.searchsorted(line, line - tolerance), np.searchsorted(line, line + tolerance, "right") - 1
