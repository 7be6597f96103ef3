"""Whether forces are the negative gradient of the energy: energy differences of close geometries of one molecule."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rung.data.report.result import Consistency
from rung.data.table import StructureTable

MAX_DISPLACEMENT = 0.1  # angstrom, of any atom; the trapezoid rule leaves a few per cent of the difference at it
MAX_PAIRS = 2000
_EXACT = 0.04  # angstrom; up to about here the trapezoid rule is as good as the labels
_MAX_ATOMS = 400_000  # kept at a time; beyond it half of the groups is let go
_BLOCK = 256  # geometries compared with each other at a time

Floats = NDArray[np.float64]


@dataclass
class CloseGeometries:
    """Molecules of a share of the groups, chosen by a hash of the group so that those kept are kept whole."""

    tables: list[StructureTable] = field(default_factory=list)
    limit: int = 1 << 32  # groups whose hash is below it are kept

    def add(self, table: StructureTable) -> None:
        """Take in the molecules of a table, in bounded memory."""
        self.tables.append(self._kept(table.where(~table.pbc.any(axis=1) & (table.num_atoms > 1))))
        while sum(len(kept.numbers) for kept in self.tables) > _MAX_ATOMS and self.limit > 1:
            self.limit //= 2
            self.tables = [self._kept(kept) for kept in self.tables]

    def consistency(self, fidelity: str) -> Consistency:
        """Return how energies and forces at `fidelity` fit together over the closest pairs of geometries.

        The slope is that of a line through the origin.
        """
        tables = [t.where(t.has("energy", fidelity) & t.has("forces", fidelity)) for t in self.tables]
        table = StructureTable.concatenate([t.at(fidelity) for t in tables if len(t)])
        a, b, displacement = _closest(table)
        if not len(a):
            return Consistency(0, None, None, None)
        # The rule's error grows with the cube of the displacement: each pair counts by the inverse square of that.
        weights = 1 / np.sqrt(1 + (displacement / _EXACT) ** 6)
        expected, found = (weights * values for values in _differences(table, fidelity, a, b))
        xx, yy, xy = (float(np.sum(u * v)) for u, v in ((expected, expected), (found, found), (expected, found)))
        if not xx * yy > 0:
            return Consistency(len(a), None, None, float(displacement.max()))
        return Consistency(len(a), xy / xx, xy / math.sqrt(xx * yy), float(displacement.max()))

    def _kept(self, table: StructureTable) -> StructureTable:
        hashes = np.fromiter(map(zlib.crc32, table.groups.tobytes()), np.int64, len(table))
        kept = table.where(hashes < self.limit)
        wanted = {name: array for name, array in kept.labels.items() if name.startswith(("energy.", "forces."))}
        return replace(kept, labels=wanted)


def _closest(table: StructureTable) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Return the closest pairs of structures of one group and order of atoms, and the largest displacement in each."""
    buckets: dict[tuple[bytes, bytes], list[int]] = {}
    offsets = table.offsets
    for m, group in enumerate(table.groups.tobytes()):
        atoms = table.numbers[offsets[m] : offsets[m + 1]].tobytes()
        buckets.setdefault((group, atoms), []).append(m)
    found = [np.zeros((3, 0))]
    for members in buckets.values():
        if len(members) > 1:
            found += _closest_of(table, np.array(members), offsets)
    a, b, displacement = np.concatenate(found, axis=1)
    order = np.argsort(displacement, kind="stable")[:MAX_PAIRS]
    return a[order].astype(np.int64), b[order].astype(np.int64), displacement[order]


def _closest_of(table: StructureTable, members: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[Floats]:
    """Return arrays [3, pairs] of two structures and their displacement, each structure with the nearest to it."""
    size = int(table.num_atoms[members[0]])
    positions = table.positions[offsets[members, None] + np.arange(size)]
    direction = np.random.default_rng(0).normal(size=3 * size)
    order = np.argsort(positions.reshape(len(members), -1) @ direction, kind="stable")
    found = []
    for start in range(0, len(members), _BLOCK):
        block = order[start : start + _BLOCK]
        if len(block) < 2:
            continue
        squares = np.zeros((len(block), len(block)), np.float32)
        for atom in range(size):
            x, y, z = (axis[:, None] - axis for axis in positions[block, atom].T)
            np.maximum(squares, x * x + y * y + z * z, out=squares)
        np.fill_diagonal(squares, np.inf)
        nearest = squares.argmin(axis=1)
        displacement = np.sqrt(squares[np.arange(len(block)), nearest])
        pairs = np.sort(np.stack([np.arange(len(block)), nearest], axis=1), axis=1)
        _, first = np.unique(pairs, axis=0, return_index=True)
        first = first[(displacement[first] < MAX_DISPLACEMENT) & (displacement[first] > 0)]
        found.append(np.concatenate([members[block[pairs[first]]].T, displacement[None, first]]))
    return found


def _differences(
    table: StructureTable, fidelity: str, a: NDArray[np.int64], b: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return what the trapezoid rule over the forces gives for E_b - E_a, and E_b - E_a itself, in eV."""
    one, other = table.take(a), table.take(b)
    forces = one.labels[f"forces.{fidelity}"].astype(np.float64) + other.labels[f"forces.{fidelity}"]
    work = -0.5 * forces * (other.positions.astype(np.float64) - one.positions)
    expected = np.add.reduceat(work.sum(axis=1), one.offsets[:-1])
    return expected, other.labels[f"energy.{fidelity}"] - one.labels[f"energy.{fidelity}"]
