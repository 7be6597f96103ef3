"""ASE LMDB: rows written as ase-db-backends and older fairchem write them; OC20's frames; no pickles, no crash."""

from __future__ import annotations

import json
import lzma
import pickle
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db.row import AtomsRow
from ase.io import write as ase_write
from ase.io.jsonio import encode
from ase.stress import voigt_6_to_full_3x3_stress

from rung.data.sources import aselmdb
from rung.data.sources import source as limits
from rung.data.sources.aselmdb import OC20, AseLmdb, OMat24, OMol25
from rung.data.sources.source import Source
from rung.data.structure import Structure

rng = np.random.default_rng(0)
STRESS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def labelled(atoms: Atoms, **results: Any) -> Atoms:
    forces = rng.normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, **{"energy": -1.5 * len(atoms), "forces": forces, **results})
    return atoms


def row_of(atoms: Atoms, data: dict[str, Any], **key_value_pairs: Any) -> dict[str, Any]:
    """Return the dictionary that ase_db_backends.aselmdb.LMDBDatabase stores."""
    row = AtomsRow(atoms)
    fields = {k: row[k] for k in row.__dict__ if k[0] != "_" and k not in row._keys and k != "id"}
    fields |= {"mtime": 26.0, "cell": np.asarray(fields["cell"]), "data": data}
    if key_value_pairs:
        fields["key_value_pairs"] = key_value_pairs
    if constraints := row.get("constraints"):
        fields["constraints"] = [constraint.todict() for constraint in constraints]
    return fields


def plain(value: Any) -> Any:
    """Return arrays as nested lists, as fairchem's older backend (orjson) writes them."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def write(path: Path, rows: Sequence[dict[str, Any]], deleted: Sequence[int] = (), older: bool = False) -> Path:
    entries: dict[str, Any] = {str(k): row for k, row in enumerate(rows, start=1) if k not in deleted}
    entries |= {"nextid": len(rows) + 1, "metadata": {"made": "by a test"}}
    if deleted:
        entries["deleted_ids"] = list(deleted)
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as environment,
        environment.begin(write=True) as t,
    ):
        for key, value in entries.items():
            text = json.dumps(value, default=plain) if older else encode(value)
            t.put(key.encode(), zlib.compress(text.encode()))
    return path


def read(source: Source, *paths: Path) -> list[Structure]:
    return [s for part in source.parts(paths) for table in source.read(part) for s in table]


@pytest.mark.parametrize("older", [False, True])
def test_omol25(tmp_path: Path, older: bool) -> None:
    water, ion = labelled(molecule("H2O")), labelled(Atoms("Na", positions=[[0, 0, 1.0]]))
    data = {"charge": 0, "spin": 3, "source": "omol/x/orca.tar.zst", "data_id": "elytes", "homo_energy": np.ones(1)}
    rows = [row_of(water, data), row_of(ion, {**data, "charge": 1.0, "spin": 1})]
    path = write(tmp_path / "data0000.aselmdb", rows, older=older)
    first, second = read(OMol25(), path)
    assert (first.key, first.group) == (f"{tmp_path.name}/data0000-000001", "H2O")
    assert (first.charge, first.multiplicity, second.charge, second.multiplicity) == (0, 3, 1, 1)
    assert first.numbers.tolist() == [8, 1, 1] and not first.pbc.any() and not first.cell.any()
    np.testing.assert_allclose(first.positions, water.positions, rtol=1e-6)
    labels = first.labels["wb97mv_def2tzvpd"]
    assert labels.energy == -4.5 and labels.stress is None and labels.dipole is None
    np.testing.assert_allclose(labels.forces, water.get_forces(), rtol=1e-6)
    with pytest.raises(ValueError, match="row 1: data: expected charge and spin, found sid"):
        read(OMol25(), write(tmp_path / "other.aselmdb", [row_of(water, {"sid": 1})]))


def test_omat24_has_stress(tmp_path: Path) -> None:
    copper = labelled(bulk("Cu") * (2, 1, 1), stress=np.array(STRESS))
    (tmp_path / "rattled-1000").mkdir()
    write(tmp_path / "rattled-1000" / "data0.aselmdb", [row_of(copper, {"charge": 0, "spin": 0})])
    (found,) = read(OMat24(), tmp_path)
    assert (found.key, found.group, found.multiplicity) == ("rattled-1000/data0-000001", "Cu2", 1)
    labels = found.labels["pbe_u_omat24"]
    np.testing.assert_allclose(labels.stress, voigt_6_to_full_3x3_stress(STRESS), rtol=1e-6)
    np.testing.assert_allclose(found.cell, copper.cell.array, rtol=1e-6)
    assert found.pbc.all() and labels.energy == -3.0


def test_a_plain_database_with_own_names(tmp_path: Path) -> None:
    atoms = labelled(molecule("CH4"), dipole=np.array([0.1, 0, 0]), free_energy=-8.0)
    rows = [row_of(atoms, {"charge": -1, "multiplicity": 2}, name="methane"), row_of(atoms, {})]
    path = write(tmp_path / "mine.aselmdb", rows)
    source = AseLmdb("b3lyp", "B3LYP", energy_key="free_energy", group_key="name")
    first, second = read(source, path)
    assert (first.group, first.charge, first.multiplicity) == ("methane", -1, 2)
    assert (second.group, second.charge, second.multiplicity) == ("CH4", 0, 1)
    assert first.labels["b3lyp"].energy == -8.0 and first.labels["b3lyp"].dipole is not None
    assert source.fidelities["b3lyp"].method == "B3LYP" and AseLmdb("pbe").fidelities["pbe"].method == "pbe"
    with pytest.raises(ValueError, match="name 'PBE': expected lower-case"):
        AseLmdb("PBE")


@pytest.mark.parametrize(("part", "table"), [(1, 1), (3, 2), (100, 100)])
def test_parts_hold_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, table: int) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", table)
    rows = [row_of(labelled(Atoms("H", positions=[[k, 0, 0]])), {}) for k in range(7)]
    rows.append(row_of(Atoms("H"), {}))  # no labels
    path = write(tmp_path / "a.aselmdb", rows, deleted=[2, 5])
    structures = read(AseLmdb("pbe"), path)
    assert [s.positions[0, 0] for s in structures] == [0, 2, 3, 5, 6]
    assert [s.key[-1] for s in structures] == ["1", "3", "4", "6", "7"]


def test_two_readers_of_one_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.aselmdb", [row_of(labelled(Atoms("H")), {})] * 2)
    source = AseLmdb("pbe")
    (part,) = source.parts([path])
    assert len(list(zip(source.read(part), source.read(part), strict=True))) == 1


def test_missing_and_wrong_values_are_named(tmp_path: Path) -> None:
    good = row_of(labelled(molecule("H2O")), {})
    for name, changes, message in (
        ("a", {"forces": np.zeros((2, 3))}, r"a.aselmdb: row 1: forces: expected shape \(3, 3\), found \(2, 3\)"),
        ("b", {"energy": "low"}, "row 1: energy: expected a number or null, found str 'low'"),
        ("c", {"positions": {"x": 1}}, r"row 1: expected a list or {'__ndarray__': .*}, found x"),
        ("d", {"numbers": [1.5, 2.0, 1.0]}, "row 1: numbers: expected a list of atomic numbers, found float64"),
        ("e", {"data": {"charge": 0.5}}, "row 1: charge: expected a whole number, found 0.5"),
        ("f", {"pbc": [True] * 3, "cell": [1, 2, 3]}, r"row 1: cell: expected shape \(3, 3\), found \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read(AseLmdb("pbe"), write(tmp_path / f"{name}.aselmdb", [{**good, **changes}]))
    without = {k: v for k, v in good.items() if k != "positions"}
    with pytest.raises(ValueError, match="row 1: expected positions, found calculator, .*numbers"):
        read(AseLmdb("pbe"), write(tmp_path / "g.aselmdb", [without]))
    (nan,) = read(AseLmdb("pbe"), write(tmp_path / "h.aselmdb", [{**good, "energy": float("nan")}]))
    assert nan.labels["pbe"].energy is None and nan.labels["pbe"].forces is not None


def put(path: Path, entries: dict[str, bytes]) -> Path:
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as environment,
        environment.begin(write=True) as t,
    ):
        for key, value in entries.items():
            t.put(key.encode(), value)
    return path


def test_pickles_are_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps({"pos": [1.0]}, protocol=4)
    with pytest.raises(ValueError, match=r"0.lmdb: a \*.lmdb file holds pickled objects, which can run code; expected"):
        OC20().parts([put(tmp_path / "0.lmdb", {"0": pickled, "length": pickled})])
    path = put(tmp_path / "0.aselmdb", {"1": pickled, "nextid": zlib.compress(b"2")})
    with pytest.raises(ValueError, match="0.aselmdb: row 1: a pickled object, which can run code"):
        read(OC20(), path)


def test_damaged_databases_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = AseLmdb("pbe")
    row = zlib.compress(encode(row_of(labelled(molecule("C6H6")), {})).encode())
    following = zlib.compress(b"3")
    for name, entries, message in (
        (
            "a",
            {"0": row, "length": b"1"},
            "a.aselmdb: expected an ASE database with 'nextid', found the keys 0, length",
        ),
        ("b", {"1": row, "nextid": following}, "b.aselmdb: row 2: missing; the database is damaged"),
        ("c", {"1": row[:-9], "nextid": following}, "c.aselmdb: row 1: not JSON compressed by zlib"),
        ("d", {"1": zlib.compress(b"{'a'"), "nextid": following}, "d.aselmdb: row 1: not JSON compressed by zlib"),
        ("e", {"nextid": zlib.compress(b'"x"')}, "e.aselmdb: nextid: expected the number of the next row, found 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(source, put(tmp_path / f"{name}.aselmdb", entries))
    path = write(tmp_path / "cut.aselmdb", [row_of(labelled(molecule("C6H6")), {})] * 20)
    whole = path.read_bytes()
    for data, message in (
        (whole[:-8192], "cut.aselmdb: truncated: .* bytes, the database has"),
        (b"hello" * 3000, "cut.aselmdb: not a readable LMDB file"),
        (b"", "cut.aselmdb: not a readable LMDB file"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            source.parts([path])
    monkeypatch.setattr(aselmdb, "MAX_ROW", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read(source, put(tmp_path / "bomb.aselmdb", {"1": zlib.compress(bytes(10**6)), "nextid": zlib.compress(b"2")}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file; source 'omol25' reads"):
        OMol25().parts([tmp_path / "none.aselmdb"])
    with pytest.raises(ValueError, match="no file for source 'omat24' in this folder"):
        OMat24().parts([tmp_path])
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match="a.json: source 'oc20' expects N.extxyz"):
        OC20().parts([tmp_path / "a.json"])


def slab_frames() -> list[Atoms]:
    frames = []
    for _ in range(3):
        slab = fcc111("Pt", (1, 1, 2), vacuum=5.0)
        add_adsorbate(slab, "O", 1.5, "ontop")
        slab.info.clear()
        slab.pbc = True
        slab.set_constraint(FixAtoms([0]))
        slab.rattle(0.1, rng=rng)
        frames.append(labelled(slab, free_energy=-9.0))
    return frames


def write_oc20(folder: Path, frames: list[Atoms], lines: list[str], compressed: bool) -> Path:
    ase_write(folder / "0.extxyz", frames, columns=["symbols", "positions", "move_mask", "tags", "forces"])
    (folder / "0.txt").write_text("\n".join(lines) + "\n")
    if compressed:
        for name in ("0.extxyz", "0.txt"):
            (folder / f"{name}.xz").write_bytes(lzma.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_oc20_frames(tmp_path: Path, compressed: bool) -> None:
    frames = slab_frames()
    folder = write_oc20(
        tmp_path, frames, ["random12,frame0,-1.5", "random12,frame3,-1.5", "random7,frame0,2.0"], compressed
    )
    structures = read(OC20(), folder)
    assert [s.key for s in structures] == ["random12-frame0", "random12-frame3", "random7-frame0"]
    assert [s.group for s in structures] == ["random12", "random12", "random7"]
    for structure, atoms in zip(structures, frames, strict=True):
        labels = structure.labels["rpbe"]
        assert labels.energy == -4.5 and structure.pbc.all() and labels.forces is not None
        np.testing.assert_allclose(labels.forces, atoms.get_forces(apply_constraint=False), atol=1e-7)
        np.testing.assert_allclose(structure.positions, atoms.positions, atol=1e-6)
    assert read(OC20(energy_key="free_energy"), folder)[0].labels["rpbe"].energy == -9.0
    with pytest.raises(ValueError, match="energy_key: expected 'energy' or 'free_energy', found 'e'"):
        OC20(energy_key="e")


def test_oc20_rows_and_its_errors(tmp_path: Path) -> None:
    frames = slab_frames()
    (found,) = read(OC20(), write(tmp_path / "a.aselmdb", [row_of(frames[0], {"sid": "random12"})]))
    np.testing.assert_allclose(found.labels["rpbe"].forces, frames[0].get_forces(apply_constraint=False), rtol=1e-6)
    folder = tmp_path / "s2ef"
    folder.mkdir()
    for lines, message in (
        (["random1,frame0,0"] * 2, r"0.extxyz: frame 2: IndexError: .*not what 0.txt \(2 lines\) lists"),
        (["random1,frame0,0"] * 4, "0.extxyz: expected 4 frames, as 0.txt lists, found 3"),
        (["random1"] * 3, "0.extxyz: frame 0: IndexError"),
    ):
        with pytest.raises(ValueError, match=message):
            read(OC20(), write_oc20(folder, frames, lines, compressed=False))
    (folder / "0.txt").unlink()
    with pytest.raises(FileNotFoundError, match="0.extxyz: expected 0.txt or 0.txt.xz beside it"):
        read(OC20(), folder)


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    data = {"charge": 0, "spin": 1}
    rows = [row_of(labelled(molecule(name)), data) for name in ("H2O", "CH4", "NH3", "H2O", "CH3Cl")]
    builds(OMol25(), write(tmp_path / "data0000.aselmdb", rows, deleted=[2]))
    crystals = [row_of(labelled(bulk(name), stress=np.array(STRESS)), {}) for name in ("Cu", "Fe", "Si")]
    builds(OMat24(), write(tmp_path / "data0001.aselmdb", crystals))


def test_parts_of_large_rows_hold_fewer_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(labelled(bulk("Cu") * (3, 3, 3)), {}) for _ in range(8)]
    path = write(tmp_path / "data0000.aselmdb", rows)
    assert len(OMat24().parts([path])) == 1
    monkeypatch.setattr(limits, "PART_ATOMS", 8 * 27)
    parts = OMat24().parts([path])
    assert len(parts) > 1 and max(part.stop - part.start for part in parts) * 27 <= 8 * 27
    assert sum(len(table) for part in parts for table in OMat24().read(part)) == 8
