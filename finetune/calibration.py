"""How well predicted uncertainties tell the errors on rows that were not trained on, and the factor that mends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf  # type: ignore[import-untyped]

from rung.data.reaction import Reaction
from rung.finetune.reference import label_energies, num_atoms
from rung.finetune.ridge import Ridge, derivatives
from rung.model.potential import Potential
from rung.model.predict import reaction_energies

Floats = NDArray[np.float64]
MIN_ROWS = 5  # fewer errors say too little about a spread


@dataclass(frozen=True)
class Scores:
    """Errors of rows beside the standard deviations that were predicted for them, [R] in eV."""

    error: Floats
    std: Floats
    num_atoms: Floats

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """Return the scores of all parts."""
        return Scores(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("error", "std", "num_atoms")))

    def scaled(self, factor: float) -> Scores:
        """Return the scores with standard deviations multiplied by a factor."""
        return Scores(self.error, self.std * factor, self.num_atoms)

    @property
    def factor(self) -> float:
        """The factor of the standard deviations under which Gaussian errors are most likely: the RMS of error / std."""
        return float(np.sqrt(np.mean((self.error / self.std) ** 2)))

    def coverage(self, levels: Floats) -> Floats:
        """Return which fraction of the errors lies inside the central interval of each probability in `levels`."""
        inside = erf(np.abs(self.error) / self.std / 2**0.5)
        return np.array([float(np.mean(inside <= level)) for level in levels])

    def metrics(self) -> dict[str, float]:
        """Return the coverage of one and two standard deviations (Gaussian: 0.683, 0.954) and the rank correlation."""
        from scipy.stats import spearmanr  # type: ignore[import-untyped]

        within = np.abs(self.error) / self.std
        rank = spearmanr(np.abs(self.error) / self.num_atoms, self.std / self.num_atoms)[0] if len(within) > 2 else 0.0
        return {
            "rows": len(self.error),
            "within_one_std": float(np.mean(within <= 1)),
            "within_two_std": float(np.mean(within <= 2)),
            "rms_error_over_std": self.factor,
            "rank_correlation": float(np.nan_to_num(rank)),
        }


def last_layer_scores(potential: Potential, posterior: Ridge, rows: Sequence[Reaction], fidelity: str) -> Scores:
    """Return the errors of rows and the standard deviations of the last layer's posterior."""
    derivatives_RX, atoms = torch.from_numpy(derivatives(potential, rows, fidelity)), num_atoms(rows)
    variance = posterior.last_layer().variance_of(derivatives_RX, torch.from_numpy(atoms))
    return Scores(_errors(potential, rows, fidelity), variance.sqrt().numpy(), atoms)


def ensemble_scores(members: Sequence[Potential], rows: Sequence[Reaction], fidelity: str) -> Scores:
    """Return the errors of the members' mean on rows, and the standard deviations of the members' energies."""
    errors = np.stack([_errors(member, rows, fidelity) for member in members])
    std = np.maximum(errors.std(0, ddof=1), 1e-9)  # members that agree exactly: no division by zero
    return Scores(errors.mean(0), std, num_atoms(rows))


def _errors(potential: Potential, rows: Sequence[Reaction], fidelity: str) -> Floats:
    """Return prediction less label of every row, [R] in eV."""
    return reaction_energies(potential, rows, fidelity) - label_energies(rows)
