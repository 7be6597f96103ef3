"""Strategy `auto`: every strategy is cross-validated, and the simplest of the best ones is taken."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rung.finetune import dataset
from rung.finetune.config import CLOSED_FORM, FROZEN_TRUNK, FinetuneConfig, Strategy
from rung.finetune.measure import row_errors
from rung.finetune.recipe import Judged, Recipe, cross_validate

logger = logging.getLogger(__name__)
FOLDS_OF_LARGE_SETS = 3  # where the final fit needs no folds, these are enough to compare strategies
CANDIDATES: tuple[Strategy, ...] = ("parent", "ridge", "embedding", "adapter", "full")  # simplest first


@dataclass(frozen=True)
class Trial:
    """A strategy's error in cross-validation."""

    strategy: Strategy
    mae_mev_per_atom: float  # of all rows
    standard_error: float  # of that mean, over folds
    folds: list[Judged]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    strategy: Strategy
    reason: str
    trials: list[Trial]

    @property
    def folds(self) -> list[Judged]:
        """The folds of the chosen strategy."""
        return next(trial.folds for trial in self.trials if trial.strategy == self.strategy)


def choose(
    config: FinetuneConfig, target: dataset.TargetSet, make: Callable[[FinetuneConfig], Recipe], notes: list[str]
) -> Choice:
    """Cross-validate every strategy on the same folds; take the simplest within one standard error of the best.

    The standard error is that of the best one's folds (L. Breiman et al., Classification and Regression Trees, 1984,
    section 3.4.3). With replay, strategies that leave the shared weights alone are no candidates; with forces, those
    that learn from energies only are none.
    """
    num_folds = target.num_folds or FOLDS_OF_LARGE_SETS
    parts = dataset.partition(target.train, num_folds, config.seed, notes, "choice of the strategy")
    trials = []
    for name in CANDIDATES:
        if config.replay and name in FROZEN_TRUNK or config.use_forces and name in CLOSED_FORM:
            continue
        recipe = make(dataclasses.replace(config, strategy=name))
        folds = cross_validate(recipe, target.train, parts)
        errors = [np.abs(row_errors(f.fit.potential, f.rows, config.fidelity).per_atom) * 1000 for f in folds]
        spread = float(np.std([error.mean() for error in errors], ddof=1)) / len(errors) ** 0.5
        trials.append(Trial(name, float(np.concatenate(errors).mean()), spread, folds))
        logger.info(
            "strategy %s: %.1f +- %.1f meV/atom in %d folds", name, trials[-1].mae_mev_per_atom, spread, num_folds
        )
    best = min(trials, key=lambda trial: trial.mae_mev_per_atom)
    limit = best.mae_mev_per_atom + best.standard_error
    taken = next(trial for trial in trials if trial.mae_mev_per_atom <= limit)
    table = ", ".join(f"{t.strategy} {t.mae_mev_per_atom:.1f} +- {t.standard_error:.1f}" for t in trials)
    why = "the smallest error" if taken is best else f"the simplest within one standard error of {best.strategy}"
    reason = f"strategy {taken.strategy}: {why} in {num_folds}-fold cross-validation (meV/atom: {table})"
    return Choice(taken.strategy, reason, trials)
