"""Structures that are in memory already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.pack import arrays_of
from rung.data.sources.source import Part, Source, SourceInfo, cut
from rung.data.table import StructureTable


@dataclass(frozen=True, repr=False)
class InMemory(Source):
    """A table as a source; its `repr` has a digest of it, because a build tells sources apart by that."""

    info: ClassVar[SourceInfo] = SourceInfo("memory", "structures in memory", "none", "StructureTable")

    table: StructureTable
    levels: dict[str, Fidelity]

    def __repr__(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, array in arrays_of(self.table).items():
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return f"InMemory({digest.hexdigest()})"

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        return self.levels

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """See `Source`; there are no files."""
        return cut(Path("memory"), len(self.table), len(self.table.numbers) // max(len(self.table), 1))

    def read(self, part: Part) -> Iterator[StructureTable]:
        """See `Source`."""
        yield self.table.part(part.start, part.stop)
