"""What is measured before and after: errors on the target, errors on what was known before, and drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.structure import Structure
from rung.finetune.dataset import draw
from rung.finetune.reference import check_domain
from rung.finetune.replay import ReplayTask
from rung.model.potential import Potential
from rung.model.predict import StructurePrediction, evaluate, predict

MAX_STRUCTURES = 100  # per fidelity, for forgetting and drift
MIN_LABELS = 5  # fewer labels of an old fidelity on the target's geometries are no measurement


def forgetting(
    before: Potential, after: Potential, known: Sequence[str], target: Sequence[Structure], replay: Sequence[ReplayTask]
) -> list[dict[str, Any]]:
    """Return, for every old fidelity with labels at hand, its errors before and after.

    Labels are at hand in the replay tasks' held-out structures, and on the target's geometries where its dataset
    carries several fidelities.
    """
    sets = [(task.fidelity, f"{task.dataset}, held out", task.held_out) for task in replay]
    for fidelity in known:
        labelled = [s for s in target if fidelity in s.labels]
        if len(labelled) >= MIN_LABELS and fidelity not in {task.fidelity for task in replay}:
            sets.append((fidelity, "target geometries", draw(labelled, MAX_STRUCTURES, 0)))
    return [
        {
            "fidelity": fidelity,
            "set": name,
            "before": evaluate(before, structures, fidelity),
            "after": evaluate(after, structures, fidelity),
        }
        for fidelity, name, structures in sets
    ]


def drift(
    before: Potential, after: Potential, fidelities: Sequence[str], structures: Sequence[Structure]
) -> dict[str, dict[str, float]]:
    """Return per fidelity how far predictions moved on `structures`, root mean square; it needs no labels.

    Fidelities that do not know an element of the structures are left out.
    """
    structures = draw(list(structures), MAX_STRUCTURES, 0)
    moved: dict[str, dict[str, float]] = {}
    for fidelity in fidelities:
        if not knows(before, structures, fidelity):
            continue
        old, new = predict(before, structures, fidelity), predict(after, structures, fidelity)
        energy = [(b.energy - a.energy) / s.num_atoms for a, b, s in zip(old, new, structures, strict=True)]
        forces = np.concatenate([forces_of(b) - forces_of(a) for a, b in zip(old, new, strict=True)])
        moved[fidelity] = {
            "energy_rms_mev_per_atom": _rms_milli(np.array(energy)),
            "force_rms_mev_per_angstrom": _rms_milli(forces),
        }
    return moved


def knows(potential: Potential, structures: Sequence[Structure], fidelity: str) -> bool:
    """Tell whether the potential was trained on every element, charge and multiplicity of the structures."""
    try:
        check_domain(potential, structures, fidelity)
    except ValueError:
        return False
    return True


def forces_of(prediction: StructurePrediction) -> NDArray[np.float64]:
    """Return the predicted forces of one structure, [n, 3] in eV/angstrom."""
    assert prediction.forces is not None  # predict() was asked for them
    return prediction.forces


def _rms_milli(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))) * 1000)
