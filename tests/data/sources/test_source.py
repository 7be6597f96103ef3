"""Parts: the cut by structures and by atoms covers every file once; no part is larger than it may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rung.data.sources import source as limits
from rung.data.sources.common import batches, formula, formulas, gathered, labelled, pieces
from rung.data.sources.source import Part, cut, cut_groups, cut_rows, span
from rung.data.table import StructureTable

COUNTS = [3, 0, 40, 1, 7, 0, 250, 2]
SIZES = [9, 4, 2, 600, 30, 9, 3, 1]


def greedy(counts: list[int], sizes: list[int], per_part: int, atoms: int) -> list[int]:
    """Return the part of each structure: what lies before it, as a share of full parts, in whole numbers."""
    cost = [max(n * per_part, atoms) for n, count in zip(sizes, counts, strict=True) for _ in range(count)]
    before = np.cumsum([0, *cost])[:-1]
    return (before // (per_part * atoms)).tolist()


@pytest.mark.parametrize("per_part", [1, 10, 64, 1000])
@pytest.mark.parametrize("atoms", [1, 50, 2_000_000])
def test_rows_are_cut_by_structures_and_atoms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, atoms: int
) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "PART_ATOMS", atoms)
    (path := tmp_path / "file").write_bytes(bytes(1000))
    parts = cut_rows(path, COUNTS, SIZES)
    found = [index for index, part in enumerate(parts) for _ in range(part.start, part.stop)]
    expected = greedy(COUNTS, SIZES, per_part, atoms)
    assert found == np.unique(expected, return_inverse=True)[1].tolist()  # parts are not empty
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert sum(part.bytes for part in parts) == pytest.approx(1000, abs=len(parts))
    of_each = np.repeat(SIZES, COUNTS)
    for part in parts:
        assert part.stop - part.start <= per_part
        assert of_each[part.start : part.stop - 1].sum() <= atoms  # but for the last, which crosses the line


@pytest.mark.parametrize("per_part", [1, 10, 64, 1000])
@pytest.mark.parametrize("atoms", [1, 50, 2_000_000])
def test_groups_stay_whole(monkeypatch: pytest.MonkeyPatch, per_part: int, atoms: int) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "PART_ATOMS", atoms)
    parts = cut_groups(Path("absent"), COUNTS, SIZES)
    assert [item for part in parts for item in range(part.start, part.stop)] == list(range(len(COUNTS)))
    assert all(part.stop > part.start and part.bytes == 0 for part in parts)
    for part in parts:
        begun = slice(part.start, part.stop - 1)  # without the last group
        assert sum(COUNTS[begun]) <= per_part
        assert np.dot(COUNTS[begun], SIZES[begun]) <= atoms


def test_small_molecules_fill_parts_of_the_full_number() -> None:
    assert [part.stop for part in cut(Path("absent"), 120_000, 20)] == [50_000, 100_000, 120_000]
    assert [part.stop for part in cut(Path("absent"), 12_000, 350)] == [5_715, 11_429, 12_000]
    assert [part.stop for part in cut(Path("absent"), 60_000)] == [50_000, 60_000]
    assert cut(Path("absent"), 0, 20) == []
    assert list(span(Part(Path("absent"), 2), 5)) == [2, 3, 4] and list(span(Part(Path("absent"), 2, 9), 5)) == [
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_pieces_cover_items_of_groups(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", size)
    everything = [(group, row) for group, count in enumerate(COUNTS) for row in range(count)]
    for start, stop in ((0, 303), (2, 44), (5, 6), (43, 303)):
        found = list(pieces(COUNTS, range(start, stop)))
        assert [(group, row) for group, rows in found for row in range(rows.start, rows.stop)] == everything[start:stop]
        assert all(0 < rows.stop - rows.start <= size for _, rows in found)
    assert [len(batch) for batch in batches(range(9))] == {1: [1] * 9, 4: [4, 4, 1], 1000: [9]}[size]


def atoms(count: int, label: str, energies: list[float]) -> StructureTable:
    keys = [f"{label}{i}" for i in range(count)]
    labels = {f"energy.{label}": energies}
    return StructureTable.make(keys, keys, [1] * count, [2] * count, np.zeros((count, 3)), labels=labels)


def test_tables_are_joined_and_lose_what_has_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 4)
    tables = [
        atoms(2, "a", [1, 2]),
        atoms(0, "a", []),
        atoms(2, "b", [3, 4]),
        atoms(1, "c", [5]),
        atoms(6, "d", [6] * 6),
    ]
    assert [table.keys.tolist() for table in gathered(tables)] == [
        ["a0", "a1", "b0", "b1"],
        ["c0"],
        [f"d{i}" for i in range(6)],
    ]
    some = atoms(3, "a", [np.nan, 1, 2])
    assert labelled(some, ["a"]).keys.tolist() == ["a1", "a2"] and len(labelled(some, ["b"])) == 0
    whole = atoms(2, "a", [1, 2])
    assert labelled(whole, ["a", "b"]) is whole


def test_formulas_are_of_hill() -> None:
    """https://doi.org/10.1021/ja02046a005: carbon, hydrogen, then the alphabet; without carbon, the alphabet alone."""
    assert formula(np.array([17, 6, 1, 17, 17], np.uint8)) == "CHCl3"
    assert formula(np.array([1, 8, 1], np.uint8)) == "H2O" and formula(np.array([22, 39], np.uint8)) == "TiY"
    assert formula(np.array([35, 6, 1, 1, 1], np.uint8)) == "CH3Br"
    present = np.array([[True, True, False], [True, True, True]])
    assert formulas(np.array([[8, 1, 99], [8, 1, 1]]), present) == ["HO", "H2O"]
    assert formulas(np.zeros((0, 3), np.uint8)) == [] and formulas(np.zeros((2, 0), np.uint8)) == ["", ""]
    for wrong in (0, 119, -1):
        with pytest.raises(ValueError, match=f"expected atomic numbers 1..118, found {min(wrong, 8)}..{max(wrong, 8)}"):
            formula(np.array([8, wrong]))
