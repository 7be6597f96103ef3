"""Structures and labels from extxyz, or any other file that ASE reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rung.data.fidelity import check_name
from rung.data.sources.records import full_stress, geometry, tables, whole_number
from rung.data.sources.source import OneLevelSource, Part, SourceInfo, existing, whole
from rung.data.structure import Labels, Structure, validate
from rung.data.table import StructureTable

if TYPE_CHECKING:
    from ase import Atoms

ENERGY_KEY = "REF_energy"
FORCES_KEY = "REF_forces"
GROUP_KEY = "group"
CALCULATOR_KEYS = ("energy", "forces")


@dataclass(frozen=True)
class AseFile(OneLevelSource):
    """Frames of files that ASE reads, all at one level of theory; `read_structures` says which labels are taken."""

    energy_key: str = ENERGY_KEY
    forces_key: str = FORCES_KEY
    group_key: str = GROUP_KEY

    info: ClassVar[SourceInfo] = SourceInfo(
        name="ase",
        title="extxyz, or another file that ASE reads",
        files="*.extxyz, *.xyz, *.traj, *.db, ...",
        layout=(
            "frames with REF_energy, REF_forces, REF_stress, REF_dipole (or energy, forces, stress, dipole), charge, "
            "multiplicity or spin (2S + 1) and group, in ASE's units (eV, angstrom); other values and arrays are "
            "not read"
        ),
        url="https://gitlab.com/ase/ase",
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return one part per file: a file of frames cannot be entered in the middle."""
        return [whole(path) for path in existing(paths, self.info)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the frames of a file; raises what `read_structures` raises."""
        keys = {"energy_key": self.energy_key, "forces_key": self.forces_key, "group_key": self.group_key}
        yield from tables(read_structures(part.path, fidelity=self.fidelity, **keys))


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
    `forces`, `stress`, `dipole`). The two are never mixed: they may be of different levels of theory. The calculator's
    labels can also be asked for by name ("energy", "forces"). `charge` and `multiplicity` (or `spin`, which also means
    2S + 1) come from `info`, as does the group; a frame without `group_key` belongs to the group of its formula.

    Raises FileNotFoundError, and ValueError naming the file and the frame for an empty or damaged file, a frame without
    a label, a key other than the default that no frame has, and a value that `rung.data.structure.validate` refuses.
    """
    check_name(fidelity)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected extxyz or another file that ASE reads")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected at least one frame")
    missing = {energy_key, forces_key, group_key} - {ENERGY_KEY, FORCES_KEY, GROUP_KEY}
    for index, atoms in _frames(path):
        stored = _stored(atoms)
        missing -= stored.keys()
        try:
            labels = _labels(stored, energy_key, forces_key)
            structure = _structure(atoms, f"{path.stem}-{index:06d}", group_key, {fidelity: labels})
            validate(structure)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: frame {index}: {error}") from error
        yield structure
    if missing:
        raise ValueError(f"{path}: no frame has {' or '.join(sorted(missing))}; the last one has {_names(stored)}")


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


def _stored(atoms: Atoms) -> dict[str, Any]:
    """Return all that a frame holds by name; ASE moves extxyz's `energy`, `forces`, ... to a calculator."""
    results = {} if atoms.calc is None else atoms.calc.results
    return {**results, **atoms.arrays, **atoms.info}


def _labels(stored: Mapping[str, Any], energy_key: str, forces_key: str) -> Labels:
    keys = (energy_key, forces_key)
    if keys == (ENERGY_KEY, FORCES_KEY) and not stored.keys() & set(keys):
        keys = CALCULATOR_KEYS
    others = ("stress", "dipole") if keys == CALCULATOR_KEYS else ("REF_stress", "REF_dipole")
    energy, forces, stress, dipole = (stored.get(name) for name in (*keys, *others))
    if energy is None and forces is None:
        raise ValueError(
            f"no energy and no forces: expected '{energy_key}' or '{forces_key}' (or, with the default keys, 'energy' "
            f"or 'forces'), found {_names(stored)}"
        )
    if energy is not None and not isinstance(energy, (int, float, np.integer, np.floating)):
        raise ValueError(f"{keys[0]}: expected one number in eV, found {energy!r}")
    return Labels(
        energy=None if energy is None else float(energy),
        forces=None if forces is None else np.asarray(forces, np.float32),
        stress=None if stress is None else full_stress(stress),
        dipole=None if dipole is None else np.asarray(dipole, np.float32),
    )


def _names(stored: Mapping[str, Any]) -> str:
    return ", ".join(sorted(stored.keys() - {"numbers", "positions"})) or "no labels at all"


def _structure(atoms: Atoms, key: str, group_key: str, labels: dict[str, Labels]) -> Structure:
    charge, multiplicity = charge_and_multiplicity(atoms.info)
    return Structure(
        key=key,
        group=str(atoms.info.get(group_key, atoms.get_chemical_formula())),
        charge=charge,
        multiplicity=multiplicity,
        labels=labels,
        **geometry(atoms),
    )


def charge_and_multiplicity(info: Mapping[str, Any]) -> tuple[int, int]:
    """Return the charge (default 0) and the spin multiplicity (2S + 1, default 1) that `atoms.info` states.

    Raises ValueError for a value that is no whole number, and for `multiplicity` and `spin` that differ.
    """
    if "multiplicity" in info and "spin" in info and info["multiplicity"] != info["spin"]:
        raise ValueError(f"multiplicity {info['multiplicity']} and spin {info['spin']} differ; both mean 2S + 1")
    multiplicity = info.get("multiplicity", info.get("spin", 1))
    return whole_number(info.get("charge", 0), "charge"), whole_number(multiplicity, "multiplicity")
