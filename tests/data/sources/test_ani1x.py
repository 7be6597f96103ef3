"""ANI-1x: a file in the published layout comes out in eV and angstrom; other layouts are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import units

from rung.data.sources import source as limits
from rung.data.sources.ani1x import LEVELS, Ani1x
from rung.data.sources.source import Part
from rung.data.table import StructureTable, faults

FORMULAS = {"C1H4": [6, 1, 1, 1, 1], "H2O1": [8, 1, 1], "H3N1": [7, 1, 1, 1]}
COUNTS = {"C1H4": 7, "H2O1": 4, "H3N1": 1}
ENERGIES = [
    *("wb97x_dz.energy", "wb97x_tz.energy", "ccsd(t)_cbs.energy", "hf_dz.energy", "hf_tz.energy", "hf_qz.energy"),
    *("mp2_dz.corr_energy", "mp2_tz.corr_energy", "mp2_qz.corr_energy", "npno_ccsd(t)_dz.corr_energy"),
    *("npno_ccsd(t)_tz.corr_energy", "tpno_ccsd(t)_dz.corr_energy"),
]


def write(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Write groups by formula with dtypes and keys as published; methane 0 has DFT only, methane 1 nothing at all."""
    rng = np.random.default_rng(0)
    raw = {}
    for formula, numbers in FORMULAS.items():
        M, n = COUNTS[formula], len(numbers)
        arrays = {"atomic_numbers": np.array(numbers, np.uint8)}
        arrays["coordinates"] = rng.normal(size=(M, n, 3)).astype(np.float32)
        for key in ENERGIES:
            arrays[key] = rng.normal(-40, 1, M)
        for level in ("wb97x_dz", "wb97x_tz"):
            arrays[f"{level}.forces"] = rng.normal(scale=0.1, size=(M, n, 3)).astype(np.float32)
            arrays[f"{level}.dipole"] = rng.normal(size=(M, 3)).astype(np.float32)
        arrays["wb97x_dz.cm5_charges"] = rng.normal(size=(M, n)).astype(np.float32)
        raw[formula] = arrays
    for key, array in raw["C1H4"].items():
        if "." in key:
            array[0 if not key.startswith("wb97x_dz") else 1] = np.nan
            array[1] = np.nan
    with h5py.File(path, "w") as file:
        for formula, arrays in raw.items():
            for key, array in arrays.items():
                file[f"{formula}/{key}"] = array
    return raw


def read_all(source: Ani1x, path: Path) -> list[StructureTable]:
    return [table for part in source.parts([path]) for table in source.read(part)]


def test_structures_and_units(tmp_path: Path) -> None:
    raw = write(path := tmp_path / "ani1x-release.h5")
    source = Ani1x()
    [table] = read_all(source, path)
    keys = [f"C1H4-{i:06d}" for i in (0, 2, 3, 4, 5, 6)] + [f"H2O1-{i:06d}" for i in range(4)] + ["H3N1-000000"]
    assert table.keys.tolist() == keys
    assert table.groups.tolist() == [key.partition("-")[0] for key in keys]
    assert not faults(table)
    assert not table.charge.any() and (table.multiplicity == 1).all()
    water = table[7]
    data = raw["H2O1"]
    assert water.numbers.tolist() == [8, 1, 1]
    np.testing.assert_array_equal(water.positions, data["coordinates"][1])
    assert set(water.labels) == set(source.fidelities) == {"wb97x_631gd", "wb97x_def2tzvpp", "ccsdt_cbs"}
    for name, key in {"wb97x_631gd": "wb97x_dz", "wb97x_def2tzvpp": "wb97x_tz"}.items():
        labels = water.labels[name]
        np.testing.assert_allclose(labels.energy, data[f"{key}.energy"][1] * units.Hartree, rtol=1e-6)
        np.testing.assert_allclose(labels.forces, data[f"{key}.forces"][1] * units.Hartree, rtol=1e-6)
        np.testing.assert_array_equal(labels.dipole, data[f"{key}.dipole"][1])
    np.testing.assert_allclose(
        water.labels["ccsdt_cbs"].energy, data["ccsd(t)_cbs.energy"][1] * units.Hartree, rtol=1e-6
    )


def test_what_was_not_computed_is_missing(tmp_path: Path) -> None:
    write(path := tmp_path / "ani1x-release.h5")
    [table] = read_all(Ani1x(), path)
    assert list(table[0].labels) == ["wb97x_631gd"]
    [table] = read_all(Ani1x(levels=("ccsdt_cbs",)), path)
    assert table.keys.tolist()[0] == "C1H4-000002"
    assert table.fidelities == ["ccsdt_cbs"]
    assert not table.has("forces", "ccsdt_cbs").any()


def test_correlation_energies_are_added_to_hartree_fock(tmp_path: Path) -> None:
    data = write(path := tmp_path / "ani1x-release.h5")["H2O1"]
    correlation = {
        "mp2_ccpvtz": ("hf_tz.energy", "mp2_tz.corr_energy"),
        "npno_ccsdt_ccpvdz": ("hf_dz.energy", "npno_ccsd(t)_dz.corr_energy"),
        "tpno_ccsdt_ccpvdz": ("hf_dz.energy", "tpno_ccsd(t)_dz.corr_energy"),
    }
    [table] = read_all(Ani1x(levels=tuple(LEVELS)), path)
    water = table[6]
    assert water.key == "H2O1-000000" and set(water.labels) == set(LEVELS)
    for name, (hartree_fock, correlated) in correlation.items():
        expected = (data[hartree_fock][0] + data[correlated][0]) * units.Hartree
        np.testing.assert_allclose(water.labels[name].energy, expected, rtol=1e-6)


@pytest.mark.parametrize(("per_part", "per_table"), [(1, 1), (5, 2), (8, 100), (100, 3)])
def test_parts_hold_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, per_table: int
) -> None:
    write(path := tmp_path / "ani1x-release.h5")
    [whole] = read_all(Ani1x(), path)
    [again] = Ani1x().read(Part(path))  # to the end
    assert again.keys.tolist() == whole.keys.tolist()
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", per_table)
    parts = Ani1x().parts([path])
    assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]] and parts[-1].stop == 3
    assert len(parts) == {1: 3, 5: 3, 8: 2, 100: 1}[per_part]
    assert sum(part.bytes for part in parts) == pytest.approx(path.stat().st_size, abs=len(parts))
    tables = [table for part in parts for table in Ani1x().read(part)]
    assert max(map(len, tables)) <= per_table
    assert [key for table in tables for key in table.keys.tolist()] == whole.keys.tolist()
    np.testing.assert_array_equal(np.concatenate([table.positions for table in tables]), whole.positions)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown fidelity 'wb97x_631g'.*did you mean 'wb97x_631gd'"):
        Ani1x(levels=("wb97x_631g",))
    with pytest.raises(ValueError, match="ani1x: levels: expected at least one"):
        Ani1x(levels=())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.h5: no such file; source 'ani1x' reads ani1x-release.h5"):
        Ani1x().parts([tmp_path / "absent.h5"])
    with pytest.raises(ValueError, match="source 'ani1x': expected files"):
        Ani1x().parts([])
    write(path := tmp_path / "ani1x-release.h5")
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="ani1x-release.h5: not a readable HDF5 file .*truncated, fetch it again"):
            Ani1x().parts([path])
    h5py.File(path, "w").close()
    with pytest.raises(ValueError, match="ani1x-release.h5: /: expected groups of molecules, found an empty group"):
        Ani1x().parts([path])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("coordinates", None, "/H2O1: expected a dataset 'coordinates', found atomic_numbers, ccsd"),
        ("coordinates", np.zeros((4, 9), np.float32), r"coordinates: expected floats of shape \(any, any, 3\), found"),
        ("atomic_numbers", None, "expected a dataset 'atomic_numbers', found ccsd"),
        ("atomic_numbers", np.array([8.0, 1, 1]), r"expected integers of shape \(any\), found float64 \(3,\)"),
        ("atomic_numbers", np.array([8, 1]), r"coordinates: expected floats of shape \(any, 2, 3\), found float32"),
        ("atomic_numbers", np.array([8, 1, 999]), "/H2O1: numbers: expected 0..255, found 1..999"),
        ("wb97x_dz.energy", None, "expected a dataset 'wb97x_dz.energy', found"),
        ("wb97x_dz.energy", np.zeros(3), r"wb97x_dz.energy: expected floats of shape \(4\), found float64 \(3,\)"),
        ("wb97x_dz.forces", np.zeros((4, 3), np.float32), r"wb97x_dz.forces: expected floats of shape \(4, 3, 3\)"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, key: str, value: np.ndarray | None, message: str) -> None:
    write(path := tmp_path / "ani1x-release.h5")
    with h5py.File(path, "r+") as file:
        del file[f"H2O1/{key}"]
        if value is not None:
            file[f"H2O1/{key}"] = value
    with pytest.raises(ValueError, match=f"ani1x-release.h5: .*{message}"):
        read_all(Ani1x(), path)


def test_a_dataset_in_place_of_a_group_is_refused(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "other.h5", "w") as file:
        file["C1H4"] = np.zeros(3)
    with pytest.raises(ValueError, match="other.h5: /: expected a group 'C1H4', found a dataset"):
        Ani1x().parts([path])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write(path := tmp_path / "ani1x-release.h5")
    builds(Ani1x(levels=tuple(LEVELS)), path)
