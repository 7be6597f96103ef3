"""Structures and labels from extxyz, or any other file that ASE reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rung.data.fidelity import check_name
from rung.data.structure import Labels, Structure, validate

if TYPE_CHECKING:
    from ase import Atoms

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"
GROUP_KEY = "group"


def read_structures(
    path: str | Path,
    *,
    fidelity: str,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
    group_key: str = GROUP_KEY,
) -> Iterator[Structure]:
    """Yield each frame of a file with its labels under `fidelity`; units must be ASE's (eV, angstrom).

    A frame that has `energy_key` in `info` or `forces_key` in `arrays` (and `REF_stress`, `REF_dipole` in `info`) is
    labelled by those alone; otherwise, with the default keys, by what ASE's calculator holds (extxyz's `energy`,
    `forces`, `stress`, `dipole`). The two are never mixed: they may be of different levels of theory. `charge` and
    `multiplicity` (or `spin`, which also means 2S + 1) come from `info`, as does the group; a frame without
    `group_key` belongs to the group of its chemical formula.

    Raises FileNotFoundError, and ValueError naming the file and the frame for an empty or damaged file, a frame without
    a label, and a value that `rung.data.structure.validate` refuses.
    """
    check_name(fidelity)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected extxyz or another file that ASE reads")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected at least one frame")
    for index, atoms in _frames(path):
        try:
            labels = _labels(atoms, energy_key, forces_key)
            structure = _structure(atoms, f"{path.stem}-{index:06d}", group_key, {fidelity: labels})
            validate(structure)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: frame {index}: {error}") from error
        yield structure


def _frames(path: Path) -> Iterator[tuple[int, Atoms]]:
    from ase.io import iread

    frames = iread(str(path), index=":")
    for index in itertools.count():
        try:
            atoms = next(frames)
        except StopIteration:
            break
        except Exception as error:  # ASE's readers raise anything: KeyError, RuntimeError, XYZError, ...
            message = f"{path}: frame {index}: ASE cannot read it ({type(error).__name__}: {error})"
            raise ValueError(f"{message}; damaged or truncated?") from error
        yield index, atoms
    if index == 0:
        raise ValueError(f"{path}: no frame in the file; expected at least one")


def _labels(atoms: Atoms, energy_key: str, forces_key: str) -> Labels:
    results: dict[str, Any] = atoms.calc.results if atoms.calc is not None else {}
    if energy_key in atoms.info or forces_key in atoms.arrays:
        energy, forces = atoms.info.get(energy_key), atoms.arrays.get(forces_key)
        stress, dipole = atoms.info.get("REF_stress"), atoms.info.get("REF_dipole")
    elif (energy_key, forces_key) == (ENERGY_KEY, FORCES_KEY):
        energy, forces, stress, dipole = (results.get(name) for name in ("energy", "forces", "stress", "dipole"))
    else:
        energy = forces = stress = dipole = None
    if energy is None and forces is None:
        present = sorted({*atoms.info, *atoms.arrays, *results} - {"numbers", "positions"})
        raise ValueError(
            f"no energy and no forces: expected '{energy_key}' or '{forces_key}' (or, with the default keys, 'energy' "
            f"or 'forces'), found {', '.join(present) if present else 'no labels at all'}"
        )
    if energy is not None and not isinstance(energy, (int, float, np.integer, np.floating)):
        raise ValueError(f"{energy_key}: expected one number in eV, found {energy!r}")
    return Labels(
        energy=None if energy is None else float(energy),
        forces=None if forces is None else np.asarray(forces, np.float32),
        stress=None if stress is None else _full_stress(stress),
        dipole=None if dipole is None else np.asarray(dipole, np.float32),
    )


def _full_stress(stress: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    from ase.stress import voigt_6_to_full_3x3_stress

    array = np.asarray(stress, np.float32)
    if array.shape == (6,):
        return np.asarray(voigt_6_to_full_3x3_stress(array), np.float32)
    return array.reshape(3, 3) if array.shape == (9,) else array


def _structure(atoms: Atoms, key: str, group_key: str, labels: dict[str, Labels]) -> Structure:
    info = atoms.info
    if "multiplicity" in info and "spin" in info and info["multiplicity"] != info["spin"]:
        raise ValueError(f"multiplicity {info['multiplicity']} and spin {info['spin']} differ; both mean 2S + 1")
    periodic = bool(atoms.pbc.any())
    return Structure(
        key=key,
        group=str(info.get(group_key, atoms.get_chemical_formula())),
        numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions.astype(np.float32),
        cell=np.asarray(atoms.cell.array if periodic else np.zeros((3, 3)), np.float32),
        pbc=np.asarray(atoms.pbc, np.bool_),
        charge=_whole(info.get("charge", 0), "charge"),
        multiplicity=_whole(info.get("multiplicity", info.get("spin", 1)), "multiplicity"),
        labels=labels,
    )


def _whole(value: Any, name: str) -> int:
    if float(value) != int(value):
        raise ValueError(f"{name}: expected a whole number, found {value!r}")
    return int(value)
