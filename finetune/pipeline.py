"""Fine-tuning from the checkpoint to the report, step by step in the order of DESIGN.md section 9."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rung.data.fidelity import unknown_fidelity
from rung.data.reaction import structures_of
from rung.finetune import auto, breakdown, checks, dataset, elements, measure, reference, report
from rung.finetune.config import FinetuneConfig
from rung.finetune.recipe import Judged, Outcome, Recipe, ScratchRecipe, carry_out
from rung.finetune.replay import ReplayTask, load_also, load_replay
from rung.finetune.save import save
from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.potential import Potential

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left behind."""

    folder: Path
    checkpoint: Path
    plots: list[Path]
    metrics: dict[str, Any]  # the content of report.json


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Adapt a checkpoint to the target set, measure what was gained and lost, and write both into `config.out`.

    Raises:
        FileNotFoundError: the checkpoint or the data do not exist.
        ValueError: a label is missing or suspicious, a name is unknown, or the set cannot be divided.
    """
    began = time.monotonic()
    keep_freed_memory()
    source = load_checkpoint(config.checkpoint)
    source.potential.to(choose_device(config.device))
    check_names(config, source)
    target = dataset.load_target(config)
    reference.check_covered(target.train, target.test, config.fidelity)
    notes = [*target.notes, forces_note(config, target)]
    known = source.potential.config.fidelities
    replay = load_replay(config.replay, known, config.training, config.seed, notes)
    also = load_also(config.also, [*known, config.fidelity], config.seed, notes)
    potential, new_elements = with_new_elements(config, source.potential, target, also)
    notes += new_elements
    parents = reference.choose_parent(potential, target.train, [config.parent] if config.parent else known)
    logger.info("%s", report.parents_table(parents))
    findings = inspect(config, target, parents[0])
    checks.settle(findings, config.checks)

    def make(configured: FinetuneConfig) -> Recipe:
        return Recipe(configured, potential, parents[0].fidelity, replay, also)

    config, folds = with_strategy(config, target, make, notes)
    tuned = carry_out(make(config), target, notes, folds)
    scratch = carry_out(ScratchRecipe(config, potential), target, []) if config.baseline == "scratch" else None

    errors = tuned.errors(config.fidelity)
    seen = structures_of(target.test or target.train)
    final, start = tuned.potential, tuned.fit.start
    measured = report.Measured(
        num_train=len(target.train),
        num_test=len(target.test),
        num_folds=len(tuned.folds),
        parents=parents,
        findings=findings,
        notes=[note for note in [*notes, parents[0].shift.note] if note],
        errors=errors | ({"scratch": scratch.errors(config.fidelity)["after"]} if scratch else {}),
        forgetting=measure.forgetting(start, final, known, seen, [*replay, *also]),
        drift=measure.drift(start, final, [*known, config.fidelity], seen),
        histories=histories(tuned, scratch),
        calibration=tuned.scores,
        test_scores=tuned.test_scores,
        uncertainty=tuned.uncertainty,
        predictions=breakdown.predict_rows(tuned, config.fidelity),
        steps=tuned.fit.trained.step,
        seconds=time.monotonic() - began,
    )
    return write(config, source, target, tuned, measured)


def with_new_elements(
    config: FinetuneConfig, source: Potential, target: dataset.TargetSet, also: Sequence[ReplayTask]
) -> tuple[Potential, list[str]]:
    """Return the potential with every element of the data, and a sentence on each that is new.

    A new element has the reference energy 0 at every fidelity while fine-tuning, so that parents can be compared;
    `save` takes it away again from all but the new fidelities.
    """
    structures = structures_of(target.train) + [s for task in also for s in task.train]
    grown = copy.deepcopy(source)
    new, notes = elements.add_elements(grown, structures, config.new_elements)
    columns = [grown.config.elements.index(number) for number in new]
    grown.e0_FZ[:, columns] = 0.0
    return grown, notes


def with_strategy(
    config: FinetuneConfig, target: dataset.TargetSet, make: Callable[[FinetuneConfig], Recipe], notes: list[str]
) -> tuple[FinetuneConfig, list[Judged] | None]:
    """Return the configuration with the strategy that `auto` chooses, and its folds where the final fit needs them."""
    if config.strategy != "auto":
        return config, None
    choice = auto.choose(config, target, make, notes)
    notes.append(choice.reason)
    logger.info("%s", choice.reason)
    folded = dataset.num_folds(config.split, len(target.train)) > 0
    return dataclasses.replace(config, strategy=choice.strategy), choice.folds if folded else None


def choose_device(name: str) -> torch.device:
    """Return the device that the configuration means."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def check_names(config: FinetuneConfig, source: Checkpoint) -> None:
    """Raise ValueError for an unknown parent, or for a new fidelity that the checkpoint has already."""
    known = source.potential.config.fidelities
    if config.parent and config.parent not in known:
        raise unknown_fidelity(config.parent, known)
    if config.fidelity in known:
        raise ValueError(
            f"the checkpoint already has the fidelity '{config.fidelity}'; give the new level another name, or start "
            f"from a checkpoint without it. It has: {', '.join(known)}"
        )


def forces_note(config: FinetuneConfig, target: dataset.TargetSet) -> str:
    """Return what was done with forces in the data, for the report; raise ValueError if they are asked for in vain."""
    labelled = [s.labels[config.fidelity] for s in structures_of(target.train) if config.fidelity in s.labels]
    with_forces = sum(labels.forces is not None for labels in labelled)
    if config.use_forces and not with_forces:
        raise ValueError(f"{config.data}: use_forces: expected forces at '{config.fidelity}', found none")
    if config.use_forces:
        return f"trained on energies and on the forces of {with_forces} of {len(target.train)} structures"
    unused = (
        f"; the forces of {with_forces} structures were not used (--use-forces trains on them)" if with_forces else ""
    )
    return f"trained on energies only{unused}"


def inspect(config: FinetuneConfig, target: dataset.TargetSet, parent: reference.Parent) -> list[checks.Finding]:
    """Return everything suspicious about the labels."""
    labels = reference.label_energies(target.train)
    counts = reference.composition(target.train, reference.elements_of(target.train))
    unit = checks.wrong_unit(labels, parent.predicted, counts, config.data)
    found = checks.duplicates(target.train, config.checks)
    found += checks.leaks(target.train, target.test, config.checks)
    # In a wrong unit every energy is far off, so outliers would say nothing more.
    return found + (unit or checks.energy_outliers(target.train, parent.shift.residual_per_atom, config.checks))


def histories(tuned: Outcome, scratch: Outcome | None) -> dict[str, list[dict[str, float]]]:
    """Return the learning curves by name."""
    curves = {"fine-tuned": tuned.fit.trained.history}
    curves |= {f"fold {i + 1}": fold.trained.history for i, fold in enumerate(tuned.folds)}
    return curves | ({"scratch": scratch.fit.trained.history} if scratch else {})


def write(
    config: FinetuneConfig, source: Checkpoint, target: dataset.TargetSet, tuned: Outcome, measured: report.Measured
) -> FinetuneResult:
    """Write report, plots and checkpoint into `config.out`."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = report.metrics(config, measured)
    checkpoint = save(folder / "checkpoint", config, source, target, tuned, metrics)
    files = report.write(config, measured, metrics, checkpoint, folder)
    plots = [path for path in files if path.suffix == ".png"]
    return FinetuneResult(folder, checkpoint, plots, json.loads((folder / "report.json").read_text()))
