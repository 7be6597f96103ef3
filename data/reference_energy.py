"""Reference energies (E0) of a fidelity by least squares on composition, and the energies that do not fit.

The model learns E - sum_i E0[Z_i]. Isolated-atom energies are better where a source states them: they give
atomisation energies, which stay right for a dissociating molecule. The fit is what remains when it states none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from rung.data.structure import Structure

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

EXTREME_DEVIATION = 10.0  # eV/atom; beyond any chemical bond: from here a unit or a method is mixed
SUSPICIOUS_Z = 10.0  # robust z-score from which an energy is named in reports
_MIN_SPREAD = 0.05  # eV/atom; the spread of a narrow set (one molecule near its minimum) is taken to be at least this


@dataclass(frozen=True)
class E0Fit:
    """Energies per element that explain total energies by composition alone."""

    e0: dict[int, float]  # atomic number -> eV
    residual_rms: float  # eV/atom, root mean square over structures
    rank: int  # of the composition matrix; below len(e0) some elements cannot be told apart
    unseparated: tuple[int, ...]  # the elements whose E0 the compositions do not determine; only their sums are

    @property
    def note(self) -> str:
        """A sentence on what the compositions leave undetermined; empty when nothing is."""
        if not self.unseparated:
            return ""
        elements = ", ".join(chemical_symbols[z] for z in self.unseparated)
        return (
            f"compositions have rank {self.rank} for {len(self.e0)} elements: the E0s of {elements} cannot be told "
            "apart (they always occur in the same proportions, or there are too few compositions); their smallest "
            "solution is used, only their sum in known compositions means anything. Add structures of other "
            "compositions or give isolated-atom energies"
        )


@dataclass(frozen=True)
class Outlier:
    """A structure whose energy per atom is far from what its composition explains."""

    index: int
    deviation: float  # eV/atom, from the median residual of a robust fit
    z: float  # the deviation in robust standard deviations


class Compositions(NamedTuple):
    """How many atoms of each element each of M structures has."""

    elements: NDArray[np.int64]  # [e], atomic numbers, ascending
    counts: Floats  # [M, e]

    @staticmethod
    def of(numbers: NDArray[np.uint8], num_atoms: NDArray[np.integer]) -> Compositions:
        """Return the compositions of structures whose atoms follow each other in `numbers`."""
        elements = np.flatnonzero(np.bincount(numbers, minlength=1))
        column = np.zeros(256, np.int64)
        column[elements] = np.arange(len(elements))
        cell = np.repeat(np.arange(len(num_atoms)) * len(elements), num_atoms) + column[numbers]
        counts = np.bincount(cell, minlength=len(num_atoms) * len(elements)).reshape(len(num_atoms), len(elements))
        return Compositions(elements.astype(np.int64), counts.astype(np.float64))

    @staticmethod
    def concatenate(parts: Sequence[Compositions]) -> Compositions:
        """Return the compositions of all parts, over the elements of any of them."""
        elements = np.unique(np.concatenate([part.elements for part in parts]))
        return Compositions(elements, np.concatenate([part.over(elements) for part in parts]))

    def over(self, elements: NDArray[np.int64]) -> Floats:
        """Return the counts of these elements, zero for those that do not occur; [M, len(elements)]."""
        counts = np.zeros((len(self.counts), len(elements)))
        known = np.isin(self.elements, elements)
        counts[:, np.searchsorted(elements, self.elements[known])] = self.counts[:, known]
        return counts

    def rows(self, index: NDArray[np.integer]) -> Compositions:
        """Return the compositions of some structures, over the elements that they have."""
        counts = self.counts[index]
        occurring = counts.any(axis=0)
        return Compositions(self.elements[occurring], counts[:, occurring])

    def sums(self, e0: Mapping[int, float]) -> Floats:
        """Return the sum of the elements' energies for each structure; [M], NaN where an element has none."""
        known = np.array([e0.get(z, np.nan) for z in self.elements.tolist()])
        # Not a product of BLAS: its threads cost more than they save on a few columns, and worker processes share them.
        # An element without an energy counts only where it occurs: 0 * NaN is NaN.
        return np.asarray(np.where(self.counts > 0, self.counts * known, 0.0).sum(1), np.float64)


@dataclass(frozen=True)
class RobustReference:
    """What composition explains of an energy, in eV/atom, unbent by a minority of wrong energies."""

    e0: dict[int, float]  # least absolute deviations
    centre: float  # eV/atom, median of what they leave
    spread: float  # eV/atom, robust standard deviation of it

    @staticmethod
    def fit(compositions: Compositions, energies: Floats) -> RobustReference | None:
        """Return the fit to total energies in eV; None for fewer than five structures per element, too few to tell.

        The spread is 1.4826 times the median absolute deviation (Leys et al., J. Exp. Soc. Psychol. 49, 764 (2013)).
        """
        elements, counts = compositions
        if len(energies) < 5 * len(elements):
            return None
        sizes = counts.sum(1)
        solution = _least_absolute_deviations(counts / sizes[:, None], energies / sizes)
        residual = (energies - counts @ solution) / sizes
        centre = float(np.median(residual))
        spread = max(1.4826 * float(np.median(np.abs(residual - centre))), _MIN_SPREAD)
        return RobustReference(dict(zip(elements.tolist(), solution.tolist(), strict=True)), centre, spread)

    def deviations(self, compositions: Compositions, energies: Floats) -> Floats:
        """Return how far each energy is from what composition explains, in eV/atom; NaN for an unknown element."""
        residual = (energies - compositions.sums(self.e0)) / compositions.counts.sum(1)
        return np.asarray(residual - self.centre, np.float64)


def fit_e0_robustly(compositions: Compositions, energies: Floats) -> E0Fit:
    """Return the least-squares fit to the energies that a robust reference does not call outliers."""
    reference = RobustReference.fit(compositions, energies)
    if reference is not None:
        kept = np.abs(reference.deviations(compositions, energies)) <= SUSPICIOUS_Z * reference.spread
        without = Compositions(compositions.elements, compositions.counts[kept])
        if (without.counts.sum(0) > 0).all():  # an element that only outliers have must keep its energy
            compositions, energies = without, energies[kept]
    return fit_compositions(compositions, energies)


def fit_e0(numbers: Sequence[NDArray[np.uint8]], energies: Sequence[float] | Floats, *, ridge: float = 0.0) -> E0Fit:
    """Fit one energy per element to total energies in eV; `numbers` holds each structure's atomic numbers.

    Minimises mean_s ((E_s - sum_i E0[Z_i]) / n_s)^2 + ridge * sum_Z E0[Z]^2. Without ridge the smallest of the equally
    good solutions is returned when compositions are rank-deficient; with ridge, E0 shrinks towards zero (which is what
    a correction to known reference energies wants). Raises ValueError for no structures, unequal lengths, NaN or
    negative ridge.
    """
    target = np.asarray(energies, np.float64)
    if len(numbers) == 0 or len(numbers) != len(target):
        raise ValueError(f"E0 fit: expected as many compositions as energies, found {len(numbers)} and {len(target)}")
    if not np.isfinite(target).all():
        raise ValueError("E0 fit: expected finite energies; leave out the structures without one")
    if ridge < 0:
        raise ValueError(f"fit_e0: ridge: expected >= 0, found {ridge}")
    return fit_compositions(_compositions(numbers), target, ridge=ridge)


def fit_compositions(
    compositions: Compositions, energies: Floats, *, ridge: float = 0.0, sizes: Floats | None = None
) -> E0Fit:
    """Fit as `fit_e0` does to any rows of atom counts [M, e]; `sizes` [M] are the atoms that an energy is divided by.

    A reaction's counts are the changes of composition: zero where it is balanced, and then `sizes` must be given.
    """
    elements, counts = compositions
    sizes = counts.sum(1) if sizes is None else sizes
    design, target = counts / sizes[:, None], energies / sizes
    num_structures, num_elements = design.shape
    penalty = np.sqrt(ridge * num_structures) * np.eye(num_elements)
    solution = np.linalg.lstsq(np.vstack([design, penalty]), np.append(target, np.zeros(num_elements)), rcond=1e-10)[0]
    residual = target - design @ solution
    rank, unseparated = _rank(design)
    return E0Fit(
        e0={int(z): float(value) for z, value in zip(elements, solution, strict=True)},
        residual_rms=float(np.sqrt(np.mean(residual**2))),
        rank=rank,
        unseparated=tuple(int(z) for z in elements[unseparated]),
    )


def outliers(
    numbers: Sequence[NDArray[np.uint8]],
    energies: Sequence[float] | Floats,
    *,
    z: float = SUSPICIOUS_Z,
    deviation: float = 0.0,
) -> list[Outlier]:
    """Return the structures whose energy per atom deviates by more than `z` robust sigma and `deviation` eV/atom.

    The reference is `RobustReference`; sets with fewer than five structures per element return nothing.
    """
    compositions, target = _compositions(numbers), np.asarray(energies, np.float64)
    reference = RobustReference.fit(compositions, target)
    if reference is None:
        return []
    found = reference.deviations(compositions, target)
    far = np.flatnonzero((np.abs(found) > z * reference.spread) & (np.abs(found) > deviation))
    return [Outlier(int(i), float(found[i]), float(abs(found[i]) / reference.spread)) for i in far]


def check_energies(structures: Sequence[Structure], fidelity: str, limit: float = EXTREME_DEVIATION) -> None:
    """Log structures whose energy is far from what composition explains; raise ValueError beyond `limit` eV/atom."""
    labelled = [(s, e) for s in structures if fidelity in s.labels and (e := s.labels[fidelity].energy) is not None]
    if not labelled:
        return
    found = outliers([s.numbers for s, _ in labelled], [energy for _, energy in labelled])
    told = [f"'{labelled[o.index][0].key}' by {o.deviation:+.3f} eV/atom" for o in found]
    extreme = [text for text, o in zip(told, found, strict=True) if abs(o.deviation) > limit]
    if extreme:
        raise ValueError(
            f"energy.{fidelity}: expected energies within {limit:g} eV/atom of what composition explains, found "
            f"{len(extreme)} beyond: {_some(extreme)}; are all energies in eV, of one method and one code?"
        )
    if told:
        message = "energy.%s: %d outliers (robust z-score over %g): %s"
        logger.warning(message, fidelity, len(told), SUSPICIOUS_Z, _some(told))


def _some(texts: Sequence[str], shown: int = 10) -> str:
    rest = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + rest


def _compositions(numbers: Sequence[NDArray[np.uint8]]) -> Compositions:
    return Compositions.of(np.concatenate(numbers), np.array([len(atoms) for atoms in numbers]))


def _rank(design: Floats) -> tuple[int, NDArray[np.intp]]:
    """Return the rank and the columns that take part in the null space: the elements that cannot be separated."""
    _, singular, right = np.linalg.svd(np.linalg.qr(design, mode="r"))  # of [elements, elements], not [structures, ..]
    rank = int((singular > 1e-10 * max(singular[0], 1e-10)).sum())
    return rank, np.flatnonzero((np.abs(right[rank:]) > 1e-6).any(0))


def _least_absolute_deviations(design: Floats, target: Floats, iterations: int = 30) -> Floats:
    """Return argmin_x sum |target - design x| by iteratively reweighted least squares.

    The steps are corrections to the plain least-squares solution by its normal equations, which are as small as there
    are elements: squaring the condition number costs digits of a correction, not of the solution.
    """
    solution: Floats = np.linalg.lstsq(design, target, rcond=1e-10)[0].astype(np.float64)
    for _ in range(iterations):
        residual = target - design @ solution
        weighted = design.T / np.maximum(np.abs(residual), 1e-3)
        step = np.linalg.lstsq(weighted @ design, weighted @ residual, rcond=1e-14)[0]
        solution = solution + step
        if np.abs(step).max() < 1e-5:  # eV; a hundredth of the finest spread that is told apart
            break
    return solution
