"""SPICE: bohr and hartree to angstrom and eV, forces out of gradients, charges out of SMILES."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.units
import h5py
import numpy as np
import pytest

from rung.data.sources.spice import Spice, charge_of
from rung.data.table import StructureTable

LEVEL = "wb97md3bj_def2tzvppd"
WATER = "[O:1]([H:2])[H:3]"
AMMONIUM = "[N+:1]([H:2])([H:3])([H:4])[H:5]"


def write_molecule(file: h5py.File, name: str, written: str, numbers: list[int], M: int, **changes: Any) -> None:
    """Write a group as the data set's downloader does; a change of None leaves an array out."""
    rng = np.random.default_rng(len(file))
    n = len(numbers)
    arrays: dict[str, Any] = {
        "atomic_numbers": np.array(numbers, np.int16),
        "conformations": rng.normal(size=(M, n, 3)).astype(np.float32),
        "formation_energy": rng.normal(size=M),
        "dft_total_energy": rng.normal(-76, 1, M),
        "dft_total_gradient": rng.normal(scale=0.05, size=(M, n, 3)).astype(np.float32),
        "mbis_charges": rng.normal(size=(M, n, 1)).astype(np.float32),
        "scf_dipole": rng.normal(size=(M, 3)).astype(np.float32),
    }
    units = {"conformations": "bohr", "dft_total_energy": "hartree", "dft_total_gradient": "hartree/bohr"}
    group = file.create_group(name)
    subset = "SPICE PubChem Set 1 Single Points Dataset v1.3"
    for key, text in {"smiles": written, "subset": subset}.items():
        if key not in changes:
            group.create_dataset(key, data=[text], dtype=h5py.string_dtype())
    for key, value in (arrays | changes).items():
        if value is not None:
            group[key] = value
            group[key].attrs["units"] = units.get(key, "elementary_charge*bohr")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "SPICE-2.0.1.hdf5"
    with h5py.File(path, "w") as file:
        write_molecule(file, "103147721", WATER, [8, 1, 1], 4)
        write_molecule(file, "[NH4+]", AMMONIUM, [7, 1, 1, 1, 1], 3, scf_dipole=None)
        write_molecule(file, "ala-gly", "[H:1][H:2]", [1, 1], 2)
    return path


def read(path: Path) -> StructureTable:
    source = Spice()
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


def test_units_signs_and_identity(path: Path) -> None:
    table = read(path)
    assert table.keys.tolist() == [
        *(f"103147721-{i:06d}" for i in range(4)),
        *(f"[NH4+]-{i:06d}" for i in range(3)),
        *(f"ala-gly-{i:06d}" for i in range(2)),
    ]
    assert table.groups.tolist() == ["[O]([H])[H]"] * 4 + ["[N+]([H])([H])([H])[H]"] * 3 + ["[H][H]"] * 2
    assert table.charge.tolist() == [0] * 4 + [1] * 3 + [0] * 2
    assert set(table.multiplicity.tolist()) == {1}
    with h5py.File(path) as file:
        groups = [file[name] for name in ("103147721", "[NH4+]", "ala-gly")]
        numbers = np.concatenate([np.tile(g["atomic_numbers"], len(g["conformations"])) for g in groups])
        positions = np.concatenate([g["conformations"][()].reshape(-1, 3) for g in groups])
        gradient = np.concatenate([g["dft_total_gradient"][()].reshape(-1, 3) for g in groups])
        energy = np.concatenate([g["dft_total_energy"] for g in groups])
        dipole = groups[0]["scf_dipole"][()]
    np.testing.assert_array_equal(table.numbers, numbers)
    np.testing.assert_allclose(table.positions, positions * ase.units.Bohr, rtol=1e-6)
    np.testing.assert_allclose(table.labels[f"energy.{LEVEL}"], energy * ase.units.Hartree, rtol=1e-6)
    expected = -gradient * ase.units.Hartree / ase.units.Bohr
    np.testing.assert_allclose(table.labels[f"forces.{LEVEL}"], expected, rtol=1e-6)
    np.testing.assert_allclose(table.labels[f"dipole.{LEVEL}"][:4], dipole * ase.units.Bohr, rtol=1e-6)
    assert table.has("dipole", LEVEL).tolist() == [True] * 4 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_parts_and_tables_of_any_size_cover_the_file_once(
    path: Path, size: int, read_in_pieces: Callable[..., tuple[int, StructureTable]]
) -> None:
    whole = read(path)
    num_parts, again = read_in_pieces(Spice(), path, size)
    assert num_parts == {1: 3, 4: 2, 5: 2, 100: 1}[size]
    assert again.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(again.positions, whole.positions)


def test_what_is_missing_is_nan_and_what_has_no_label_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "SPICE.hdf5"
    gradient = np.zeros((3, 3, 3), np.float32)
    gradient[:2] = np.nan
    with h5py.File(path, "w") as file:
        energy = np.array([np.nan, -76.0, -76.0])
        write_molecule(file, "1", WATER, [8, 1, 1], 3, dft_total_energy=energy, dft_total_gradient=gradient)
        file["1"]["scf_dipole"][0] = np.nan
    table = read(path)
    assert table.keys.tolist() == ["1-000001", "1-000002"]
    assert table.has("forces", LEVEL).tolist() == [False, True]


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        (WATER, 0),
        (AMMONIUM, 1),
        ("[H:1][C@@:2]([H:3])([N+:4])[C:5](=[O:6])[O-:7]", 0),
        ("[O-:1][P:2](=[O:3])([O-:4])[O-:5]", -3),
        ("[Mg+2:1].[Cl-:2]", 1),
        ("[Ca++].[K+]", 3),
        ("C#N", 0),
        ("[13CH3-]", -1),
        ("[H:1][C:2](=[N+:3]=[N-:4])/[C:5]#[N:6]", 0),
    ],
)
def test_charge_is_the_sum_of_formal_charges(smiles: str, charge: int) -> None:
    assert charge_of(smiles) == charge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conformations": None}, "SPICE.hdf5: /1: expected a dataset 'conformations', found .*dft_total_energy"),
        ({"dft_total_gradient": None}, "SPICE.hdf5: /1: expected a dataset 'dft_total_gradient', found"),
        ({"smiles": np.array([b"\xff"], h5py.string_dtype())}, "SPICE.hdf5: /1: 'utf-8' codec can't decode"),
        ({"smiles": np.zeros(1)}, "/1: smiles: expected texts of shape .1., found float64"),
        ({"atomic_numbers": np.array([8, 1], np.int16)}, r"/1: conformations: expected floats of shape \(any, 2, 3\)"),
        ({"dft_total_energy": np.zeros((2, 1))}, r"/1: dft_total_energy: .* found float64 \(2, 1\)"),
        ({"atomic_numbers": np.array([8.0, 1, 1])}, "/1: atomic_numbers: expected integers .* found float64"),
        ({"atomic_numbers": np.array([8, 1, 999], np.int16)}, "/1: numbers: expected 0..255, found 1..999"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "SPICE.hdf5"
    with h5py.File(path, "w") as file:
        write_molecule(file, "1", WATER, [8, 1, 1], 2, **changes)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_another_unit_is_refused(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["103147721"]["conformations"].attrs["units"] = "angstrom"
    with pytest.raises(ValueError, match="103147721: conformations: expected the unit bohr, found angstrom"):
        read(path)


def test_missing_empty_and_truncated_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.hdf5: no such file; source 'spice' reads SPICE-2.0.1.hdf5"):
        Spice().parts([tmp_path / "absent.hdf5"])
    for content in (b"", path.read_bytes()[:3000]):
        damaged = tmp_path / "damaged.hdf5"
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="damaged.hdf5: not a readable HDF5 file"):
            read(damaged)
    with h5py.File(tmp_path / "none.hdf5", "w"), pytest.raises(ValueError, match="expected files .* found none"):
        Spice().parts([])
    with pytest.raises(ValueError, match="none.hdf5: /: expected groups of molecules, found an empty group"):
        Spice().parts([tmp_path / "none.hdf5"])


def test_a_dataset_is_built(path: Path, builds: Callable[..., None]) -> None:
    builds(Spice(), path)
