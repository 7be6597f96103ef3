"""How a potential for the target fidelity is made from labelled rows: from a checkpoint, or from scratch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rung.data.reaction import Reaction, structures_of
from rung.finetune import dataset, reference, ridge
from rung.finetune.adapt import LEARNING_RATES, Adaptation
from rung.finetune.calibration import MIN_ROWS, Scores, ensemble_scores, last_layer_scores
from rung.finetune.config import CLOSED_FORM, FinetuneConfig
from rung.finetune.measure import RowErrors, row_errors
from rung.finetune.replay import ReplayTask
from rung.finetune.train import Target, Trained, train
from rung.model.potential import Potential
from rung.model.uncertainty import Ensemble, Uncertainty


@dataclasses.dataclass(frozen=True)
class Fit:
    """A potential fitted to rows: where it started, what the closed form gave, and what gradient steps made of it."""

    start: Potential  # the parent and its shift
    regressed: Potential | None  # with the read-outs of the ridge regression; None where it was not asked for
    trained: Trained
    posterior: ridge.Ridge | None  # of the last layer of the trained potential; None where it was not asked for

    @property
    def potential(self) -> Potential:
        """The final potential."""
        return self.trained.potential


class Recipe:
    """How a potential for the target is made from labelled rows; cross-validation repeats it on subsets."""

    label = "fine-tune"

    def __init__(
        self,
        config: FinetuneConfig,
        source: Potential,
        parent: str,
        replay: Sequence[ReplayTask] = (),
        also: Sequence[ReplayTask] = (),
    ) -> None:
        self.config = config
        self.source = source
        self.parent = parent
        self.replay = replay
        self.also = also
        self.strategy: str = config.strategy
        rate = config.training.learning_rate or LEARNING_RATES.get(config.strategy, 0.0)
        self.training = dataclasses.replace(config.training, learning_rate=rate)
        self.regresses = config.strategy == "ridge" or config.strategy != "parent" and config.start == "ridge"

    def start(self, rows: Sequence[Reaction]) -> Potential:
        """Return the potential before the first step: the parent, with reference energies fitted to the labels."""
        potential = self._grown(self.source, rows, self.config.fidelity, self.parent)
        for task in self.also:
            potential = self._grown(potential, dataset.absolute_rows(task.train, task.fidelity), task.fidelity, "")
        return potential

    def _grown(self, potential: Potential, rows: Sequence[Reaction], fidelity: str, parent: str) -> Potential:
        """Return a copy of the potential with a new fidelity, which equals its parent with shifted energies."""
        known = self.source.config.fidelities
        chosen = reference.choose_parent(potential, rows, [parent] if parent else known)[0]
        grown = reference.with_new_fidelity(potential, fidelity, chosen)
        reference.check_identity(grown, structures_of(rows), fidelity, chosen)
        return grown

    def regressed(self, start: Potential, target: ridge.Ridge) -> Potential:
        """Return a copy of `start` with the read-outs of every new fidelity by ridge regression, the target's given."""
        potential = copy.deepcopy(start)
        target.apply(potential, self.config.fidelity)
        for task in self.also:
            rows = dataset.absolute_rows(task.train, task.fidelity)
            ridge.regress(start, rows, task.fidelity).apply(potential, task.fidelity)
        return potential

    def fit(
        self, start: Potential, train_on: list[Reaction], validate_on: list[Reaction], steps: int | None = None
    ) -> Fit:
        """Fit from `start`: ridge regression, then gradient steps (at most `steps` where given), as configured."""
        config = self.config
        regressed = regression = None
        if self.regresses or config.uncertainty == "last_layer":
            regression = ridge.regress(start, train_on, config.fidelity)
            regressed = self.regressed(start, regression) if self.regresses else None
        begin = start if regressed is None else regressed
        trained = Trained(begin, 0, [])
        if self.strategy not in CLOSED_FORM and steps != 0:
            trained = self.descend(begin, train_on, validate_on, steps)
        posterior = None
        if config.uncertainty == "last_layer" and regression is not None:
            posterior = ridge.posterior(trained.potential, train_on, config.fidelity, regression)
        return Fit(start, regressed, trained, posterior)

    def descend(
        self, begin: Potential, train_on: list[Reaction], validate_on: list[Reaction], steps: int | None
    ) -> Trained:
        """Train by gradient steps."""
        config, training = self.config, self.training
        if steps is not None:
            training = dataclasses.replace(training, steps=steps)
        rows = [config.fidelity, *(task.fidelity for task in [*self.replay, *self.also])]
        adaptation = Adaptation(begin, list(dict.fromkeys(rows)), self.strategy, rank=training.rank, seed=config.seed)
        target = Target(
            config.fidelity,
            dataset.training_view(train_on, config.fidelity, config.use_forces),
            dataset.training_view(validate_on, config.fidelity, config.use_forces),
            config.use_forces,
        )
        also = [task.with_labels(config.use_forces) for task in self.also]
        return train(
            begin,
            adaptation,
            target,
            training,
            replay=self.replay,
            also=also,
            seed=config.seed,
            label=self.label,
        )


class ScratchRecipe(Recipe):
    """The baseline: the same potential from random weights, the same labels, every weight trained, nothing to pull to.

    The reference energies are the least-squares fit to the labels; the energy scale is the checkpoint's.
    """

    label = "scratch"

    def __init__(self, config: FinetuneConfig, source: Potential) -> None:
        own = {field.name: getattr(config.scratch, field.name) for field in dataclasses.fields(config.scratch)}
        training = dataclasses.replace(
            config.training, l2_pull=0.0, layer_decay=1.0, optimizer="soap", max_forgetting=0.0, **own
        )
        config = dataclasses.replace(
            config, strategy="full", start="parent", uncertainty="none", replay=(), also=(), training=training
        )
        super().__init__(config, source, parent="")

    def start(self, rows: Sequence[Reaction]) -> Potential:
        """Return a potential with random weights that knows only the target fidelity."""
        fidelity = self.config.fidelity
        potential = Potential(dataclasses.replace(self.source.config, fidelities=(fidelity,), seed=self.config.seed))
        like = next(self.source.parameters())
        potential.to(like.device, like.dtype)
        potential.set_scale(float(self.source.scale))
        potential.set_reference(fidelity, reference.fit_shift(rows, reference.label_energies(rows)).per_element)
        return potential


@dataclasses.dataclass(frozen=True)
class Judged:
    """Rows that were not trained on, with what to judge on them."""

    fit: Fit
    rows: list[Reaction]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A recipe carried out: the final potential with its start, and what its errors are measured on."""

    fit: Fit
    folds: list[Fit]  # of cross-validation; empty without
    judged: list[Judged]  # the test set, or the held-out part of every fold
    uncertainty: Uncertainty | None
    scores: Scores | None  # on the rows that the uncertainty was calibrated on
    test_scores: Scores | None  # on the test rows

    @property
    def potential(self) -> Potential:
        """The final potential."""
        return self.fit.potential

    def stages(self) -> dict[str, list[Potential]]:
        """Return the potentials of every stage, one for each part of the judged rows: before, (ridge,) after."""
        fits = [part.fit for part in self.judged]
        stages = {"before": [fit.start for fit in fits]}
        regressed = [fit.regressed for fit in fits if fit.regressed is not None]
        if regressed and self.fit.trained.history:  # without gradient steps the ridge regression is the end
            stages["ridge"] = regressed
        return stages | {"after": [fit.potential for fit in fits]}

    def errors(self, fidelity: str) -> dict[str, dict[str, float | None]]:
        """Return the errors of every stage on the judged rows."""
        errors = {}
        for stage, potentials in self.stages().items():
            pairs = zip(potentials, self.judged, strict=True)
            errors[stage] = sum((row_errors(p, part.rows, fidelity) for p, part in pairs), RowErrors()).metrics()
        return errors


def cross_validate(recipe: Recipe, rows: list[Reaction], folds: list[list[int]]) -> list[Judged]:
    """Fit the recipe to all rows but those of a fold, for every fold (indices of rows).

    Held-out rows with an element that the others lack have no reference energy from those: they are not judged.
    """
    judged = []
    for indices in folds:
        kept = [row for i, row in enumerate(rows) if i not in set(indices)]
        known = set(reference.elements_of(kept))
        held = [rows[i] for i in indices if set(reference.elements_of([rows[i]])) <= known]
        if held:
            judged.append(Judged(recipe.fit(recipe.start(kept), kept, held), held))
    if not judged:
        raise ValueError(
            "cross-validation: every fold holds out the only molecules with some element; give more data, or take "
            "split.folds=0"
        )
    return judged


def carry_out(
    recipe: Recipe, target: dataset.TargetSet, notes: list[str], folded: list[Judged] | None = None
) -> Outcome:
    """Fit the recipe's potential, with one validation set or by cross-validation.

    With folds, every fold gives errors on rows it did not train on, and a number of steps; the final potential is
    trained on all rows for the median number of steps. `folded` are the folds, where they were made before.
    """
    config, rows = recipe.config, target.train
    start = recipe.start(rows)
    num_folds = target.num_folds
    apart: list[Reaction] = []
    if num_folds == 0 or config.uncertainty == "ensemble":
        # An ensemble is calibrated on rows that no member saw: a member that did not see a row is the one that errs
        # on it, which the spread of all members would tell all too well.
        fraction = config.split.validation_fraction
        rows, apart = dataset.hold_out(rows, fraction, config.seed, "validation", notes)
    if num_folds == 0:
        final = recipe.fit(start, rows, apart)
        judged, folds = [Judged(final, apart)], []
    else:
        if folded is None or apart:
            parts = dataset.partition(rows, num_folds, config.seed, notes, "cross-validation")
            folded = cross_validate(recipe, rows, parts)
            if missing := len(rows) - sum(len(part.rows) for part in folded):
                notes.append(f"cross-validation: {missing} rows have an element that no other molecule has: not judged")
        judged, folds = folded, [fold.fit for fold in folded]
        steps = round(float(np.median([fold.trained.step for fold in folds])))
        final = recipe.fit(start, target.train, [], steps)
        if recipe.strategy not in CLOSED_FORM:
            count = len(target.train)
            notes.append(f"the final potential is trained on all {count} rows for {steps} steps, the folds' median")
    uncertainty, scores = calibrated(recipe, final, folds, [Judged(final, apart)] if apart else judged, notes)
    test_scores = None
    if target.test:
        if uncertainty is not None:
            test_scores = scores_of(recipe, final, folds, target.test).scaled(uncertainty.factor)
        judged = [Judged(final, target.test)]
    return Outcome(final, folds, judged, uncertainty, scores, test_scores)


def calibrated(
    recipe: Recipe, final: Fit, folds: Sequence[Fit], held: Sequence[Judged], notes: list[str]
) -> tuple[Uncertainty | None, Scores | None]:
    """Return the uncertainty of the final potential, calibrated on rows that were not trained on.

    The scores are after calibration.
    """
    kind = recipe.config.uncertainty
    if kind == "none":
        return None, None
    scores = Scores.joined([scores_of(recipe, part.fit, folds, part.rows) for part in held])
    factor = 1.0
    if len(scores.error) >= MIN_ROWS:
        factor = scores.factor
    else:
        notes.append(f"uncertainties are not calibrated: {len(scores.error)} rows were held out, {MIN_ROWS} are needed")
    if kind == "ensemble":
        return Ensemble([changes(final.potential, fit.potential) for fit in folds], factor), scores.scaled(factor)
    assert final.posterior is not None
    return final.posterior.last_layer(factor), scores.scaled(factor)


def scores_of(recipe: Recipe, fit: Fit, ensemble: Sequence[Fit], rows: Sequence[Reaction]) -> Scores:
    """Return the errors of a fit (of an ensemble: of its mean) on rows, and the standard deviations predicted."""
    fidelity = recipe.config.fidelity
    if recipe.config.uncertainty == "ensemble":
        return ensemble_scores([member.potential for member in ensemble], rows, fidelity)
    assert fit.posterior is not None
    return last_layer_scores(fit.potential, fit.posterior, rows, fidelity)


def changes(served: Potential, member: Potential) -> dict[str, Tensor]:
    """Return the parameters and buffers of `member` that differ from those of `served`, by name."""
    other = served.state_dict()
    return {
        name: value.detach().clone()
        for name, value in member.state_dict().items()
        if not torch.equal(value.nan_to_num(), other[name].nan_to_num())
    }
