"""What a reader is: a Source lists the parts of its files and reads each part as tables, in eV and angstrom.

A part is what one process reads. Parts do not depend on how many processes there are, so neither do a dataset's bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rung.data.fidelity import Fidelity
from rung.data.table import StructureTable


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
    @abstractmethod
    def fidelities(self) -> Mapping[str, Fidelity]:
        """The levels of theory whose labels `read` gives under these options, by name."""

    @abstractmethod
    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return the parts of these files in a fixed order, reading no more than their indices.

        A part should hold about PART_STRUCTURES structures. Raises FileNotFoundError for a file that is not there, and
        ValueError naming the file, what was expected and what was found for one that has another layout.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the structures of a part as tables of at most some TABLE_STRUCTURES structures, units converted.

        Missing labels are NaN; structures without any label at `fidelities` are left out. Raises ValueError naming the
        file and the place for data that is damaged or has another layout than `info.layout` says.
        """


PART_STRUCTURES = 50_000
TABLE_STRUCTURES = 8_192


def existing(paths: Sequence[Path], info: SourceInfo) -> list[Path]:
    """Return the paths; raise FileNotFoundError naming one that is not there, ValueError for none."""
    if not paths:
        raise ValueError(f"source '{info.name}': expected files ({info.files}), found none")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; source '{info.name}' reads {info.files}")
    return list(paths)


def cut(path: Path, count: int, per_part: int = PART_STRUCTURES) -> list[Part]:
    """Return parts of `per_part` items each over a file of `count` items."""
    return [Part(path, start, min(start + per_part, count)) for start in range(0, count, per_part)]
