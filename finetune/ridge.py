"""Bayesian ridge regression of a new fidelity's read-outs: closed form, no learning rate, with predictive variance.

With the trunk frozen, the energy is linear in the read-outs of a fidelity and in its reference energies
(`Potential.readout_derivatives`). The regression is of what the parent leaves of the labels, every row divided by its
number of atoms n: y / n = (phi . w) / n + noise. The prior of w is Gaussian around the parent's values (w = 0), with a
strength of its own for every layer; the strengths and the noise maximise the evidence (C. M. Bishop, Pattern
Recognition and Machine Learning, 2006, section 3.5; the maximum is found numerically). The reference energies, already
shifted by the parent's fit, are one more such block. A number that no label depends on keeps its value, and has no
variance.

R rows (energies), X columns (derivatives: K for each of the T layers, then one for each element), in blocks: the
layers, then the reference energies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rung.data.batch import Sample, batches
from rung.data.reaction import Reaction, structures_of
from rung.finetune.reference import label_energies, num_atoms
from rung.model.potential import Potential
from rung.model.predict import DEFAULT_BUDGET, reaction_energies, widened
from rung.model.uncertainty import LastLayer

Floats = NDArray[np.float64]

STRENGTH_RANGE = (1e-4, 1e3)  # of the prior's standard deviations, relative to the spread of the labels
WIDTH_EXPECTED, WIDTH_LOG_STD = 0.3, 1.5  # log-normal prior of those: median, relative to the same, and width
NOISE_RANGE = (1e-3, 1.0)  # of the noise, relative to the same
FLOOR = 1e-6  # eV/atom; the rounding of float32 predictions: no noise is smaller


@dataclass(frozen=True)
class Ridge:
    """The posterior of a regression."""

    change: Floats  # [X], mean: what is added to read-outs and reference energies
    covariance: Floats  # [X, X]
    noise: float  # eV/atom, standard deviation of a label
    prior_std: tuple[float, ...]  # of each block's part of an energy, eV/atom: how far it may go from the parent
    effective: float  # how many numbers the labels determine

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
    parts = batches(
        samples,
        fidelity_index=index,
        cutoff=potential.config.cutoff,
        budget=widened(DEFAULT_BUDGET, structures, potential.config.cutoff),
    )
    rows = [potential.readout_derivatives(part.to(weight.device, weight.dtype)).cpu().numpy() for part in parts]
    of_structure = dict(zip(map(id, structures), np.concatenate(rows), strict=True))
    return np.array([reaction.combined(of_structure) for reaction in reactions])


@dataclass(frozen=True)
class Regression:
    """The regression's sums; the evidence as a function of log noise and log prior standard deviations."""

    gram_XX: Floats
    moment_X: Floats
    square: float  # sum of y^2
    num_rows: int
    blocks: Sequence[NDArray[np.int64]]  # columns of each layer, then those of the reference energies
    sizes: Sequence[float]  # a block's part of an energy per atom, for numbers of standard deviation 1
    spread: float  # eV/atom, of the labels without composition

    @classmethod
    def of(cls, potential: Potential, rows: Sequence[Reaction], fidelity: str) -> Regression:
        """Return the regression of what a potential leaves of the rows' energies on its own read-outs."""
        residual_R = label_energies(rows) - reaction_energies(potential, rows, fidelity)
        derivatives_RX = derivatives(potential, rows, fidelity)
        config = potential.config
        return cls.from_arrays(derivatives_RX, residual_R, num_atoms(rows), config.num_layers, len(config.elements))

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
        solution, _, rank, _ = np.linalg.lstsq(references, np.column_stack([x_RX, y_R]), rcond=None)
        left = np.column_stack([x_RX, y_R]) - references @ solution
        freedom = len(y_R) - int(rank)  # rows beyond those that composition explains whatever they are
        num_columns = x_RX.shape[1]
        blocks = np.array_split(np.arange(num_columns - num_elements), num_layers)
        squares = [np.sum(left[:, some] ** 2) / freedom if freedom else 0.0 for some in blocks]
        # A block that composition explains but for rounding is one that nothing can be learned about.
        informed = [
            square > 1e-12 * np.mean(np.sum(x_RX[:, b] ** 2, 1)) for square, b in zip(squares, blocks, strict=True)
        ]
        sizes = [float(np.sqrt(square)) if known else 0.0 for square, known in zip(squares, informed, strict=True)]
        spread = float(np.sqrt(np.sum(left[:, -1] ** 2) / freedom)) if freedom else 0.0
        return cls(
            gram_XX=x_RX.T @ x_RX,
            moment_X=x_RX.T @ y_R,
            square=float(y_R @ y_R),
            num_rows=len(y_R),
            blocks=[*blocks, np.arange(num_columns - num_elements, num_columns)],
            sizes=[*sizes, float(np.sqrt(np.mean(np.sum(references**2, axis=1))))],
            spread=max(spread, FLOOR),
        )

    def widths(self, log_prior: Sequence[float]) -> Floats:
        """Return the prior's standard deviation of every column [X]; 0 for one that no label depends on."""
        width = np.zeros(len(self.moment_X))
        for some, size, log_std in zip(self.blocks, self.sizes, log_prior, strict=True):
            if size > 0:
                width[some] = np.exp(log_std) / size
        return np.where(np.diag(self.gram_XX) > 0, width, 0.0)

    def _whitened(self, log_prior: Sequence[float]) -> tuple[Floats, Floats, Floats]:
        """Return widths [X], eigenvalues [X] and eigenvectors [X, X] of the Gram matrix in units of the widths."""
        width = self.widths(log_prior)
        values, vectors = np.linalg.eigh(width[:, None] * self.gram_XX * width)
        return width, np.maximum(values, 0.0), vectors  # rounding makes some of the smallest negative

    def evidence(self, log_noise: float, log_prior: Sequence[float]) -> float:
        """Return the logarithm of the evidence, less what does not depend on the arguments."""
        width, values, vectors = self._whitened(log_prior)
        beta = float(np.exp(-2 * log_noise))
        projected = vectors.T @ (width * self.moment_X)
        explained = float(np.sum(projected**2 * beta / (1 + beta * values)))
        log_determinant = float(np.log1p(beta * values).sum())
        return 0.5 * float(self.num_rows * np.log(beta) - log_determinant - beta * (self.square - explained))

    def most_evident(self) -> Floats:
        """Return the logarithms of the noise and of the blocks' prior widths that maximise the evidence.

        With a weak log-normal prior on the widths: of a handful of labels the evidence alone is too easily impressed.
        """
        from scipy.optimize import minimize  # type: ignore[import-untyped]

        log_spread = float(np.log(self.spread))
        low, high = np.log(STRENGTH_RANGE) + log_spread
        quiet = max(float(np.log(NOISE_RANGE[0])) + log_spread, float(np.log(FLOOR)))
        loud = max(float(np.log(NOISE_RANGE[1])) + log_spread, quiet)
        bounds = [(quiet, loud), *[(low, high)] * len(self.blocks)]

        def cost(point: Floats) -> float:
            expected = (point[1:] - log_spread - np.log(WIDTH_EXPECTED)) / WIDTH_LOG_STD
            return 0.5 * float(np.sum(expected**2)) - self.evidence(float(point[0]), point[1:].tolist())

        # There can be several maxima (all is noise; all is explained): several starts.
        starts = [
            [np.clip(np.log(noise) + log_spread, quiet, loud), *[np.log(prior) + log_spread] * len(self.blocks)]
            for noise, prior in ((0.5, 1.0), (0.1, 3.0), (0.9, 0.1))
        ]
        found = [minimize(cost, start, bounds=bounds) for start in starts]
        best: Floats = min(found, key=lambda result: float(result.fun)).x
        return best

    def posterior(self, log_noise: float, log_prior: Sequence[float]) -> Ridge:
        """Return mean and covariance of read-outs and reference energies, given noise and prior widths."""
        width, values, vectors = self._whitened(log_prior)
        beta = float(np.exp(-2 * log_noise))
        scaled = width[:, None] * vectors
        covariance = (scaled / (1 + beta * values)) @ scaled.T
        mean = beta * covariance @ self.moment_X
        effective = float(np.sum(beta * values / (1 + beta * values)))
        return Ridge(mean, covariance, float(np.exp(log_noise)), tuple(np.exp(log_prior).tolist()), effective)
