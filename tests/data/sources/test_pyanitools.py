"""ANI-1 and COMP6: nested groups of one molecule each, symbols as bytes, conformers of high energy apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import units
from ase.data import atomic_numbers

from rung.data.sources import source as limits
from rung.data.sources.pyanitools import PyAniTools
from rung.data.table import StructureTable, faults

MOLECULES = {"[H]C([H])([H])[H]": "CHHHH", "[H]O[H]": "OHH", "[H]N([H])[H]": "NHHH"}
COUNTS = (6, 3, 2)
FLOATS = {"coordinates": np.float32, "energies": np.float64}


def write_ani1(path: Path) -> list[dict[str, np.ndarray]]:
    """Write as ANI-1 is: compressed, texts as lists of characters; the last molecule has no high-energy conformers."""
    rng = np.random.default_rng(0)
    raw = []
    with h5py.File(path, "w") as file:
        for index, ((smiles, symbols), M) in enumerate(zip(MOLECULES.items(), COUNTS, strict=True)):
            n = len(symbols)
            arrays = {
                "coordinates": rng.normal(size=(M, n, 3)).astype(np.float32),
                "coordinatesHE": rng.normal(size=(2, n, 3)).astype(np.float32),
                "energies": rng.normal(-40, 1, M),
                "energiesHE": rng.normal(-39, 1, 2),
                "species": np.array([symbol.encode() for symbol in symbols]),
                "smiles": np.array([character.encode() for character in smiles]),
            }
            if index == 2:
                arrays |= {"coordinatesHE": np.zeros(0), "energiesHE": np.zeros(0)}
            group = file.create_group(f"gdb11_s01/gdb11_s01-{index}")
            for key, array in arrays.items():
                group.create_dataset(key, data=array, compression="gzip" if array.size else None)
            raw.append(arrays)
    return raw


def write_comp6(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {
        "coordinates": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "energies": rng.normal(-76, 1, 4),
        "forces": rng.normal(scale=0.1, size=(4, 3, 3)).astype(np.float32),
        "species": np.array([b"O", b"H", b"H"]),
    }
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[f"s66x8/01_water/{key}"] = array
    return arrays


def read_all(source: PyAniTools, *paths: Path) -> list[StructureTable]:
    return [table for part in source.parts(paths) for table in source.read(part)]


def test_ani1(tmp_path: Path) -> None:
    raw = write_ani1(path := tmp_path / "ani_gdb_s01.h5")
    source = PyAniTools()
    [table] = read_all(source, path)
    assert list(source.fidelities) == table.fidelities == ["wb97x_631gd"]
    assert not faults(table)
    structures = iter(table)
    for index, ((smiles, symbols), arrays) in enumerate(zip(MOLECULES.items(), raw, strict=True)):
        for i, energy in enumerate(arrays["energies"]):
            structure = next(structures)
            assert structure.key == f"ani_gdb_s01-gdb11_s01/gdb11_s01-{index}-{i:06d}"
            assert structure.group == smiles
            assert structure.numbers.tolist() == [atomic_numbers[symbol] for symbol in symbols]
            assert (structure.charge, structure.multiplicity) == (0, 1)
            np.testing.assert_array_equal(structure.positions, arrays["coordinates"][i])
            labels = structure.labels["wb97x_631gd"]
            np.testing.assert_allclose(labels.energy, energy * units.Hartree, rtol=1e-6)
            assert labels.forces is None
    assert next(structures, None) is None


def test_conformers_of_high_energy_are_an_option(tmp_path: Path) -> None:
    raw = write_ani1(path := tmp_path / "ani_gdb_s01.h5")
    [table] = read_all(PyAniTools(high_energy=True), path)
    assert len(table) == sum(COUNTS) + 4
    index = table.keys.tolist().index("ani_gdb_s01-gdb11_s01/gdb11_s01-1-he-000001")
    structure = table[index]
    assert structure.group == "[H]O[H]"
    np.testing.assert_array_equal(structure.positions, raw[1]["coordinatesHE"][1])
    expected = raw[1]["energiesHE"][1] * units.Hartree
    np.testing.assert_allclose(structure.labels["wb97x_631gd"].energy, expected, rtol=1e-6)
    write_comp6(comp6 := tmp_path / "s66x8_wb97x6-31gd.h5")
    with pytest.raises(ValueError, match="s66x8/01_water: high_energy: expected a dataset 'coordinatesHE', found coor"):
        PyAniTools(high_energy=True).parts([comp6])


def test_comp6_has_forces(tmp_path: Path) -> None:
    raw = write_comp6(path := tmp_path / "s66x8_wb97x6-31gd.h5")
    [table] = read_all(PyAniTools(), path)
    assert table.keys[3] == "s66x8_wb97x6-31gd-s66x8/01_water-000003"
    assert table.groups.tolist() == ["s66x8/01_water"] * 4
    forces = np.stack([structure.labels["wb97x_631gd"].forces for structure in table])
    np.testing.assert_allclose(forces, raw["forces"] * units.Hartree, rtol=1e-6)


@pytest.mark.parametrize("high_energy", [False, True])
@pytest.mark.parametrize(("per_part", "per_table"), [(1, 1), (7, 2), (100, 4)])
def test_parts_hold_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, per_table: int, high_energy: bool
) -> None:
    write_ani1(path := tmp_path / "ani_gdb_s01.h5")
    source = PyAniTools(high_energy)
    [whole] = read_all(source, path)
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", per_table)
    parts = source.parts([path])
    assert len(parts) == {1: 3, 7: 2, 100: 1}[per_part]
    tables = [table for part in parts for table in source.read(part)]
    assert max(map(len, tables)) <= per_table
    assert [key for table in tables for key in table.keys.tolist()] == whole.keys.tolist()
    np.testing.assert_array_equal(np.concatenate([table.positions for table in tables]), whole.positions)


def test_the_order_of_files_is_kept(tmp_path: Path) -> None:
    write_comp6(first := tmp_path / "b.h5")
    write_comp6(second := tmp_path / "a.h5")
    tables = read_all(PyAniTools(), first, second)
    assert [table.keys[0] for table in tables] == ["b-s66x8/01_water-000000", "a-s66x8/01_water-000000"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "coordinates",
            None,
            "expected a dataset 'coordinates', found coordinatesHE, energies, energiesHE, smiles, sp",
        ),
        ("species", None, "expected a dataset 'species', found coordinates, coordinatesHE, energies"),
        ("species", np.array([b"O", b"H"]), r"coordinates: expected floats of shape \(any, 2, 3\), found float32"),
        ("species", np.array([b"O", b"H", b"X"]), "species: expected symbols of elements, found 'X'"),
        ("species", np.array([8, 1, 1]), r"species: expected texts of shape \(any\), found int64 \(3,\)"),
        ("energies", np.zeros(2), r"energies: expected floats of shape \(3\), found float64 \(2,\)"),
        ("forces", np.zeros((3, 3)), r"forces: expected floats of shape \(3, 3, 3\), found float64 \(3, 3\)"),
    ],
)
@pytest.mark.parametrize("molecule", [0, 1])
def test_another_layout_is_refused(
    tmp_path: Path, key: str, value: np.ndarray | None, message: str, molecule: int
) -> None:
    write_ani1(path := tmp_path / "ani_gdb_s01.h5")
    with h5py.File(path, "r+") as file:
        if molecule == 0:
            file.move("gdb11_s01/gdb11_s01-1", "gdb11_s01/gdb11_s01- first")
        group = file["gdb11_s01"]["gdb11_s01-1" if molecule else "gdb11_s01- first"]
        if key in group:
            del group[key]
        if value is not None:
            group[key] = value
    with pytest.raises(ValueError, match=f"ani_gdb_s01.h5: /gdb11_s01/gdb11_s01-[ 1a-z]+: {message}"):
        read_all(PyAniTools(), path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ani_gdb_s01.h5: no such file; source 'pyanitools' reads ani_gdb_s01"):
        PyAniTools().parts([path := tmp_path / "ani_gdb_s01.h5"])
    write_ani1(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="ani_gdb_s01.h5: not a readable HDF5 file"):
        PyAniTools().parts([path])
    with h5py.File(path, "w") as file:
        file.create_group("gdb11_s01/gdb11_s01-0")
    with pytest.raises(ValueError, match="gdb11_s01-0: expected a dataset .coordinates., found nothing"):
        PyAniTools().parts([path])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write_ani1(ani1 := tmp_path / "ani_gdb_s01.h5")
    write_comp6(comp6 := tmp_path / "s66x8_wb97x6-31gd.h5")
    builds(PyAniTools(), ani1, comp6)
