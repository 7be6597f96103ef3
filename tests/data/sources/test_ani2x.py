"""ANI-2x: groups by number of atoms with many molecules each; the name of a file says its level of theory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms, units

from rung.data.sources import source as limits
from rung.data.sources.ani2x import LEVELS, Ani2x
from rung.data.sources.source import Part
from rung.data.table import StructureTable, faults

COUNTS = {2: 3, 3: 6, 12: 5}


def write(path: Path, forces: bool = True) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    raw = {}
    for n, M in COUNTS.items():
        arrays = {
            "species": rng.choice([1, 6, 7, 8, 9, 16, 17], (M, n)),
            "coordinates": rng.normal(size=(M, n, 3)).astype(np.float32),
            "energies": rng.normal(-400, 1, M),
        }
        if forces:
            arrays["forces"] = rng.normal(scale=0.1, size=(M, n, 3))
        raw[f"{n:03d}"] = arrays
    with h5py.File(path, "w") as file:
        for group, arrays in raw.items():
            for key, array in arrays.items():
                file[f"{group}/{key}"] = array
    return raw


def read_all(source: Ani2x, path: Path) -> list[StructureTable]:
    return [table for part in source.parts([path]) for table in source.read(part)]


def test_structures_and_units(tmp_path: Path) -> None:
    raw = write(path := tmp_path / "ANI-2x-wB97X-631Gd.h5")
    source = Ani2x()
    [table] = read_all(source, path)
    assert list(source.fidelities) == table.fidelities == ["wb97x_631gd"]
    assert table.keys.tolist() == [
        f"ANI-2x-wB97X-631Gd-{group}-{i:06d}" for group, arrays in raw.items() for i in range(len(arrays["energies"]))
    ]
    assert not faults(table)
    structures = iter(table)
    for arrays in raw.values():
        for i, numbers in enumerate(arrays["species"]):
            structure = next(structures)
            assert structure.numbers.tolist() == numbers.tolist()
            assert structure.group == Atoms(numbers).get_chemical_formula(mode="hill")
            assert (structure.charge, structure.multiplicity) == (0, 1)
            np.testing.assert_array_equal(structure.positions, arrays["coordinates"][i])
            labels = structure.labels["wb97x_631gd"]
            np.testing.assert_allclose(labels.energy, arrays["energies"][i] * units.Hartree, rtol=1e-6)
            np.testing.assert_allclose(labels.forces, arrays["forces"][i] * units.Hartree, rtol=1e-6)


def test_levels_by_file(tmp_path: Path) -> None:
    write(path := tmp_path / "ANI-2x-wB97MV-def2TZVPP.h5", forces=False)
    [table] = read_all(Ani2x(levels=tuple(LEVELS)), path)
    assert list(table.labels) == ["energy.wb97mv_def2tzvpp"]
    with pytest.raises(ValueError, match=r"def2TZVPP.h5: expected a level of \('wb97x_631gd',\), found 'wb97mv_def2tz"):
        Ani2x().parts([path])
    with pytest.raises(ValueError, match="mine.h5: the name says the level of theory: expected one of ANI-2x-wB97X-6"):
        Ani2x().parts([path.rename(tmp_path / "mine.h5")])
    with pytest.raises(ValueError, match="unknown fidelity 'wb97x'; known: wb97x_631gd, "):
        Ani2x(levels=("wb97x",))
    with pytest.raises(ValueError, match="ani2x: levels: expected at least one"):
        Ani2x(levels=())


def test_structures_without_a_label_are_left_out(tmp_path: Path) -> None:
    write(path := tmp_path / "ANI-2x-wB97X-631Gd.h5")
    with h5py.File(path, "r+") as file:
        file["003/energies"][:2] = np.nan
        file["003/forces"][0] = np.nan
    [table] = read_all(Ani2x(), path)
    assert "ANI-2x-wB97X-631Gd-003-000000" not in table.keys.tolist()
    kept = table[table.keys.tolist().index("ANI-2x-wB97X-631Gd-003-000001")].labels["wb97x_631gd"]
    assert kept.energy is None and kept.forces is not None


@pytest.mark.parametrize(("per_part", "per_table"), [(1, 1), (4, 3), (5, 100), (100, 4)])
def test_parts_hold_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, per_table: int
) -> None:
    write(path := tmp_path / "ANI-2x-wB97X-631Gd.h5")
    [whole] = read_all(Ani2x(), path)
    [again] = Ani2x().read(Part(path))  # to the end
    assert again.keys.tolist() == whole.keys.tolist()
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", per_table)
    parts = Ani2x().parts([path])
    assert [part.start for part in parts] == list(range(0, 14, per_part))
    assert sum(part.bytes for part in parts) == pytest.approx(path.stat().st_size, abs=len(parts))
    tables = [table for part in parts for table in Ani2x().read(part)]
    assert max(map(len, tables)) <= per_table
    assert [key for table in tables for key in table.keys.tolist()] == whole.keys.tolist()
    np.testing.assert_array_equal(np.concatenate([table.positions for table in tables]), whole.positions)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("coordinates", None, "/003: expected a dataset 'coordinates', found energies, forces, species"),
        ("species", None, "/003: expected a dataset 'species', found coordinates, energies, forces"),
        ("species", np.ones((6, 2), int), r"/003: species: expected integers of shape \(6, 3\), found int64 \(6, 2\)"),
        ("species", np.zeros((6, 3), int), "/003: expected atomic numbers 1..118, found 0..0"),
        ("energies", np.zeros((6, 1)), r"/003: energies: expected floats of shape \(6\), found float64 \(6, 1\)"),
        ("energies", np.zeros(6, int), r"/003: energies: expected floats of shape \(6\), found int64 \(6,\)"),
        ("forces", None, "/003: expected a dataset 'forces', found coordinates, energies, species"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, key: str, value: np.ndarray | None, message: str) -> None:
    write(path := tmp_path / "ANI-2x-wB97X-631Gd.h5")
    with h5py.File(path, "r+") as file:
        del file[f"003/{key}"]
        if value is not None:
            file[f"003/{key}"] = value
    with pytest.raises(ValueError, match=f"631Gd.h5: {message}"):
        read_all(Ani2x(), path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="631Gd.h5: no such file; source 'ani2x' reads ANI-2x"):
        Ani2x().parts([path := tmp_path / "ANI-2x-wB97X-631Gd.h5"])
    write(path)
    [part] = Ani2x().parts([path])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="631Gd.h5: not a readable HDF5 file"):
        list(Ani2x().read(part))


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write(first := tmp_path / "ANI-2x-wB97X-631Gd.h5")
    write(second := tmp_path / "ANI-2x-wB97MV-def2TZVPP.h5", forces=False)
    builds(Ani2x(levels=("wb97x_631gd", "wb97mv_def2tzvpp")), first, second)
