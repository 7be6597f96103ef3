"""StructureTable against loops over Structures: the same answers, and the same refusals as `validate`."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from rung.data.structure import Labels, Structure, validate
from rung.data.table import LABEL_KINDS, Strings, StructureTable, faults, offsets_of, pair_grid, ragged_index


def make_structures(count: int = 20) -> list[Structure]:
    """Molecules and cells of 1 to 5 atoms with every combination of labels at two fidelities, some with none."""
    rng = np.random.default_rng(0)
    structures = []
    for i in range(count):
        n = int(rng.integers(1, 6))
        labels = {}
        for fidelity in ("pbe", "ccsdt"):
            bits = rng.integers(0, 2, 4)
            values = {
                "energy": float(rng.normal()),
                "forces": rng.normal(size=(n, 3)).astype(np.float32),
                "stress": rng.normal(size=(3, 3)).astype(np.float32),
                "dipole": rng.normal(size=3).astype(np.float32),
            }
            chosen = {name: value for bit, (name, value) in zip(bits, values.items(), strict=True) if bit}
            if chosen:
                labels[fidelity] = Labels(**chosen)
        periodic = i % 3 == 0
        structures.append(
            Structure(
                key=f"schlüssel-{i}",
                group="" if i % 5 == 0 else f"g{i // 4}",
                numbers=rng.integers(1, 119, n).astype(np.uint8),
                positions=rng.normal(size=(n, 3)).astype(np.float32),
                cell=np.eye(3, dtype=np.float32) * (5 + i) * periodic,
                pbc=np.array([periodic, periodic, False]),
                charge=int(rng.integers(-128, 128)),
                multiplicity=int(rng.integers(1, 256)),
                labels=dict(sorted(labels.items())),
            )
        )
    return structures


STRUCTURES = make_structures()
TABLE = StructureTable.of(STRUCTURES)
INDICES = [[], [3], [19, 0, 7, 7, 2], list(range(20))]


def assert_equal(table: StructureTable, structures: list[Structure]) -> None:
    """Hold a table to structures by iteration, by index, and by its flat arrays."""
    assert len(table) == len(structures)
    np.testing.assert_equal([asdict(s) for s in table], [asdict(s) for s in structures])
    np.testing.assert_equal([asdict(table[i]) for i in range(len(table))], [asdict(s) for s in structures])
    assert table.offsets.tolist() == [sum(s.num_atoms for s in structures[:i]) for i in range(len(structures) + 1)]
    assert table.structure.tolist() == [i for i, s in enumerate(structures) for _ in range(s.num_atoms)]
    assert table.numbers.tolist() == [z for s in structures for z in s.numbers.tolist()]
    assert table.keys.tolist() == [s.key for s in structures] and table.keys.offsets[0] == 0


def test_there_and_back() -> None:
    assert_equal(TABLE, STRUCTURES)
    assert TABLE.fidelities == ["ccsdt", "pbe"]
    with pytest.raises(IndexError):
        TABLE[20]
    with pytest.raises(IndexError):
        TABLE[-1]


@pytest.mark.parametrize("index", INDICES)
def test_take(index: list[int]) -> None:
    taken = TABLE.take(np.array(index, np.int64))
    assert_equal(taken, [STRUCTURES[i] for i in index])
    assert not np.shares_memory(taken.positions, TABLE.positions)


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 0), (20, 20), (4, 11), (19, 20)])
def test_part(start: int, stop: int) -> None:
    part = TABLE.part(start, stop)
    assert_equal(part, STRUCTURES[start:stop])
    assert part.positions.base is not None or start == stop
    if stop - start > 2:
        assert_equal(part.part(1, 2), STRUCTURES[start + 1 : start + 2])


def test_where() -> None:
    mask = np.arange(20) % 3 == 1
    assert_equal(TABLE.where(mask), STRUCTURES[1::3])
    assert TABLE.where(np.ones(20, np.bool_)) is TABLE


@pytest.mark.parametrize("cuts", [[], [7], [0, 3, 3, 20], [5, 12]])
def test_concatenate(cuts: list[int]) -> None:
    bounds = [0, *cuts, 20]
    pieces = [STRUCTURES[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]
    assert_equal(StructureTable.concatenate([StructureTable.of(piece) for piece in pieces]), STRUCTURES)


def test_concatenate_of_other_labels_and_of_nothing() -> None:
    one = [replace(STRUCTURES[0], labels={"mp2": Labels(energy=1.0)})]
    two = [replace(STRUCTURES[1], labels={"hf": Labels(dipole=np.ones(3, np.float32))})]
    joined = StructureTable.concatenate([StructureTable.of(one), StructureTable.of(two)])
    assert_equal(joined, one + two)
    assert sorted(joined.labels) == ["dipole.hf", "energy.mp2"]
    assert_equal(StructureTable.concatenate([]), [])


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("fidelity", ["pbe", "ccsdt", "other"])
def test_has(kind: str, fidelity: str) -> None:
    expected = [getattr(s.labels.get(fidelity, Labels()), kind) is not None for s in STRUCTURES]
    assert TABLE.has(kind, fidelity).tolist() == expected


@pytest.mark.parametrize("fidelity", ["pbe", "ccsdt", "other"])
def test_carries_at_and_renamed(fidelity: str) -> None:
    carried = [s for s in STRUCTURES if fidelity in s.labels]
    assert TABLE.carries(fidelity).tolist() == [fidelity in s.labels for s in STRUCTURES]
    assert_equal(TABLE.at(fidelity), [replace(s, labels={fidelity: s.labels[fidelity]}) for s in carried])
    renamed = [replace(s, labels={"new": s.labels[fidelity]} if fidelity in s.labels else {}) for s in STRUCTURES]
    assert_equal(TABLE.renamed(fidelity, "new"), renamed)


def test_a_label_that_no_structure_has_is_nan() -> None:
    assert TABLE.label("forces.other").shape == (len(TABLE.numbers), 3)
    assert TABLE.label("stress.other").shape == (20, 3, 3) and np.isnan(TABLE.label("stress.other")).all()
    assert TABLE.label("energy.pbe") is TABLE.labels["energy.pbe"]
    for name in ("charges.pbe", "energy"):
        with pytest.raises(ValueError, match=rf"expected '<kind>.<fidelity>' with a kind of .*, found '{name}'"):
            TABLE.label(name)


def test_strings() -> None:
    texts = ["", "a", "größe", "", "日本", ""]
    strings = Strings.of(texts)
    assert strings.tolist() == texts and len(strings) == 6 and [strings[i] for i in range(6)] == texts
    assert strings.take(np.array([4, 0, 4])).tolist() == ["日本", "", "日本"]
    assert strings.part(1, 4).tolist() == texts[1:4] and strings.part(6, 6).tolist() == []
    assert Strings.of([]).tolist() == []


def test_ragged_index_and_pairs() -> None:
    starts, lengths = np.array([5, 0, 9, 2]), np.array([3, 0, 1, 2])
    expected = [i for start, length in zip(starts, lengths, strict=True) for i in range(start, start + length)]
    assert ragged_index(starts, lengths).tolist() == expected
    assert offsets_of(lengths).tolist() == [0, 3, 3, 4, 6]
    pairs = [(i + o, j + o) for n, o in ((2, 0), (1, 2), (3, 3)) for i in range(n) for j in range(n)]
    assert list(zip(*(array.tolist() for array in pair_grid(np.array([2, 1, 3]))), strict=True)) == pairs


# What is refused

NAN, INF = float("nan"), float("inf")


def spoiled(index: int, **changes: Any) -> StructureTable:
    """Return 12 good structures of three atoms, of which the arrays of one are changed: name -> (place, value)."""
    rng = np.random.default_rng(1)
    M, n = 12, 3
    arrays: dict[str, Any] = {
        "numbers": np.full((M, n), 8, np.uint8),
        "positions": rng.normal(size=(M, n, 3)).astype(np.float32),
        "cell": np.tile(np.eye(3, dtype=np.float32), (M, 1, 1)),
        "pbc": np.ones((M, 3), np.bool_),
        "multiplicity": np.ones(M, np.uint8),
    }
    labels: dict[str, Any] = {
        "energy.pbe": rng.normal(size=M),
        "forces.pbe": rng.normal(size=(M, n, 3)).astype(np.float32),
        "stress.pbe": rng.normal(size=(M, 3, 3)).astype(np.float32),
        "dipole.pbe": rng.normal(size=(M, 3)).astype(np.float32),
    }
    for name, (place, value) in changes.items():
        array = arrays[name] if name in arrays else labels[f"{name}.pbe"]
        array[(index, *place)] = value
    keys = [f"s{i}" for i in range(M)]
    return StructureTable.make(keys, keys, np.full(M, n), **arrays, labels=labels)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, ""),
        ({"numbers": ((1,), 0)}, "numbers"),
        ({"numbers": ((2,), 119)}, "numbers"),
        ({"positions": ((1, 2), NAN)}, "positions"),
        ({"positions": ((0, 0), -INF)}, "positions"),
        ({"cell": ((0, 0), NAN)}, "cell"),
        ({"cell": ((0, 0), INF)}, "cell"),
        ({"cell": ((2,), 0)}, "cell"),
        ({"cell": ((), 0), "pbc": ((), False)}, ""),
        ({"multiplicity": ((), 0)}, "multiplicity"),
        ({"energy": ((), NAN)}, ""),  # missing
        ({"energy": ((), INF)}, "energy.pbe"),
        ({"forces": ((), NAN)}, ""),
        ({"forces": ((1,), NAN)}, "forces.pbe"),
        ({"forces": ((1, 2), NAN)}, "forces.pbe"),
        ({"forces": ((1, 2), INF)}, "forces.pbe"),
        ({"forces": ((1, 2), 300.0)}, ""),
        ({"forces": ((1, 2), -301.0)}, "forces.pbe"),
        ({"stress": ((), NAN)}, ""),
        ({"stress": ((1, 1), NAN)}, "stress.pbe"),
        ({"stress": ((1, 1), -INF)}, "stress.pbe"),
        ({"dipole": ((), NAN)}, ""),
        ({"dipole": ((0,), NAN)}, "dipole.pbe"),
        ({"dipole": ((0,), INF)}, "dipole.pbe"),
    ],
)
@pytest.mark.parametrize("index", [0, 5, 11])
def test_faults_are_what_validate_refuses(changes: dict[str, Any], field: str, index: int) -> None:
    table = spoiled(index, **changes)
    assert faults(table) == reasons(table)
    assert [f": {field}: expected" in reason for reason in faults(table).values()] == [True] * bool(field)


def reasons(table: StructureTable) -> dict[int, str]:
    """Return what `validate` says of each structure it refuses."""
    found = {}
    for index, structure in enumerate(table):
        try:
            validate(structure)
        except ValueError as error:
            found[index] = str(error)
    return found


def test_every_fault_is_found_beside_structures_without_atoms() -> None:
    good, bad = spoiled(0).part(0, 2), spoiled(0, multiplicity=((), 0)).part(0, 1)
    empty = StructureTable.make(["e"], ["e"], [0], [], np.zeros((0, 3)))
    table = StructureTable.concatenate([empty, good, bad, empty])
    assert list(faults(table)) == [0, 3, 4] and faults(table) == reasons(table)
    assert faults(empty.part(0, 0)) == {}


def make(**changes: Any) -> StructureTable:
    arrays = {
        "keys": ["a", "b"],
        "groups": ["a", "b"],
        "num_atoms": [2, 1],
        "numbers": [1, 1, 8],
        "positions": np.zeros((3, 3)),
        **changes,
    }
    return StructureTable.make(**arrays)


def test_make_takes_any_dtype_and_both_layouts() -> None:
    table = make(charge=-1.0, multiplicity=[1, 3], numbers=np.array([1.0, 1, 8]), labels={"energy.pbe": [1, 2]})
    assert table.numbers.dtype == np.uint8 and table.charge.tolist() == [-1, -1]
    assert table.multiplicity.dtype == np.uint8 and table.labels["energy.pbe"].dtype == np.float64
    square = make(num_atoms=[2, 2], numbers=[[1, 1], [8, 8]], positions=np.ones((2, 2, 3)), pbc=[True, False, True])
    assert square.numbers.tolist() == [1, 1, 8, 8] and square.positions.shape == (4, 3)
    assert square.pbc.tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ["a"]}, "keys: expected one per structure (2), found 1"),
        ({"groups": ["a", "b", "c"]}, "groups: expected one per structure (2), found 3"),
        ({"num_atoms": [4, -1]}, "num_atoms: expected no negative number, found -1"),
        ({"num_atoms": [1.5, 1.5]}, "num_atoms: expected whole numbers, found float64 [1.5, 1.5]"),
        ({"numbers": [1, 1]}, "numbers: expected shape (3,), found (2,)"),
        ({"numbers": [1, 1, 256]}, "numbers: expected 0..255, found 1..256"),
        ({"numbers": [1, -1, 8]}, "numbers: expected 0..255, found -1..8"),
        ({"numbers": [1, NAN, 8]}, "numbers: expected whole numbers, found float64"),
        ({"numbers": ["H", "H", "O"]}, "numbers: expected whole numbers, found <U1 ['H', 'H', 'O']"),
        ({"positions": np.zeros((3, 2))}, "positions: expected shape (3, 3), found (3, 2)"),
        ({"positions": np.zeros(9)}, "positions: expected shape (3, 3), found (9,)"),
        ({"positions": np.zeros((3, 3)).T[:2]}, "positions: expected shape (3, 3), found (2, 3)"),
        ({"cell": np.zeros((3, 2))}, "cell: expected shape (2, 3, 3), found (3, 2)"),
        ({"pbc": [True, False]}, "pbc: expected shape (2, 3), found (2,)"),
        ({"charge": 200}, "charge: expected -128..127, found 200..200"),
        ({"charge": [1, 2, 3]}, "charge: expected shape (2,), found (3,)"),
        ({"multiplicity": -1}, "multiplicity: expected 0..255, found -1..-1"),
        ({"labels": {"energy.pbe": [1.0]}}, "energy.pbe: expected shape (2,), found (1,)"),
        ({"labels": {"forces.pbe": np.zeros((2, 3))}}, "forces.pbe: expected shape (3, 3), found (2, 3)"),
        ({"labels": {"dipole.pbe": np.zeros((2, 3, 1))}}, "dipole.pbe: expected shape (2, 3), found (2, 3, 1)"),
        ({"labels": {"spin.pbe": [1.0, 1.0]}}, "labels: expected '<kind>.<fidelity>' with a kind of energy, forces"),
    ],
)
def test_make_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**changes)
