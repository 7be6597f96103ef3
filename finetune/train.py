"""The loop of fine-tuning, for every strategy with gradient steps and for the scratch baseline."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rung.data.reaction import Reaction
from rung.finetune.adapt import Adaptation
from rung.finetune.config import TrainingConfig
from rung.finetune.measure import RowErrors, row_errors
from rung.finetune.objective import RowBatch, WeightedRow, collate_rows, row_loss
from rung.finetune.replay import ReplayTask, replay_rows
from rung.model.loss import LossConfig
from rung.model.potential import Potential
from rung.model.predict import evaluate

logger = logging.getLogger(__name__)
LOG_EVERY = 5  # evaluations per plain line of progress
FORGETTING_STRUCTURES = 50  # of each replay task, on which forgetting is watched while training


@dataclass(frozen=True)
class Target:
    """What one run trains on and is judged by; labels that may not be trained on are already taken away."""

    fidelity: str
    train: list[Reaction]
    validation: list[Reaction]  # empty: train for all the steps and keep the last weights
    use_forces: bool


@dataclass(frozen=True)
class Trained:
    """The weights' average where early stopping kept it (at the end, without validation) and how it was reached."""

    potential: Potential
    step: int
    history: list[dict[str, float]]  # one row per evaluation: step, mean loss since the last one, validation errors


class Average:
    """Exponential moving average of the adapted weights, written into a potential of its own; it is what is served."""

    def __init__(self, potential: Potential, decay: float) -> None:
        self.potential = copy.deepcopy(potential).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]) -> None:
        """Move towards `weights`; the first updates count more, so that the start is forgotten."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9)) if self.decay else 0.0
        served = dict(self.potential.named_parameters())
        for name, value in weights.items():
            served[name].lerp_(value, 1 - decay)


class EarlyStopping:
    """Keeps the latest weights whose validation error is within a tolerance of the smallest; the start counts, too.

    The latest, not the best: validation energies stop falling while forces, which are not trained on, still improve.
    Weights that have forgotten too much of the replay fidelities are not kept, and end the training.
    """

    def __init__(
        self, potential: Potential, target: Target, config: TrainingConfig, replay: Sequence[ReplayTask] = ()
    ) -> None:
        self.target = target
        self.patience = config.patience * config.evaluate_every  # steps without anything to keep; 0: without end
        self.tolerance = config.tolerance  # relative
        self.max_forgetting = config.max_forgetting  # relative; 0: any
        self.replay = replay
        self.remembered: dict[str, float] = {}  # errors of the replay fidelities at the start
        self.forgot = False
        self.smallest = math.inf
        self.step, self.potential = 0, potential

    def judge(self, potential: Potential, step: int) -> dict[str, float]:
        """Evaluate, keep the weights if they are good enough, and return the errors; none without a set."""
        known = {name: value for task in self.replay for name, value in _replay_errors(potential, task).items()}
        self.remembered = self.remembered or known
        limits = {name: value * (1 + self.max_forgetting) for name, value in self.remembered.items()}
        self.forgot = bool(self.max_forgetting) and any(known[name] > limit for name, limit in limits.items())
        errors = validation_errors(potential, self.target) if self.target.validation else {}
        score = validation_score(errors)
        if score <= self.smallest * (1 + self.tolerance) and not self.forgot:
            self.step, self.potential = step, copy.deepcopy(potential)
        self.smallest = min(self.smallest, score)
        return errors | known

    def exhausted(self, step: int) -> bool:
        """Tell whether too much was forgotten, or it is too long ago that there was something to keep."""
        return self.forgot or bool(self.patience) and step - self.step >= self.patience


def train(
    potential: Potential,
    adaptation: Adaptation,
    target: Target,
    config: TrainingConfig,
    *,
    replay: Sequence[ReplayTask] = (),
    also: Sequence[ReplayTask] = (),
    seed: int = 0,
    label: str = "fine-tune",
) -> Trained:
    """Minimise the loss of the adapted potential on the target's and the other tasks' rows, up to `config.steps` steps.

    On the held-out structures of `replay` forgetting is watched; of `also` a batch has as many rows as of the target.
    Raises ValueError when the loss or a gradient is not finite, naming the rows of the batch.
    """
    lbfgs = config.optimizer == "lbfgs"  # its weights need no average: a line search does not jump about
    average = Average(potential, 0.0 if lbfgs else config.ema)
    stopping = EarlyStopping(average.potential, target, config, replay)
    history = [{"step": 0.0} | stopping.judge(average.potential, 0)]
    optimizer = make_optimizer(adaptation, config)
    forces = target.use_forces or bool(replay)
    batches = make_batches(potential, target, config, replay, also, seed)
    losses: list[float] = []
    progress = tqdm(range(1, config.steps + 1), desc=label, disable=None, leave=False)
    for step in progress:
        if not lbfgs:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step, config)
        losses.append(take_step(adaptation, optimizer, next(batches), config, forces))
        average.update(adaptation.weights())
        if step % config.evaluate_every == 0 or step == config.steps:
            history.append(
                {"step": float(step), "loss": float(np.mean(losses))} | stopping.judge(average.potential, step)
            )
            losses.clear()
            if progress.disable and len(history) % LOG_EVERY == 1:  # no terminal: plain lines
                logger.info("%s: %s", label, ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items()))
            if stopping.exhausted(step):
                break
    return Trained(stopping.potential, stopping.step, history)


def take_step(
    adaptation: Adaptation, optimizer: torch.optim.Optimizer, batch: RowBatch, config: TrainingConfig, forces: bool
) -> float:
    """Take one step of the optimizer on a batch and return the loss before it."""

    def evaluate_loss() -> Tensor:
        optimizer.zero_grad()
        loss = batch_loss(adaptation, batch, config, forces)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = math.inf if config.optimizer == "lbfgs" else config.clip  # a line search needs the loss's own gradient
        norm = torch.nn.utils.clip_grad_norm_(adaptation.parameters(), limit)
        if not bool(torch.isfinite(norm + loss)):
            raise ValueError(
                f"training: expected a finite loss and gradient, found {loss.item():g} and {norm.item():g} on the "
                f"batch of {', '.join(batch.keys[:8])}{', ...' if len(batch.keys) > 8 else ''}; look at these labels, "
                f"or take a smaller training.learning_rate than {config.learning_rate:g}"
            )
        return loss

    if config.optimizer == "lbfgs":  # asks for the loss again along its line search
        return optimizer.step(lambda: evaluate_loss().item())
    loss = evaluate_loss()
    optimizer.step()
    return loss.item()


def make_optimizer(adaptation: Adaptation, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trained numbers; the pull to the pretrained weights takes the place of decay.

    Layers further from the energy have smaller rates by powers of `layer_decay`.
    """
    if config.optimizer == "lbfgs":
        return torch.optim.LBFGS(adaptation.parameters(), max_iter=1, history_size=50, line_search_fn="strong_wolfe")
    groups: list[dict[str, Any]] = []
    for depth, parameters in sorted(adaptation.parameters_by_depth().items()):
        rate = config.learning_rate * config.layer_decay**depth
        groups.append({"params": parameters, "lr": rate, "initial_lr": rate})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    from pytorch_optimizer import SOAP

    options: dict[str, Any] = {"betas": (0.95, 0.95), "weight_decay": 0.0, "precondition_frequency": 10}
    return SOAP(groups, **options)


def schedule(step: int, config: TrainingConfig) -> float:
    """Return the factor of the learning rate: a linear rise, then a cosine down to 1 %; `step` counts from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_loss(adaptation: Adaptation, rows: RowBatch, config: TrainingConfig, forces: bool) -> Tensor:
    """Return the loss of one batch, with the pull to the pretrained weights; scalar."""
    weights = adaptation.weights()
    parameter = next(adaptation.parameters())
    rows = rows.to(parameter.device, parameter.dtype)
    shape = LossConfig(energy_weight=config.energy_weight, forces_weight=config.forces_weight if forces else 0.0)
    prediction = adaptation(weights, rows.batch, forces)
    return row_loss(prediction, rows, shape, adaptation.potential.scale) + config.l2_pull * adaptation.pull(weights)


def make_batches(
    potential: Potential,
    target: Target,
    config: TrainingConfig,
    replay: Sequence[ReplayTask],
    also: Sequence[ReplayTask],
    seed: int,
) -> Iterator[RowBatch]:
    """Yield batches without end: `batch_size` target rows (lbfgs: all), then as many of `also`, then replay rows.

    Every pass takes the target rows in a new order; those that do not fill a batch are left to other passes.
    """
    index = {name: row for row, name in enumerate(potential.config.fidelities)}
    generator = np.random.default_rng(seed)
    size = len(target.train) if config.optimizer == "lbfgs" else min(config.batch_size, len(target.train))
    replayed, beside = replay_rows(replay, seed), replay_rows(also, seed)
    while True:
        order = generator.permutation(len(target.train))
        for start in range(0, len(order) - size + 1, size):
            rows = [WeightedRow(target.train[i], target.fidelity) for i in order[start : start + size]]
            if also:
                rows += [next(beside) for _ in range(size)]
            if replay and config.replay_ratio > 0:
                rows += [next(replayed) for _ in range(max(1, round(config.replay_ratio * size)))]
            yield collate_rows(rows, index, potential.config.cutoff)


def validation_errors(potential: Potential, target: Target) -> dict[str, float]:
    """Return the validation errors of the target's fidelity, in the units that their names say."""
    errors: RowErrors = row_errors(potential, target.validation, target.fidelity)
    return {name: value for name, value in errors.metrics().items() if "_mae_" in name and value is not None}


def validation_score(errors: dict[str, float]) -> float:
    """Return what early stopping looks at: the energy error, plus the force error where forces are trained on."""
    # A typical force error is ten times the energy error in these units, so this weighs the two about equally.
    return errors.get("row_mae_mev_per_atom", 0.0) + 0.1 * errors.get("force_mae_mev_per_angstrom", 0.0)


def _replay_errors(potential: Potential, task: ReplayTask) -> dict[str, float]:
    """Return the errors of a replay fidelity on some of its held-out structures, named after it."""
    errors = evaluate(potential, task.held_out[:FORGETTING_STRUCTURES], task.fidelity)
    names = ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom")
    return {f"{task.fidelity}.{name}": value for name in names if (value := errors[name]) is not None}
