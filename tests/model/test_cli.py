"""`rung evaluate` end to end on a small checkpoint and a small file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
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
