"""How a potential for the target fidelity is made from labelled structures: from a checkpoint, or from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rung.data.structure import Structure
from rung.finetune import dataset, reference
from rung.finetune.adapt import LEARNING_RATES, Adaptation
from rung.finetune.config import FinetuneConfig
from rung.finetune.replay import ReplayTask, replay_structures
from rung.finetune.train import Target, Trained, train
from rung.model.potential import Potential
from rung.model.predict import ErrorSums, error_sums


class Recipe:
    """How a potential for the target is made from labelled structures; cross-validation repeats it on subsets."""

    label = "fine-tune"

    def __init__(self, config: FinetuneConfig, source: Potential, parent: str, replay: Sequence[ReplayTask]) -> None:
        self.config = config
        self.source = source
        self.parent = parent
        self.replay = replay
        self.strategy: str = config.strategy
        rate = config.training.learning_rate or LEARNING_RATES[config.strategy]
        self.training = dataclasses.replace(config.training, learning_rate=rate)

    def start(self, structures: Sequence[Structure]) -> Potential:
        """Return the potential before the first step: the parent, with reference energies fitted to the labels."""
        parent = reference.choose_parent(self.source, structures, self.config.fidelity, self.parent)[0]
        potential = reference.with_new_fidelity(self.source, self.config.fidelity, parent)
        reference.check_identity(potential, structures, self.config.fidelity, parent)
        return potential

    def fit(self, start: Potential, train_on: list[Structure], validate_on: list[Structure], steps: int = 0) -> Trained:
        """Train from `start`, at most `steps` steps where given."""
        config, training = self.config, self.training
        if steps:
            training = dataclasses.replace(training, steps=steps)
        rows = [config.fidelity, *(task.fidelity for task in self.replay)]
        adaptation = Adaptation(start, list(dict.fromkeys(rows)), self.strategy, rank=training.rank, seed=config.seed)
        target = Target(
            config.fidelity,
            dataset.training_view(train_on, config.fidelity, config.use_forces),
            dataset.training_view(validate_on, config.fidelity, config.use_forces),
            config.use_forces,
        )
        replay = replay_structures(self.replay, config.seed) if self.replay else None
        return train(start, adaptation, target, training, replay=replay, seed=config.seed, label=self.label)


class ScratchRecipe(Recipe):
    """The baseline: the same potential from random weights, the same labels, every weight trained, nothing to pull to.

    The reference energies are the least-squares fit to the labels; the energy scale is the checkpoint's.
    """

    label = "scratch"

    def __init__(self, config: FinetuneConfig, source: Potential) -> None:
        super().__init__(config, source, parent="", replay=())
        self.strategy = "full"
        own = {field.name: getattr(config.scratch, field.name) for field in dataclasses.fields(config.scratch)}
        self.training = dataclasses.replace(config.training, l2_pull=0.0, **own)

    def start(self, structures: Sequence[Structure]) -> Potential:
        """Return a potential with random weights that knows only the target fidelity."""
        fidelity = self.config.fidelity
        potential = Potential(dataclasses.replace(self.source.config, fidelities=(fidelity,), seed=self.config.seed))
        like = next(self.source.parameters())
        potential.to(like.device, like.dtype)
        potential.set_scale(float(self.source.scale))
        labels = reference.label_energies(structures, fidelity)
        potential.set_reference(fidelity, reference.fit_shift(structures, labels).per_element)
        return potential


@dataclasses.dataclass(frozen=True)
class Judged:
    """Structures that were not trained on, with the potential to judge on them and its start."""

    start: Potential
    potential: Potential
    structures: list[Structure]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A recipe carried out: the final potential with its start, and what its errors are measured on."""

    start: Potential
    trained: Trained
    folds: list[Trained]  # of cross-validation; empty without
    judged: list[Judged]  # the test set, or the held-out part of every fold

    def errors(self, fidelity: str) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Return the errors before and after training, as `rung.model.predict.evaluate` defines them."""
        before = sum((error_sums(j.start, j.structures, fidelity) for j in self.judged), ErrorSums())
        after = sum((error_sums(j.potential, j.structures, fidelity) for j in self.judged), ErrorSums())
        return before.metrics(), after.metrics()


def carry_out(recipe: Recipe, target: dataset.TargetSet, notes: list[str]) -> Outcome:
    """Fit the recipe's potential, with one validation set or by cross-validation.

    With folds, every fold gives errors on structures it did not train on, and a number of steps; the final potential
    is trained on all structures for the median number of steps. The reference energies are fitted once, to all labels:
    a fold may hold out the only molecule with some element.
    """
    split, seed = recipe.config.split, recipe.config.seed
    structures, start = target.train, recipe.start(target.train)
    num_folds = dataset.num_folds(split, len(structures))
    if num_folds == 0:
        kept, held = dataset.hold_out(structures, split.validation_fraction, seed, "validation", notes)
        trained = recipe.fit(start, kept, held)
        return Outcome(start, trained, [], [Judged(start, trained.potential, target.test)])
    folds, judged = [], []
    for indices in dataset.partition(structures, num_folds, seed, notes, "cross-validation"):
        held = [structures[i] for i in indices]
        kept = [s for i, s in enumerate(structures) if i not in set(indices)]
        folds.append(recipe.fit(start, kept, held))
        judged.append(Judged(start, folds[-1].potential, held))
    steps = round(float(np.median([fold.step for fold in folds])))
    notes.append(
        f"the final potential is trained on all {len(structures)} structures for {steps} steps, the folds' median"
    )
    trained = recipe.fit(start, structures, [], steps) if steps else Trained(start, 0, [])
    if target.test:
        judged = [Judged(start, trained.potential, target.test)]
    return Outcome(start, trained, folds, judged)
