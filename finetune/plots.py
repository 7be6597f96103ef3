"""The plots of the report, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rung.data.reaction import structures_of
from rung.finetune.calibration import Scores
from rung.finetune.measure import forces_of
from rung.finetune.recipe import Judged
from rung.finetune.reference import fit_shift, label_energies, num_atoms
from rung.model.predict import predict, reaction_energies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, LINE = "#b8b8b8", "#1f5fa8", "#444444"


@dataclass(frozen=True)
class Pairs:
    """Labels and predictions, before and after, of structures not trained on; forces are None without labels."""

    energy: NDArray[np.float64]  # [3, M]: label, before, after; eV/atom, without the labels' fit by composition
    forces: NDArray[np.float64] | None  # [3, components], eV/angstrom


def parity_pairs(judged: Sequence[Judged], fidelity: str) -> Pairs:
    """Predict every judged row with its start and its final potential."""
    rows = [row for part in judged for row in part.rows]
    before = np.concatenate([reaction_energies(part.fit.start, part.rows, fidelity) for part in judged])
    after = np.concatenate([reaction_energies(part.fit.potential, part.rows, fidelity) for part in judged])
    labels = label_energies(rows)
    atoms = num_atoms(rows)
    # Total energies span hundreds of eV with composition; what is left after a fit by composition is the chemistry.
    baseline = labels / atoms - fit_shift(rows, labels).residual_per_atom
    energy = np.stack([values / atoms - baseline for values in (labels, before, after)])
    forces = [part for one in judged if (part := _force_pairs(one, fidelity)) is not None]
    return Pairs(energy, np.concatenate(forces, axis=1) if forces else None)


def _force_pairs(judged: Judged, fidelity: str) -> NDArray[np.float64] | None:
    """Return labels and predictions before and after, [3, components]; None without labels."""
    structures = [
        s for s in structures_of(judged.rows) if fidelity in s.labels and s.labels[fidelity].forces is not None
    ]
    if not structures:
        return None
    before, after = (predict(p, structures, fidelity) for p in (judged.fit.start, judged.fit.potential))
    labels = np.concatenate([np.ravel(s.labels[fidelity].forces) for s in structures])  # type: ignore[arg-type]
    predicted = [np.concatenate([forces_of(p).ravel() for p in some]) for some in (before, after)]
    return np.stack([labels, *predicted])


def parity(pairs: Pairs, fidelity: str, folder: Path) -> list[Path]:
    """Write the parity plot of the energies and, where there are labels, of the forces; return the paths."""
    drawings = [("parity_energy.png", "energy less its fit by composition (eV/atom)", pairs.energy, "meV/atom")]
    if pairs.forces is not None:
        drawings.append(("parity_forces.png", "force component (eV/angstrom)", pairs.forces, "meV/angstrom"))
    paths = []
    for name, quantity, (label, before, after), unit in drawings:
        figure, axes = _figure()
        for values, colour, text in ((before, BEFORE, "before"), (after, AFTER, "fine-tuned")):
            mae = 1000 * float(np.mean(np.abs(values - label)))
            axes.plot(label, values, ".", color=colour, markersize=4, alpha=0.7, label=f"{text}, MAE {mae:.1f} {unit}")
        ends = [float(label.min()), float(label.max())]
        axes.plot(ends, ends, color=LINE, linewidth=0.8)
        axes.set(xlabel=f"{fidelity}: {quantity}", ylabel="predicted", title="structures not trained on")
        axes.legend(frameon=False)
        paths.append(_save(figure, folder / name))
    return paths


def calibration(scores: Scores, path: Path) -> Path:
    """Write which part of the errors on held-out rows lies inside the predicted central intervals."""
    levels = np.linspace(0, 1, 41)
    figure, axes = _figure()
    axes.plot(levels, levels, color=LINE, linewidth=0.8, label="ideal")
    axes.plot(levels, scores.coverage(levels), color=AFTER, label=f"{len(scores.error)} rows not trained on")
    axes.set(
        xlabel="probability of the interval", ylabel="part of the errors inside", title="calibration of uncertainties"
    )
    axes.legend(frameon=False)
    return _save(figure, path)


def learning_curve(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> list[Path]:
    """Write the validation error (the training loss where there is no validation) against the step.

    Nothing is written, and no path returned, where no gradient step was taken.
    """
    if not any(len(history) > 1 for history in histories.values()):
        return []
    from matplotlib.ticker import LogFormatter

    figure, axes = _figure()
    key = "row_mae_mev_per_atom"
    validated = any(key in row for history in histories.values() for row in history)
    for name, history in histories.items():
        rows = [row for row in history if (key if validated else "loss") in row]
        if rows:
            axes.plot([row["step"] for row in rows], [row[key if validated else "loss"] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="validation energy MAE (meV/atom)" if validated else "training loss", yscale="log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 20, not 2 x 10^1
    axes.legend(frameon=False)
    return [_save(figure, path)]


def _figure() -> tuple[Figure, Axes]:
    # Without pyplot: no global state, no display, no choice of back-end.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
