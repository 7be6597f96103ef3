"""The loop of fine-tuning, for every strategy and for the scratch baseline."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.finetune.adapt import Adaptation
from rung.finetune.config import TrainingConfig
from rung.model.loss import LossConfig, loss_terms, total
from rung.model.potential import Potential
from rung.model.predict import evaluate

logger = logging.getLogger(__name__)
LOG_EVERY = 5  # evaluations per plain line of progress


@dataclass(frozen=True)
class Target:
    """What one run trains on and is judged by; labels that may not be trained on are already taken away."""

    fidelity: str
    train: list[Structure]
    validation: list[Structure]  # empty: train for all the steps and keep the last weights
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
        decay = min(self.decay, self.updates / (self.updates + 9))
        served = dict(self.potential.named_parameters())
        for name, value in weights.items():
            served[name].lerp_(value, 1 - decay)


class EarlyStopping:
    """Keeps the latest weights whose validation error is within a tolerance of the smallest; the start counts, too.

    The latest, not the best: validation energies stop falling while forces, which are not trained on, still improve.
    """

    def __init__(self, potential: Potential, target: Target, patience: int, tolerance: float) -> None:
        self.target = target
        self.patience = patience  # steps without anything to keep; 0: without end
        self.tolerance = tolerance  # relative
        self.smallest = math.inf
        self.step, self.potential = 0, potential

    def judge(self, potential: Potential, step: int) -> dict[str, float]:
        """Evaluate, keep the weights if they are good enough, and return the validation errors; none without a set."""
        errors = validation_errors(potential, self.target) if self.target.validation else {}
        score = validation_score(errors)
        if score <= self.smallest * (1 + self.tolerance):
            self.step, self.potential = step, copy.deepcopy(potential)
        self.smallest = min(self.smallest, score)
        return errors

    def exhausted(self, step: int) -> bool:
        """Tell whether it is too long ago that there was something to keep."""
        return bool(self.patience) and step - self.step >= self.patience


def train(
    potential: Potential,
    adaptation: Adaptation,
    target: Target,
    config: TrainingConfig,
    *,
    replay: Iterator[tuple[Structure, str]] | None = None,
    seed: int = 0,
    label: str = "fine-tune",
) -> Trained:
    """Minimise the loss of the adapted potential on the target (and replay) labels, up to `config.steps` steps.

    Raises RuntimeError when a gradient is not finite.
    """
    average = Average(potential, config.ema)
    stopping = EarlyStopping(average.potential, target, config.patience * config.evaluate_every, config.tolerance)
    history = [{"step": 0.0} | stopping.judge(average.potential, 0)]
    optimizer = make_optimizer(adaptation, config)
    batches = make_batches(potential, target, config, replay, seed)
    losses: list[float] = []
    progress = tqdm(range(1, config.steps + 1), desc=label, disable=None, leave=False)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        loss = batch_loss(adaptation, next(batches), config, forces=target.use_forces or replay is not None)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adaptation.parameters(), config.clip, error_if_nonfinite=True)
        optimizer.step()
        average.update(adaptation.weights())
        losses.append(loss.item())
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


def make_optimizer(adaptation: Adaptation, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trained numbers; the pull to the pretrained weights takes the place of decay."""
    parameters = list(adaptation.parameters())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    from pytorch_optimizer import SOAP

    options: dict[str, Any] = {"betas": (0.95, 0.95), "weight_decay": 0.0, "precondition_frequency": 10}
    return SOAP(parameters, lr=config.learning_rate, **options)


def schedule(step: int, config: TrainingConfig) -> float:
    """Return the factor of the learning rate: a linear rise, then a cosine down to 1 %; `step` counts from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_loss(adaptation: Adaptation, batch: Batch, config: TrainingConfig, forces: bool) -> Tensor:
    """Return the loss of one batch, with the pull to the pretrained weights; scalar."""
    weights = adaptation.weights()
    parameter = next(adaptation.parameters())
    batch = batch.to(parameter.device, parameter.dtype)
    shape = LossConfig(energy_weight=config.energy_weight, forces_weight=config.forces_weight if forces else 0.0)
    terms = loss_terms(adaptation(weights, batch, forces), batch, shape, adaptation.potential.scale)
    return total(terms, terms.statistics(), shape) + config.l2_pull * adaptation.pull(weights)


def make_batches(
    potential: Potential,
    target: Target,
    config: TrainingConfig,
    replay: Iterator[tuple[Structure, str]] | None,
    seed: int,
) -> Iterator[Batch]:
    """Yield batches without end: `batch_size` target structures, every one once per pass, then replay structures."""
    index = {name: row for row, name in enumerate(potential.config.fidelities)}
    generator = np.random.default_rng(seed)
    size = min(config.batch_size, len(target.train))
    while True:
        order = generator.permutation(len(target.train))
        for start in range(0, len(order) - size + 1, size):
            chosen = [(target.train[i], target.fidelity) for i in order[start : start + size]]
            if replay is not None:
                chosen += [next(replay) for _ in range(round(config.replay_ratio * size))]
            structures, fidelities = zip(*chosen, strict=True)
            weights = [1.0] * size + [config.replay_weight] * (len(chosen) - size)
            yield collate(
                structures,
                fidelities=fidelities,
                fidelity_index=index,
                cutoff=potential.config.cutoff,
                energy_weights=weights,
                forces_weights=weights,
            )


def validation_errors(potential: Potential, target: Target) -> dict[str, float]:
    """Return the validation errors of the target's fidelity in meV/atom and meV/angstrom."""
    errors = evaluate(potential, target.validation, target.fidelity)
    return {name: value for name, value in errors.items() if "_mae_" in name and value is not None}


def validation_score(errors: dict[str, float]) -> float:
    """Return what early stopping looks at: the energy error, plus the force error where forces are trained on."""
    # A typical force error is ten times the energy error in these units, so this weighs the two about equally.
    return errors.get("energy_mae_mev_per_atom", 0.0) + 0.1 * errors.get("force_mae_mev_per_angstrom", 0.0)
