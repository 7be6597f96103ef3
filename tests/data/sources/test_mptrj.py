"""MPtrj: JSON cut at any byte gives each frame once; the zip of extxyz files gives the same structures."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.io import write as ase_write

from rung.data.sources import json_stream, mptrj
from rung.data.sources import source as limits
from rung.data.sources.mptrj import MPtrj
from rung.data.structure import Structure

rng = np.random.default_rng(0)


def frame(symbols: tuple[str, ...], **changes: object) -> dict:
    matrix = (np.eye(3) * 4 + rng.normal(size=(3, 3)) * 0.1).tolist()
    sites = [
        {"species": [{"element": s, "occu": 1}], "abc": rng.random(3).tolist(), "xyz": [0, 0, 0], "label": s}
        for s in symbols
    ]
    stress = rng.normal(size=(3, 3)) * 10
    record = {
        "structure": {
            "@module": "pymatgen.core.structure",
            "charge": None,
            "lattice": {"matrix": matrix},
            "sites": sites,
        },
        "uncorrected_total_energy": float(rng.normal()) - 30,
        "corrected_total_energy": float(rng.normal()) - 31,
        "energy_per_atom": -9.0,
        "ef_per_atom": 0.1,
        "force": rng.normal(size=(len(symbols), 3)).tolist(),
        "stress": (stress + stress.T).tolist(),
        "magmom": None,
        "bandgap": 0.0,
        "mp_id": "mp-1",
    }
    return {**record, **changes}


def materials() -> dict:
    return {
        "mp-1": {"mp-1-0-0": frame(("Li", "O")), "mp-1-0-12": frame(("Li", "O"))},
        "mp-22": {"mp-7777-1-0": frame(("Fe", "O", "O"), stress=None)},
        "mvc-3": {"mvc-3-0-0": frame(("Na",)), "mvc-3-1-0": frame(("Na",), force=None)},
        "mp-444": {"mp-444-0-0": frame(("U",))},
    }


def write(folder: Path, data: object) -> Path:
    path = folder / "MPtrj_2022.9_full.json"
    path.write_text(json.dumps(data))
    return path


def read(path: Path, source: MPtrj | None = None) -> list[Structure]:
    source = source or MPtrj()
    return [s for part in source.parts([path]) for table in source.read(part) for s in table]


def test_a_frame(tmp_path: Path) -> None:
    data = materials()
    structures = read(write(tmp_path, data))
    assert [s.key for s in structures] == [f"{m}/{f}" for m, frames in data.items() for f in frames]
    assert [s.group for s in structures] == ["mp-1", "mp-1", "mp-22", "mvc-3", "mvc-3", "mp-444"]
    record, found = data["mp-1"]["mp-1-0-0"], structures[0]
    abc = [site["abc"] for site in record["structure"]["sites"]]
    atoms = Atoms("LiO", cell=record["structure"]["lattice"]["matrix"], scaled_positions=abc, pbc=True)
    np.testing.assert_allclose(found.positions, atoms.positions, rtol=1e-6)
    assert found.numbers.tolist() == [3, 8] and found.pbc.all() and found.multiplicity == 1
    labels = found.labels["pbe_u"]
    assert labels.energy == record["uncorrected_total_energy"]
    np.testing.assert_allclose(labels.forces, record["force"], rtol=1e-6)
    np.testing.assert_allclose(labels.stress, np.array(record["stress"]) * -0.1 * ase.units.GPa, rtol=1e-6)
    assert structures[2].labels["pbe_u"].stress is None and structures[4].labels["pbe_u"].forces is None
    corrected = read(tmp_path / "MPtrj_2022.9_full.json", MPtrj(corrected=True))[0]
    assert corrected.labels["pbe_u"].energy == record["corrected_total_energy"]


@pytest.mark.parametrize("size", [1, 97, 1000, 5000, 10**9])
@pytest.mark.parametrize("indent", [None, 2])
def test_any_cut_gives_each_frame_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, indent: int | None
) -> None:
    data = materials()
    path = tmp_path / "mptrj.json"
    path.write_text(json.dumps(data, indent=indent))
    whole = [s.key for s in read(path)]
    monkeypatch.setattr(json_stream, "PIECE", 600)
    monkeypatch.setattr(mptrj, "PART_BYTES", size if size > 1 else path.stat().st_size // 40)
    assert [s.key for s in read(path)] == whole
    parts = MPtrj().parts([path])
    assert sum(part.bytes for part in parts) == path.stat().st_size and parts[-1].stop == path.stat().st_size


def extxyz(data: dict) -> dict[str, str]:
    """Return the text of one extxyz file per material, in the units and with the keys of the published zip."""
    files = {}
    for material, frames in data.items():
        text = io.StringIO()
        for name, record in frames.items():
            structure = record["structure"]
            symbols = [site["species"][0]["element"] for site in structure["sites"]]
            abc = [site["abc"] for site in structure["sites"]]
            atoms = Atoms(symbols, cell=structure["lattice"]["matrix"], scaled_positions=abc, pbc=True)
            task, calculation, step = name.rsplit("-", 2)
            atoms.info.update(task_id=task, calc_id=int(calculation), ionic_step=int(step), mp_id=material)
            atoms.info["energy"] = record["uncorrected_total_energy"]
            atoms.info["corrected_total_energy"] = record["corrected_total_energy"]
            if record["force"]:
                atoms.arrays["forces"] = np.array(record["force"])
            if record["stress"]:
                atoms.info["stress"] = np.array(record["stress"]) * -1e-1 * ase.units.GPa
            ase_write(text, atoms, format="extxyz")
        files[material] = text.getvalue()
    return files


def zipped(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "mp-trj-extxyz.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for material, text in files.items():
            archive.writestr(f"mptrj-gga-ggapu/{material}.extxyz", text)
            archive.writestr(f"__MACOSX/mptrj-gga-ggapu/._{material}.extxyz", "\x00")
    return path


@pytest.mark.filterwarnings("ignore:write_xyz")
@pytest.mark.parametrize("files", [1, 3, 1000])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_zip_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, corrected: bool) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", 11 * files)
    data = materials()
    expected = sorted(read(write(tmp_path, data), MPtrj(corrected)), key=lambda s: s.key)
    found = sorted(read(zipped(tmp_path, extxyz(data)), MPtrj(corrected)), key=lambda s: s.key)
    for one, other in zip(found, expected, strict=True):
        assert (one.key, one.group, one.numbers.tolist()) == (other.key, other.group, other.numbers.tolist())
        labels = asdict(other.labels["pbe_u"])
        for name, value in asdict(one.labels["pbe_u"]).items():
            assert (value is None) == (labels[name] is None)
            if value is not None:
                np.testing.assert_allclose(value, labels[name], rtol=1e-4, atol=2e-8)
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"first": {}}, "expected a material such as 'mp-123', found 'first'"),
        ({"mp-1": {"structure": {}}}, "material mp-1: expected a frame such as 'mp-123-0-5', found 'structure'"),
        ({"mp-1": {"mp-1-0-0": {"structure": 1}}}, "frame mp-1-0-0: expected 'uncorrected_total_energy', found struct"),
        ({"mp-1": {"mp-1-0-0": frame(("Li",), force=[[0, 0]])}}, r"frame mp-1-0-0: force: expected shape \(1, 3\)"),
        ({"mp-1": {"mp-1-0-0": frame(("Li",), stress=[1, 2])}}, r"frame mp-1-0-0: stress: expected shape \(3, 3\)"),
        ([], "MPtrj_2022.9_full.json: character 0: expected '{', found '\\['"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, data))


def test_a_name_at_a_cut_that_the_next_part_could_not_find_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"mp-1": {"mp-1-0-0": frame(("Li",))}, "mp-2": {"odd": frame(("Li",))}})
    first = mptrj.Part(path, 0, path.read_text().index('"mp-2"') - 5)
    with pytest.raises(ValueError, match="expected a frame such as 'mp-123-0-5', found 'odd'"):
        list(MPtrj().read(first))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, materials())
    path.write_text(path.read_text()[:-200])
    with pytest.raises(ValueError, match="MPtrj_2022.9_full.json: character .* truncated"):
        read(path)
    packed = tmp_path / "MPtrj.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(materials()).encode()))
    assert len(read(packed)) == 6
    for name, text, message in (
        ("cut.zip", b"PK no", "cut.zip: expected a folder, a zip or a tar archive of .*extxyz files"),
        ("zero.json", b"", "zero.json: the file is empty"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=r"mp-trj-extxyz.zip: expected \*.extxyz files, found none"):
        read(zipped(tmp_path, {}))
    with pytest.raises(ValueError, match="mp-1.extxyz: expected frames in extxyz with task_id"):
        read(zipped(tmp_path, {"mp-1": "1\nProperties=species:S:1:pos:R:3 energy=1.0\nH 0 0 0\n"}))


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mptrj, "PART_BYTES", 1000)
    builds(MPtrj(), write(tmp_path, materials()))
