"""The geometries that a table of relative energies names, each read once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import iread
from numpy.typing import NDArray

from rung.data.reaction_row import hint
from rung.data.sources.ase_file import charge_and_multiplicity
from rung.data.sources.records import geometry, whole_number
from rung.data.structure import Structure, validate

Frames = list[tuple[str, Atoms]]  # name, atoms
_FRAME = re.compile(r"(.+?)(#.+|@[0-9]+)")
_MAX_UNPAIRED = 254  # a multiplicity is a uint8 on disk


@dataclass
class Geometries:
    """What the species of a table are: short names, or references to files beside it."""

    table: Path
    names: Mapping[str, Mapping[str, str]] | None = None  # short name -> GEOMETRY_KEYS
    frames_file: str = ""  # whose frames are the names
    _files: dict[Path, Frames] = field(default_factory=dict)
    _structures: dict[tuple[Any, ...], Structure] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The files that have been read so far."""
        return list(self._files)

    def structure(self, species: str) -> Structure:
        """Return the structure of a species, the same object for the same one.

        Raises ValueError naming the species where it is unknown, or its multiplicity impossible.
        """
        if self.names is not None:
            known = list(self.names)
            if species not in self.names:
                raise ValueError(f"unknown species '{species}'{hint(species, known) or f'; known: {shown(known)}'}")
            stated = self.names[species]
            file, frame = self._split(stated["file"])
            return self._structure(file, frame, species, stated)
        if self.frames_file:
            return self._structure(self.table.parent / self.frames_file, f"#{species}", species, {})
        file, frame = self._split(species)
        return self._structure(file, frame, species, {})

    def _split(self, reference: str) -> tuple[Path, str]:
        """Return the file of a reference, and its frame as "#NAME" or "@NUMBER": "" for the only one."""
        whole = self.table.parent / reference
        match = _FRAME.fullmatch(reference)
        if match is None or whole.is_file():
            return whole, ""
        return self.table.parent / match[1], match[2]

    def _structure(self, file: Path, frame: str, key: str, stated: Mapping[str, str]) -> Structure:
        frames = self._frames(file)
        index = _frame_index(file, [name for name, _ in frames], frame)
        own = tuple(sorted((name, value) for name, value in stated.items() if name != "file"))
        identity = (file.absolute(), index, own)
        if identity not in self._structures:
            self._structures[identity] = _structure(frames[index][1], file, key, stated)
        return self._structures[identity]

    def _frames(self, file: Path) -> Frames:
        if file not in self._files:
            self._files[file] = _read_frames(file)
        return self._files[file]


def _frame_index(file: Path, names: Sequence[str], frame: str) -> int:
    if frame == "":
        if len(names) > 1:
            raise ValueError(f"{file} has {len(names)} frames; name one, such as {file.name}#{names[0]}")
        return 0
    if frame[0] == "@":
        if int(frame[1:]) >= len(names):
            raise ValueError(f"unknown species: {file} has no frame {frame[1:]}; it has {len(names)}, counted from 0")
        return int(frame[1:])
    name = frame[1:]
    if name not in names:
        near = hint(name, names) or f"; it has {shown(names)}"
        raise ValueError(f"unknown species '{name}': no frame of that name in {file}{near}")
    first = names.index(name)
    if name in names[first + 1 :]:
        both = f"{first} and {names.index(name, first + 1)}"
        raise ValueError(f"species '{name}': expected one frame of that name in {file}, found frames {both}")
    return first


def _read_frames(file: Path) -> Frames:
    """Return the frames of a file with their names."""
    if not file.is_file():
        siblings = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ValueError(f"unknown species: no file {file}{hint(file.name, siblings)}")
    try:
        frames = list(iread(str(file), index=":", do_not_split_by_at_sign=True))
    except Exception as error:  # ASE's readers raise anything: KeyError, RuntimeError, XYZError, ...
        raise ValueError(f"{file}: ASE cannot read it ({type(error).__name__}: {error}); damaged?") from error
    if not frames:
        raise ValueError(f"{file}: expected at least one frame, found none")
    return [(_name(atoms, f"{file.stem}-{index:06d}"), atoms) for index, atoms in enumerate(frames)]


def _name(atoms: Atoms, default: str) -> str:
    return str(atoms.info.get("key", atoms.info.get("name", default)))


def _structure(atoms: Atoms, file: Path, key: str, stated: Mapping[str, str]) -> Structure:
    try:
        charge, multiplicity = charge_and_multiplicity(atoms.info)
        charge = _whole(stated["charge"], "charge") if "charge" in stated else charge
        given = multiplicity if {"multiplicity", "spin"} & atoms.info.keys() else None
        given = _whole(stated["multiplicity"], "multiplicity") if "multiplicity" in stated else given
        shape = geometry(atoms)
        structure = Structure(
            key=key,
            group=stated.get("group") or str(atoms.info.get("group", atoms.get_chemical_formula())),
            charge=charge,
            multiplicity=possible_multiplicity(key, shape["numbers"], charge, given),
            **shape,
        )
        validate(structure)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return structure


def possible_multiplicity(species: str, numbers: NDArray[np.uint8], charge: int, stated: int | None) -> int:
    """Return the stated multiplicity (2S + 1), or the smallest possible one, 1 or 2, where none is stated.

    Raises ValueError naming the species where its electrons cannot have the stated one: the number of unpaired
    electrons, 2S, is at most that of the electrons, and is odd where that is odd.
    """
    electrons = int(np.sum(numbers, dtype=np.int64)) - charge
    if electrons < 0:
        raise ValueError(f"species '{species}': expected a charge of at most {electrons + charge}, found {charge}")
    unpaired = electrons % 2 if stated is None else stated - 1
    if not 0 <= unpaired <= min(electrons, _MAX_UNPAIRED) or unpaired % 2 != electrons % 2:
        parity = "even" if electrons % 2 else "odd"
        raise ValueError(
            f"species '{species}': expected an {parity} multiplicity (2S + 1) for its {electrons} electrons (charge "
            f"{charge}), at most {min(electrons, _MAX_UNPAIRED) + 1}, found {unpaired + 1}; correct the charge or the "
            "multiplicity"
        )
    return unpaired + 1


def _whole(text: str, name: str) -> int:
    try:
        return whole_number(float(text), name)
    except ValueError:
        raise ValueError(f"{name} of a structure: expected a whole number, found {text!r}") from None


def shown(names: Sequence[str], most: int = 10) -> str:
    """Return names for an error message, at most `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
