"""What a reader is: a Source lists the parts of its files and reads each part as tables, in eV and angstrom.

A part is what one process reads and holds in memory. Parts do not depend on how many processes there are, so neither do
a dataset's bytes. A part has about PART_STRUCTURES structures, or fewer where these are large: about PART_ATOMS atoms,
where a reader knows their number without reading them. A file that cannot be entered in the middle (compressed, or
without an index) is one part, however large it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rung.data.fidelity import Fidelity, check_name, unknown_fidelity
from rung.data.table import StructureTable, offsets_of


@dataclass(frozen=True)
class SourceInfo:
    """What `rung data sources` prints of a public dataset or a file format, and what a manifest takes over."""

    name: str  # such as "ani1x": the word after --source
    title: str
    files: str  # what to pass: the published file names, or the format's suffix
    layout: str  # keys, shapes and units as published, in one or two sentences
    url: str = ""
    doi: str = ""  # of the paper or the data
    licence: str = ""  # SPDX identifier where there is one
    citation: str = ""
    fidelities: tuple[Fidelity, ...] = ()  # known levels of theory; empty for a format that does not say
    structures: int | None = None  # as published; None for a format
    size: str = ""  # download size, such as "5 GB"
    # fidelity -> isolated atoms in eV, where they are published
    e0: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A piece of a source: items start..stop of one file, where the reader says what an item is."""

    path: Path
    start: int = 0
    stop: int = -1  # -1: to the end
    bytes: int = 0  # about what it holds, for progress


@dataclass(frozen=True)
class Source(ABC):
    """A reader with its options as fields; it travels between processes by pickle, so it holds no open file."""

    info: ClassVar[SourceInfo]

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        """The levels of theory whose labels `read` gives under these options, by name: all of `info`, unless told."""
        return {fidelity.name: fidelity for fidelity in self.info.fidelities}

    @abstractmethod
    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return the parts of these files in a fixed order, reading no more than their indices.

        A part should hold about PART_STRUCTURES structures, and not much more than PART_ATOMS atoms. Raises
        FileNotFoundError for a file that is not there, and ValueError naming the file, what was expected and what was
        found for one that has another layout.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the structures of a part as tables of at most some TABLE_STRUCTURES structures, units converted.

        Missing labels are NaN; structures without any label at `fidelities` are left out. Raises ValueError naming the
        file and the place for data that is damaged or has another layout than `info.layout` says.
        """


@dataclass(frozen=True)
class LevelsSource(Source):
    """A source of which `levels` chooses among the levels of theory that `info` lists."""

    levels: tuple[str, ...]

    def __post_init__(self) -> None:
        known = [fidelity.name for fidelity in self.info.fidelities]
        for name in self.levels:
            if name not in known:
                raise unknown_fidelity(name, known)
        if not self.levels:
            raise ValueError(f"{self.info.name}: levels: expected at least one of {', '.join(known)}, found none")

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        known = {fidelity.name: fidelity for fidelity in self.info.fidelities}
        return {name: known[name] for name in self.levels}


@dataclass(frozen=True)
class OneLevelSource(Source):
    """A source of a format that does not say its level of theory: the options do."""

    fidelity: str
    method: str = ""  # "": the name of the fidelity
    basis: str = ""
    dispersion: str = ""
    code: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.fidelity)

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        method = self.method or self.fidelity
        about = (self.basis, self.dispersion, self.code, self.description)
        return {self.fidelity: Fidelity(self.fidelity, method, *about)}


PART_STRUCTURES = 50_000
PART_ATOMS = 2_000_000  # of which positions and forces are 50 MB; a build holds a part several times
TABLE_STRUCTURES = 8_192


def existing(paths: Sequence[Path], info: SourceInfo) -> list[Path]:
    """Return the paths; raise FileNotFoundError naming one that is not there, ValueError for none."""
    if not paths:
        raise ValueError(f"source '{info.name}': expected files ({info.files}), found none")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; source '{info.name}' reads {info.files}")
    return list(paths)


def whole(path: Path) -> Part:
    """Return a file that cannot be entered in the middle as one part."""
    return Part(path, bytes=path.stat().st_size)


def cut(path: Path, count: int, num_atoms: int = 0) -> list[Part]:
    """Return parts over a file of `count` structures of about `num_atoms` atoms each (0: few, or not known)."""
    return cut_rows(path, [count], [num_atoms])


def cut_rows(path: Path, counts: Sequence[int], num_atoms: Sequence[int]) -> list[Part]:
    """Return parts whose items are structures, over groups of `counts` structures of `num_atoms` laid end to end."""
    before, filled, costs, full = _fill(counts, num_atoms)
    targets = np.arange(0, filled[-1], full)
    group = np.searchsorted(filled, targets, "right") - 1
    starts = before[group] - (filled[group] - targets) // costs[group]  # rounded up
    bounds = [*np.unique(starts).tolist(), int(before[-1])]
    return _parts(path, bounds, bounds)


def cut_groups(path: Path, counts: Sequence[int], num_atoms: Sequence[int]) -> list[Part]:
    """Return parts whose items are groups, each of `counts` structures of `num_atoms`; a group is never cut."""
    before, filled, _, full = _fill(counts, num_atoms)
    edges = np.flatnonzero(np.diff(filled[:-1] // full)) + 1
    bounds = [0, *edges.tolist(), len(counts)]
    return _parts(path, bounds, before[bounds].tolist())


def span(part: Part, count: int) -> range:
    """Return the items of a part of a file that holds `count`."""
    return range(part.start, count if part.stop < 0 else min(part.stop, count))


def _fill(
    counts: Sequence[int], num_atoms: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Return structures before each group, what they fill of parts, what one of each group does, and a full part."""
    costs = np.maximum(np.asarray(num_atoms, np.int64) * PART_STRUCTURES, PART_ATOMS)
    sizes = np.asarray(counts, np.int64)
    return offsets_of(sizes), offsets_of(sizes * costs), costs, PART_STRUCTURES * PART_ATOMS


def _parts(path: Path, bounds: Sequence[int], structures: Sequence[int]) -> list[Part]:
    """Return the parts between `bounds`, before each of which the file has so many structures."""
    size = path.stat().st_size / max(structures[-1], 1) if path.is_file() else 0
    rows = zip(bounds, bounds[1:], structures, structures[1:], strict=False)
    return [Part(path, start, stop, int(size * (after - before))) for start, stop, before, after in rows]
