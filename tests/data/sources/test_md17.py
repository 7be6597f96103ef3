"""MD17, rMD17 and MD22: npz files in the published layouts come out in eV; other layouts are refused by name."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import units

from rung.data.sources import source as limits
from rung.data.sources.md17 import MD17, MD22, RevisedMD17, Trajectories, molecule_of
from rung.data.table import StructureTable, faults

FRAMES = 23
ETHANOL = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1], np.uint8)
KCAL = units.kcal / units.mol


def sgdml(path: Path, compressed: bool = True, **changes: object) -> dict[str, np.ndarray]:
    """Write the keys of an sGDML file, texts among them; a change to None leaves a key out."""
    rng = np.random.default_rng(0)
    shape = (FRAMES, len(ETHANOL), 3)
    arrays = {
        "E": rng.normal(-97_000, 5, (FRAMES, 1)),
        "F": rng.normal(scale=20, size=shape),
        "R": rng.normal(size=shape),
        "z": ETHANOL,
        "name": np.array("ethanol"),
        "theory": np.array(b"unknown"),
        "type": np.array("d"),
        "md5": np.array("6b7c"),
        **changes,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return arrays


def revised(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (FRAMES, len(ETHANOL), 3)
    arrays = {
        "nuclear_charges": ETHANOL,
        "coords": rng.normal(size=shape),
        "energies": rng.normal(-97_000, 5, FRAMES),
        "forces": rng.normal(scale=20, size=shape),
        "old_indices": np.arange(FRAMES),
        "old_energies": rng.normal(-97_100, 5, FRAMES),
        "old_forces": rng.normal(scale=20, size=shape),
    }
    np.savez(path, **arrays)
    return arrays


def read_all(source: Trajectories, *paths: Path) -> StructureTable:
    return StructureTable.concatenate([t for part in source.parts(paths) for t in source.read(part)])


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("source", "name", "level"),
    [
        (MD17(), "md17_ethanol", "pbe_ts"),
        (MD17(("ccsdt_ccpvtz",)), "ethanol_ccsd_t-train", "ccsdt_ccpvtz"),
        (MD22(), "md22_ethanol", "pbe_mbd"),
    ],
)
def test_sgdml_files(tmp_path: Path, source: Trajectories, name: str, level: str, compressed: bool) -> None:
    raw = sgdml(path := tmp_path / f"{name}.npz", compressed)
    table = read_all(source, path)
    assert faults(table) == {}
    assert table.keys.tolist() == [f"{name}-{index:06d}" for index in range(FRAMES)]
    assert set(table.groups.tolist()) == {"ethanol"}
    np.testing.assert_array_equal(table.numbers, np.tile(ETHANOL, FRAMES))
    np.testing.assert_array_equal(table.positions, raw["R"].astype(np.float32).reshape(-1, 3))
    np.testing.assert_allclose(table.labels[f"energy.{level}"], raw["E"][:, 0] * KCAL, rtol=1e-6)
    np.testing.assert_allclose(table.labels[f"forces.{level}"], (raw["F"] * KCAL).reshape(-1, 3), rtol=1e-6)
    assert list(source.fidelities) == table.fidelities == [level]
    assert not table.pbc.any() and not table.charge.any() and (table.multiplicity == 1).all()


def test_revised_files_hold_two_levels(tmp_path: Path) -> None:
    raw = revised(path := tmp_path / "rmd17_ethanol.npz")
    assert read_all(RevisedMD17(), path).fidelities == ["pbe_def2svp"]
    table = read_all(RevisedMD17(("pbe_def2svp", "pbe_ts")), path)
    for prefix, level in (("", "pbe_def2svp"), ("old_", "pbe_ts")):
        np.testing.assert_allclose(table.labels[f"energy.{level}"], raw[f"{prefix}energies"] * KCAL, rtol=1e-6)
        forces = (raw[f"{prefix}forces"] * KCAL).reshape(-1, 3)
        np.testing.assert_allclose(table.labels[f"forces.{level}"], forces, rtol=1e-6)
    assert table.groups.tolist() == ["ethanol"] * FRAMES and faults(table) == {}


@pytest.mark.parametrize("per_part", [1, 5, FRAMES, 100])
@pytest.mark.parametrize("compressed", [True, False])
def test_parts_partition_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, compressed: bool
) -> None:
    sgdml(path := tmp_path / "md17_ethanol.npz", compressed)
    whole = read_all(MD17(), path)
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 4)
    parts = MD17().parts([path])
    assert len(parts) == (1 if compressed else -(-FRAMES // per_part))
    assert all(len(table) <= 4 for part in parts for table in MD17().read(part))
    pieces = read_all(MD17(), path)
    assert pieces.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(pieces.positions, whole.positions)
    for name, array in whole.labels.items():
        np.testing.assert_array_equal(pieces.labels[name], array)


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("md17_uracil", "md17_aspirin"):
        sgdml(tmp_path / f"{name}.npz")
    table = read_all(MD17(), tmp_path)
    assert table.groups.tolist() == ["aspirin"] * FRAMES + ["uracil"] * FRAMES
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected npz files in this folder, found none"):
        MD17().parts([tmp_path / "empty"])


def test_missing_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    energies, forces = rng.normal(size=(FRAMES, 1)), rng.normal(size=(FRAMES, 9, 3))
    energies[[2, 5]] = np.nan
    forces[[2, 7]] = np.nan
    sgdml(path := tmp_path / "md17_ethanol.npz", E=energies, F=forces)
    table = read_all(MD17(), path)
    assert "md17_ethanol-000002" not in table.keys.tolist() and len(table) == FRAMES - 1
    assert np.flatnonzero(~table.has("energy", "pbe_ts")).tolist() == [4]  # frame 5, after 2 was left out
    assert np.flatnonzero(~table.has("forces", "pbe_ts")).tolist() == [6]


@pytest.mark.parametrize(
    ("name", "molecule"),
    [
        ("md17_benzene2017", "benzene"),
        ("benzene2018_dft", "benzene"),
        ("md17_benzene_old", "benzene"),
        ("aspirin_ccsd-test", "aspirin"),
        ("rmd17_salicylic", "salicylic"),
        ("md22_Ac-Ala3-NHMe", "Ac-Ala3-NHMe"),
    ],
)
def test_one_molecule_is_one_group_in_all_sets(name: str, molecule: str) -> None:
    assert molecule_of(Path(f"{name}.npz")) == molecule


def test_levels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown fidelity 'pbe_tz'; known: pbe_ts, .*did you mean 'pbe_ts'"):
        MD17(("pbe_tz",))
    sgdml(path := tmp_path / "aspirin_ccsd-train.npz")
    with pytest.raises(ValueError, match="aspirin_ccsd-train.npz: expected labels at pbe_ts, found ccsd_ccpvdz; leave"):
        MD17().parts([path])
    sgdml(path := tmp_path / "toluene_ccsd_t-train.npz")
    assert read_all(MD17(("ccsdt_ccpvdz",)), path).fidelities == ["ccsdt_ccpvdz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"F": None}, "expected an array 'F', found E, R, md5, name, theory, type, z"),
        ({"z": None}, "expected an array 'z', found E, F, R"),
        ({"R": np.zeros((FRAMES, 8, 3))}, r"R: expected floating point (any, 9, 3), found float64 (23, 8, 3)"),
        ({"R": np.zeros((0, 9, 3))}, r"R: expected floating point (any, 9, 3), found float64 (0, 9, 3)"),
        ({"F": np.zeros((FRAMES, 9, 3), int)}, r"F: expected floating point (23, 9, 3), found int64 (23, 9, 3)"),
        ({"E": np.zeros(4)}, r"E: expected floating point (23,) or (23, 1), found float64 (4,)"),
        ({"z": ETHANOL * 1.0}, r"z: expected whole numbers (any,), found float64 (9,)"),
        ({"e_unit": np.array("eV")}, "e_unit: expected 'kcal/mol', found 'eV'"),
        ({"r_unit": np.array(b"bohr")}, "r_unit: expected 'Ang', found 'bohr'"),
        ({"r_unit": np.array({"a": 1})}, "'r_unit' cannot be read: Object arrays cannot be loaded"),
        ({"F": np.zeros((3, 9, FRAMES)).T}, "F.npy: not a readable array (stored column by column"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    sgdml(path := tmp_path / "md17_ethanol.npz", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        MD17().parts([path])


def test_units_as_expected_are_accepted(tmp_path: Path) -> None:
    sgdml(path := tmp_path / "md22_DHA.npz", e_unit=np.array("kcal/mol"), r_unit=np.array(b"Ang"))
    assert len(read_all(MD22(), path)) == FRAMES


def test_what_is_no_element_is_refused(tmp_path: Path) -> None:
    sgdml(path := tmp_path / "md17_ethanol.npz", z=ETHANOL.astype(np.int64) + 250)
    with pytest.raises(ValueError, match=r"z: expected atomic numbers 1\.\.118, found 251\.\.258"):
        read_all(MD17(), path)


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_files_are_named(tmp_path: Path, compressed: bool) -> None:
    sgdml(path := tmp_path / "md17_ethanol.npz", compressed)
    good = path.read_bytes()
    for damaged in (b"", b"not an npz", good[: len(good) // 2], good[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="md17_ethanol.npz: not a readable npz .*damaged or truncated"):
            MD17().parts([path])


def test_damaged_data_are_named(tmp_path: Path) -> None:
    sgdml(path := tmp_path / "md17_ethanol.npz")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("F.npy")
    data = bytearray(path.read_bytes())
    middle = info.header_offset + 60 + info.compress_size // 2
    data[middle : middle + 40] = bytes(40)
    parts = MD17().parts([path])
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="md17_ethanol.npz: not a readable npz"):
        list(MD17().read(parts[0]))


def test_an_array_shorter_than_its_header_says_is_named(tmp_path: Path) -> None:
    path = tmp_path / "md17_ethanol.npz"
    raw = sgdml(tmp_path / "good.npz")
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in raw.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array)
                if name == "R":
                    stream.write(b"more")
    with pytest.raises(ValueError, match=r"R.npy: expected float64 \(23, 9, 3\), found \d+ bytes of data"):
        list(MD17().read(MD17().parts([path])[0]))


def test_other_archives_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "aspirin_ccsd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("aspirin_ccsd-train.npz", b"")
    with pytest.raises(ValueError, match="aspirin_ccsd.zip: expected arrays .*'aspirin_ccsd-train.npz'; unpack"):
        MD17().parts([path])
    with pytest.raises(FileNotFoundError, match="gone.npz: no such file; source 'md17' reads md17_aspirin.npz"):
        MD17().parts([tmp_path / "gone.npz"])
    with pytest.raises(ValueError, match="source 'md17': expected files .* found none"):
        MD17().parts([])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    revised(tmp_path / "rmd17_ethanol.npz")
    builds(RevisedMD17(("pbe_def2svp", "pbe_ts")), tmp_path / "rmd17_ethanol.npz")


def test_parts_of_large_molecules_hold_fewer_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sgdml(path := tmp_path / "md22_ethanol.npz", compressed=False)
    monkeypatch.setattr(limits, "PART_ATOMS", 5 * len(ETHANOL))
    assert [(part.start, part.stop) for part in MD22().parts([path])] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
