"""What a run tells: text and a page for people, JSON for programs, plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols

from rung.finetune import plots
from rung.finetune.breakdown import Predictions
from rung.finetune.calibration import Scores
from rung.finetune.checks import Finding
from rung.finetune.config import FinetuneConfig
from rung.finetune.html import number
from rung.finetune.page import page
from rung.finetune.reference import Parent
from rung.model.config import to_mapping
from rung.model.provenance import git_commit, package_versions
from rung.model.uncertainty import Uncertainty

Errors = Mapping[str, float | None]
ENERGY, FORCE = "energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"
RELATIVE = "relative_mae_kcal_per_mol"


@dataclass(frozen=True)
class Measured:
    """Everything measured in a run, before it is formatted."""

    num_train: int  # structures whose labels were used, validation included
    num_test: int
    num_folds: int
    parents: Sequence[Parent]  # best first; the first was taken
    findings: Sequence[Finding]
    notes: Sequence[str]
    errors: Mapping[str, Errors]  # before, ridge (where gradient steps followed it), after, scratch (where asked for)
    forgetting: Sequence[Mapping[str, Any]]
    drift: Mapping[str, Mapping[str, float]]
    histories: Mapping[str, Sequence[Mapping[str, float]]]
    uncertainty: Uncertainty | None
    calibration: Scores | None  # errors beside standard deviations, of the rows that those were calibrated on
    test_scores: Scores | None  # the same of the test rows
    predictions: Predictions  # of the rows that the errors are measured on
    steps: int  # of the weights that were kept
    seconds: float


def metrics(config: FinetuneConfig, measured: Measured) -> dict[str, Any]:
    """Return the content of report.json."""
    parent = measured.parents[0]
    return {
        "fidelity": config.fidelity,
        "strategy": config.strategy,
        "labels": measured.num_train,
        "measured_on": measured_on(measured),
        "target": {stage: dict(errors) for stage, errors in measured.errors.items()},
        "parent": parent.fidelity,
        "parent_candidates": [
            {"fidelity": p.fidelity, "residual_rms_mev_per_atom": p.shift.rms_mev_per_atom} for p in measured.parents
        ],
        "e0_shift_ev": {chemical_symbols[z]: shift for z, shift in parent.shift.per_element.items()},
        "forgetting": [dict(row) for row in measured.forgetting],
        "drift": {name: dict(values) for name, values in measured.drift.items()},
        "uncertainty": uncertainty(measured),
        "findings": [asdict(finding) for finding in measured.findings],
        "notes": list(measured.notes),
        "rows": measured.predictions.table(),
        "by_element": measured.predictions.by_element(),
        "by_size": measured.predictions.by_size(),
        "steps": measured.steps,
        "history": {name: [dict(row) for row in rows] for name, rows in measured.histories.items()},
        "seconds": measured.seconds,
        "settings": to_mapping(config),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }


def uncertainty(measured: Measured) -> dict[str, Any] | None:
    """Return what the predicted standard deviations are, and how well they tell errors on held-out rows."""
    if measured.uncertainty is None or measured.calibration is None:
        return None
    found: dict[str, Any] = {"kind": measured.uncertainty.kind, "factor": measured.uncertainty.factor}
    found |= {"calibration": measured.calibration.metrics()}
    return found | ({"test": measured.test_scores.metrics()} if measured.test_scores is not None else {})


def measured_on(measured: Measured) -> str:
    """Return in words which structures the target's errors are of."""
    if measured.num_test:
        return f"{measured.num_test} test structures, not trained on"
    folds = f"{measured.num_folds}-fold cross-validation"
    stepped = any(measured.histories.values())
    return f"{folds} (slightly optimistic: it chose the number of steps)" if stepped else folds


def parents_table(parents: Sequence[Parent]) -> str:
    """Return how well each candidate parent explains the labels after its shift of the reference energies."""
    lines = ["parent fidelity, and what it leaves of the labels after the shift of E0 (RMS, meV/atom):"]
    lines += [
        f"  {parent.fidelity:<24}{parent.shift.rms_mev_per_atom:10.2f}{'   <- taken' if i == 0 else ''}"
        for i, parent in enumerate(parents)
    ]
    return "\n".join(lines)


def text(config: FinetuneConfig, measured: Measured, checkpoint: Path, html: Path) -> str:
    """Return the report for the terminal."""
    rows = {name: measured.errors[stage] for stage, name in stage_names(config).items() if stage in measured.errors}
    lines = [
        f"{config.fidelity}: {measured.num_train} labels, from '{measured.parents[0].fidelity}', "
        f"{measured.steps} steps, {measured.seconds:.0f} s",
        "",
        f"Errors at {config.fidelity}, {measured_on(measured)}",
        *errors_table(rows),
    ]
    if measured.forgetting:
        lines += ["", "Other fidelities, before -> after (what was forgotten)"]
        lines += [
            f"  {row['fidelity']:<24}{_change(row, ENERGY)}{_change(row, FORCE)}  {row['set']}"
            for row in measured.forgetting
        ]
    lines += ["", "Drift of the predictions on these structures (RMS)"]
    for name, moved in measured.drift.items():
        energy, force = moved["energy_rms_mev_per_atom"], moved["force_rms_mev_per_angstrom"]
        lines.append(f"  {name:<24}{number(energy):>8} meV/atom{number(force):>10} meV/angstrom")
    lines += uncertainty_lines(uncertainty(measured))
    lines += ["", *(f"note: {note}" for note in measured.notes)]
    lines += [f"suspicious, trained on as it is: {finding.message}" for finding in measured.findings]
    lines += [f"checkpoint: {checkpoint}", f"report with plots: {html}"]
    return "\n".join(lines)


def uncertainty_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Return what the report says about predicted standard deviations."""
    if found is None:
        return []
    lines = ["", f"Uncertainty ({found['kind']}): errors within one and two standard deviations (Gaussian: 68, 95 %)"]
    for name, key in (("rows it was calibrated on", "calibration"), ("test rows", "test")):
        if scores := found.get(key):
            lines.append(
                f"  {name:<30}{100 * scores['within_one_std']:>8.0f} %{100 * scores['within_two_std']:>8.0f} %"
                f"   rank correlation with the error {scores['rank_correlation']:.2f}, {scores['rows']} rows"
            )
    return lines


def stage_names(config: FinetuneConfig) -> dict[str, str]:
    """Return what the stages of a run are called, in their order."""
    return {
        "before": "parent + shift of E0",
        "ridge": "ridge regression of read-outs",
        "after": f"fine-tuned ({config.strategy})",
        "scratch": "from scratch, same labels",
    }


def errors_table(rows: Mapping[str, Errors]) -> list[str]:
    """Return the lines of a table of errors: of total energies, forces and relative energies where there are any."""
    columns = {
        ENERGY: ("energy MAE", "meV/atom"),
        FORCE: ("force MAE", "meV/angstrom"),
        RELATIVE: ("relative MAE", "kcal/mol"),
    }
    shown = [key for key in columns if any(errors.get(key) is not None for errors in rows.values())]
    return [
        "  " + " " * 30 + "".join(f"{columns[key][0]:>16}" for key in shown),
        "  " + " " * 30 + "".join(f"{columns[key][1]:>16}" for key in shown),
        *(
            f"  {name:<30}" + "".join(f"{number(errors.get(key)):>16}" for key in shown)
            for name, errors in rows.items()
        ),
    ]


def write(
    config: FinetuneConfig, measured: Measured, content: Mapping[str, Any], checkpoint: Path, folder: Path
) -> list[Path]:
    """Write report.json, report.txt, report.html and the plots; return their paths in this order.

    content: of report.json, as from `metrics`; the paths of checkpoint and plots are added.
    """
    scores = {"rows it was calibrated on": measured.calibration, "test rows": measured.test_scores}
    known = {name: some for name, some in scores.items() if some is not None}
    drawn = plots.figures(config.fidelity, measured.predictions, measured.histories, known, measured.steps)
    images = plots.save(drawn, folder)
    content = {**content, "checkpoint": str(checkpoint), "plots": [str(path) for path in images]}
    drawings = {name: plots.svg(figure, name) for name, figure in drawn.items()}
    files = {
        "report.json": json.dumps(content, indent=2, allow_nan=False) + "\n",
        "report.txt": text(config, measured, checkpoint, folder / "report.html") + "\n",
        "report.html": page(content, stage_names(config), drawings),
    }
    for name, written in files.items():
        (folder / name).write_text(written, encoding="utf-8")
    return [*(folder / name for name in files), *images]


def _change(row: Mapping[str, Any], key: str) -> str:
    unit = "meV/atom" if key == ENERGY else "meV/angstrom"
    return f"{number(row['before'][key]):>9} ->{number(row['after'][key]):>8} {unit}"
