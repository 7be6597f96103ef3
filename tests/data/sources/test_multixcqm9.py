"""MultiXC-QM9: geometries and tables of energies are joined by the molecule's index; other layouts are named."""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rung.data.sources import multixcqm9
from rung.data.sources import source as limits
from rung.data.sources.multixcqm9 import COLUMNS, FUNCTIONALS, MultiXCQM9
from rung.data.table import StructureTable, faults

WATER = "3\n\nO -0.034360 0.977540 0.007602\nH 0.064766 0.020572 0.001535\nH 0.871790 1.300792 0.000693\n"
NUMBERS = [8, 1, 1]
INDICES = [1, 2, 3, 10, 21]


def write(folder: Path, indices: list[int] = INDICES, columns: tuple[str, ...] = FUNCTIONALS) -> dict[str, np.ndarray]:
    """Write the unpacked set: one row per molecule in the order of texts (10 before 2), 'index' last."""
    rng = np.random.default_rng(0)
    (folder / "xyzfiles").mkdir(parents=True)
    for index in indices:
        (folder / "xyzfiles" / f"dsgdb9nsd_{index:06d}.xyz").write_text(WATER)
    raw = {}
    for basis in ("SZ", "DZP", "TZP", "XTB"):
        names = columns if basis != "XTB" else ("GFNXTB",)
        raw[basis] = rng.normal(-30, 5, (len(indices), len(names)))
        (folder / basis / "molecules").mkdir(parents=True)
        with (folder / basis / "molecules" / "molecules.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "index"])
            for row in sorted(range(len(indices)), key=lambda row: str(indices[row])):
                writer.writerow([*raw[basis][row], indices[row]])
    return raw


def read_all(source: MultiXCQM9, path: Path) -> StructureTable:
    return StructureTable.concatenate([t for part in source.parts([path]) for t in source.read(part)])


def table_file(folder: Path, basis: str = "TZP") -> Path:
    return folder / basis / "molecules" / "molecules.csv"


def test_levels_are_229_and_named_apart() -> None:
    assert len(FUNCTIONALS) == 76 and len(COLUMNS) == len(MultiXCQM9.info.fidelities) == 229
    assert {"pbe_sz", "hcth_407_dzp", "b3lyp_vwn5_tzp", "b3lyp_star_vwn5_tzp", "vs98_x_xc_sz", "gfn2_xtb"} <= set(
        COLUMNS
    )


def test_energies_belong_to_their_molecules(tmp_path: Path) -> None:
    raw = write(tmp_path / "set")
    table = read_all(MultiXCQM9(), tmp_path / "set")
    assert faults(table) == {}
    assert table.keys.tolist() == table.groups.tolist() == [f"gdb9-{index:06d}" for index in INDICES]
    np.testing.assert_array_equal(table.numbers, NUMBERS * 5)
    np.testing.assert_allclose(table.positions[0], [-0.034360, 0.977540, 0.007602], rtol=1e-6)
    for level, name in (("pbe_tzp", "PBE"), ("b3lyp_d_tzp", "B3LYP-D"), ("m06_2x_tzp", "M06-2X")):
        np.testing.assert_allclose(table.labels[f"energy.{level}"], raw["TZP"][:, FUNCTIONALS.index(name)], rtol=1e-12)
    np.testing.assert_allclose(table.labels["energy.gfn2_xtb"], raw["XTB"][:, 0], rtol=1e-12)
    assert set(table.fidelities) == set(MultiXCQM9().fidelities)


def test_all_levels_at_once(tmp_path: Path) -> None:
    raw = write(tmp_path / "set")
    table = read_all(MultiXCQM9(tuple(COLUMNS)), tmp_path / "set")
    assert len(table.labels) == 229
    for basis in ("SZ", "DZP", "TZP"):
        found = [table.labels[f"energy.{multixcqm9.level_name(name, basis)}"] for name in FUNCTIONALS]
        np.testing.assert_allclose(np.transpose(found), raw[basis], rtol=1e-12)


def test_only_the_tables_of_chosen_levels_are_needed(tmp_path: Path) -> None:
    write(tmp_path / "set")
    table_file(tmp_path / "set", "SZ").unlink()
    assert len(read_all(MultiXCQM9(), tmp_path / "set")) == 5
    with pytest.raises(
        FileNotFoundError, match=r"SZ/molecules/molecules.csv: no such file, needed for 'pbe_sz'; unpack"
    ):
        MultiXCQM9(("pbe_sz",)).parts([tmp_path / "set"])
    with pytest.raises(ValueError, match="unknown fidelity 'pbe_tz'; known: .* did you mean 'pbe_.?z"):
        MultiXCQM9(("pbe_tz",))
    with pytest.raises(ValueError, match="multixcqm9: levels: expected at least one of .*gfn2_xtb, found none"):
        MultiXCQM9(())


def test_missing_energies(tmp_path: Path) -> None:
    write(tmp_path / "set", columns=("PBE", "M06-2X"))
    text = table_file(tmp_path / "set").read_text().splitlines()
    kept = [text[0], *(f",-31.5,{line.rpartition(',')[2]}" for line in text[1:] if not line.endswith(",3"))]
    table_file(tmp_path / "set").write_text("\n".join(kept) + "\n")
    table = read_all(MultiXCQM9(("pbe_tzp", "m06_2x_tzp")), tmp_path / "set")
    assert table.keys.tolist() == [f"gdb9-{index:06d}" for index in (1, 2, 10, 21)]  # 3 has no energy
    assert np.isnan(table.labels["energy.pbe_tzp"]).all() and (table.labels["energy.m06_2x_tzp"] == -31.5).all()


@pytest.mark.parametrize("per_part", [1, 2, 100])
@pytest.mark.parametrize("zipped", [True, False])
def test_parts_partition_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, zipped: bool) -> None:
    write(folder := tmp_path / "set")
    whole = read_all(MultiXCQM9(), folder)
    if zipped:
        with zipfile.ZipFile(folder / "xyz.zip", "w") as archive:
            for file in (folder / "xyzfiles").iterdir():
                archive.write(file, f"xyzfiles/{file.name}")
                file.unlink()
        (folder / "xyzfiles").rmdir()
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 2)
    assert len(MultiXCQM9().parts([folder])) == -(-5 // per_part)
    pieces = read_all(MultiXCQM9(), folder)
    assert pieces.keys.tolist() == whole.keys.tolist()
    for name, array in whole.labels.items():
        np.testing.assert_array_equal(pieces.labels[name], array)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected columns 'index' and 'PBE', found an empty file"),
        ("BLYP,index\n-30,1\n", "expected columns 'PBE', found BLYP, index"),
        ("PBE,molecule\n-30,1\n", "expected columns 'index', found PBE, molecule"),
        ("PBE,index\n", "expected one line per molecule, found none"),
        ("PBE,index\n-30,1\n-31\n", "line 3: expected the index of a molecule and energies in eV (list index"),
        ("PBE,index\n-30,1\n-3x,2\n", "line 3: expected the index of a molecule and energies in eV (could not"),
        (
            "PBE,index\n-30,1\n-31,1\n",
            "line 3: expected the index of a molecule and energies in eV (molecule 1 a second",
        ),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(folder := tmp_path / "set")
    table_file(folder).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{table_file(folder)}: {message}")):
        read_all(MultiXCQM9(("pbe_tzp",)), folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dsgdb9nsd_000001", "", "not an xyz file of one molecule: list index out of range"),
        ("dsgdb9nsd_000001", WATER.replace("3\n", "4\n", 1), "expected 6 lines, found 5; truncated?"),
        ("dsgdb9nsd_000001", WATER.replace("O", "S"), "expected an element of H, C, N, O, F"),
        ("dsgdb9nsd_000001", WATER.replace(" 0.007602", ""), "(3 columns)"),
        ("water", WATER, "water.xyz: expected a name that ends in the molecule's index"),
    ],
)
def test_other_geometries_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(folder := tmp_path / "set")
    (folder / "xyzfiles" / f"{name}.xyz").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_all(MultiXCQM9(), folder)


def test_folders_without_geometries_are_refused(tmp_path: Path) -> None:
    write(folder := tmp_path / "set", indices=[])
    with pytest.raises(ValueError, match="xyzfiles: expected .*xyz files, found none"):
        MultiXCQM9().parts([folder])
    (folder / "xyzfiles").rmdir()
    with pytest.raises(FileNotFoundError, match="expected 'xyzfiles' or 'xyz.zip' in it, found DZP, SZ, TZP, XTB"):
        MultiXCQM9().parts([folder])
    with pytest.raises(FileNotFoundError, match="no such file; source 'multixcqm9' reads the folder"):
        MultiXCQM9().parts([tmp_path / "gone"])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    write(tmp_path / "set")
    builds(MultiXCQM9(), tmp_path / "set")
