"""DeePMD systems: what dpdata writes, standard and mixed type, comes out atom by atom; other folders are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.lj import LennardJones

from rung.data.sources import source as limits
from rung.data.sources.deepmd import DeepMD
from rung.data.table import StructureTable, faults

PBE = DeepMD("pbe", method="PBE", code="VASP")


def write(system: Path, types: list[int], names: str, sets: list[dict[str, np.ndarray]], nopbc: bool = False) -> None:
    """Write one system as dpdata's `to('deepmd/npy')` does: flat rows per frame."""
    system.mkdir(parents=True)
    np.savetxt(system / "type.raw", types, fmt="%d")
    if names:
        (system / "type_map.raw").write_text("\n".join(names.split()) + "\n")
    if nopbc:
        (system / "nopbc").touch()
    for number, arrays in enumerate(sets):
        folder = system / f"set.{number:03d}"
        folder.mkdir()
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)


def frames(count: int, n: int, seed: int = 0, box: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "coord": rng.normal(size=(count, 3 * n)).astype(np.float32),
        "energy": rng.normal(-100, 3, count),
        "force": rng.normal(size=(count, 3 * n)),
    }
    if box:
        arrays["box"] = np.tile(np.diag([4.0, 5.0, 6.0]).reshape(9), (count, 1)) + rng.normal(0, 0.1, (count, 9))
        arrays["virial"] = rng.normal(size=(count, 9))
    return arrays


def read_all(path: Path, source: DeepMD = PBE) -> StructureTable:
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


def test_systems_at_any_depth(tmp_path: Path) -> None:
    salt = [frames(3, 2, 1), frames(2, 2, 2)]
    water = frames(4, 3, 3, box=False)
    write(tmp_path / "all" / "b" / "salt", [1, 0], "Na Cl", salt)
    write(tmp_path / "all" / "a-water", [0, 1, 1], "O H", [water], nopbc=True)
    table = read_all(tmp_path / "all")
    assert faults(table) == {} and table.fidelities == ["pbe"]
    keys = [f"all/a-water-{i:06d}" for i in range(4)] + [f"all/b/salt-{i:06d}" for i in range(5)]
    assert table.keys.tolist() == keys
    assert table.groups.tolist() == ["H2O"] * 4 + ["ClNa"] * 5
    assert table.numbers.tolist() == [8, 1, 1] * 4 + [17, 11] * 5
    np.testing.assert_array_equal(table.positions[:12], water["coord"].reshape(-1, 3))
    np.testing.assert_array_equal(table.positions[12:], np.concatenate([s["coord"] for s in salt]).reshape(-1, 3))
    energies = [water["energy"], *(s["energy"] for s in salt)]
    np.testing.assert_allclose(table.labels["energy.pbe"], np.concatenate(energies), rtol=1e-12)
    forces = np.concatenate([s["force"].reshape(-1, 3) for s in [water, *salt]])
    np.testing.assert_allclose(table.labels["forces.pbe"], forces, rtol=1e-6)
    assert table.pbc.tolist() == [[False] * 3] * 4 + [[True] * 3] * 5
    assert not table.cell[:4].any()
    np.testing.assert_allclose(table.cell[4:7], salt[0]["box"].reshape(3, 3, 3), rtol=1e-6)
    assert table.has("stress", "pbe").tolist() == [False] * 4 + [True] * 5
    fidelity = PBE.fidelities["pbe"]
    assert (fidelity.method, fidelity.code) == ("PBE", "VASP")


def test_stress_has_the_sign_of_ase(tmp_path: Path) -> None:
    """dpdata writes virial = -volume * ASE's stress (its plugin for ASE): negative when compressed."""
    atoms = bulk("Ar", "fcc", a=4.6, cubic=True)
    atoms.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=9.0)
    stress = atoms.get_stress(voigt=False)
    assert stress[0, 0] < 0
    arrays = {
        "coord": atoms.positions.reshape(1, -1),
        "box": np.asarray(atoms.cell).reshape(1, 9),
        "energy": np.array([[atoms.get_potential_energy()]]),
        "force": atoms.get_forces().reshape(1, -1),
        "virial": (-atoms.get_volume() * stress).reshape(1, 9),
    }
    write(tmp_path / "argon", [0] * 4, "Ar", [arrays])
    table = read_all(tmp_path / "argon")
    assert table.keys.tolist() == ["argon-000000"]
    np.testing.assert_allclose(table.labels["stress.pbe"][0], stress, rtol=1e-6, atol=1e-9)


def test_mixed_type_with_padding(tmp_path: Path) -> None:
    arrays = frames(4, 3, box=False)
    types = np.array([[2, 0, 0], [1, 0, -1], [0, 1, -1], [0, 2, 0]])  # H2O, CH, HC, HOH
    arrays["real_atom_types"] = types
    write(tmp_path / "mixed", [0, 0, 0], "H C O", [arrays], nopbc=True)
    table = read_all(tmp_path / "mixed")
    assert faults(table) == {}
    assert table.num_atoms.tolist() == [3, 2, 2, 3]
    assert table.numbers.tolist() == [8, 1, 1, 6, 1, 1, 6, 1, 8, 1]
    assert table.groups.tolist() == ["H2O", "CH", "CH", "H2O"]
    for name, found in (("coord", table.positions), ("force", table.labels["forces.pbe"])):
        np.testing.assert_allclose(found, arrays[name].reshape(4, 3, 3)[types >= 0], rtol=1e-6)


@pytest.mark.parametrize("per_part", [1, 4, 100])
@pytest.mark.parametrize("per_table", [2, 5, 100])
def test_parts_partition_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, per_table: int
) -> None:
    write(tmp_path / "all" / "a", [0, 0], "H", [frames(3, 2, 1), frames(4, 2, 2)])
    write(tmp_path / "all" / "b", [0, 1], "H O", [frames(1, 2, 3)])
    write(tmp_path / "all" / "c", [0], "H", [frames(5, 1, 4)])
    whole = read_all(tmp_path / "all")
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", per_table)
    parts = PBE.parts([tmp_path / "all"])
    assert len(parts) == -(-13 // per_part)
    assert all(len(table) <= per_table for part in parts for table in PBE.read(part))
    pieces = read_all(tmp_path / "all")
    assert pieces.keys.tolist() == whole.keys.tolist()
    np.testing.assert_array_equal(pieces.positions, whole.positions)
    for name, array in whole.labels.items():
        np.testing.assert_array_equal(pieces.labels[name], array)


def test_type_map_charge_and_multiplicity_as_options(tmp_path: Path) -> None:
    write(tmp_path / "oh", [0, 1], "", [frames(2, 2, box=False)], nopbc=True)
    with pytest.raises(FileNotFoundError, match="oh/type_map.raw: no such file; give the elements .*'type_map'"):
        read_all(tmp_path / "oh")
    table = read_all(tmp_path / "oh", DeepMD("pbe", type_map=("O", "H"), charge=-1, multiplicity=1))
    assert table.numbers.tolist() == [8, 1] * 2
    assert table.charge.tolist() == [-1, -1] and table.multiplicity.tolist() == [1, 1]


def test_missing_labels(tmp_path: Path) -> None:
    with_forces, without = frames(2, 2, 1), frames(2, 2, 2)
    for name in ("force", "virial"):
        del without[name]
    without["energy"][1] = np.nan
    write(tmp_path / "s", [0, 0], "H", [with_forces, without])
    table = read_all(tmp_path / "s")
    assert table.keys.tolist() == [f"s-{index:06d}" for index in range(3)]  # frame 3 has no label
    assert table.has("forces", "pbe").tolist() == [True, True, False]


def test_other_arrays_are_ignored_only_when_named(tmp_path: Path) -> None:
    arrays = {**frames(2, 2, box=False), "fparam": np.zeros((2, 1)), "virial": np.zeros((2, 9))}
    write(tmp_path / "s", [0, 0], "H", [arrays], nopbc=True)
    with pytest.raises(ValueError, match="set.000: expected no arrays but .*, found fparam; name them in 'ignore'"):
        PBE.parts([tmp_path / "s"])
    with pytest.raises(ValueError, match="set.000: expected no virial without a box; name it in 'ignore'"):
        read_all(tmp_path / "s", DeepMD("pbe", ignore=("fparam",)))
    table = read_all(tmp_path / "s", DeepMD("pbe", ignore=("fparam", "virial")))
    assert set(table.labels) == {"energy.pbe", "forces.pbe"}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("coord", None, "coord.npy: no such file"),
        ("box", None, "box.npy: no such file"),
        ("coord", np.zeros((3, 5)), "coord.npy: expected numbers (3, 6), found float64 (3, 5)"),
        ("coord", np.zeros((0, 6)), "coord.npy: expected at least one frame, found float64 (0, 6)"),
        ("energy", np.zeros(2), "energy.npy: expected numbers (3, 1), found float64 (2,)"),
        ("force", np.zeros((3, 6), int), "force.npy: expected numbers (3, 6), found int64 (3, 6)"),
        ("virial", np.zeros((3, 6)), "virial.npy: expected numbers (3, 9), found float64 (3, 6)"),
        (
            "real_atom_types",
            np.full((3, 2), 5),
            "expected types 0..1, which the type map names (-1: no atom), found 5..5",
        ),
        ("real_atom_types", np.full((3, 2), 0.5), "real_atom_types.npy: expected whole numbers, found float64"),
        (
            "energy",
            np.array([{}] * 3),
            "energy.npy: expected numbers, found Python objects, which Rung does not unpickle",
        ),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    arrays = {**frames(3, 2), name: array}
    kept = {key: value for key, value in arrays.items() if value is not None}
    write(tmp_path / "s", [0, 1], "H O", [kept])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_all(tmp_path / "s")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("type.raw", "0 x\n", "type.raw: expected whole numbers, one per atom"),
        ("type.raw", "", r"type.raw: expected types from 0, one per atom, found \[\]"),
        ("type.raw", "0 2\n", r"expected types 0\.\.1, .* found 0\.\.2"),
        ("type_map.raw", "H Qq\n", "type_map.raw: expected symbols of elements, found Qq"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    write(tmp_path / "s", [0, 1], "H O", [frames(3, 2)])
    (tmp_path / "s" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "s")


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    write(tmp_path / "s", [0, 1], "H O", [frames(3, 2)])
    for name in ("coord", "energy"):
        path = tmp_path / "s" / "set.000" / f"{name}.npy"
        good = path.read_bytes()
        for damaged in (b"", b"not an array", good[:40], good[:-8]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}.npy: .*damaged or truncated"):
                read_all(tmp_path / "s")
        path.write_bytes(good)


def test_folders_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a system .a folder with type.raw. at or below it, found none"):
        PBE.parts([tmp_path])
    write(tmp_path / "s", [0], "H", [])
    with pytest.raises(ValueError, match=r"s: expected folders set\.\*, found none; a system of \.raw files"):
        PBE.parts([tmp_path])
    write(tmp_path / "t", [0], "H", [{"coord": np.zeros((1, 3)), "box": np.eye(3).reshape(1, 9)}])
    with pytest.raises(ValueError, match=r"set.000: expected a label \(energy, force, virial\), found box, coord"):
        PBE.parts([tmp_path / "t"])
    with pytest.raises(FileNotFoundError, match="source 'deepmd' reads folders with type.raw"):
        PBE.parts([tmp_path / "gone"])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write(tmp_path / "all" / "salt", [1, 0], "Na Cl", [frames(5, 2, 1), frames(2, 2, 2)])
    write(tmp_path / "all" / "water", [0, 1, 1], "O H", [frames(4, 3, 3, box=False)], nopbc=True)
    builds(PBE, tmp_path / "all")
