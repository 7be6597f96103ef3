"""QMugs: SDF files of a folder or of the archive itself, hartree to eV, charges from the connection table."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms

from rung.data.sources import qmugs
from rung.data.sources import source as limits
from rung.data.sources.qmugs import QMugs
from rung.data.table import StructureTable

LEVELS = ("gfn2_xtb", "wb97xd_def2svp")


def sdf(
    atoms: Atoms, gfn2: str = "-12.5", dft: str = "-168.25", charges: str = "M  CHG  2   2   1   3  -1\n", code: int = 0
) -> str:
    """Return a conformer as the data set has it: V2000 with properties of which some are long lists."""
    lines = ["CHEMBL1", "     RDKit          3D", "", f"{len(atoms):3d}  1  0  0  0  0  0  0  0  0999 V2000"]
    for i, atom in enumerate(atoms):
        x, y, z = atom.position
        old = code if i == 0 else 0
        lines.append(f"{x:10.4f}{y:10.4f}{z:10.4f} {atom.symbol:<3} 0{old:3d}  0  0  0  0  0  0  0  0  0  0")
    lines += ["  1  2  3  0", charges + "M  END"]
    properties = {
        "CHEMBL_ID": "CHEMBL1",
        "CONF_ID": "conf_00",
        "GFN2:TOTAL_ENERGY": gfn2,
        "GFN2:MULLIKEN_CHARGES": "-0.15|0.25|-0.25|0.15",
        "DFT:TOTAL_ENERGY": dft,
        "DFT:DIPOLE": "0.1|0.2|0.3|0.37",
    }
    for key, value in properties.items():
        if value != "absent":
            lines += [f">  <{key}>  (1) ", value, ""]
    return "\n".join([*lines, "$$$$", ""])


def molecule(seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    return Atoms("CNOHClBr"[:4] + "ClBr"[: 2 * (seed % 2)], np.round(rng.normal(scale=12, size=(4 + seed % 2, 3)), 4))


def contents() -> dict[str, str]:
    return {
        f"structures/CHEMBL{m}/conf_{c:02d}.sdf": sdf(molecule(3 * m + c), f"{-12.5 - m}", f"{-168.25 - c}")
        for m in (1, 15, 2)
        for c in range(3)
    }


def write_archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for folder in dict.fromkeys(name.rpartition("/")[0] for name in files):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "structures"


def read(path: Path, levels: tuple[str, ...] = LEVELS) -> StructureTable:
    reader = QMugs(levels=levels)
    return StructureTable.concatenate([t for part in reader.parts([path]) for t in reader.read(part)])


@pytest.mark.parametrize("packed", [True, False])
def test_folder_and_archive_give_the_same_structures(tmp_path: Path, packed: bool) -> None:
    path = write_archive(tmp_path / "structures.tar.gz", contents()) if packed else write_folder(tmp_path, contents())
    table = read(path)
    assert table.keys.tolist() == [f"CHEMBL{m}-conf_{c:02d}" for m in (1, 15, 2) for c in range(3)]
    assert table.groups.tolist() == [f"CHEMBL{m}" for m in (1, 15, 2) for _ in range(3)]
    assert set(table.charge.tolist()) == {0} and set(table.multiplicity.tolist()) == {1}
    molecules = [molecule(3 * m + c) for m in (1, 15, 2) for c in range(3)]
    np.testing.assert_array_equal(table.numbers, np.concatenate([m.numbers for m in molecules]))
    np.testing.assert_allclose(table.positions, np.concatenate([m.positions for m in molecules]), rtol=1e-6)
    gfn2 = np.array([-12.5 - m for m in (1, 15, 2) for _ in range(3)]) * ase.units.Hartree
    dft = np.array([-168.25 - c for _ in range(3) for c in range(3)]) * ase.units.Hartree
    np.testing.assert_allclose(table.labels["energy.gfn2_xtb"], gfn2, rtol=1e-6)
    np.testing.assert_allclose(table.labels["energy.wb97xd_def2svp"], dft, rtol=1e-6)


@pytest.mark.parametrize("per_part", [3, 6, 300])
def test_parts_and_tables_of_any_size_cover_the_data_once(
    tmp_path: Path, per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, contents())
    archive = write_archive(tmp_path / "structures.tar.gz", contents())
    whole = read(folder).keys.tolist()
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 2)
    for path, number in ((folder, {3: 3, 6: 2, 300: 1}[per_part]), (archive, 1)):
        parts = QMugs().parts([path])
        assert len(parts) == number
        tables = [table for part in parts for table in QMugs().read(part)]
        assert max(map(len, tables)) == 2
        assert [key for table in tables for key in table.keys.tolist()] == whole


@pytest.mark.parametrize(
    ("charges", "code", "charge"),
    [
        ("M  CHG  1   2   1\n", 0, 1),
        ("M  CHG  2   1  -1   2  -2\nM  CHG  1   3   1\n", 0, -2),
        ("M  CHG  1   2   1\n", 5, 1),
        ("", 5, -1),
        ("", 3, 1),
        ("", 0, 0),
    ],
)
def test_charge_is_the_sum_of_formal_charges(tmp_path: Path, charges: str, code: int, charge: int) -> None:
    files = {"structures/CHEMBL1/conf_00.sdf": sdf(molecule(0), charges=charges, code=code)}
    assert read(write_folder(tmp_path, files)).charge.tolist() == [charge]


def test_levels_are_an_option_and_what_has_none_is_left_out(tmp_path: Path) -> None:
    files = {
        "structures/CHEMBL1/conf_00.sdf": sdf(molecule(0), dft="absent"),
        "structures/CHEMBL1/conf_01.sdf": sdf(molecule(1), gfn2="nan", dft=""),
        "structures/CHEMBL1/conf_02.sdf": sdf(molecule(2), gfn2=""),
    }
    folder = write_folder(tmp_path, files)
    table = read(folder)
    assert table.keys.tolist() == ["CHEMBL1-conf_00", "CHEMBL1-conf_02"]
    assert table.has("energy", "gfn2_xtb").tolist() == [True, False]
    assert read(folder, ("wb97xd_def2svp",)).keys.tolist() == ["CHEMBL1-conf_02"]
    assert list(QMugs(levels=("gfn2_xtb",)).fidelities) == ["gfn2_xtb"]
    with pytest.raises(ValueError, match="unknown fidelity 'gfn1_xtb'.*did you mean 'gfn2_xtb'"):
        QMugs(levels=("gfn1_xtb",))
    with pytest.raises(ValueError, match="qmugs: levels: expected at least one of gfn2_xtb, wb97xd_def2svp"):
        QMugs(levels=())


WHOLE = sdf(molecule(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"conf_00.sdf: expected one whole V2000 record, found 0 ends of records"),
        ("$$$$\n", "expected one whole V2000 record, found 1 ends"),
        (WHOLE[: len(WHOLE) // 3], "expected one whole V2000 record, found 0 ends of records"),
        (WHOLE + WHOLE, "expected one whole V2000 record, found 2 ends"),
        (WHOLE.replace("V2000", "V3000"), "expected one whole V2000 record, found 1 .* counts line '.*V3000'"),
        (WHOLE.replace("  5  1  0", "  9  1  0"), "conf_00.sdf: .*expected"),
        (WHOLE.replace("  5  1  0", "  0  1  0"), "atom block: expected at least one atom, found none"),
        (WHOLE.replace(" Cl ", " Xx "), "atom block: expected an element's symbol, found 'Xx'"),
        (WHOLE.replace(":TOTAL_ENERGY", ":ENERGY"), "expected the property GFN2:TOTAL_ENERGY or .*, found CHEMBL_ID, "),
        (WHOLE.replace("-168.25", "-168,25"), "conf_00.sdf: could not convert string to float: '-168,25'"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = write_folder(tmp_path, {"structures/CHEMBL1/conf_00.sdf": text})
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert "structures: CHEMBL1/conf_00.sdf: " in str(caught.value)


def test_links_in_an_archive_are_not_followed_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "secret.sdf").write_text(WHOLE)
    path = tmp_path / "structures.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, target, kind in (
            ("structures/CHEMBL1/conf_00.sdf", str(tmp_path / "secret.sdf"), tarfile.SYMTYPE),
            ("structures/CHEMBL1/conf_01.sdf", "../../secret.sdf", tarfile.LNKTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
        entry = tarfile.TarInfo("../../escape/CHEMBL2/conf_00.sdf")
        entry.size = len(WHOLE)
        archive.addfile(entry, io.BytesIO(WHOLE.encode()))
    before = sorted(tmp_path.parent.rglob("*"))
    assert read(path).keys.tolist() == ["CHEMBL2-conf_00"]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    data = write_archive(tmp_path / "whole.tar.gz", contents()).read_bytes()
    damaged = tmp_path / "structures.tar.gz"
    wrong_checksum = data[:-8] + b"\0\0\0\0" + data[-4:]
    for content in (
        b"",
        b"no gzip at all",
        data[: len(data) // 2],
        data[:-4],
        wrong_checksum,
        gzip.compress(b"no tar"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="structures.tar.gz: not readable .*damaged or truncated"):
            read(damaged)


def test_other_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file; source 'qmugs' reads structures.tar.gz"):
        QMugs().parts([tmp_path / "absent"])
    (tmp_path / "summary.csv").write_text("chembl_id")
    with pytest.raises(ValueError, match="summary.csv: expected structures.tar.gz.*, found another file"):
        QMugs().parts([tmp_path / "summary.csv"])
    with pytest.raises(ValueError, match="expected folders <ChEMBL id> with conf_<nn>.sdf, found no folder"):
        QMugs().parts([tmp_path])
    (tmp_path / "structures/CHEMBL1").mkdir(parents=True)
    with pytest.raises(ValueError, match="CHEMBL1: expected conf_<nn>.sdf, found no .sdf"):
        read(tmp_path / "structures")
    with pytest.raises(ValueError, match="a.tar.gz: expected files <ChEMBL id>/conf_<nn>.sdf, found no .sdf"):
        read(write_archive(tmp_path / "a.tar.gz", {"structures/readme.txt": "text"}))
    with pytest.raises(ValueError, match="b.tar.gz: expected members .*, found 'conf_00.sdf'"):
        read(write_archive(tmp_path / "b.tar.gz", {"conf_00.sdf": WHOLE}))
    monkeypatch.setattr(qmugs, "_MAX_SDF", 100)
    with pytest.raises(ValueError, match="conf_00.sdf: expected an SDF of one conformer, found [0-9]+ bytes"):
        read(write_archive(tmp_path / "c.tar.gz", contents()))


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    builds(QMugs(), write_archive(tmp_path / "structures.tar.gz", contents()))
    builds(QMugs(), write_folder(tmp_path, contents()))
