"""The plots of the report: figures, as PNG files and as SVG for its page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rung.data.units import KCAL_MOL
from rung.finetune.breakdown import Predictions
from rung.finetune.calibration import Scores
from rung.finetune.reference import fit_shift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

# Read on white and on black: the page has a light and a dark mode.
BEFORE, AFTER, OTHER, LINE = "#a3a3a3", "#2f7dc4", "#d0803c", "#808080"
NUM_NAMED = 3  # rows with the largest errors that a parity plot names
WIDTH = 5.2  # inches, of a panel
ROOM = 0.3  # of the width of a plot, for a name
MAX_NAME = 28  # characters
MAX_VECTOR_POINTS = 1000  # more points are drawn as an image, also in SVG
ROW, REPLAYED = "row_mae_mev_per_atom", ".energy_mae_mev_per_atom"


def figures(
    fidelity: str,
    predictions: Predictions,
    histories: Mapping[str, History],
    scores: Mapping[str, Scores],
    steps: int,
) -> dict[str, Figure]:
    """Return the figures of a run by name; one without anything to show is not there.

    scores: errors beside standard deviations, by what the rows are; steps: those of the weights that were kept.
    """
    drawn = {
        "parity_energy": parity_energy(predictions, fidelity),
        "parity_relative": parity_relative(predictions, fidelity),
        "parity_forces": parity_forces(predictions, fidelity),
        "learning_curve": learning_curve(histories, steps),
        "calibration": calibration(scores),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def parity_energy(predictions: Predictions, fidelity: str) -> Figure | None:
    """Draw the total energies."""
    chosen = [i for i, row in enumerate(predictions.rows) if row.is_absolute]
    if not chosen:
        return None
    rows = [predictions.rows[i] for i in chosen]
    label = np.array([row.energy for row in rows])
    atoms = np.array([row.num_atoms for row in rows])
    # Total energies span hundreds of eV with composition; what is left after a fit by composition is the chemistry.
    left = fit_shift(rows, label).residual_per_atom
    values = {stage: left + (energy[chosen] - label) / atoms for stage, energy in predictions.energy.items()}
    quantity = "energy less its fit by composition (eV/atom)"
    return _parity(fidelity, quantity, "meV/atom", 1000, left, values, [row.key for row in rows])


def parity_relative(predictions: Predictions, fidelity: str) -> Figure | None:
    """Draw the relative energies."""
    chosen = [i for i, row in enumerate(predictions.rows) if not row.is_absolute]
    if not chosen:
        return None
    label = np.array([predictions.rows[i].energy for i in chosen]) / KCAL_MOL
    values = {stage: energy[chosen] / KCAL_MOL for stage, energy in predictions.energy.items()}
    keys = [predictions.rows[i].key for i in chosen]
    return _parity(fidelity, "relative energy (kcal/mol)", "kcal/mol", 1, label, values, keys)


def parity_forces(predictions: Predictions, fidelity: str) -> Figure | None:
    """Draw the components of the forces."""
    if not len(predictions.label_forces):
        return None
    quantity = "force component (eV/angstrom)"
    return _parity(fidelity, quantity, "meV/angstrom", 1000, predictions.label_forces, predictions.forces(), [])


def _parity(
    fidelity: str,
    quantity: str,
    unit: str,
    factor: float,
    label: NDArray[np.float64],
    values: Mapping[str, NDArray[np.float64]],
    keys: Sequence[str],
) -> Figure:
    """Draw predictions before and after against labels; `factor` is from the unit of the axes to that of the MAE."""
    figure, (axes,) = _figure()
    for stage, colour, text in (("before", BEFORE, "before"), ("after", AFTER, "fine-tuned")):
        mae = factor * float(np.mean(np.abs(values[stage] - label)))
        legend = f"{text}, MAE {mae:.3g} {unit}"
        axes.plot(
            label,
            values[stage],
            ".",
            color=colour,
            markersize=4,
            alpha=0.7,
            label=legend,
            rasterized=len(label) > MAX_VECTOR_POINTS,
        )
    ends = [float(label.min()), float(label.max())]
    axes.axline((ends[0], ends[0]), slope=1, color=LINE, linewidth=0.8, zorder=0)
    axes.set(xlabel=f"{fidelity}: {quantity}", ylabel="predicted", title="rows not trained on")
    axes.legend(frameon=False, loc="upper left")
    if keys:
        _name_worst(axes, label, values["after"], keys)
    return figure


def _name_worst(axes: Axes, label: NDArray[np.float64], values: NDArray[np.float64], keys: Sequence[str]) -> None:
    """Write their keys beside the points with the largest errors."""
    worst = np.argsort(-np.abs(values - label), kind="stable")[:NUM_NAMED].tolist()
    first, last = axes.get_xlim()
    for i in worst:
        place = (label[i] - first) / (last - first)
        # Away from the diagonal, unless there is no room on that side.
        side = "right" if (values[i] > label[i] and place > ROOM) or place > 1 - ROOM else "left"
        axes.annotate(
            short(keys[i]),
            (label[i], values[i]),
            xytext=(4 if side == "left" else -4, 7 if values[i] > label[i] else -7),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=7,
            parse_math=False,
        )


def short(key: str) -> str:
    """Return a key as a plot can show it: in ASCII, for which there are glyphs, and no longer than MAX_NAME."""
    key = "".join(c if c.isascii() and c.isprintable() else "?" for c in key)
    return key if len(key) <= MAX_NAME else f"{key[: MAX_NAME // 2 - 1]}..{key[1 - MAX_NAME // 2 :]}"


def learning_curve(histories: Mapping[str, History], steps: int) -> Figure | None:
    """Draw the validation error (the training loss where there is none) against the step.

    A second panel has the errors at the replay fidelities while training. None where no gradient step was taken.
    """
    if not any(len(history) > 1 for history in histories.values()):
        return None
    key = ROW if any(ROW in row for history in histories.values() for row in history) else "loss"
    replayed = {
        name.removesuffix(REPLAYED): [(row["step"], row[name]) for row in history if name in row]
        for history in reversed(list(histories.values()))  # the final fit is the first, and it replaces the folds'
        for name in sorted({name for row in history for name in row if name.endswith(REPLAYED)})
    }
    figure, panels = _figure(2 if replayed else 1)
    for name, history in histories.items():
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            colour = {"fine-tuned": AFTER, "scratch": OTHER}.get(name, BEFORE)
            folds = name == "fold 1" and sum(other.startswith("fold ") for other in histories)
            label = f"{folds} folds" if folds else "_" + name if name.startswith("fold ") else name
            panels[0].plot(*np.transpose(points), color=colour, label=label)
    if steps:
        panels[0].axvline(steps, color=LINE, linewidth=0.8, linestyle=":", label=f"kept: step {steps}")
    panels[0].set(ylabel="validation error (meV/atom)" if key == ROW else "training loss", yscale="log")
    for name, points in replayed.items():
        panels[1].plot(*np.transpose(points), label=name)
    if replayed:
        panels[1].set(ylabel="held-out energy MAE (meV/atom)", title="replay fidelities: forgetting")
    panels[0].set_title("target")
    for axes in panels:
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    _plain_numbers(panels[0])
    return figure


def calibration(scores: Mapping[str, Scores]) -> Figure | None:
    """Draw which part of the errors of held-out rows lies inside the predicted central intervals."""
    if not scores:
        return None
    levels = np.linspace(0, 1, 41)
    figure, (axes,) = _figure()
    axes.plot(levels, levels, color=LINE, linewidth=0.8, label="ideal")
    for name, some in scores.items():
        colour = AFTER if name == list(scores)[-1] else BEFORE
        axes.plot(levels, some.coverage(levels), color=colour, label=f"{name} ({len(some.error)})")
    axes.set(xlabel="probability of the predicted interval", ylabel="part of the errors inside", title="calibration")
    axes.legend(frameon=False, loc="upper left")
    return figure


def save(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write the figures as PNG files; return their paths."""
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figure.savefig(path, dpi=150)
    return paths


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element for a page: transparent, text and black lines in the page's colour."""
    import matplotlib

    written = io.StringIO()
    # Text remains text, to be searched and read aloud; the salt keeps the ids of several figures apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = written.getvalue()
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    element = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", element)
    double = ' class="double"' if figure.get_figwidth() > WIDTH else ""
    return element.replace("#000000", "currentColor").replace("<svg", f"<svg{double}", 1)


def _figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    # Without pyplot: no global state, no display, no choice of back-end.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * panels, 4.4), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_numbers(axes: Axes) -> None:
    """Label a logarithmic axis with 20, not 2 x 10^1."""
    from matplotlib.ticker import LogFormatter

    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
