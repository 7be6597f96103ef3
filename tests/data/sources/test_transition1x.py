"""Transition1x: every reaction once, with its ends, in eV as published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rung.data.sources.transition1x import Transition1x
from rung.data.table import StructureTable

LEVEL = "wb97x_631gd"
NUMBERS = {"C2H2": [6, 6, 1, 1], "CH2O": [6, 8, 1, 1], "N2": [7, 7]}


def write_images(group: h5py.Group, formula: str, M: int, rng: np.random.Generator) -> None:
    n = len(NUMBERS[formula])
    group["atomic_numbers"] = np.array(NUMBERS[formula])
    group["positions"] = rng.normal(size=(M, n, 3))
    group["wB97x_6-31G(d).energy"] = rng.normal(-2000, 1, M)
    group["wB97x_6-31G(d).forces"] = rng.normal(size=(M, n, 3))


def write(path: Path, data: bool = True) -> None:
    """Write reactions under `data` and linked under their splits; with `data` false under the splits alone."""
    rng = np.random.default_rng(0)
    reactions = [("C2H2", "rxn0001", "train", 7), ("C2H2", "rxn0002", "train", 4), ("CH2O", "rxn0003", "val", 5)]
    with h5py.File(path, "w") as file:
        for formula, reaction, split, M in reactions:
            group = file.create_group(f"{'data' if data else split}/{formula}/{reaction}")
            write_images(group, formula, M, rng)
            for end in ("reactant", "product", "transition_state"):
                write_images(group.create_group(end), formula, 1, rng)
                group[end]["hash"] = "ab12"
            if data:
                file[f"{split}/{formula}/{reaction}"] = h5py.SoftLink(group.name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "Transition1x.h5")
    return tmp_path / "Transition1x.h5"


def read(path: Path) -> StructureTable:
    source = Transition1x()
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


def test_every_reaction_once_with_its_ends(path: Path) -> None:
    table = read(path)
    expected = []
    for formula, reaction, M in (("C2H2", "rxn0001", 7), ("C2H2", "rxn0002", 4), ("CH2O", "rxn0003", 5)):
        name = f"{formula}-{reaction}"
        expected += [f"{name}-reactant-000000", f"{name}-product-000000", *(f"{name}-{i:06d}" for i in range(M))]
    assert table.keys.tolist() == expected
    assert table.groups.tolist() == ["C2H2"] * 15 + ["CH2O"] * 7
    assert set(table.charge.tolist()) == {0} and set(table.multiplicity.tolist()) == {1}
    with h5py.File(path) as file:
        reaction = file["data/C2H2/rxn0001"]
        pieces = [reaction["reactant"], reaction["product"], reaction]
        energy = np.concatenate([piece["wB97x_6-31G(d).energy"] for piece in pieces])
        forces = np.concatenate([piece["wB97x_6-31G(d).forces"] for piece in pieces]).reshape(-1, 3)
        positions = np.concatenate([piece["positions"] for piece in pieces]).reshape(-1, 3)
    np.testing.assert_array_equal(table.numbers[:36], NUMBERS["C2H2"] * 9)
    np.testing.assert_allclose(table.labels[f"energy.{LEVEL}"][:9], energy, rtol=1e-12)
    np.testing.assert_allclose(table.labels[f"forces.{LEVEL}"][:36], forces, rtol=1e-6)
    np.testing.assert_allclose(table.positions[:36], positions, rtol=1e-6)


def test_a_file_of_splits_alone_gives_the_same_structures(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "splits.h5", data=False)
    whole, splits = read(path), read(tmp_path / "splits.h5")
    assert splits.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(splits.positions, whole.positions)


@pytest.mark.parametrize("size", [1, 6, 9, 100])
def test_parts_and_tables_of_any_size_cover_the_file_once(
    path: Path, size: int, read_in_pieces: Callable[..., tuple[int, StructureTable]]
) -> None:
    whole = read(path)
    num_parts, again = read_in_pieces(Transition1x(), path, size)
    assert num_parts == {1: 3, 6: 3, 9: 2, 100: 1}[size]
    assert again.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(again.labels[f"forces.{LEVEL}"], whole.labels[f"forces.{LEVEL}"])


def test_images_without_a_label_are_left_out(path: Path) -> None:
    with h5py.File(path, "a") as file:
        group = file["data/CH2O/rxn0003"]
        group["wB97x_6-31G(d).energy"][1:3] = np.nan
        group["wB97x_6-31G(d).forces"][2] = np.nan
    table = read(path)
    assert len(table) == 21 and "CH2O-rxn0003-000002" not in table.keys.tolist()
    assert int((~table.has("energy", LEVEL)).sum()) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("product", None, "CH2O/rxn0003: expected a group 'product', found atomic_numbers"),
        ("positions", None, "rxn0003: expected a dataset 'positions', found .*wB97x_6-31G"),
        ("positions", np.zeros((5, 3, 3)), r"rxn0003: positions: expected floats of shape \(any, 4, 3\), found"),
        ("wB97x_6-31G(d).energy", np.zeros(4), r"energy: expected floats of shape \(5\), found float64 \(4,\)"),
        ("wB97x_6-31G(d).forces", np.zeros((5, 4, 3), int), "forces: expected floats .* found int64"),
        ("atomic_numbers", np.array([6, 8, 1, -1]), "rxn0003: numbers: expected 0..255, found -1..8"),
    ],
)
def test_another_layout_is_named(path: Path, name: str, value: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        del file["data/CH2O/rxn0003"][name]
        if value is not None:
            file["data/CH2O/rxn0003"][name] = value
    with pytest.raises(ValueError, match=message):
        read(path)


def test_missing_empty_and_truncated_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.h5: no such file; source 'transition1x'"):
        Transition1x().parts([tmp_path / "absent.h5"])
    for content in (b"", path.read_bytes()[:4000]):
        (tmp_path / "damaged.h5").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.h5: not a readable HDF5 file"):
            read(tmp_path / "damaged.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("C2H2")
    with pytest.raises(ValueError, match=r"other.h5: /: expected a group 'data' or .*'train'.*, found C2H2"):
        Transition1x().parts([tmp_path / "other.h5"])


def test_a_dataset_is_built(path: Path, builds: Callable[..., None]) -> None:
    builds(Transition1x(), path)
