"""QM7-X: three levels, one small group per structure, the published list of duplicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rung.data.sources.qm7x import QM7X
from rung.data.table import StructureTable

ALL = ("pbe0_mbd", "pbe0", "dftb3_mbd")


def write_structure(group: h5py.Group, numbers: list[int], rng: np.random.Generator) -> None:
    n = len(numbers)
    group["atNUM"] = np.array(numbers)
    group["atXYZ"] = rng.normal(size=(n, 3))
    for key in ("ePBE0+MBD", "ePBE0", "eMBD", "eDFTB+MBD", "eAT", "DIP"):
        group[key] = rng.normal(-1000, 1, 1)
    for key in ("totFOR", "pbe0FOR", "vdwFOR"):
        group[key] = rng.normal(size=(n, 3))
    group["vDIP"] = rng.normal(size=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "1000.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for molecule, numbers in (("1", [6, 1, 1, 1, 1]), ("10", [7, 1, 1, 1]), ("2", [8, 1, 1])):
            for conformer in ("i1-c1", "i1-c2"):
                for kind in ("d1", "d2", "opt"):
                    name = f"Geom-m{molecule}-{conformer}-{kind}"
                    write_structure(file.create_group(f"{molecule}/{name}"), numbers, rng)
    return path


def read(path: Path, **options: Any) -> StructureTable:
    source = QM7X(**options)
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


def test_levels_in_ev_as_published(path: Path) -> None:
    table = read(path, levels=ALL)
    kinds = [f"{c}-{k}" for c in ("i1-c1", "i1-c2") for k in ("d1", "d2", "opt")]
    assert table.keys.tolist() == [f"Geom-m{m}-{kind}" for m in ("1", "10", "2") for kind in kinds]
    assert table.groups.tolist() == ["1"] * 6 + ["10"] * 6 + ["2"] * 6
    assert table.num_atoms.tolist() == [5] * 6 + [4] * 6 + [3] * 6
    assert set(table.charge.tolist()) == {0} and set(table.multiplicity.tolist()) == {1}
    with h5py.File(path) as file:
        groups = [file[f"{key.split('-')[1][1:]}/{key}"] for key in table.keys.tolist()]
        stored = {key: np.concatenate([group[key] for group in groups]) for key in groups[0]}
    np.testing.assert_array_equal(table.numbers, stored["atNUM"])
    np.testing.assert_allclose(table.positions, stored["atXYZ"], rtol=1e-6)
    expected = {
        "energy.pbe0_mbd": "ePBE0+MBD",
        "energy.pbe0": "ePBE0",
        "energy.dftb3_mbd": "eDFTB+MBD",
        "forces.pbe0_mbd": "totFOR",
        "forces.pbe0": "pbe0FOR",
    }
    for label, key in expected.items():
        np.testing.assert_allclose(table.labels[label], stored[key], rtol=1e-6)
    for level in ("pbe0_mbd", "pbe0"):
        np.testing.assert_allclose(table.labels[f"dipole.{level}"].ravel(), stored["vDIP"], rtol=1e-6)
    assert set(table.labels) == {*expected, "dipole.pbe0_mbd", "dipole.pbe0"}


def test_levels_are_an_option(path: Path) -> None:
    assert read(path).fidelities == ["pbe0_mbd"] == list(QM7X().fidelities)
    assert set(read(path, levels=("dftb3_mbd",)).labels) == {"energy.dftb3_mbd"}
    with pytest.raises(ValueError, match="unknown fidelity 'pbe0_mdb'; known: .*; did you mean 'pbe0_mbd'"):
        QM7X(levels=("pbe0_mdb",))
    with pytest.raises(ValueError, match="qm7x: levels: expected at least one of pbe0_mbd"):
        QM7X(levels=())


@pytest.mark.parametrize("size", [1, 6, 7, 100])
def test_parts_and_tables_of_any_size_cover_the_file_once(
    path: Path, size: int, read_in_pieces: Callable[..., tuple[int, StructureTable]]
) -> None:
    whole = read(path)
    num_parts, again = read_in_pieces(QM7X(), path, size)
    assert num_parts == {1: 3, 6: 3, 7: 2, 100: 1}[size]
    assert again.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(again.positions, whole.positions)


def test_listed_duplicates_are_left_out_with_what_is_displaced_from_them(path: Path, tmp_path: Path) -> None:
    listed = tmp_path / "DupMols.dat"
    listed.write_text("Geom-m1-i1-c2-opt\nGeom-m2-i1-c1-opt\n")
    keys = read(path, duplicates=str(listed)).keys.tolist()
    assert keys == [k for k in read(path).keys.tolist() if not k.startswith(("Geom-m1-i1-c2-", "Geom-m2-i1-c1-"))]
    listed.write_text("m1\n")
    with pytest.raises(ValueError, match="DupMols.dat: expected names such as Geom-m1-i1-c1-opt, found 'm1'"):
        QM7X(duplicates=str(listed)).parts([path])
    with pytest.raises(FileNotFoundError, match="option 'duplicates' expects the published DupMols.dat"):
        QM7X(duplicates=str(tmp_path / "absent")).parts([path])


def test_structures_without_a_chosen_label_are_left_out(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for key in ("ePBE0+MBD", "totFOR", "vDIP"):
            file["10/Geom-m10-i1-c1-d2"][key][...] = np.nan
    assert "Geom-m10-i1-c1-d2" not in read(path).keys.tolist()
    assert len(read(path)) == 17 and len(read(path, levels=ALL)) == 18


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("totFOR", None, "/10/Geom-m10-i1-c1-d2: expected a dataset 'totFOR', found .*atXYZ"),
        ("atXYZ", np.zeros((5, 3)), r"c1-d2: atXYZ: expected floats of shape \(4, 3\), found float64 \(5, 3\)"),
        ("atNUM", np.zeros(4), r"c1-d2: atNUM: expected integers of shape \(4\), found float64 \(4,\)"),
        ("ePBE0+MBD", np.zeros(1, int), r"ePBE0\+MBD: expected floats of shape \(1\), found int64"),
        ("atNUM", np.array([7, 1, 1, 300]), "/10: numbers: expected 0..255, found 1..300"),
    ],
)
def test_another_layout_is_named(path: Path, name: str, value: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        del file["10/Geom-m10-i1-c1-d2"][name]
        if value is not None:
            file["10/Geom-m10-i1-c1-d2"][name] = value
    with pytest.raises(ValueError, match=message):
        read(path)


def test_files_that_are_no_hdf5_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="3000.hdf5: no such file; source 'qm7x' reads 1000.hdf5"):
        QM7X().parts([tmp_path / "3000.hdf5"])
    (tmp_path / "1000.xz").write_bytes(b"x")
    with pytest.raises(ValueError, match="1000.xz: expected HDF5, found a compressed file; unpack it first"):
        QM7X().parts([tmp_path / "1000.xz"])
    for content in (b"", path.read_bytes()[:5000]):
        (tmp_path / "damaged.hdf5").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.hdf5: not a readable HDF5 file"):
            read(tmp_path / "damaged.hdf5")


def test_a_dataset_is_built(path: Path, builds: Callable[..., None]) -> None:
    builds(QM7X(levels=ALL), path)
