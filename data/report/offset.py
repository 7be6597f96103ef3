"""Differences between two levels of theory on the same geometries, before and after one energy per element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rung.data.structure import MAX_ATOMIC_NUMBER

Floats = NDArray[np.float64]

_SIZE = MAX_ATOMIC_NUMBER + 1


@dataclass
class Differences:
    """Sums over structures from which mean, spread and the fit on composition follow, in memory of one fixed size."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    gram: Floats = field(default_factory=lambda: np.zeros((_SIZE, _SIZE)))
    moment: Floats = field(default_factory=lambda: np.zeros(_SIZE))

    def add(self, fractions: Floats, differences: Floats) -> None:
        """Take in differences in eV/atom [M] of structures with these shares of each element [M, 119]."""
        self.number += len(differences)
        self.total += float(differences.sum())
        self.squares += float(differences @ differences)
        present = np.flatnonzero(fractions.any(axis=0))
        shares = fractions[:, present]
        self.gram[np.ix_(present, present)] += shares.T @ shares
        self.moment[present] += shares.T @ differences

    def summary(self) -> tuple[float, float, float]:
        """Return mean, standard deviation and root mean square of what the fit leaves, in eV/atom."""
        present = np.flatnonzero(self.gram.diagonal())
        gram, moment = self.gram[np.ix_(present, present)], self.moment[present]
        fit = np.linalg.lstsq(gram, moment, rcond=1e-10)[0]
        left = self.squares - float(2 * fit @ moment - fit @ gram @ fit)
        mean = self.total / self.number
        spread = self.squares / self.number - mean**2
        return mean, math.sqrt(max(spread, 0.0)), math.sqrt(max(left / self.number, 0.0))


def binding(energies: Floats, counts: NDArray[np.int32], e0: Mapping[int, float]) -> Floats:
    """Return E - sum E0 per atom in eV, [M]; an element without an E0 counts as zero."""
    reference = np.zeros(_SIZE)
    reference[list(e0)] = list(e0.values())
    result: Floats = (energies - counts @ reference) / counts.sum(axis=1)
    return result
