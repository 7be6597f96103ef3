"""Write the small checkpoints of the current format version that test_checkpoint.py keeps loading for ever.

Run it once per format version, after raising FORMAT_VERSION: `python tests/model/checkpoints/make_samples.py`. The
samples of older versions stay as they are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rung.data.fidelity import Fidelity
from rung.data.structure import Structure
from rung.model.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint, write_checkpoint
from rung.model.config import ModelConfig
from rung.model.potential import Potential
from rung.model.predict import predict
from rung.model.reference import make_reference
from rung.model.uncertainty import Ensemble, LastLayer

WATER = Structure(
    key="water",
    group="water",
    numbers=np.array([8, 1, 1], np.uint8),
    positions=np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]], np.float32),
)


def make_sample(folder: Path, conditioning: Any) -> None:
    """Save a small potential with `conditioning` and every optional file, its predictions for WATER as evaluation."""
    config = ModelConfig((1, 8), ("low", "high"), channels=4, num_radial=4, fidelity_dim=4, conditioning=conditioning)
    potential = Potential(config).eval()
    potential.set_reference("low", {1: -13.6, 8: -2040.0})
    potential.set_reference("high", {1: -13.7})
    potential.set_scale(1.5)
    [water] = predict(potential, [WATER], "low")
    assert water.forces is not None
    save_checkpoint(
        folder,
        potential,
        fidelities={"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2", "cc-pVDZ")},
        training_config={"steps": 0},
        datasets=[{"name": "none", "version": "1", "licence": "CC0-1.0", "sha256": "0" * 64}],
        evaluation={"water": {"energy_ev": water.energy, "forces_ev_per_angstrom": water.forces.tolist()}},
        raw_state=potential.state_dict(),
        uncertainty={
            "low": LastLayer(torch.eye(3, dtype=torch.float64), noise=0.002, factor=1.5),
            "high": Ensemble([{"e0_FZ": potential.e0_FZ + shift} for shift in (0.0, 0.1)], factor=2.0),
        },
    )
    hydrogen = dataclasses.replace(WATER, key="hydrogen", group="hydrogen", numbers=np.array([1, 1], np.uint8))
    hydrogen = dataclasses.replace(hydrogen, positions=WATER.positions[1:])
    reference = make_reference(potential, [WATER, hydrogen])  # oxygen is not trained at "high"
    write_checkpoint(folder, dataclasses.replace(load_checkpoint(folder), reference=reference))


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(__file__).parent
    for name in ("film", "heads"):
        make_sample(here / f"v{FORMAT_VERSION}" / name, name)
