"""Fine-tuning from the checkpoint to the report, step by step in the order of DESIGN.md section 9."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rung.data.fidelity import unknown_fidelity
from rung.finetune import checks, dataset, measure, plots, reference, report
from rung.finetune.config import FinetuneConfig
from rung.finetune.recipe import Outcome, Recipe, ScratchRecipe, carry_out
from rung.finetune.replay import load_replay
from rung.finetune.save import save
from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.config import to_mapping

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
    replay = load_replay(config.replay, source.potential.config.fidelities, config.seed, notes)
    parents = reference.choose_parent(source.potential, target.train, config.fidelity, config.parent)
    logger.info("%s", report.parents_table(parents))
    findings = inspect(config, target, parents[0])
    checks.settle(findings, config.checks)
    tuned = carry_out(Recipe(config, source.potential, parents[0].fidelity, replay), target, notes)
    scratch = carry_out(ScratchRecipe(config, source.potential), target, []) if config.baseline == "scratch" else None

    before, after = tuned.errors(config.fidelity)
    known, seen = source.potential.config.fidelities, target.test or target.train
    measured = report.Measured(
        num_train=len(target.train),
        num_test=len(target.test),
        num_folds=len(tuned.folds),
        parents=parents,
        findings=findings,
        notes=[note for note in [*notes, parents[0].shift.note] if note],
        before=before,
        after=after,
        scratch=scratch.errors(config.fidelity)[1] if scratch else None,
        forgetting=measure.forgetting(tuned.start, tuned.trained.potential, known, seen, replay),
        drift=measure.drift(tuned.start, tuned.trained.potential, [*known, config.fidelity], seen),
        histories=histories(tuned, scratch),
        steps=tuned.trained.step,
        seconds=time.monotonic() - began,
    )
    return write(config, source, target, tuned, measured)


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
    with_forces = sum(s.labels[config.fidelity].forces is not None for s in target.train)
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
    labels = reference.label_energies(target.train, config.fidelity)
    counts = reference.composition(target.train, reference.elements_of(target.train))
    unit = checks.wrong_unit(labels, parent.predicted, counts, config.data)
    found = checks.duplicates(target.train, config.fidelity, config.checks)
    found += checks.leaks(target.train, target.test, config.checks)
    # In a wrong unit every energy is far off, so outliers would say nothing more.
    return found + (unit or checks.energy_outliers(target.train, parent.shift.residual_per_atom, config.checks))


def histories(tuned: Outcome, scratch: Outcome | None) -> dict[str, list[dict[str, float]]]:
    """Return the learning curves by name."""
    curves = {"fine-tuned": tuned.trained.history}
    curves |= {f"fold {i + 1}": fold.history for i, fold in enumerate(tuned.folds)}
    return curves | ({"scratch": scratch.trained.history} if scratch else {})


def write(
    config: FinetuneConfig, source: Checkpoint, target: dataset.TargetSet, tuned: Outcome, measured: report.Measured
) -> FinetuneResult:
    """Write report, plots and checkpoint into `config.out`."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = report.metrics(config, measured) | {"settings": to_mapping(config)}
    paths = [plots.learning_curve(measured.histories, folder / "learning_curve.png")]
    pairs = plots.parity_pairs(tuned.judged, config.fidelity)
    paths += plots.parity(pairs, config.fidelity, folder)
    checkpoint = save(folder / "checkpoint", config, source, target, tuned.trained.potential, metrics)
    metrics |= {"checkpoint": str(checkpoint), "plots": [str(path) for path in paths]}
    report.write(metrics, report.text(config, measured, checkpoint, paths), folder)
    return FinetuneResult(folder, checkpoint, paths, metrics)
