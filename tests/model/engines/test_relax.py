"""`rung relax` on a small checkpoint: minima, files, and every kind of bad input."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import read, write

from rung.data.fidelity import Fidelity
from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import Checkpoint, save_checkpoint
from rung.model.engines import relax
from rung.model.engines.trajectory import TrajectoryWriter
from rung.model.potential import Potential
from rung.model.uncertainty import LastLayer

FIDELITIES = {"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2")}
BAR = 1 / 1.602176634e6  # eV/angstrom^3: 1e5 Pa by CODATA 2018's elementary charge


@pytest.fixture
def checkpoint(tmp_path: Path, make_potential: Callable[..., Potential]) -> Path:
    place = {"fidelities": FIDELITIES, "training_config": {}, "datasets": [], "evaluation": {}}
    return save_checkpoint(tmp_path / "model", make_potential(), **place)


@pytest.fixture
def crystal(tmp_path: Path) -> Path:
    atoms = bulk("C", "diamond", a=3.6)
    atoms.rattle(0.05, seed=1)
    write(tmp_path / "diamond.extxyz", atoms)
    return tmp_path / "diamond.extxyz"


@pytest.fixture
def methane(tmp_path: Path) -> Path:
    write(tmp_path / "methane.xyz", molecule("CH4"))
    return tmp_path / "methane.xyz"


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    relax.add_arguments(parser)
    return relax.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("optimizer", ["lbfgs", "fire", "bfgs"])
def test_it_ends_in_a_minimum(
    checkpoint: Path, crystal: Path, tmp_path: Path, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "out.extxyz", tmp_path / "path.traj"
    options = ["--fidelity", "low", "--optimizer", optimizer, "--fmax", 0.02, "--out", out, "--trajectory", path]
    assert run(checkpoint, crystal, *options) == 0
    assert "converged after" in capsys.readouterr().out
    frames, relaxed = read(path, ":"), read(out)
    np.testing.assert_allclose(relaxed.positions, frames[-1].positions, atol=1e-8)
    assert frames[-1].get_potential_energy() < frames[0].get_potential_energy()
    atoms = relaxed.copy()
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.02
    np.testing.assert_allclose(relaxed.get_forces(), atoms.get_forces(), atol=1e-6)  # the file has them


def test_a_cell_relaxes_until_the_pressure_is_the_one_asked_for(
    checkpoint: Path, crystal: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.traj"
    options = ["--fidelity", "low", "--fmax", 1e-3, "--cell", "--pressure", 5e4, "--out", out]
    assert run(checkpoint, crystal, *options) == 0
    atoms = read(out)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    expected = [-5e4 * BAR] * 3 + [0.0] * 3
    np.testing.assert_allclose(atoms.get_stress(), expected, atol=1e-3 / atoms.get_volume() * 3)


def test_what_does_not_converge_says_so_and_keeps_what_it_has(
    checkpoint: Path, crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.cif"
    assert run(checkpoint, crystal, "--fidelity", "low", "--steps", 2, "--out", out) == 1
    assert "rung relax: not converged after 2 steps" in (error := capsys.readouterr().err)
    assert f"{out} has the structure so far" in error
    assert len(read(out)) == 2


def test_the_stress_has_a_criterion_of_its_own(
    checkpoint: Path, crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ASE's generalised force on the lattice, stress times the volume of an atom, is below 0.05 at 10^4 bar."""
    out = tmp_path / "out.traj"
    options = [checkpoint, crystal, "--fidelity", "low", "--cell", "--pressure", 500, "--out", out]
    assert run(*options, "--fmax", 0.05, "--smax", 50) == 0
    atoms = read(out)
    error = np.abs(atoms.get_stress() / BAR + [500, 500, 500, 0, 0, 0]).max()
    assert error < 50
    assert f"stress off by {error:.3g} bar" in capsys.readouterr().out
    assert run(*options, "--fmax", 0.05, "--steps", 1, "--smax", 1e-3, "--overwrite") == 1
    assert "asked for 0.05 eV/angstrom and 0.001 bar" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_what_breaks_off_keeps_the_last_structure_that_was_calculated(
    checkpoint: Path, crystal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    calculate, calls = RungCalculator.calculate, []

    def fail(self: RungCalculator, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise kind("broken off")
        calculate(self, *args)

    monkeypatch.setattr(RungCalculator, "calculate", fail)
    out, path = tmp_path / "out.extxyz", tmp_path / "path.extxyz"
    with pytest.raises(kind, match="broken off"):
        run(checkpoint, crystal, "--fidelity", "low", "--cell", "--out", out, "--trajectory", path)
    frames = read(path, ":")
    assert len(frames) == 4
    np.testing.assert_array_equal(read(out).positions, frames[-1].positions)
    np.testing.assert_array_equal(read(out).cell.array, frames[-1].cell.array)


def test_a_frame_has_the_uncertainty_where_the_calculator_gives_it(
    make_potential: Callable[..., Potential], tmp_path: Path
) -> None:
    potential = make_potential()
    known = {"low": LastLayer(torch.eye(potential.config.num_layers * 4 + 3).double(), noise=0.01)}
    atoms = molecule("CH4")
    atoms.calc = RungCalculator(Checkpoint(potential, {}, {}, None, known), "low", uncertainty=True)
    with TrajectoryWriter(tmp_path / "path.extxyz") as trajectory:
        relax.relax(atoms, steps=1, trajectory=trajectory)
    assert read(tmp_path / "path.extxyz").info["energy_std"] == pytest.approx(atoms.calc.results["energy_std"])


def test_ctrl_c_ends_it_after_a_whole_step(
    checkpoint: Path, crystal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frame = TrajectoryWriter.write

    def interrupt(self: TrajectoryWriter, atoms: Atoms) -> None:
        write_frame(self, atoms)
        if self.num_frames == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrajectoryWriter, "write", interrupt)
    out, path = tmp_path / "out.extxyz", tmp_path / "path.extxyz"
    assert run(checkpoint, crystal, "--fidelity", "low", "--out", out, "--trajectory", path) == 130
    assert "interrupted after 2 steps" in capsys.readouterr().err
    frames = read(path, ":")
    assert len(frames) == 3
    np.testing.assert_array_equal(read(out).positions, frames[-1].positions)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_charge_and_multiplicity_reach_the_potential(checkpoint: Path, methane: Path, tmp_path: Path) -> None:
    energies = []
    for options in ([], ["--charge", 1, "--multiplicity", 2]):
        run(
            checkpoint,
            methane,
            "--fidelity",
            "low",
            "--steps",
            1,
            "--out",
            tmp_path / "o.extxyz",
            "--overwrite",
            *options,
        )
        atoms = read(tmp_path / "o.extxyz")
        energies.append(atoms.get_potential_energy())
    assert energies[0] != energies[1]
    assert (atoms.info["charge"], atoms.info["multiplicity"]) == (1, 2)


def test_frames_are_chosen_by_number(checkpoint: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames.extxyz"
    write(frames, [molecule("CH4"), molecule("C2H2")])
    options = ["--fidelity", "low", "--steps", 1, "--out", tmp_path / "o.extxyz"]
    with pytest.raises(ValueError, match=r"frames.extxyz: 2 frames; choose one with --frame"):
        run(checkpoint, frames, *options)
    with pytest.raises(ValueError, match=r"--frame 2: .*frames.extxyz has 2 frames"):
        run(checkpoint, frames, *options, "--frame", 2)
    run(checkpoint, frames, *options, "--frame", -1)
    assert read(tmp_path / "o.extxyz").get_chemical_formula() == "C2H2"


BAD = {
    "no file": (["nowhere.xyz"], FileNotFoundError, "nowhere.xyz: no such file"),
    "no format": (["noise.xyz"], ValueError, "noise.xyz: ASE cannot read it"),
    "not finite": (["nan.xyz"], ValueError, "nan.xyz: positions: expected finite numbers"),
    "no fidelity": (["methane.xyz"], ValueError, "this potential knows 2, so name one: low, high"),
    "unknown fidelity": (["methane.xyz", "--fidelity", "lo"], ValueError, "unknown fidelity 'lo'; known: low, high"),
    "unknown element": (["gold.xyz", "--fidelity", "low"], ValueError, "was not trained on Au"),
    "unknown charge": (["methane.xyz", "--fidelity", "low", "--charge", "3"], ValueError, "charge 3 is not known"),
    "no device": (["methane.xyz", "--fidelity", "low", "--device", "toaster"], ValueError, "device 'toaster': "),
    "fmax": (["methane.xyz", "--fmax", "-1"], ValueError, "--fmax: expected a positive number"),
    "steps": (["methane.xyz", "--steps", "0"], ValueError, "--steps: expected a whole number >= 1, found 0"),
    "cell": (["methane.xyz", "--cell"], ValueError, "--cell: expected a structure periodic in three directions"),
    "pressure": (["methane.xyz", "--pressure", "1"], ValueError, "--pressure: has no effect on a cell that stays"),
    "stress": (["methane.xyz", "--smax", "1"], ValueError, "--smax: has no effect on a cell that stays"),
    "no stress": (["methane.xyz", "--cell", "--smax", "0"], ValueError, "--smax: expected a positive number of bar"),
    "format": (["methane.xyz", "--out", "o.nothing"], ValueError, "o.nothing: ASE writes no format with that name"),
    "folder": (["methane.xyz", "--out", "no/o.xyz"], FileNotFoundError, "the folder no does not exist"),
    "exists": (["methane.xyz", "--out", "gold.xyz"], FileExistsError, "gold.xyz exists: choose another file"),
    "trajectory": (["methane.xyz", "--trajectory", "t.cif"], ValueError, "t.cif: a trajectory is an .extxyz, .xyz or"),
    "same": (["methane.xyz", "--out", "t.xyz", "--trajectory", "t.xyz"], ValueError, "the relaxed structure goes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(
    checkpoint: Path, methane: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, kind, message = BAD[case]
    (tmp_path / "noise.xyz").write_bytes(b"\x00\x01nothing")
    write(tmp_path / "gold.xyz", Atoms("Au"))
    write(tmp_path / "nan.xyz", Atoms("H", [[np.nan, 0, 0]]))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options: list[Any] = [checkpoint, *words]
    with pytest.raises(kind, match=message):
        run(*options)
    assert sorted(tmp_path.rglob("*")) == before
