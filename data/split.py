"""Deal the groups of a dataset (its molecules) into train, val and test, the same way on every machine."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitFractions:
    """Shares of the groups (not of the structures) in each split; they sum to one."""

    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    seed: int = 0


def split_of_group(group: str, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> str:
    """Return 'train', 'val' or 'test' for a group, by a hash of its name: independent of every other group.

    Raises ValueError when the fractions are negative or do not sum to one.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise ValueError(f"split fractions: expected three shares >= 0 that sum to 1, found {fractions}")
    digest = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    if point < fractions[0]:
        return "train"
    return "val" if point < fractions[0] + fractions[1] else "test"
