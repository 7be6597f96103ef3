"""Flat vectors cut into equal partitions, one for each data rank, as ZeRO keeps its masters and their moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def resplit(parts: Sequence[Tensor], size: int, rank: int, world: int, length: int) -> Tensor:
    """Return the partition of data rank `rank` of `world`, `length` elements long, of a vector cut otherwise before.

    `parts` are its partitions by data rank, padded at the end; `size` is the vector's true number of elements.
    Raises ValueError when they hold fewer, or when `world` partitions of `length` cannot.
    """
    whole = torch.cat(list(parts))
    if len(whole) < size or length * world < size:
        raise ValueError(
            f"partition: expected {size} elements, found {len(whole)} in {len(parts)} partition(s), "
            f"for {world} partition(s) of {length}"
        )
    padded = whole.new_zeros(world * length)
    padded[:size] = whole[:size]
    return padded[rank * length : (rank + 1) * length].clone()
