"""GEOM: the crude MessagePack, packed or not, as a stream; pickles refused by name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.units
import msgpack
import numpy as np
import pytest

from rung.data.sources import source as limits
from rung.data.sources.geom import Geom
from rung.data.table import StructureTable

LABEL = "energy.gfn2_xtb"


def molecule(seed: int, M: int, charge: int = 0) -> dict[str, Any]:
    """Return a molecule as CREST's results were stored, with the keys that every one of them has."""
    rng = np.random.default_rng(seed)
    numbers = [8.0, 6.0, 17.0, *[1.0] * (seed + 1)]
    conformers = [
        {
            "xyz": [[z, *rng.normal(size=3).tolist()] for z in numbers],
            "geom_id": 119926532 + 100 * seed + i,
            "set": 1,
            "degeneracy": 2,
            "totalenergy": -79.0 - rng.random(),
            "relativeenergy": 0.1 * i,
            "boltzmannweight": 1 / M,
            "conformerweights": [0.5 / M, 0.5 / M],
        }
        for i in range(M)
    ]
    return {"totalconfs": 2 * M, "uniqueconfs": M, "charge": charge, "datasets": ["plpro"], "conformers": conformers}


MAPS = [
    {"O=CCl": molecule(0, 3), "[O-]CCl": molecule(1, 2, -1)},
    {},
    {"OC(Cl)C": molecule(2, 4)},
]


def packed(maps: list[Any]) -> bytes:
    return b"".join(msgpack.packb(entry) for entry in maps)


def archive(path: Path, data: bytes, name: str = "drugs_crude.msgpack") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "drugs_crude.msgpack"
    path.write_bytes(packed(MAPS))
    return path


def read(path: Path) -> StructureTable:
    return StructureTable.concatenate([t for part in Geom().parts([path]) for t in Geom().read(part)])


@pytest.mark.parametrize("packing", [False, True])
def test_conformers_in_ev_and_angstrom(path: Path, tmp_path: Path, packing: bool) -> None:
    table = read(archive(tmp_path / "drugs_crude.msgpack.tar.gz", path.read_bytes()) if packing else path)
    molecules = {smiles: content for entry in MAPS for smiles, content in entry.items()}
    conformers = [c for content in molecules.values() for c in content["conformers"]]
    xyz = np.concatenate([c["xyz"] for c in conformers])
    assert table.keys.tolist() == [
        f"drugs_crude-{smiles}-{i:06d}" for smiles, m in molecules.items() for i in range(len(m["conformers"]))
    ]
    assert table.groups.tolist() == ["O=CCl"] * 3 + ["[O-]CCl"] * 2 + ["OC(Cl)C"] * 4
    assert table.charge.tolist() == [0] * 3 + [-1] * 2 + [0] * 4
    assert table.num_atoms.tolist() == [4] * 3 + [5] * 2 + [6] * 4
    np.testing.assert_array_equal(table.numbers, xyz[:, 0])
    np.testing.assert_allclose(table.positions, xyz[:, 1:], rtol=1e-6)
    expected = np.array([c["totalenergy"] for c in conformers]) * ase.units.Hartree
    np.testing.assert_allclose(table.labels[LABEL], expected, rtol=1e-6)
    assert list(table.labels) == [LABEL]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_tables_of_any_size_cover_the_file_once(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(path)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", size)
    (part,) = Geom().parts([path])
    tables = list(Geom().read(part))
    assert len(tables) == {1: 3, 5: 2, 100: 1}[size]
    assert StructureTable.concatenate(tables).keys.tolist() == whole.keys.tolist()


def test_a_file_is_not_read_further_than_its_tables_ask(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 3)
    path.write_bytes(packed([MAPS[0]]) + b"\xc1 damage")
    tables = Geom().read(Geom().parts([path])[0])
    assert len(next(tables)) == 3
    with pytest.raises(ValueError, match="drugs_crude.msgpack"):
        list(tables)


def test_conformers_without_energy_are_left_out(path: Path) -> None:
    content = molecule(1, 3)
    content["conformers"][1]["totalenergy"] = float("nan")
    path.write_bytes(packed([{"CO": content}]))
    assert read(path).keys.tolist() == ["drugs_crude-CO-000000", "drugs_crude-CO-000002"]


def broken(**changes: Any) -> list[Any]:
    """Return maps with one molecule whose conformers have other entries; None leaves one out."""
    content = molecule(0, 2)
    for conformer in content["conformers"]:
        conformer.update(changes)
        for key in [key for key, value in conformer.items() if value is None]:
            del conformer[key]
    return [{"CO": content}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed(broken(totalenergy=None)), "msgpack: CO: expected the key 'totalenergy', found xyz, geom_id"),
        (packed(broken(xyz=None)), "msgpack: CO: expected the key 'xyz', found geom_id"),
        (packed(broken(xyz=[[1.0, 2.0, 3.0]])), r"CO: expected conformers with xyz \[n, 4\]"),
        (packed(broken(xyz=[[1.5, 0.0, 0.0, 0.0]])), "CO: expected .*numbers: expected whole numbers, found float64"),
        (packed(broken(totalenergy="low")), r"CO: expected conformers with .*could not convert string"),
        (packed([{"CO": {"conformers": []}}]), "CO: expected the key 'charge', found conformers"),
        (packed([{"CO": [{"bonds": []}]}]), "molecule 0: expected SMILES -> map, found str -> list"),
        (packed([["CO"]]), "drugs_crude.msgpack: expected maps SMILES -> molecule, found"),
        (packed([{}]), "drugs_crude.msgpack: expected maps SMILES -> molecule, found none"),
        (packed(MAPS)[:-3], "after 2 molecules: expected .* found OutOfData.*; damaged or truncated"),
        (packed(MAPS) + b"\xde\x00", "found OutOfData.*; damaged or truncated"),
        (b"plain text, not MessagePack", "drugs_crude.msgpack: expected maps SMILES -> molecule, found"),
    ],
)
def test_another_layout_is_named(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rdkit_folder.tar.gz", "refused, it holds pickles, which run code when opened; expected drugs_crude"),
        ("CCO.pickle", "refused, a pickle runs code when opened"),
        ("drugs_1k.pkl", "refused, a pickle runs code when opened"),
        ("drugs_featurized.msgpack.tar.gz", "refused, it holds graph features without energies"),
        ("summary_drugs.json", "expected drugs_crude.msgpack.tar.gz, .* found another name"),
        ("empty_crude.msgpack", "the file is empty"),
    ],
)
def test_other_files_of_the_data_set_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"\x80\x04N.")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        Geom().parts([tmp_path / name])


def test_damaged_archives_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.msgpack: no such file; source 'geom' reads drugs_crude"):
        Geom().parts([tmp_path / "absent.msgpack"])
    whole = archive(tmp_path / "qm9_crude.msgpack.tar.gz", path.read_bytes())
    data = whole.read_bytes()
    for content in (data[: len(data) // 2], data[:-4], b"no gzip"):
        whole.write_bytes(content)
        with pytest.raises(ValueError, match="qm9_crude.msgpack.tar.gz: .*damaged or truncated"):
            read(whole)
    other = archive(tmp_path / "drugs_crude.msgpack.tar.gz", b"text", "readme.txt")
    with pytest.raises(ValueError, match="drugs_crude.msgpack.tar.gz: expected a member .*, found none"):
        read(other)


def test_a_dataset_is_built(path: Path, tmp_path: Path, builds: Callable[..., None]) -> None:
    builds(Geom(), path, archive(tmp_path / "qm9_crude.msgpack.tar.gz", path.read_bytes(), "qm9_crude.msgpack"))
