"""What a manifest states of labels, gathered piece by piece: samples for the E0 fits, and sums that add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rung.data.reference_energy import Compositions, E0Fit, Floats, RobustReference, fit_e0_robustly
from rung.data.table import StructureTable

SAMPLE = 50_000  # energies that a fit is made on, of a larger dataset
PER_ELEMENT = 50  # structures of a rare element that are in the sample of each part in any case
_DIGITS = 9  # decimals of fitted and averaged numbers: what differs between linear algebra libraries is rounded off


@dataclass(frozen=True)
class EnergySample:
    """Energies of some structures and their compositions."""

    compositions: Compositions
    energies: Floats  # eV

    @staticmethod
    def of(table: StructureTable, fidelity: str, limit: int) -> EnergySample | None:
        """Return the first `limit` structures with an energy, and the first of each element; None when there is none.

        A spill is sorted by a hash, so the first are a random sample that does not depend on how the work was shared.
        """
        rows = np.flatnonzero(table.has("energy", fidelity))
        if not len(rows):
            return None
        compositions = Compositions.of(table.numbers, table.num_atoms).rows(rows)
        firsts = [np.flatnonzero(column)[:PER_ELEMENT] for column in compositions.counts.T]
        kept = np.unique(np.concatenate([np.arange(min(limit, len(rows))), *firsts]))
        return EnergySample(compositions.rows(kept), table.labels[f"energy.{fidelity}"][rows[kept]])

    @staticmethod
    def concatenate(samples: Sequence[EnergySample]) -> EnergySample:
        """Return all samples as one."""
        return EnergySample(
            Compositions.concatenate([sample.compositions for sample in samples]),
            np.concatenate([sample.energies for sample in samples]),
        )


@dataclass(frozen=True)
class Reference:
    """The reference energies of a fidelity, and what tells its outliers."""

    e0: dict[int, float]  # eV, isolated atoms or fitted
    fit: E0Fit
    robust: RobustReference | None
    typical: float  # eV/atom, median of E - sum E0

    @staticmethod
    def of(statistics: EnergySample, everything: EnergySample, known_e0: dict[int, float] | None) -> Reference:
        """Fit the E0s to the energies of the split that statistics are taken on, the outliers' to those of all."""
        fit = fit_e0_robustly(statistics.compositions, statistics.energies)
        fit = dataclasses.replace(fit, e0={z: round(value, _DIGITS) for z, value in fit.e0.items()})
        e0 = fit.e0 if known_e0 is None else dict(sorted(known_e0.items()))
        residual = statistics.energies - statistics.compositions.sums(e0)
        typical = float(np.median(residual / statistics.compositions.counts.sum(1)))
        return Reference(e0, fit, RobustReference.fit(everything.compositions, everything.energies), typical)


@dataclass(frozen=True)
class LabelSums:
    """Sums over the labels of some structures at one fidelity; those of disjoint sets add up."""

    num_energies: int = 0
    num_forces: int = 0
    num_residuals: int = 0
    residual: float = 0.0  # sum of (E - sum E0) / n, eV/atom
    residual_squared: float = 0.0
    num_components: int = 0
    force_squared: float = 0.0  # (eV/angstrom)^2
    force_max: float = 0.0  # eV/angstrom, largest component

    @staticmethod
    def of(table: StructureTable, compositions: Compositions, fidelity: str, e0: Mapping[int, float]) -> LabelSums:
        """Return the sums of a table, whose compositions are given because every fidelity needs them."""
        residual = (table.label(f"energy.{fidelity}") - compositions.sums(e0)) / table.num_atoms
        residual = residual[~np.isnan(residual)]  # no energy, or an element that only another split has
        forces = table.labels.get(f"forces.{fidelity}", np.zeros((0, 3))).astype(np.float64).ravel()
        forces = forces[~np.isnan(forces)]
        return LabelSums(
            num_energies=int(table.has("energy", fidelity).sum()),
            num_forces=int(table.has("forces", fidelity).sum()),
            num_residuals=len(residual),
            residual=float(residual.sum()),
            residual_squared=float((residual**2).sum()),
            num_components=forces.size,
            force_squared=float(np.square(forces).sum()),
            force_max=float(np.abs(forces).max(initial=0.0)),
        )

    def __add__(self, other: LabelSums) -> LabelSums:
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in dataclasses.fields(self)}
        return LabelSums(**{**sums, "force_max": max(self.force_max, other.force_max)})

    def energy_statistics(self) -> dict[str, float]:
        """Return e0_residual, energy_mean and energy_std of a manifest, in eV/atom; empty without energies."""
        if not self.num_residuals:
            return {}
        mean, square = self.residual / self.num_residuals, self.residual_squared / self.num_residuals
        spread = max(square - mean**2, 0.0) ** 0.5
        names = {"e0_residual": square**0.5, "energy_mean": mean, "energy_std": spread}
        return {name: round(value, _DIGITS) for name, value in names.items()}

    def force_statistics(self) -> dict[str, float]:
        """Return force_rms and force_max of a manifest, in eV/angstrom; empty without forces."""
        if not self.num_components:
            return {}
        rms = (self.force_squared / self.num_components) ** 0.5
        return {"force_rms": round(rms, _DIGITS), "force_max": self.force_max}


def deviations(
    table: StructureTable, compositions: Compositions, fidelity: str, robust: RobustReference
) -> tuple[NDArray[np.int64], Floats]:
    """Return the structures with an energy, and how far each is from what composition explains, in eV/atom."""
    rows = np.flatnonzero(table.has("energy", fidelity))
    return rows, robust.deviations(compositions.rows(rows), table.label(f"energy.{fidelity}")[rows])
