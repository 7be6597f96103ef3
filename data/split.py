"""Deal the groups of a dataset (its molecules) into train, val and test, the same way on every machine."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitFractions:
    """Shares of the groups (not of the structures) in each split, which they deal by a hash; they sum to one.

    Raises ValueError when the shares are negative or do not sum to one.
    """

    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.train, self.val, self.test)
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise ValueError(f"split fractions: expected three shares >= 0 that sum to 1, found {shares}")

    def __call__(self, group: str) -> str:
        """Return 'train', 'val' or 'test' for a group: independent of every other group."""
        digest = hashlib.blake2b(f"{self.seed}:{group}".encode(), digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64
        if point < self.train:
            return "train"
        return "val" if point < self.train + self.val else "test"
