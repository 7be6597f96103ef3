"""QM9: the published xyz files, quirks of Fortran and all, give electronic energies; damage is named."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import units

from rung.data.sources import source as limits
from rung.data.sources.qm9 import QM9
from rung.data.table import StructureTable, faults

LEVEL = "b3lyp_631g2dfp"
METHANE = (
    "5\n"
    "gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\t"
    "-40.476062\t-40.475117\t-40.498597\t6.469\t\n"
    "C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689\n"
    "H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921\n"
    "H\t 1.0117308433\t 1.4637511618\t 2.8*^-4\t 0.133922\n"
    "H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923\n"
    "H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 1.339*^-1\n"
    "1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078\n"
    "C\tC\t\n"
    "InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4\n"
)
WATER = (
    "3\n"
    "gdb 3\t799.58812\t437.90386\t282.94545\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0002\t0.021375\t-76.404702\t"
    "-76.401867\t-76.400922\t-76.422349\t6.002\t\n"
    "O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706\n"
    "H\t 0.0647664923\t 0.0205721989\t 1.5346341*^-3\t 0.294853\n"
    "H\t 0.8717903737\t 1.3007924048\t 6.9321*^-6\t 0.294853\n"
    "1671.4222\t3803.6305\t3907.698\t\nO\tO\t\nInChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2\n"
)
UNCHARACTERIZED = (
    "==== \nList of molecules that failed\n\n Index   GDB17    B3LYP\n----\n"
    "     3  O   [OH-]   X\n    58 N  N  N\n====\n"
)


def molecules(count: int) -> dict[str, str]:
    """Return file name -> text of molecules 1..count, methane and water in turn."""
    texts = {}
    for index in range(1, count + 1):
        text = METHANE if index % 2 else WATER
        texts[f"dsgdb9nsd_{index:06d}.xyz"] = re.sub(r"gdb \d+", f"gdb {index}", text)
    return texts


def write_folder(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def write_tar(path: Path, texts: dict[str, str]) -> Path:
    with tarfile.open(path, "w:bz2", compresslevel=1) as archive:  # blocks of 100 kB
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def read_all(source: QM9, path: Path) -> StructureTable:
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_structures_and_units(tmp_path: Path, kind: str) -> None:
    texts = {"dsgdb9nsd_000001.xyz": METHANE, "dsgdb9nsd_000003.xyz": WATER}
    path = write_tar(tmp_path / "q.tar.bz2", texts) if kind == "tar" else write_folder(tmp_path / "q", texts)
    table = read_all(QM9(), path)
    assert faults(table) == {} and table.fidelities == list(QM9().fidelities) == [LEVEL]
    assert table.keys.tolist() == table.groups.tolist() == ["gdb9-000001", "gdb9-000003"]
    assert table.numbers.tolist() == [6, 1, 1, 1, 1, 8, 1, 1]
    expected = [[-0.0126981359, 1.0858041578, 0.0080009958], [1.0117308433, 1.4637511618, 2.8e-4]]
    np.testing.assert_allclose(table.positions[[0, 2]], expected, rtol=1e-6)
    np.testing.assert_allclose(table.positions[7], [0.8717903737, 1.3007924048, 6.9321e-6], rtol=1e-6)
    electronic = np.array([-40.47893 - 0.044749, -76.404702 - 0.021375])  # U0 less the zero-point energy
    np.testing.assert_allclose(table.labels[f"energy.{LEVEL}"], electronic * units.Hartree, rtol=1e-6)
    assert not table.charge.any() and (table.multiplicity == 1).all() and not table.pbc.any()


def test_atomization_energy_of_methane(tmp_path: Path) -> None:
    table = read_all(QM9(), write_folder(tmp_path / "q", {"a.xyz": METHANE}))
    atoms = QM9.info.e0[LEVEL]
    binding = table.labels[f"energy.{LEVEL}"][0] - atoms[6] - 4 * atoms[1]
    assert -19 < binding < -17.9  # experiment: -18.2 eV (De, 420 kcal/mol)


@pytest.mark.parametrize("per_part", [1, 3, 7, 100])
def test_parts_partition_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int) -> None:
    path = write_folder(tmp_path / "q", molecules(7))
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 2)
    parts = QM9().parts([path])
    assert len(parts) == -(-7 // per_part)
    assert all(len(table) <= 2 for part in parts for table in QM9().read(part))
    assert read_all(QM9(), path).keys.tolist() == [f"gdb9-{index:06d}" for index in range(1, 8)]


def test_the_archive_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", 2)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 3)
    others = {"readme.txt": "no molecule", "._dsgdb9nsd_000001.xyz": "of macOS"}
    path = write_tar(tmp_path / "dsgdb9nsd.xyz.tar.bz2", {**molecules(7), **others})
    [part] = QM9().parts([path])
    assert [len(table) for table in QM9().read(part)] == [3, 3, 1]


def test_uncharacterized_molecules_are_left_out(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "q", molecules(4))
    (listing := tmp_path / "uncharacterized.txt").write_text(UNCHARACTERIZED)
    kept = read_all(QM9(uncharacterized=str(listing)), path)
    assert kept.keys.tolist() == ["gdb9-000001", "gdb9-000002", "gdb9-000004"]
    listing.write_text("nothing of use\n")
    with pytest.raises(ValueError, match="uncharacterized.txt: expected lines that begin with the index"):
        QM9(uncharacterized=str(listing)).parts([path])
    with pytest.raises(FileNotFoundError, match="gone.txt: no such file; expected the published uncharacterized.txt"):
        QM9(uncharacterized=str(tmp_path / "gone.txt")).parts([path])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gdb 1", "1", "expected 'gdb' and 16 numbers in line 2, found '1\t157.7"),
        ("\t6.469", "", "expected 'gdb' and 16 numbers in line 2"),
        ("-40.47893", "none", "could not convert string to float: 'none'"),
        ("5\n", "five\n", "invalid literal for int() with base 10: 'five'"),
        ("5\n", "6\n", "expected 11 lines, found 10; truncated?"),
        ("InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4\n", "", "expected 10 lines, found 9; truncated?"),
        (
            "C\t-0.0126981359",
            "Xx\t-0.0126981359",
            "expected an element of H, C, N, O, F, x, y, z in 5 columns, found 'Xx",
        ),
        ("\t-0.535689", "", "(4 columns)"),
        ("1.4637511618", "1.46375*11618", "could not convert string to float: '1.46375*11618'"),
        (METHANE, "", "dsgdb9nsd_000001: not a molecule of QM9: list index out of range"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in METHANE
    path = write_folder(tmp_path / "q", {"dsgdb9nsd_000001.xyz": METHANE.replace(old, new, 1)})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_all(QM9(), path)
    assert str(caught.value).startswith(f"{path}: dsgdb9nsd_000001: not a molecule of QM9: ")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "q.tar.bz2", molecules(500))
    good = path.read_bytes()
    for damaged in (b"", b"not a tar"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"q.tar.bz2: expected a folder, a zip or a tar .*, found {len(damaged)}"):
            QM9().parts([path])
    [part] = QM9().parts([_write(path, good)])
    for length in (len(good) // 10, len(good) // 2, len(good) - 200):
        _write(path, good[:length])
        with pytest.raises(ValueError, match="q.tar.bz2: not readable .*damaged or truncated"):
            list(QM9().read(part))


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_archives_without_a_molecule_are_named(tmp_path: Path) -> None:
    write_folder(empty := tmp_path / "empty", {})
    with pytest.raises(ValueError, match="empty: expected .*xyz files, found none"):
        QM9().parts([empty])
    [part] = QM9().parts([write_tar(tmp_path / "q.tar.bz2", {"readme.txt": "no molecule"})])
    with pytest.raises(ValueError, match="q.tar.bz2: expected .*xyz files, found none"):
        list(QM9().read(part))
    with pytest.raises(FileNotFoundError, match="source 'qm9' reads dsgdb9nsd.xyz.tar.bz2"):
        QM9().parts([tmp_path / "gone.tar.bz2"])


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dsgdb9nsd_000001.xyz", b"\xff\xfe")
    with pytest.raises(ValueError, match="q.zip: dsgdb9nsd_000001.xyz: expected UTF-8 text"):
        read_all(QM9(), path)


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    builds(QM9(), write_folder(tmp_path / "q", molecules(7)))
