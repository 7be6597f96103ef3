"""`rung md` on a small checkpoint: ensembles, files, what continues, and every kind of bad input."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.io import read, write
from ase.md.verlet import VelocityVerlet

from rung.data.fidelity import Fidelity
from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import save_checkpoint
from rung.model.engines import md
from rung.model.engines.md import Dynamics, draw_velocities
from rung.model.potential import Potential

FIDELITIES = {"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2")}


@pytest.fixture
def checkpoint(tmp_path: Path, make_potential: Callable[..., Potential]) -> Path:
    place = {"fidelities": FIDELITIES, "training_config": {}, "datasets": [], "evaluation": {}}
    return save_checkpoint(tmp_path / "model", make_potential(), **place)


@pytest.fixture
def methane(tmp_path: Path) -> Path:
    write(tmp_path / "methane.xyz", molecule("CH4"))
    return tmp_path / "methane.xyz"


@pytest.fixture
def crystal(tmp_path: Path) -> Path:
    write(tmp_path / "diamond.extxyz", bulk("C", "diamond", a=3.6))
    return tmp_path / "diamond.extxyz"


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    md.add_arguments(parser)
    return md.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("suffix", ["traj", "extxyz"])
def test_nve_is_velocity_verlet_and_every_frame_has_energy_forces_and_momenta(
    checkpoint: Path, methane: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"out.{suffix}"
    options = ["--fidelity", "low", "--ensemble", "nve", "--dtype", "float64", "--interval", 4, "--seed", 3]
    assert run(checkpoint, methane, *options, "--steps", 10, "--timestep", 0.25, "--out", out) == 0
    assert f"step 10, 0.0025 ps; 4 frames written to {out}" in capsys.readouterr().out
    frames = read(out, ":")
    assert [frame.info["step"] for frame in frames] == [0, 4, 8, 10]
    assert [frame.info["time_fs"] for frame in frames] == [0, 1, 2, 2.5]
    atoms = read(methane)
    draw_velocities(atoms, 300.0, seed=3)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    VelocityVerlet(atoms, 0.25 * units.fs).run(10)
    tolerance = 1e-12 if suffix == "traj" else 1e-7
    np.testing.assert_allclose(frames[-1].positions, atoms.positions, atol=tolerance)
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta(), atol=tolerance)
    np.testing.assert_allclose(frames[-1].get_forces(), atoms.get_forces(), atol=1e-7)
    assert frames[-1].get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


def test_what_is_continued_ends_where_one_run_would(checkpoint: Path, methane: Path, tmp_path: Path) -> None:
    options = [checkpoint, methane, "--fidelity", "low", "--ensemble", "nve", "--interval", 4]
    whole, parts = tmp_path / "whole.traj", tmp_path / "parts.traj"
    assert run(*options, "--out", whole, "--steps", 15) == 0
    assert run(*options, "--out", parts, "--steps", 6) == 0
    assert run(*options, "--out", parts, "--steps", 15, "--restart") == 0
    assert run(*options, "--out", parts, "--steps", 15, "--restart") == 0  # nothing left to do
    expected, found = read(whole, ":"), read(parts, ":")
    assert [frame.info["step"] for frame in found] == [0, 4, 6, 8, 12, 15]
    np.testing.assert_array_equal(found[-1].positions, expected[-1].positions)
    np.testing.assert_array_equal(found[-1].get_momenta(), expected[-1].get_momenta())
    np.testing.assert_array_equal(found[-1].get_forces(), expected[-1].get_forces())


def test_another_state_or_checkpoint_is_not_continued(
    checkpoint: Path, methane: Path, tmp_path: Path, make_potential: Callable[..., Potential]
) -> None:
    other = make_potential()
    other.set_scale(5.1)
    place = {"fidelities": FIDELITIES, "training_config": {}, "datasets": [], "evaluation": {}}
    save_checkpoint(tmp_path / "other", other, **place)
    atoms = molecule("CH4")
    atoms.set_cell([9, 9, 9])
    atoms.pbc = True
    write(tmp_path / "box.traj", atoms)
    options = ["--fidelity", "low", "--ensemble", "nve", "--steps", 2, "--out", tmp_path / "out.extxyz"]
    assert run(checkpoint, methane, *options) == 0
    again = [*options[:-4], "--steps", 3, *options[-2:], "--restart"]
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "other", methane], "a checkpoint whose weights are sha256:[0-9a-f]{16}, not sha256:"),
        ([checkpoint, methane, "--charge", 1], "charge 0, not 1"),
        ([checkpoint, methane, "--multiplicity", 2], "multiplicity 1, not 2"),
        ([checkpoint, tmp_path / "box.traj"], r"pbc \[False, False, False\], not \[True, True, True\]"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*words, *again)
    assert run(checkpoint, methane, *again, "--dtype", "float64") == 0


def test_bussi_puts_a_moving_structure_at_rest_and_the_log_says_what_its_temperature_is_of(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    atoms = molecule("CH4")
    draw_velocities(atoms, 300.0, seed=0, whole=True)
    write(tmp_path / "moving.traj", atoms)
    out = tmp_path / "out.traj"
    options = ["--fidelity", "low", "--steps", 1, "--ensemble", "nvt", "--thermostat", "bussi", "--out", out]
    assert run(checkpoint, tmp_path / "moving.traj", *options) == 0
    np.testing.assert_allclose(read(out, 0).get_momenta().sum(0), 0, atol=1e-12)
    log = capsys.readouterr().out
    assert "in nvt it is put at rest" in log
    assert "temperatures: of 9 degrees of freedom, 6 less than ASE's get_temperature()" in log


def test_ctrl_c_keeps_what_was_written_and_the_same_command_goes_on(
    checkpoint: Path, methane: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.extxyz"
    options = [
        checkpoint,
        methane,
        "--fidelity",
        "low",
        "--ensemble",
        "nvt",
        "--interval",
        5,
        "--steps",
        20,
        "--out",
        out,
    ]
    with monkeypatch.context() as patch:
        forces, calls = RungCalculator.calculate, []

        def interrupt(self: RungCalculator, *args: Any) -> None:
            calls.append(forces(self, *args))
            if len(calls) == 8:
                signal.raise_signal(signal.SIGINT)

        patch.setattr(RungCalculator, "calculate", interrupt)
        assert run(*options) == 130
    assert "rung md: interrupted at step 7" in (error := capsys.readouterr().err)
    assert "the same command with --restart goes on" in error
    assert [frame.info["step"] for frame in read(out, ":")] == [0, 5, 7]
    assert run(*options, "--restart") == 0
    assert [frame.info["step"] for frame in read(out, ":")] == [0, 5, 7, 10, 15, 20]


@pytest.mark.parametrize("thermostat", ["langevin", "bussi"])
def test_thermostats_reach_the_temperature(thermostat: str) -> None:
    """Mean kinetic energies of an argon crystal against equipartition, within five standard errors."""
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True).repeat(2)
    atoms.calc = LennardJones(epsilon=0.0103, sigma=3.4, rc=6.0, smooth=True)
    draw_velocities(atoms, 90.0, seed=0)
    settings = Dynamics("nvt", timestep=8.0, temperature=40.0, thermostat=thermostat, friction=5.0, seed=1)
    dynamics = settings.of(atoms)
    dynamics.run(60)
    found = []
    for _ in dynamics.irun(120):
        found.append(atoms.get_temperature())
    assert np.mean(found) == pytest.approx(40.0, rel=0.2)


@pytest.mark.parametrize(("ensemble", "options"), [("nvt", ["--thermostat", "bussi"]), ("npt", [])])
def test_the_other_ensembles_run_from_files(
    checkpoint: Path, crystal: Path, tmp_path: Path, ensemble: str, options: list[str]
) -> None:
    out = tmp_path / "out.extxyz"
    words = [checkpoint, crystal, "--fidelity", "low", "--ensemble", ensemble, "--steps", 6, "--out", out, *options]
    assert run(*words) == 0
    first, last = read(out, "0"), read(out, "-1")
    assert (last.cell.array != first.cell.array).any() == (ensemble == "npt")
    assert last.get_stress().shape == (6,)


def test_the_volume_answers_to_the_pressure(checkpoint: Path, crystal: Path) -> None:
    volumes = []
    for pressure in (-2e5, 2e5):
        atoms = read(crystal)
        atoms.calc = RungCalculator(checkpoint, "low")
        draw_velocities(atoms, 50.0, seed=0)
        Dynamics("npt", temperature=50.0, pressure=pressure).of(atoms).run(10)
        volumes.append(atoms.get_volume())
    assert volumes[1] < volumes[0]


def test_velocities_are_drawn_or_taken_from_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    atoms = molecule("CH3CH2OH")
    draw_velocities(atoms, 250.0, seed=5)
    assert atoms.get_temperature() == pytest.approx(250.0 * 21 / 27)  # ASE counts translations and rotations
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-10)
    write(tmp_path / "moving.traj", atoms)
    options = ["--fidelity", "low", "--ensemble", "nve", "--steps", 1, "--overwrite", "--out", tmp_path / "out.traj"]
    run(checkpoint, tmp_path / "moving.traj", *options)
    np.testing.assert_array_equal(read(tmp_path / "out.traj", 0).get_momenta(), atoms.get_momenta())
    assert "velocities: the file's, 250 K" in capsys.readouterr().out
    run(checkpoint, tmp_path / "moving.traj", *options, "--new-velocities")
    assert read(tmp_path / "out.traj", 0).get_temperature() == pytest.approx(300.0 * 21 / 27)
    lone = Atoms("H")
    draw_velocities(lone, 300.0, seed=0)
    assert lone.get_temperature() == pytest.approx(300.0)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_run_that_blows_up_names_the_step_and_keeps_its_frames(
    checkpoint: Path, methane: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.extxyz"
    options = ["--fidelity", "low", "--ensemble", "nve", "--interval", 1, "--out", out]
    with pytest.raises(ValueError, match=r"after step \d+: positions of .*try a smaller --timestep"):
        run(checkpoint, methane, *options, "--steps", 200, "--timestep", 1e200)
    assert len(read(out, ":")) >= 1


BAD: dict[str, tuple[list[str], type[Exception], str]] = {
    "timestep": (["--timestep", "0"], ValueError, "--timestep: expected a positive number, found 0.0"),
    "temperature": (["--temperature", "nan"], ValueError, "--temperature: expected a positive number, found nan"),
    "steps": (["--steps", "0"], ValueError, "--steps: expected a whole number >= 1, found 0"),
    "interval": (["--interval", "-1"], ValueError, "--interval: expected a whole number >= 1"),
    "seed": (["--seed", "-1"], ValueError, "--seed: expected a whole number >= 0"),
    "friction": (["--friction", "1"], ValueError, "--friction: has no effect in nve; leave it out"),
    "tau": (["--ensemble", "nvt", "--tau", "1"], ValueError, "--tau: has no effect in nvt with langevin"),
    "thermostat": (["--ensemble", "npt", "--thermostat", "bussi"], ValueError, "--thermostat: has no effect in npt"),
    "pressure": (["--ensemble", "npt", "--pressure", "inf"], ValueError, "--pressure: expected a number of bar"),
    "npt": (["--ensemble", "npt"], ValueError, "npt: expected a structure periodic in three directions"),
    "suffix": (["--out", "out.cif"], ValueError, "out.cif: a trajectory is an .extxyz, .xyz or .traj file"),
    "exists": (["--out", "methane.xyz"], FileExistsError, "methane.xyz exists: choose another file, or --overwrite"),
    "new": (["--restart", "--new-velocities"], ValueError, "--new-velocities: --restart keeps what is there"),
    "replace": (["--restart", "--overwrite"], ValueError, "--overwrite: --restart keeps what is there"),
    "nothing": (["--restart"], FileNotFoundError, "methane-md.extxyz: no trajectory to continue"),
    "other": (["--restart", "--out", "other.traj"], ValueError, "expected the atoms of the structure, CH4, found H2"),
    "no momenta": (["--restart", "--out", "methane.xyz"], ValueError, "its last frame has no momenta or no step"),
    "torn": (["--restart", "--out", "torn.extxyz"], ValueError, "torn.extxyz: ASE cannot read its last frame"),
    "time": (["--restart", "--out", "run.traj", "--timestep", "1"], ValueError, "continue with the same time step"),
    "level": (["--restart", "--out", "run.traj", "--fidelity", "high"], ValueError, "fidelity low, not high"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_no_file_changes(
    checkpoint: Path, methane: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, kind, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    write("other.traj", molecule("H2"))
    (tmp_path / "torn.extxyz").write_text(methane.read_text()[:-30])
    frame = molecule("CH4")
    draw_velocities(frame, 300.0, seed=0)
    frame.info.update(step=4, time_fs=2.0, fidelity="low")
    write("run.traj", frame)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message):
        run(checkpoint, methane, "--fidelity", "low", "--ensemble", "nve", "--steps", 8, *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_constraints_hold_and_npt_refuses_them(checkpoint: Path, crystal: Path, tmp_path: Path) -> None:
    atoms = read(crystal)
    atoms.set_constraint(FixAtoms([0]))
    write(tmp_path / "fixed.traj", atoms)
    options = [checkpoint, tmp_path / "fixed.traj", "--fidelity", "low", "--steps", 3, "--out", tmp_path / "o.traj"]
    assert run(*options, "--ensemble", "nvt") == 0
    np.testing.assert_array_equal(read(tmp_path / "o.traj").positions[0], atoms.positions[0])
    with pytest.raises(ValueError, match="npt: expected a structure without constraints"):
        run(*options, "--ensemble", "npt", "--overwrite")
