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

from rung.data.fidelity import unknown_fidelity
from rung.data.reaction import Reaction, structures_of
from rung.finetune import auto, breakdown, checks, dataset, elements, measure, reference, report
from rung.finetune.config import FinetuneConfig
from rung.finetune.recipe import Judged, Outcome, Recipe, ScratchRecipe, carry_out
from rung.finetune.replay import ReplayTask, load_also, load_replay
from rung.finetune.save import save
from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.checkpoint_files import check_replaceable
from rung.model.potential import Potential
from rung.model.predict import to_device

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
    check_out(config)
    source = load_checkpoint(config.checkpoint)
    to_device(source.potential, config.device)
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
    notes.append(reference.tie_note(parents))
    reference.check_domain(potential, structures_of(target.test), parents[0].fidelity)
    findings = inspect(config, config.data, target.train, target.test, parents[0])
    findings += check_others(config, source.potential, potential, replay, also)
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
        forgetting=measure.forgetting(start, final, source.potential, seen, [*replay, *also]),
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
    return dataclasses.replace(config, strategy=choice.strategy), choice.folds if target.num_folds else None


def check_out(config: FinetuneConfig) -> None:
    """Raise before the work begins where the result could not be written, or would replace what it starts from."""
    folder = Path(config.out) / "checkpoint"
    check_replaceable(folder)
    if Path(config.checkpoint).exists() and folder.exists() and Path(config.checkpoint).samefile(folder):
        raise ValueError(f"out: {folder} is the checkpoint to start from; choose another folder with --out")


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
        return f"trained on energies and on the forces of {with_forces} of {len(labelled)} structures"
    unused = (
        f"; the forces of {with_forces} structures were not used (--use-forces trains on them)" if with_forces else ""
    )
    return f"trained on energies only{unused}"


def inspect(
    config: FinetuneConfig,
    name: str,
    train: Sequence[Reaction],
    test: Sequence[Reaction],
    parent: reference.Parent,
) -> list[checks.Finding]:
    """Return everything suspicious about the labels of a set."""
    labels = reference.label_energies(train)
    counts = reference.composition(train, reference.elements_of(train))
    unit = checks.wrong_unit(labels, parent.predicted, counts, name)
    found = checks.duplicates(train, config.checks) + checks.leaks(train, test, config.checks)
    # In a wrong unit every energy is far off, so outliers would say nothing more.
    return found + (unit or checks.energy_outliers(train, parent.shift.residual_per_atom, config.checks))


def check_others(
    config: FinetuneConfig,
    source: Potential,
    potential: Potential,
    replay: Sequence[ReplayTask],
    also: Sequence[ReplayTask],
) -> list[checks.Finding]:
    """Return everything suspicious about the labels of `also`.

    Raises ValueError for structures that a replayed fidelity, or the parent of a new one, does not know.
    """
    for task in replay:
        reference.check_domain(source, [*task.train, *task.held_out], task.fidelity)
    found = []
    for task in also:
        train, held_out = (dataset.absolute_rows(some, task.fidelity) for some in (task.train, task.held_out))
        reference.check_covered(train, held_out, task.fidelity)
        parent = reference.choose_parent(potential, train, source.config.fidelities)[0]
        reference.check_domain(potential, task.held_out, parent.fidelity)
        found += inspect(config, task.dataset, train, held_out, parent)
    return found


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
