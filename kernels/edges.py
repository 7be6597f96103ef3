"""The neighbour graph as the convolution reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Edges(NamedTuple):
    """Directed edges i <- j of a full, symmetric neighbour list, sorted by receiver i (compressed rows)."""

    receivers: Tensor  # int32 [E]
    senders: Tensor  # int32 [E]
    row_ptr: Tensor  # int32 [N + 1]: the edges of receiver i are row_ptr[i] .. row_ptr[i + 1] - 1
    reverse: Tensor  # int32 [E]: reverse[e] is the edge j <- i of edge e = (i <- j)
