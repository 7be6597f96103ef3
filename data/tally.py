"""What a build counts of a shard's packs while they are written: atoms, sums over labels, energies that do not fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rung.data.reference_energy import SUSPICIOUS_Z, Compositions
from rung.data.shard import ShardInfo
from rung.data.statistics import LabelSums, Reference, deviations
from rung.data.table import StructureTable
from rung.data.unfinished import ShardRecord

NAMED = 20  # structures that a record names

logger = logging.getLogger(__name__)


class Tally:
    """What a shard's record gathers of its packs."""

    def __init__(self, references: Mapping[str, Reference], limit: float) -> None:
        self._references, self._limit = references, limit
        self._elements = Counter[int]()
        self._sums: dict[str, LabelSums] = {}
        self._outliers, self._extreme = Counter[str](), Counter[str]()
        self._named: dict[str, list[tuple[float, str]]] = {}

    def seen(self, pack: StructureTable) -> StructureTable:
        """Count a pack, and return it."""
        compositions = Compositions.of(pack.numbers, pack.num_atoms)
        atoms = compositions.counts.sum(0).astype(np.int64)
        self._elements.update(dict(zip(compositions.elements.tolist(), atoms.tolist(), strict=True)))
        for name in pack.fidelities:
            reference = self._references.get(name)
            sums = LabelSums.of(pack, compositions, name, {} if reference is None else reference.e0)
            self._sums[name] = self._sums.get(name, LabelSums()) + sums
            if reference is not None and reference.robust is not None:
                self._judge(
                    pack, name, *deviations(pack, compositions, name, reference.robust), reference.robust.spread
                )
        return pack

    def _judge(
        self, pack: StructureTable, name: str, rows: NDArray[np.int64], found: NDArray[np.float64], spread: float
    ) -> None:
        far = np.flatnonzero(np.abs(found) > SUSPICIOUS_Z * spread)
        self._outliers[name] += len(far)
        self._extreme[name] += int(np.count_nonzero(np.abs(found[far]) > self._limit))
        named = [(float(found[i]), pack.keys[int(rows[i])]) for i in far.tolist()]
        self._named[name] = sorted(self._named.get(name, []) + named, key=_badness)[:NAMED]

    def record(self, info: ShardInfo) -> ShardRecord:
        """Return the record of all packs."""
        elements = dict(sorted(self._elements.items()))
        return ShardRecord(info, elements, self._sums, dict(self._outliers), self._named, dict(self._extreme))


def _badness(named: tuple[float, str]) -> tuple[float, str]:
    return -abs(named[0]), named[1]


def tell_outliers(fidelity: str, shards: Sequence[ShardRecord], limit: float) -> None:
    """Log the energies that composition does not explain; raise ValueError for those beyond `limit` eV/atom."""
    count = sum(shard.outliers.get(fidelity, 0) for shard in shards)
    extreme = sum(shard.extreme.get(fidelity, 0) for shard in shards)
    worst = sorted((item for shard in shards for item in shard.named.get(fidelity, [])), key=_badness)
    worst = worst[: min(extreme or NAMED, NAMED)]
    named = ", ".join(f"'{key}' by {deviation:+.3f} eV/atom" for deviation, key in worst)
    if extreme:
        raise ValueError(
            f"energy.{fidelity}: expected energies within {limit:g} eV/atom of what composition explains, found "
            f"{extreme} beyond: {named}; are all energies in eV, of one method and one code?"
        )
    if count:
        message = "energy.%s: %d outliers (robust z-score over %g): %s"
        logger.warning(message, fidelity, count, SUSPICIOUS_Z, named)
