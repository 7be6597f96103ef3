"""MatPES: entries as published (a compressed list), kbar in VASP's sign to eV/angstrom^3 in ASE's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from rung.data.sources.matpes import MatPES
from rung.data.structure import Structure

MATRIX = [[3.1, 0.0, 0.2], [0.1, 2.9, 0.0], [0.0, 0.3, 5.4]]
STRESS = [-5.71186022, -9.34590239, 13.64346365, 22.84178803, 23.6719352, 6.22290851]
FORCES = [[0.43578007, -0.32456562, -0.38019986], [-0.43578007, 0.32456562, 0.38019986]]


def entry(**changes: object) -> dict:
    abc = {"Y": [0.01, 0.02, 0.03], "Ti": [0.5, 0.5, 0.48]}
    sites = [
        {"species": [{"element": e, "occu": 1}], "abc": x, "properties": {"magmom": 0.1}, "label": e, "xyz": [0, 0, 0]}
        for e, x in abc.items()
    ]
    lattice = {"matrix": MATRIX, "pbc": [True, True, True], "a": 3.1, "volume": 49.0}
    record = {
        "builder_meta": {"emmet_version": "0.84"},
        "nsites": 2,
        "formula_pretty": "YTi",
        "structure": {"@module": "pymatgen.core.structure", "charge": 0, "lattice": lattice, "sites": sites},
        "energy": -13.19442081,
        "forces": FORCES,
        "stress": STRESS,
        "matpes_id": "matpes-20240214_999484_73",
        "functional": "PBE",
        "formation_energy_per_atom": None,
        "provenance": {"original_mp_id": "mp-999484", "md_step": 93},
    }
    return {**record, **changes}


def write(folder: Path, entries: object, name: str = "MatPES-PBE-2025.1.json.gz") -> Path:
    path = folder / name
    with gzip.open(path, "wt") as file:
        json.dump(entries, file)
    return path


def read(path: Path, source: MatPES | None = None) -> list[Structure]:
    source = source or MatPES()
    return [s for part in source.parts([path]) for table in source.read(part) for s in table]


def test_an_entry(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, [entry(), entry(functional="r2SCAN", provenance=None)]))
    assert (first.key, first.group) == ("MatPES-PBE-2025.1-000000", "mp-999484")
    assert (second.key, second.group, list(second.labels)) == ("MatPES-PBE-2025.1-000001", "TiY", ["r2scan"])
    atoms = Atoms("YTi", cell=MATRIX, scaled_positions=[[0.01, 0.02, 0.03], [0.5, 0.5, 0.48]], pbc=True)
    assert first.numbers.tolist() == [39, 22] and first.pbc.all()
    np.testing.assert_allclose(first.positions, atoms.positions, rtol=1e-6)
    np.testing.assert_allclose(first.cell, MATRIX, rtol=1e-6)
    labels = first.labels["pbe"]
    assert labels.energy == -13.19442081 and labels.stress is not None
    np.testing.assert_allclose(labels.forces, FORCES, rtol=1e-6)
    np.testing.assert_allclose(
        labels.stress, voigt_6_to_full_3x3_stress(STRESS) * -0.1 * ase.units.GPa, rtol=1e-6, atol=1e-9
    )
    assert MatPES().fidelities["r2scan"].method == "r2SCAN"


def test_levels_and_missing_labels(tmp_path: Path) -> None:
    path = write(tmp_path, [entry(), entry(functional="r2SCAN"), entry(energy=None, forces=None, stress=None)])
    assert [s.key[-6:] for s in read(path)] == ["000000", "000001"]
    assert [s.key[-6:] for s in read(path, MatPES(levels=("r2scan",)))] == ["000001"]
    (alone,) = read(write(tmp_path, [entry(forces=None, stress=None)]))
    assert alone.labels["pbe"].energy is not None and alone.labels["pbe"].forces is None
    with pytest.raises(ValueError, match="unknown fidelity 'scan'; known: pbe, r2scan"):
        MatPES(levels=("scan",))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(), {"energy": 1.0}], r"2025.1.json.gz: entry 1: expected structure, .*functional, found energy"),
        ([entry(functional="PBEsol")], "entry 0: functional: unknown fidelity 'pbesol'"),
        ([entry(forces=FORCES[:1])], r"entry 0: forces: expected shape \(2, 3\), found \(1, 3\)"),
        ([entry(stress=STRESS[:5])], r"entry 0: stress: expected shape \(3, 3\), found \(5,\)"),
        ([entry(energy="low")], "entry 0: energy: expected a number or null, found str 'low'"),
        ({"a": 1}, r"character 0: expected '\[', found '{'"),
        ([["a"]], "entry 0: "),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, entries: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, entries))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [entry()] * 20)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="MatPES-PBE-2025.1.json.gz: cannot be read"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"none.json: no such file; source 'matpes' reads MatPES-PBE-2025.1"):
        MatPES().parts([tmp_path / "none.json"])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    entries = [entry(), entry(functional="r2SCAN", provenance=None), entry(stress=None)]
    builds(MatPES(), write(tmp_path, entries))
