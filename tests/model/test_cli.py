"""`rung evaluate` end to end on a small checkpoint and a small file."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.reaction import Reaction
from rung.data.reaction_file import write_reactions
from rung.data.read import read_any
from rung.data.structure import Labels, Structure
from rung.model import cli
from rung.model.checkpoint import save_checkpoint
from rung.model.potential import Potential
from rung.model.predict import evaluate, predict

FIDELITIES = {"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2")}


@pytest.fixture
def data(tmp_path: Path, molecules: list[Structure]) -> Path:
    """Return an extxyz file of the molecules with their energies and forces at low."""
    frames = []
    for structure in molecules:
        atoms = Atoms(structure.numbers, structure.positions)
        atoms.info["REF_energy"] = structure.labels["low"].energy
        atoms.arrays["REF_forces"] = structure.labels["low"].forces
        frames.append(atoms)
    write(tmp_path / "data.extxyz", frames)
    return tmp_path / "data.extxyz"


def save(folder: Path, potential: Potential) -> Path:
    return save_checkpoint(folder, potential, fidelities=FIDELITIES, training_config={}, datasets=[], evaluation={})


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(("fidelities", "options"), [(("low",), []), (("low", "high"), ["--fidelity", "low"])])
def test_the_table_and_the_json_agree_with_evaluate(
    tmp_path: Path,
    data: Path,
    molecules: list[Structure],
    make_potential: Callable[..., Potential],
    capsys: pytest.CaptureFixture[str],
    fidelities: tuple[str, ...],
    options: list[str],
) -> None:
    potential = make_potential(fidelities=fidelities)
    assert run(save(tmp_path / "model", potential), data, "--device", "cpu", *options) == 0
    table = capsys.readouterr().out.splitlines()
    expected = evaluate(potential, molecules, "low")
    printed = json.loads(table[-1])
    assert printed == {"low": {key: pytest.approx(value, rel=1e-3) for key, value in expected.items()}}
    assert table[0].split("  ")[0] == "fidelity" and "energy MAE" in table[0]
    row = table[1].split()
    assert row[:2] == ["low", "3"]
    assert [line.split()[:2] for line in table[2:5]] == [["H", "3"], ["C", "2"], ["O", "2"]]
    assert float(row[2]) == pytest.approx(expected["energy_mae_mev_per_atom"], rel=1e-3)


def test_a_dataset_is_evaluated_at_every_fidelity_of_the_checkpoint(
    tmp_path: Path,
    molecules: list[Structure],
    make_potential: Callable[..., Potential],
    capsys: pytest.CaptureFixture[str],
) -> None:
    potential = make_potential()
    labelled = [dataclasses.replace(one, labels={"low": _predicted(potential, one, "low")}) for one in molecules]
    labelled[1].labels["high"] = dataclasses.replace(_predicted(potential, molecules[1], "high"), forces=None)
    build_dataset(
        labelled,
        tmp_path / "set",
        name="tiny",
        fidelities=FIDELITIES,
        split=lambda group: "test" if group == "CH4" else "train",
    )
    run(save(tmp_path / "model", potential), tmp_path / "set", "--split", "test", "--device", "cpu")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(printed) == ["low", "high"]
    for fidelity, num_forces in (("low", 1), ("high", 0)):
        assert printed[fidelity]["num_energies"] == 1 and printed[fidelity]["num_forces"] == num_forces
        assert printed[fidelity]["energy_mae_mev_per_atom"] == pytest.approx(0, abs=1e-2)


def test_files_hold_what_the_table_says(
    tmp_path: Path, data: Path, make_potential: Callable[..., Potential], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path / "model", make_potential())
    options = ["--fidelity", "low", "--device", "cpu", "--by", "size", "--json", tmp_path / "out.json"]
    run(checkpoint, data, *options, "--predictions", tmp_path / "out.csv")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[2:5]] == [
        ["3-4", "atoms", "1"],
        ["5-8", "atoms", "1"],
        ["9-16", "atoms", "1"],
    ]
    report = json.loads((tmp_path / "out.json").read_text())["fidelities"]["low"]
    assert report["all"] == json.loads(table[-1])["low"] and report["skipped"] == []
    assert set(report["by_element"]) == {"H", "C", "O"} and report["by_element"]["C"]["num_energies"] == 2
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    errors = [abs(float(row["energy_error_mev_per_atom"])) for row in rows]
    assert np.mean(errors) == pytest.approx(report["all"]["energy_mae_mev_per_atom"])
    run(checkpoint, data, *options, "--predictions", tmp_path / "out.extxyz")
    frames = read(tmp_path / "out.extxyz", ":")
    off = np.concatenate([atoms.arrays["rung_forces"] - atoms.arrays["REF_forces"] for atoms in frames])
    assert 1000 * np.abs(off).mean() == pytest.approx(report["all"]["force_mae_mev_per_angstrom"], rel=1e-5)
    energies = [atoms.info["rung_energy"] for atoms in frames]
    assert energies == pytest.approx([float(row["energy_predicted_ev"]) for row in rows])


def test_a_crystal_with_a_stress(
    tmp_path: Path, make_potential: Callable[..., Potential], capsys: pytest.CaptureFixture[str]
) -> None:
    atoms = bulk("C")
    atoms.rattle(0.05, seed=0)
    atoms.info.update(REF_energy=-2000.0, REF_stress=np.zeros(9))
    write(tmp_path / "data.extxyz", [atoms])
    potential = make_potential(fidelities=("low",))
    run(save(tmp_path / "model", potential), tmp_path / "data.extxyz", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    metrics = json.loads(lines[-1])["low"]
    [structure] = read_any(tmp_path / "data.extxyz", "low")
    [prediction] = predict(potential, [structure], "low", stress=True)
    assert prediction.stress is not None
    assert metrics["stress_mae_mev_per_angstrom3"] == pytest.approx(1000 * np.abs(prediction.stress).mean(), rel=1e-3)
    assert "stress RMSE" in lines[0] and metrics["num_stresses"] == 1 and metrics["num_forces"] == 0


def test_what_is_not_known_is_left_out_only_on_request(
    tmp_path: Path, data: Path, make_potential: Callable[..., Potential], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path / "model", make_potential())
    options = ["--fidelity", "high", "--device", "cpu"]
    with pytest.raises(ValueError, match="2 of 3 structures at 'high' cannot be evaluated; .* pass --skip-unknown"):
        run(checkpoint, data, *options)
    run(checkpoint, data, *options, "--skip-unknown", "--json", tmp_path / "out.json")
    out = capsys.readouterr().out
    assert (
        "left out 2 of 3 structures at 'high':\n  structure 'data-000000': fidelity 'high' was not trained on O" in out
    )
    report = json.loads((tmp_path / "out.json").read_text())["fidelities"]["high"]
    assert report["all"]["num_energies"] == 1 and len(report["skipped"]) == 2
    write(tmp_path / "water.extxyz", read(data, 0))
    with pytest.raises(ValueError, match="none of the 1 structures at 'high' can be evaluated"):
        run(checkpoint, tmp_path / "water.extxyz", *options, "--skip-unknown")


def test_reaction_energies(
    tmp_path: Path,
    molecules: list[Structure],
    make_potential: Callable[..., Potential],
    capsys: pytest.CaptureFixture[str],
) -> None:
    potential = make_potential()
    checkpoint = save(tmp_path / "model", potential)
    water, methane, ethanol = molecules
    reactions = [
        Reaction("synthesis", "x", (ethanol, water, methane), (1.0, -1.0, -2.0), 5.0),
        Reaction.absolute(methane, -1000.0),
    ]
    write_reactions(tmp_path / "set.yaml", reactions, "kJ/mol")
    outputs = ["--json", tmp_path / "out.json", "--predictions", tmp_path / "out.csv"]
    run(checkpoint, tmp_path / "set.yaml", "--fidelity", "low", "--device", "cpu", *outputs)
    lines = capsys.readouterr().out.splitlines()
    e = [one.energy for one in predict(potential, molecules, "low")]
    errors = np.array([e[2] - e[0] - 2 * e[1] - 5.0, e[1] + 1000.0])
    metrics = json.loads(lines[-1])["low"]
    assert metrics["mae_mev"] == pytest.approx(1000 * np.abs(errors).mean(), rel=1e-4)
    assert metrics["mean_signed_error_kcal_per_mol"] == pytest.approx(errors.mean() * 23.060548, rel=1e-4)
    assert metrics["largest_error_of"] == reactions[int(np.abs(errors).argmax())].key
    assert lines[1].split()[:3] == ["low", "2", "kcal/mol"] and lines[2].split()[:3] == ["low", "2", "meV"]
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [float(row["error_mev"]) for row in rows] == pytest.approx(1000 * errors, rel=1e-4)
    assert len(json.loads((tmp_path / "out.json").read_text())["fidelities"]["low"]["reactions"]) == 2
    with pytest.raises(ValueError, match="1 of 2 reactions at 'high' cannot be evaluated"):
        run(checkpoint, tmp_path / "set.yaml", "--fidelity", "high", "--device", "cpu")
    run(checkpoint, tmp_path / "set.yaml", "--fidelity", "high", "--device", "cpu", "--skip-unknown")
    out = capsys.readouterr().out
    assert "left out 1 of 2 reactions at 'high':\n  reaction 'synthesis': structure 'CH3CH2OH'" in out


def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, data: Path, molecules: list[Structure], make_potential: Callable[..., Potential]
) -> None:
    checkpoint = save(tmp_path / "model", make_potential())
    write_reactions(tmp_path / "set.yaml", [Reaction.absolute(molecules[0], 0.0)])
    table = (checkpoint, tmp_path / "set.yaml", "--device", "cpu")
    with pytest.raises(ValueError, match="this potential knows 2, so name one"):
        run(*table)
    with pytest.raises(ValueError, match="a table of reactions has no splits, so 'test' cannot be selected"):
        run(*table, "--fidelity", "low", "--split", "test")
    with pytest.raises(ValueError, match="--by size: only errors of structures"):
        run(*table, "--fidelity", "low", "--by", "size")
    with pytest.raises(ValueError, match="out.extxyz: expected a name that ends in .csv"):
        run(*table, "--fidelity", "low", "--predictions", tmp_path / "out.extxyz")
    with pytest.raises(ValueError, match="expected another file than the data"):
        run(checkpoint, data, "--fidelity", "low", "--predictions", data)
    with pytest.raises(FileNotFoundError, match="expected a file in a folder that exists"):
        run(checkpoint, data, "--fidelity", "low", "--json", tmp_path / "nowhere" / "out.json")


def _predicted(potential: Potential, structure: Structure, fidelity: str) -> Labels:
    [prediction] = predict(potential, [structure], fidelity)
    assert prediction.forces is not None
    return Labels(energy=prediction.energy, forces=prediction.forces.astype(np.float32))


def test_bad_input_is_named(tmp_path: Path, data: Path, make_potential: Callable[..., Potential]) -> None:
    checkpoint = save(tmp_path / "model", make_potential())
    with pytest.raises(ValueError, match="a file does not say at which fidelity its labels are"):
        run(checkpoint, data)
    with pytest.raises(ValueError, match="unknown fidelity 'hihg'; known: low, high; did you mean 'high'"):
        run(checkpoint, data, "--fidelity", "hihg")
    with pytest.raises(ValueError, match="fidelity 'high' was not trained on O"):
        run(checkpoint, data, "--fidelity", "high")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere", data)
    with pytest.raises(FileNotFoundError, match="nothing.xyz: no such file or dataset"):
        run(checkpoint, tmp_path / "nothing.xyz")
    with pytest.raises(ValueError, match="device 'gpu': "):
        run(checkpoint, data, "--fidelity", "low", "--device", "gpu")
