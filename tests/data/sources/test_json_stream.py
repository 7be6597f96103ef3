"""JSON larger than the piece that is read: nothing lost at the seams; structures of pymatgen as arrays."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from rung.data.sources import json_stream
from rung.data.sources.json_stream import JsonStream, array, crystal, formula, full_stress, number, open_text

RECORDS = [{"name": "ä" * k, "values": [k, -1.5e-3, None], "nested": {"}": "]"}} for k in range(9)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.xz"])
def test_elements_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, suffix: str) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    path = tmp_path / f"list{suffix}"
    opener = {".json": open, ".json.gz": gzip.open, ".json.xz": lzma.open}[suffix]
    with opener(path, "wt", encoding="utf-8") as file:
        json.dump(RECORDS, file, indent=1)
    with open_text(path) as file:
        assert list(JsonStream(file, path).elements()) == RECORDS


@pytest.mark.parametrize("piece", [1, 16, 1 << 20])
def test_members_of_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    path = tmp_path / "object.json"
    path.write_text(json.dumps({str(k): record for k, record in enumerate(RECORDS)}), encoding="utf-8")
    with open_text(path) as file:
        stream = JsonStream(file, path)
        assert [(key, stream.value()) for key in stream.members()] == [(str(k), r) for k, r in enumerate(RECORDS)]
        assert stream.peek() == "" and stream.position == len(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2', "t.json: character 11: not readable JSON .* truncated"),
        ('[{"a": 1}', "t.json: character 9: expected ',' or ']', found 'the end of the file'"),
        ('[{"a": 1} {"a": 2}]', "t.json: character 10: expected ',' or ']', found '{'"),
        ("[12, 13]", "t.json: character 1: expected an object, a list or a text, found '12, 13]'"),
        ('{"a": 1}', r"t.json: character 0: expected '\[', found '{'"),
        ("", "t.json: the file is empty"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message), open_text(path) as file:
        list(JsonStream(file, path).elements())


def test_a_truncated_or_foreign_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    whole = gzip.compress(json.dumps([list(range(9999))]).encode())
    for data in (whole[: len(whole) // 2], b"[{}]"):
        path.write_bytes(data)
        message = r"t.json.gz: cannot be read .*; damaged or truncated\?"
        with pytest.raises(ValueError, match=message), open_text(path) as file:
            list(JsonStream(file, path).elements())


def test_a_record_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE", 100)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    path = tmp_path / "t.json"
    path.write_text('[{"a": "' + "x" * 100_000)
    with open_text(path) as file:
        stream = JsonStream(file, path)
        with pytest.raises(ValueError, match="not readable JSON"):
            list(stream.elements())
        assert len(stream.text) < 3000


def lattice_and_site(**changes: object) -> dict:
    site = {"species": [{"element": "Li", "occu": 1}], "abc": [0.5, 0.25, 0.0], "xyz": [9.0, 9.0, 9.0], "label": "Li"}
    matrix = [[2.0, 0.1, 0.0], [0.0, 3.0, 0.2], [0.3, 0.0, 4.0]]
    return {"lattice": {"matrix": matrix}, "sites": [{**site, **changes}, site], "charge": None}


def test_a_pymatgen_structure() -> None:
    record = lattice_and_site(species=[{"element": "O", "oxidation_state": -2, "occu": 1.0}], abc=[1.25, -0.5, 0.1])
    atoms = Atoms("OLi", cell=record["lattice"]["matrix"], scaled_positions=[[1.25, -0.5, 0.1], [0.5, 0.25, 0]])
    found = crystal(record)
    np.testing.assert_allclose(found["positions"], atoms.positions, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["cell"], atoms.cell.array, rtol=1e-6)
    assert found["numbers"].tolist() == [8, 3] and found["pbc"].tolist() == [True] * 3 and found["charge"] == 0
    slab = {**lattice_and_site(), "charge": -1}
    slab["lattice"]["pbc"] = [True, True, False]
    assert crystal(slab)["pbc"].tolist() == [True, True, False] and crystal(slab)["charge"] == -1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lattice_and_site(species=[{"element": "Li", "occu": 0.5}]), "expected one whole species on each site"),
        (lattice_and_site(species=[{"element": "Li", "occu": 0.5}] * 2), "expected one whole species on each site"),
        (lattice_and_site(species=[{"element": "Xx", "occu": 1}]), "expected symbols of elements, found 'Xx'"),
        (lattice_and_site(abc=[0.1, 0.2]), "sites.abc: expected"),
        ({"sites": []}, "structure: expected a pymatgen structure .* found an object with sites"),
        ({**lattice_and_site(), "lattice": {"matrix": [[1, 2, 3]]}}, r"lattice.matrix: expected shape \(3, 3\)"),
        (None, "structure: expected a pymatgen structure .* found NoneType"),
    ],
)
def test_other_structures_are_refused(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crystal(record)


def test_numbers_and_stresses() -> None:
    voigt = np.arange(1.0, 7)
    np.testing.assert_array_equal(full_stress(voigt), voigt_6_to_full_3x3_stress(voigt))
    np.testing.assert_array_equal(full_stress(range(9)), np.arange(9).reshape(3, 3))
    assert number(None, "e") is None and number(float("nan"), "e") is None and number(2, "e") == 2.0
    with pytest.raises(ValueError, match="e: expected a number or null, found str 'x'"):
        number("x", "e")
    with pytest.raises(ValueError, match=r"f: expected numbers of shape \(1, 3\), found list"):
        array([[1, 2, "x"]], (1, 3), "f")
    assert formula(np.array([8, 1, 1], np.uint8)) == "H2O" and formula(np.array([6], np.uint8)) == "C"
