"""The outer update of Reptile (arXiv:1803.02999) over fidelities, as mathematics on tensors.

    phi <- phi + rate * mean_t(phi_t - phi)

phi_t are the weights after the inner steps on task t, all started from phi. A stacked parameter has one row per
fidelity, and a row belongs to the tasks of its fidelity: it takes the mean of their results in full, and a task's
result never touches another fidelity's row (the optimizer's momentum moves those rows too).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OuterUpdate:
    """Collects the differences of one outer step's tasks.

    `start` are the weights phi, which are copied; `owned[i]` says that start[i] is stacked, one row per fidelity.
    """

    def __init__(self, start: Sequence[Tensor], owned: Sequence[bool]) -> None:
        self.start = [tensor.detach().clone() for tensor in start]
        self._owned = list(owned)
        self._differences = [torch.zeros_like(tensor) for tensor in self.start]
        self._fidelities: list[int] = []

    def add(self, parameters: Sequence[Tensor], fidelity: int) -> None:
        """Add the weights that a task at this fidelity (a row index) ended at."""
        self._fidelities.append(fidelity)
        for difference, end, start, owned in zip(self._differences, parameters, self.start, self._owned, strict=True):
            if owned:
                difference[fidelity] += end.detach()[fidelity] - start[fidelity]
            else:
                difference += end.detach() - start

    def result(self, rate: float) -> list[Tensor]:
        """Return the new weights phi; `rate` is the outer step size."""
        if not self._fidelities:
            raise ValueError("OuterUpdate: expected the result of at least one task, found none")
        updated = []
        for start, difference, owned in zip(self.start, self._differences, self._owned, strict=True):
            if owned:
                counts = [max(1, self._fidelities.count(row)) for row in range(len(start))]
                divisor = start.new_tensor(counts).reshape(-1, *[1] * (start.dim() - 1))
                updated.append(start + difference / divisor)
            else:
                updated.append(start + difference * (rate / len(self._fidelities)))
        return updated
