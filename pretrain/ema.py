"""Exponential moving average of the weights: what is evaluated and served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages the parameters of a module, in the parameters' own dtype.

    The decay warms up as (1 + n) / (10 + n), n updates, so that the random initial weights are forgotten early.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.averages = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module's present parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self.module.named_parameters():
            self.averages[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the module for the duration of the block."""
        raw = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(raw)

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Take over the averages and the number of updates of a saved state."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates = updates

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(values[name])
