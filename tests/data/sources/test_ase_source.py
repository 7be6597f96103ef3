"""AseFile: the tables of a file hold what `read_structures` yields; tests/data/test_ase_file.py tests the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rung.data.sources import source as limits
from rung.data.sources.ase_file import AseFile, read_structures
from rung.data.sources.records import tables

FRAME = "2\nProperties=species:S:1:pos:R:3:{forces}:R:3 {energy}=-31.{k} mol=m{k}\nH 0 0 0 1 0 0\nH 0 0 0.74 -1 0 0\n"


def write(folder: Path, name: str, energy: str = "REF_energy", forces: str = "REF_forces") -> Path:
    path = folder / name
    path.write_text("".join(FRAME.format(k=k, energy=energy, forces=forces) for k in range(5)))
    return path


def test_tables_hold_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path, "a.extxyz", "ccsd", "mp2"), write(tmp_path, "b.extxyz", "ccsd", "mp2")]
    keys = {"energy_key": "ccsd", "forces_key": "mp2", "group_key": "mol"}
    source = AseFile("ccsdt_cbs", "CCSD(T)", "CBS", code="ORCA", **keys)
    parts = source.parts(paths)
    assert [part.path for part in parts] == paths and parts[0].bytes == paths[0].stat().st_size
    found = [s for part in parts for table in source.read(part) for s in table]
    expected = [s for path in paths for s in read_structures(path, fidelity="ccsdt_cbs", **keys)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(asdict(one), asdict(other))
    assert found[3].key == "a-000003" and found[3].group == "m3"
    assert source.fidelities["ccsdt_cbs"].basis == "CBS" and AseFile("pbe").fidelities["pbe"].method == "pbe"
    monkeypatch.setattr(limits, "TABLE_STRUCTURES", 4)
    sizes = [len(table) for table in tables(iter(expected))]
    assert sizes == [4, 4, 2]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name 'PBE': expected lower-case"):
        AseFile("PBE")
    with pytest.raises(FileNotFoundError, match="none.xyz: no such file; source 'ase' reads"):
        AseFile("pbe").parts([tmp_path / "none.xyz"])
    (part,) = AseFile("pbe").parts([write(tmp_path, "a.extxyz", "other", "forces_other")])
    with pytest.raises(ValueError, match="a.extxyz: frame 0: no energy and no forces"):
        list(AseFile("pbe").read(part))


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    builds(AseFile("pbe"), write(tmp_path, "a.extxyz"), write(tmp_path, "b.extxyz"))
