"""What tests of readers share: their files go through a build, whole, whatever the sizes of parts and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from rung.data.build import BuildConfig, build
from rung.data.read import read_dataset
from rung.data.sources import source as limits
from rung.data.sources.source import Source
from rung.data.structure import Structure
from rung.data.table import StructureTable
from rung.data.verify import verify


def by_key(structures: Sequence[Structure]) -> dict[str, Structure]:
    found = {structure.key: structure for structure in structures}
    assert len(found) == len(structures), "keys must be unique"
    return found


def assert_same(one: dict[str, Structure], other: dict[str, Structure]) -> None:
    assert one.keys() == other.keys()
    for key, structure in one.items():
        np.testing.assert_equal(asdict(structure), asdict(other[key]))


@pytest.fixture
def read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, StructureTable]]:
    """Read a file in parts and tables of at most `size`; return the number of parts and all structures."""

    def read(source: Source, path: Path, size: int) -> tuple[int, StructureTable]:
        monkeypatch.setattr(limits, "PART_STRUCTURES", size)
        monkeypatch.setattr(limits, "TABLE_STRUCTURES", size)
        parts = source.parts([path])
        tables = [table for part in parts for table in source.read(part)]
        assert max(map(len, tables)) <= size
        return len(parts), StructureTable.concatenate(tables)

    return read


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Build files, verify the dataset, and hold it to what the reader gives with other sizes of parts and tables."""

    def check(source: Source, *paths: Path) -> None:
        folder = Path(mkdtemp(dir=tmp_path))
        build(source, paths, folder, BuildConfig("test", max_energy_deviation=np.inf))  # energies here are random
        assert verify(folder) == []
        stored = by_key(list(read_dataset(folder)))
        for per_part, per_table in ((1, 1), (3, 2), (100, 3), (50_000, 8_192)):
            with monkeypatch.context() as patch:
                patch.setattr(limits, "PART_STRUCTURES", per_part)
                patch.setattr(limits, "TABLE_STRUCTURES", per_table)
                again = [s for part in source.parts(paths) for table in source.read(part) for s in table]
            assert_same(by_key(again), stored)

    return check
