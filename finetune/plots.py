"""The plots of the report, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rung.finetune.measure import forces_of
from rung.finetune.recipe import Judged
from rung.finetune.reference import fit_shift
from rung.model.predict import predict

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
    """Predict every judged structure with its start and its final potential."""
    structures = [s for part in judged for s in part.structures]
    before = [p for part in judged for p in predict(part.start, part.structures, fidelity)]
    after = [p for part in judged for p in predict(part.potential, part.structures, fidelity)]
    labels = [s.labels[fidelity] for s in structures]
    atoms = np.array([s.num_atoms for s in structures], dtype=np.float64)
    label_energy = np.array([label.energy for label in labels], dtype=np.float64)
    # Total energies span hundreds of eV with composition; what is left after a fit by composition is the chemistry.
    baseline = label_energy / atoms - fit_shift(structures, label_energy).residual_per_atom
    predicted = [np.array([p.energy for p in predictions]) for predictions in (before, after)]
    energy = np.stack([values / atoms - baseline for values in (label_energy, *predicted)])
    rows = [
        np.concatenate([np.ravel(f), forces_of(b).ravel(), forces_of(a).ravel()]).reshape(3, -1)
        for label, b, a in zip(labels, before, after, strict=True)
        if (f := label.forces) is not None
    ]
    return Pairs(energy, np.concatenate(rows, axis=1) if rows else None)


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


def learning_curve(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Write the validation error (the training loss where there is no validation) against the step."""
    from matplotlib.ticker import LogFormatter

    figure, axes = _figure()
    key = "energy_mae_mev_per_atom"
    validated = any(key in row for history in histories.values() for row in history)
    for name, history in histories.items():
        rows = [row for row in history if (key if validated else "loss") in row]
        if rows:
            axes.plot([row["step"] for row in rows], [row[key if validated else "loss"] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="validation energy MAE (meV/atom)" if validated else "training loss", yscale="log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 20, not 2 x 10^1
    axes.legend(frameon=False)
    return _save(figure, path)


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
