"""Bayesian ridge regression of a new fidelity's read-outs: closed form, no learning rate, with predictive variance.

With the trunk frozen, the energy is linear in the read-outs of a fidelity and in its reference energies
(`Potential.readout_derivatives`). The regression is of what the parent leaves of the labels, every row divided by its
number of atoms n: y / n = (phi . w) / n + noise. The prior of w is Gaussian around the parent's values (w = 0), with a
strength of its own for every layer; the strengths and the noise maximise the evidence (C. M. Bishop, Pattern
Recognition and Machine Learning, 2006, section 3.5; the maximum is found numerically). Reference energies have a prior
so broad that only what the compositions leave open is decided by it.

R rows (energies), X columns (derivatives: K for each of the T layers, then one for each element).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rung.data.batch import Sample, batches
from rung.data.reaction import Reaction, structures_of
from rung.model.potential import Potential
from rung.model.predict import DEFAULT_BUDGET, reaction_energies
from rung.model.uncertainty import LastLayer

Floats = NDArray[np.float64]

REFERENCE_STD = 10.0  # eV; prior of a reference energy's change, after the parent's shift
STRENGTH_RANGE = (1e-4, 1e3)  # of the prior's standard deviations, relative to the spread of the labels
NOISE_RANGE = (1e-3, 1.0)  # of the noise, relative to the same
FLOOR = 1e-7  # eV/atom; the rounding of float32 predictions: no noise is smaller


@dataclass(frozen=True)
class Ridge:
    """The posterior of a regression."""

    change: Floats  # [X], mean: what is added to read-outs and reference energies
    covariance: Floats  # [X, X]
    noise: float  # eV/atom, standard deviation of a label
    prior_std: tuple[float, ...]  # of each layer's part of an energy, eV/atom: how far it may go from the parent
    effective: float  # number of numbers that the labels determine (of the read-outs)

    def apply(self, potential: Potential, fidelity: str) -> None:
        """Add the mean to the potential's read-outs and reference energies at `fidelity`."""
        potential.change_readouts(fidelity, torch.from_numpy(self.change))

    def last_layer(self, factor: float = 1.0) -> LastLayer:
        """Return the posterior as an uncertainty of the potential."""
        return LastLayer(torch.from_numpy(self.covariance), self.noise, factor)


def regress(potential: Potential, rows: Sequence[Reaction], fidelity: str) -> Ridge:
    """Fit the read-outs of `fidelity` to what the potential, as it is, leaves of the rows' energies."""
    regression = Regression.of(potential, rows, fidelity)
    log_noise, *log_prior = regression.most_evident()
    return regression.posterior(log_noise, log_prior)


def posterior(potential: Potential, rows: Sequence[Reaction], fidelity: str, like: Ridge) -> Ridge:
    """Return the posterior about the potential's own read-outs, with the noise and the prior of another regression.

    After gradient steps the training rows are explained so well that the noise cannot be told from them: the features
    are those of the trained potential, but what a label determines is judged as it was before the first step.
    """
    return Regression.of(potential, rows, fidelity).posterior(np.log(like.noise), np.log(like.prior_std).tolist())


def derivatives(potential: Potential, reactions: Sequence[Reaction], fidelity: str) -> Floats:
    """Return the derivatives of the energies of reactions with respect to the fidelity's own numbers, [R, X]."""
    structures = structures_of(reactions)
    weight = next(potential.parameters())
    index = {name: row for row, name in enumerate(potential.config.fidelities)}
    samples = (Sample(structure, fidelity) for structure in structures)
    parts = batches(samples, fidelity_index=index, cutoff=potential.config.cutoff, budget=DEFAULT_BUDGET)
    rows = [potential.readout_derivatives(part.to(weight.device, weight.dtype)).cpu().numpy() for part in parts]
    of_structure = dict(zip(map(id, structures), np.concatenate(rows), strict=True))
    return np.array(
        [
            sum(c * of_structure[id(s)] for s, c in zip(row.structures, row.coefficients, strict=True))
            for row in reactions
        ]
    )


@dataclass(frozen=True)
class Regression:
    """The regression's sums; the evidence as a function of log noise and log prior standard deviations."""

    gram_XX: Floats
    moment_X: Floats
    square: float  # sum of y^2
    num_rows: int
    layers: Sequence[NDArray[np.int64]]  # columns of each layer
    sizes: Sequence[float]  # a layer's part of an energy per atom, for read-outs of standard deviation 1
    spread: float  # eV/atom, of the labels without composition

    @classmethod
    def of(cls, potential: Potential, rows: Sequence[Reaction], fidelity: str) -> Regression:
        """Return the regression of what a potential leaves of the rows' energies on its own read-outs."""
        residual_R = np.array([row.energy for row in rows]) - reaction_energies(potential, rows, fidelity)
        num_atoms_R = np.array([row.num_atoms for row in rows])
        derivatives_RX = derivatives(potential, rows, fidelity)
        config = potential.config
        return cls.from_arrays(derivatives_RX, residual_R, num_atoms_R, config.num_layers, len(config.elements))

    @classmethod
    def from_arrays(
        cls, derivatives_RX: Floats, residual_R: Floats, num_atoms_R: Floats, num_layers: int, num_elements: int
    ) -> Regression:
        """Return the regression of residual energies (eV; label less prediction) of rows of n atoms.

        `derivatives_RX` has the columns of `Potential.readout_derivatives`. Raises ValueError where a number is not
        finite.
        """
        if not (np.isfinite(derivatives_RX).all() and np.isfinite(residual_R).all()):
            raise ValueError("ridge: expected finite features and labels, found NaN or infinite ones")
        x_RX = derivatives_RX / num_atoms_R[:, None]
        y_R = residual_R / num_atoms_R
        references = x_RX[:, -num_elements:]
        # What composition explains belongs to the reference energies: a layer's spread is measured without it.
        left_RX = x_RX - references @ np.linalg.lstsq(references, x_RX, rcond=None)[0]
        left_R = y_R - references @ np.linalg.lstsq(references, y_R, rcond=None)[0]
        layers = np.array_split(np.arange(x_RX.shape[1] - num_elements), num_layers)
        return cls(
            gram_XX=x_RX.T @ x_RX,
            moment_X=x_RX.T @ y_R,
            square=float(y_R @ y_R),
            num_rows=len(y_R),
            layers=layers,
            sizes=[max(float(np.sqrt(np.mean(left_RX[:, some] ** 2) * len(some))), 1e-12) for some in layers],
            spread=max(float(np.sqrt(np.mean(left_R**2))), FLOOR),
        )

    def precision(self, log_prior: Sequence[float]) -> Floats:
        """Return the prior's precision of every column [X]."""
        alpha = np.full(len(self.moment_X), REFERENCE_STD**-2)
        for some, size, log_std in zip(self.layers, self.sizes, log_prior, strict=True):
            alpha[some] = (size / np.exp(log_std)) ** 2
        return alpha

    def evidence(self, log_noise: float, log_prior: Sequence[float]) -> float:
        """Return the logarithm of the evidence, less what does not depend on the arguments."""
        alpha = self.precision(log_prior)
        beta = float(np.exp(-2 * log_noise))
        # In units of the prior's widths the matrix is the identity plus something positive: well conditioned.
        width = alpha**-0.5
        a_XX = np.eye(len(alpha)) + beta * width[:, None] * self.gram_XX * width
        lower = np.linalg.cholesky(a_XX)
        half = np.linalg.solve(lower, beta * width * self.moment_X)
        log_determinant = 2 * float(np.log(np.diag(lower)).sum())
        return 0.5 * float(self.num_rows * np.log(beta) - log_determinant - beta * self.square + float(half @ half))

    def most_evident(self) -> Floats:
        """Return the logarithms of the noise and of the layers' prior widths that maximise the evidence."""
        from scipy.optimize import minimize  # type: ignore[import-untyped]

        low, high = np.log(STRENGTH_RANGE) + np.log(self.spread)
        quiet = float(np.log(max(NOISE_RANGE[0] * self.spread, FLOOR)))
        loud = max(float(np.log(NOISE_RANGE[1] * self.spread)), quiet)
        bounds = [(quiet, loud), *[(low, high)] * len(self.layers)]
        # The evidence can have several maxima (all is noise; all is explained): several starts.
        starts = [
            [np.clip(np.log(self.spread * noise), quiet, loud), *[np.log(self.spread * prior)] * len(self.layers)]
            for noise, prior in ((0.5, 1.0), (0.1, 3.0), (0.9, 0.1))
        ]
        found = [minimize(lambda p: -self.evidence(p[0], p[1:]), start, bounds=bounds) for start in starts]
        best: Floats = min(found, key=lambda result: float(result.fun)).x
        return best

    def posterior(self, log_noise: float, log_prior: Sequence[float]) -> Ridge:
        """Return mean and covariance of read-outs and reference energies, given noise and prior widths."""
        alpha = self.precision(log_prior)
        beta = float(np.exp(-2 * log_noise))
        width = alpha**-0.5
        inverse = np.linalg.inv(np.eye(len(alpha)) + beta * width[:, None] * self.gram_XX * width)
        covariance = width[:, None] * inverse * width
        covariance = (covariance + covariance.T) / 2
        effective = float(np.sum(1 - np.diag(inverse)[np.concatenate(self.layers)]))
        mean = beta * covariance @ self.moment_X
        return Ridge(mean, covariance, float(np.exp(log_noise)), tuple(np.exp(log_prior).tolist()), effective)
