"""QCSchema: one result, a list or one a line; atomic units to eV and angstrom; levels by their model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import ase.units
import numpy as np
import pytest

from rung.data.sources.qcschema import QCSchema, fidelity_name
from rung.data.structure import Structure

GEOMETRY = [0.0, 0.0, 0.2, 0.0, 1.4, -0.9, 0.0, -1.4, -0.9]  # bohr
GRADIENT = [0.0, 0.0, 0.011, 0.0, -0.02, 0.03, 0.0, 0.02, -0.041]  # hartree/bohr


def result(driver: str = "gradient", molecule: dict | None = None, **changes: object) -> dict:
    record = {
        "schema_name": "qcschema_output",
        "schema_version": 1,
        "molecule": {
            "schema_name": "qcschema_molecule",
            "symbols": ["O", "H", "H"],
            "geometry": GEOMETRY,
            "molecular_charge": 0.0,
            "molecular_multiplicity": 1,
            "name": "conformer 3",
            "real": [True] * 3,
            **(molecule or {}),
        },
        "driver": driver,
        "model": {"method": "B3LYP-D3BJ", "basis": "def2-SVP"},
        "keywords": {"scf_type": "df"},
        "return_result": {"gradient": GRADIENT, "energy": -76.3, "hessian": [0.0] * 81}.get(driver),
        "properties": {"return_energy": -76.3, "scf_total_energy": -76.3, "nuclear_repulsion_energy": 9.1},
        "success": True,
        "provenance": {"creator": "Psi4", "version": "1.9"},
    }
    return {**record, **changes}


FAILED = {"input_data": {}, "success": False, "error": {"error_type": "unknown_error", "error_message": "no"}}
SOURCE = QCSchema(models=("b3lyp-d3bj/DEF2-SVP",))


def write(folder: Path, text: str, name: str = "water.json") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(path: Path, source: QCSchema = SOURCE) -> list[Structure]:
    return [s for part in source.parts([path]) for table in source.read(part) for s in table]


def test_a_gradient(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path, json.dumps(result())))
    assert (found.key, found.group, found.numbers.tolist()) == ("water-000000", "H2O", [8, 1, 1])
    assert (found.charge, found.multiplicity, found.pbc.any()) == (0, 1, False)
    np.testing.assert_allclose(found.positions, np.reshape(GEOMETRY, (3, 3)) * ase.units.Bohr, rtol=1e-6)
    labels = found.labels["b3lypd3bj_def2svp"]
    assert labels.energy == pytest.approx(-76.3 * ase.units.Hartree, rel=1e-7)
    forces = -np.reshape(GRADIENT, (3, 3)) * ase.units.Hartree / ase.units.Bohr
    np.testing.assert_allclose(labels.forces, forces, rtol=1e-6)


def test_drivers_charge_and_identifiers(tmp_path: Path) -> None:
    cation = {"molecular_charge": 1.0, "molecular_multiplicity": 2, "identifiers": {"canonical_smiles": "[OH2+]"}}
    nested = {"geometry": np.reshape(GEOMETRY, (3, 3)).tolist()}
    records = [
        result("energy", cation, properties={}),
        result("hessian", nested),
        result("hessian", properties={"return_energy": -76.0, "return_gradient": GRADIENT}),
        result("properties", return_result={"dipole": [0, 0, 1]}, properties={}),  # no label
        result(properties={}),
    ]
    one, two, three, five = (s for s in read(write(tmp_path, json.dumps(records))))
    assert (one.charge, one.multiplicity, one.group) == (1, 2, "[OH2+]")
    energies = [s.labels["b3lypd3bj_def2svp"].energy for s in (one, two, three)]
    np.testing.assert_allclose(energies, np.array([-76.3, -76.3, -76.0]) * ase.units.Hartree, rtol=1e-7)
    assert [s.labels["b3lypd3bj_def2svp"].forces is None for s in (one, two, three, five)] == [True, True, False, False]
    assert five.key == "water-000004" and five.labels["b3lypd3bj_def2svp"].energy is None


@pytest.mark.parametrize("name", ["w.json", "w.json.gz", "w.jsonl", "w.jsonl.gz"])
def test_lists_and_lines_with_failures(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    records = [result(), FAILED, result("energy"), FAILED]
    text = "\n".join(map(json.dumps, records)) if "jsonl" in name else json.dumps(records)
    assert [s.key for s in read(write(tmp_path, text, name))] == ["w-000000", "w-000002"]
    assert f"{name}: 2 failed calculations are left out" in caplog.text


def test_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        result(),
        result(model={"method": "GFN2-xTB", "basis": None}),
        result(model={"method": "b3lyp-D3BJ", "basis": "def2-svp"}),
    ]
    path = write(tmp_path, json.dumps(records))
    source = QCSchema.found([path])
    assert sorted(source.fidelities) == ["b3lypd3bj_def2svp", "gfn2_xtb"]
    assert [list(s.labels) for s in read(path, source)] == [["b3lypd3bj_def2svp"], ["gfn2_xtb"], ["b3lypd3bj_def2svp"]]
    (only,) = read(path, QCSchema(models=("GFN2-xTB",), fidelity="xtb"))
    assert list(only.labels) == ["xtb"]
    assert "results of other models are left out: B3LYP-D3BJ/def2-SVP (1), b3lyp-D3BJ/def2-svp (1)" in caplog.text
    descriptor = SOURCE.fidelities["b3lypd3bj_def2svp"]
    assert (descriptor.method, descriptor.basis) == ("b3lyp-d3bj", "DEF2-SVP")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("wB97X/6-31G(d)", "wb97x_631gd"),
        ("wB97X/6-31G*", "wb97x_631gd"),
        ("ωB97M-D3BJ/def2-TZVPPD", "wb97md3bj_def2tzvppd"),
        ("CCSD(T)/cc-pVTZ", "ccsdt_ccpvtz"),
        ("PBE0/6-31+G**", "pbe0_631pgdp"),
        ("GFN1-xTB", "gfn1_xtb"),
        ("gfn2xtb", "gfn2_xtb"),
        ("HF/aug-cc-pV[TQ]Z", "hf_augccpvtqz"),
    ],
)
def test_names_of_fidelities(model: str, name: str) -> None:
    assert fidelity_name(model) == name


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="fidelity 'b3lyp': expected one model that it names, found"):
        QCSchema(fidelity="b3lyp")
    with pytest.raises(ValueError, match="two have the same name as fidelities; choose one"):
        QCSchema(models=("wB97X/6-31G*", "wB97X/6-31G(d)"))
    with pytest.raises(ValueError, match="qcschema: expected models such as"):
        _ = QCSchema().fidelities


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1}, "water.json: result 0: expected molecule, driver, model, return_result, found a"),
        ([[1]], "water.json: result 0: expected molecule, .*found list"),
        (
            result(molecule={"geometry": GEOMETRY[:8]}),
            r"result 0: molecule.geometry: expected shape \(9,\), found \(8,\)",
        ),
        (result(molecule={"symbols": ["O", "H", "Qq"]}), "result 0: expected symbols of elements, found 'Qq'"),
        (result(molecule={"real": [True, True, False]}), "expected atoms that are all real, found ghost atoms"),
        (result(molecule={"molecular_charge": 0.5}), "molecular_charge: expected a whole number, found 0.5"),
        (result(return_result=-76.3), r"result 0: gradient: expected shape \(3, 3\), found \(\)"),
        (result("optimize"), "driver: expected one of energy, gradient, hessian, properties, found 'optimize'"),
        (result(model="B3LYP"), "model: expected an object with method and basis, found 'B3LYP'"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, json.dumps(record)))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = json.dumps([result()])
    for text, message in (
        (whole[:-30], "water.json: character 1: not readable JSON"),
        ("", "water.json: the file is empty"),
        ("12", "water.json: character 0: expected a result or a list of results, found '1'"),
        (whole + "x", "water.json: .*expected the end of the file, found 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path, text))
    with pytest.raises(FileNotFoundError, match="none.json: no such file; source 'qcschema' reads"):
        SOURCE.parts([tmp_path / "none.json"])


def test_a_dataset_is_built(tmp_path: Path, builds: Callable[..., None]) -> None:
    builds(SOURCE, write(tmp_path, json.dumps([result(), result("energy"), result(success=False)])))
