"""Trajectories as ASE reads them: frames with energies and forces, on the disk as soon as they are written."""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType
from typing import Self

from ase import Atoms
from ase.io import Trajectory, read, write

TEXT_SUFFIXES = (".extxyz", ".xyz")  # 8 decimals
BINARY_SUFFIX = ".traj"  # exact


def check_trajectory(path: Path) -> None:
    """Raise ValueError for a file name that is not one of a trajectory."""
    if path.suffix not in (*TEXT_SUFFIXES, BINARY_SUFFIX):
        raise ValueError(f"{path}: a trajectory is an .extxyz, .xyz or .traj file")


def last_frame(path: Path) -> Atoms:
    """Return the last frame of a trajectory; raises ValueError for a file without one, or with a damaged one."""
    try:
        atoms = read(path, index=-1)
    except Exception as error:  # ASE's readers raise anything
        message = f"{path}: ASE cannot read its last frame ({type(error).__name__}: {error})"
        raise ValueError(f"{message}; remove what is damaged at its end, or begin anew") from error
    assert isinstance(atoms, Atoms)
    return atoms


def note_uncertainty(atoms: Atoms) -> None:
    """Copy `energy_std` (eV), which ASE's writers leave out, from the calculator's results to the info of its atoms."""
    results = getattr(atoms.calc, "results", {})
    atoms.info.pop("energy_std", None)
    if "energy_std" in results and not atoms.calc.check_state(atoms):
        atoms.info["energy_std"] = results["energy_std"]


class TrajectoryWriter:
    """Writes frames to a file, each with what its calculator has calculated; a frame is whole or not there.

    The energy's standard deviation is in a frame's info, where the calculator gives it. Whoever stops the program loses
    no frame that was written.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        """Open the file, at its end where frames are to be appended; raises OSError where it cannot be."""
        self.path = path
        self.num_frames = 0  # written by this one
        self._binary = self._text = None
        if path.suffix == BINARY_SUFFIX:
            self._binary = Trajectory(path, "a" if append else "w")
        else:
            self._text = path.open("a" if append else "w")

    def write(self, atoms: Atoms) -> None:
        """Write a frame."""
        note_uncertainty(atoms)
        if self._binary is not None:
            self._binary.write(atoms)
        else:
            assert self._text is not None
            frame = io.StringIO()
            write(frame, atoms, format="extxyz")
            self._text.write(frame.getvalue())
            self._text.flush()
        self.num_frames += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._binary, self._text):
            if file is not None:
                file.close()
