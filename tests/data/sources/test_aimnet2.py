"""AIMNet2: groups by number of atoms, eV, charged molecules; the level of theory is an option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms

from rung.data.sources import source as limits
from rung.data.sources.aimnet2 import Aimnet2
from rung.data.table import StructureTable, faults

COUNTS = {2: 4, 28: 5, 29: 2}


def write(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Write every dataset of the published files, dipole and quadrupole included."""
    rng = np.random.default_rng(0)
    raw = {}
    for n, M in COUNTS.items():
        raw[f"{n:03d}"] = {
            "numbers": rng.choice([1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 33, 34, 35, 53], (M, n)).astype(np.uint8),
            "coord": rng.normal(size=(M, n, 3)).astype(np.float32),
            "charge": rng.integers(-2, 3, M).astype(np.float32),
            "energy": rng.normal(-1000, 1, M),
            "forces": rng.normal(size=(M, n, 3)).astype(np.float32),
            "charges": rng.normal(size=(M, n)).astype(np.float32),
            "dipole": rng.normal(size=(M, 3)).astype(np.float32),
            "quadrupole": rng.normal(size=(M, 6)).astype(np.float32),
        }
    with h5py.File(path, "w") as file:
        for group, arrays in raw.items():
            for key, array in arrays.items():
                file[f"{group}/{key}"] = array
    return raw


def read_all(source: Aimnet2, path: Path) -> list[StructureTable]:
    return [table for part in source.parts([path]) for table in source.read(part)]


def test_structures_and_charges(tmp_path: Path) -> None:
    raw = write(path := tmp_path / "aimnet2.h5")
    source = Aimnet2()
    [table] = read_all(source, path)
    assert list(source.fidelities) == table.fidelities == ["wb97m_def2tzvpp"]
    assert table.keys.tolist() == [f"aimnet2-{n:03d}-{i:06d}" for n, M in COUNTS.items() for i in range(M)]
    assert not faults(table)
    structures = iter(table)
    for arrays in raw.values():
        for i, numbers in enumerate(arrays["numbers"]):
            structure = next(structures)
            assert structure.numbers.tolist() == numbers.tolist()
            assert structure.group == Atoms(numbers).get_chemical_formula(mode="hill")
            assert (structure.charge, structure.multiplicity) == (arrays["charge"][i], 1)
            np.testing.assert_array_equal(structure.positions, arrays["coord"][i])
            labels = structure.labels["wb97m_def2tzvpp"]
            assert labels.energy == arrays["energy"][i]
            np.testing.assert_array_equal(labels.forces, arrays["forces"][i])


def test_multiplicity_where_a_file_has_it(tmp_path: Path) -> None:
    write(path := tmp_path / "aimnet2.h5")
    with h5py.File(path, "r+") as file:
        file["028/mult"] = np.array([1, 2, 3, 2, 1], np.int32)
    [table] = read_all(Aimnet2(level="b973c"), path)
    assert table.multiplicity.tolist() == [1, 1, 1, 1, 1, 2, 3, 2, 1, 1, 1]
    assert table.fidelities == ["b973c"]


def test_the_level_must_agree_with_the_name(tmp_path: Path) -> None:
    write(path := tmp_path / "dataset_B97-3c_v0.h5")
    assert Aimnet2(level="b973c").parts([path])
    with pytest.raises(ValueError, match="v0.h5: expected a file of level 'wb97m_def2tzvpp', found one of .*b973c"):
        Aimnet2().parts([path])
    with pytest.raises(ValueError, match="unknown fidelity 'b97_3c'; known: wb97m_def2tzvpp, b973c"):
        Aimnet2(level="b97_3c")


@pytest.mark.parametrize(("per_part", "per_table"), [(1, 1), (3, 2), (100, 4)])
def test_parts_hold_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, per_table: int
) -> None:
    write(path := tmp_path / "aimnet2.h5")
    [whole] = read_all(Aimnet2(), path)
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", per_table)
    parts = Aimnet2().parts([path])
    assert [part.start for part in parts] == list(range(0, 11, per_part))
    tables = [table for part in parts for table in Aimnet2().read(part)]
    assert max(map(len, tables)) <= per_table
    assert [key for table in tables for key in table.keys.tolist()] == whole.keys.tolist()
    np.testing.assert_array_equal(np.concatenate([table.positions for table in tables]), whole.positions)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("coord", None, "/028: expected a dataset 'coord', found charge, charges, dipole"),
        ("numbers", np.ones((5, 27), int), r"/028: numbers: expected integers of shape \(5, 28\), found int64"),
        ("charge", None, "/028: expected a dataset 'charge', found charges, coord"),
        ("charge", np.full(5, 0.5), "/028: charge: expected whole numbers, found float64"),
        ("energy", np.zeros(4), r"/028: energy: expected floats of shape \(5\), found float64 \(4,\)"),
        ("forces", None, "/028: expected a dataset 'forces', found charge, charges, coord"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, key: str, value: np.ndarray | None, message: str) -> None:
    write(path := tmp_path / "aimnet2.h5")
    with h5py.File(path, "r+") as file:
        del file[f"028/{key}"]
        if value is not None:
            file[f"028/{key}"] = value
    with pytest.raises(ValueError, match=f"aimnet2.h5: {message}"):
        read_all(Aimnet2(), path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="aimnet2.h5: no such file; source 'aimnet2' reads the .h5 file"):
        Aimnet2().parts([path := tmp_path / "aimnet2.h5"])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="aimnet2.h5: not a readable HDF5 file"):
        Aimnet2().parts([path])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write(path := tmp_path / "aimnet2.h5")
    builds(Aimnet2(), path)
