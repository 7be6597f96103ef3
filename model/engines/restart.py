"""What a frame of `rung md` says of itself, so that a run is continued as what it was."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from ase import Atoms

from rung.data.sources.ase_file import charge_and_multiplicity
from rung.model.engines.trajectory import last_frame
from rung.model.potential import Potential

STEP, TIME, FIDELITY, WEIGHTS = "step", "time_fs", "fidelity", "weights"  # keys of a frame's info


def digest_of(potential: Potential) -> str:
    """Return a digest of a potential's numbers, the same for a float32 and a float64 copy of float32 weights."""
    digest = hashlib.sha256()
    for name, tensor in potential.state_dict().items():
        digest.update(name.encode() + tensor.double().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def frame_to_continue(atoms: Atoms, path: Path, timestep: float) -> Atoms:
    """Return the last frame of a trajectory; it is one of the same atoms and time step in fs.

    Raises FileNotFoundError, and ValueError for a frame that cannot be continued.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no trajectory to continue; leave out --restart to begin one")
    frame = last_frame(path)
    if not np.array_equal(frame.numbers, atoms.numbers):
        raise ValueError(f"{path}: expected the atoms of the structure, {atoms.symbols}, found {frame.symbols}")
    step, elapsed = frame.info.get(STEP), frame.info.get(TIME)
    if not (frame.has("momenta") and isinstance(step, (int, np.integer)) and elapsed is not None):
        raise ValueError(f"{path}: its last frame has no momenta or no step; only trajectories of `rung md` go on")
    if not math.isclose(elapsed, step * timestep, rel_tol=1e-6):
        raise ValueError(
            f"{path}: {step} steps are {elapsed} fs there, but {step * timestep} fs with --timestep {timestep}; "
            "continue with the same time step"
        )
    return frame


def continue_from(frame: Atoms, atoms: Atoms, path: Path) -> None:
    """Put the atoms where a frame of a file has them.

    Raises ValueError unless fidelity, weights, charge, multiplicity and periodic directions are as they were.
    """
    before, now = (_what_stays(some) for some in (frame, atoms))
    for name, value in before.items():
        if value != now[name]:
            raise ValueError(f"{path}: was computed with {name} {value}, not {now[name]}; continue with the same")
    atoms.set_cell(frame.cell)
    atoms.set_positions(frame.positions, apply_constraint=False)
    atoms.set_momenta(frame.get_momenta(), apply_constraint=False)


def _what_stays(atoms: Atoms) -> dict[str, object]:
    charge, multiplicity = charge_and_multiplicity(atoms.info)
    state = {"charge": charge, "multiplicity": multiplicity, "pbc": atoms.pbc.tolist()}
    return {"fidelity": atoms.info.get(FIDELITY), **state, "a checkpoint whose weights are": atoms.info.get(WEIGHTS)}
