"""The client against ASE's server and against i-PI itself: what they receive is what the calculator says."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.socketio import SocketIOCalculator, SocketServer, actualunixsocketname

from rung.data.fidelity import Fidelity
from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import save_checkpoint
from rung.model.engines import ipi
from rung.model.potential import Potential

FIDELITIES = {"low": Fidelity("low", "GFN2-xTB"), "high": Fidelity("high", "MP2")}
STEPS = 20
TIMESTEP = 0.25  # fs
_numbers = itertools.count()


@pytest.fixture
def checkpoint(tmp_path: Path, make_potential: Callable[..., Potential]) -> Path:
    return save_checkpoint(
        tmp_path / "checkpoint",
        make_potential(),
        fidelities=FIDELITIES,
        training_config={},
        datasets=[],
        evaluation={},
    )


@pytest.fixture
def socket_name() -> Iterator[str]:
    """Return a name for a UNIX socket that no other process has: ASE and i-PI put sockets into /tmp."""
    name = f"rung_test_{os.getpid()}_{next(_numbers)}"
    yield name
    Path(actualunixsocketname(name)).unlink(missing_ok=True)  # where a server was killed


@pytest.fixture
def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.info["charge"] = 1
    atoms.info["multiplicity"] = 2
    return atoms


@pytest.fixture
def crystal() -> Atoms:
    """Return displaced diamond in a cell without right angles, turned as i-PI wants it."""
    atoms = bulk("C", "diamond", a=3.6).repeat((2, 1, 1))
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def arguments(checkpoint: Path, structure: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ipi.add_arguments(parser)
    common = ["--fidelity", "low", "--dtype", "float64", "--device", "cpu"]
    return parser.parse_args([str(checkpoint), str(structure), *common, *words])


def written(atoms: Atoms, folder: Path) -> Path:
    atoms.write(folder / "structure.extxyz")
    return folder / "structure.extxyz"


@pytest.mark.parametrize("kind", ["water", "crystal"])
def test_a_server_of_ase_receives_what_the_calculator_says(
    kind: str, checkpoint: Path, tmp_path: Path, socket_name: str, request: pytest.FixtureRequest
) -> None:
    atoms = request.getfixturevalue(kind)
    args = arguments(checkpoint, written(atoms, tmp_path), "--unix", socket_name)
    direct = atoms.copy()
    direct.calc = RungCalculator(checkpoint, "low", dtype="float64")
    with ThreadPoolExecutor(1) as pool:
        with SocketIOCalculator(unixsocket=socket_name, timeout=60) as server:
            client = pool.submit(ipi.run, args)
            atoms.calc = server
            for _ in range(2):
                assert atoms.get_potential_energy() == pytest.approx(direct.get_potential_energy(), abs=1e-8)
                np.testing.assert_allclose(atoms.get_forces(), direct.get_forces(), atol=1e-8)
                if kind == "crystal":
                    np.testing.assert_allclose(atoms.get_stress(), direct.get_stress(), atol=1e-8)
                atoms.rattle(0.02, seed=2)
                direct.positions = atoms.positions
            server.server.protocol.end()  # ASE's server does not say EXIT by itself
        assert client.result(timeout=60) == 0


def test_another_number_of_atoms_is_an_error(checkpoint: Path, tmp_path: Path, socket_name: str, water: Atoms) -> None:
    args = arguments(checkpoint, written(water, tmp_path), "--unix", socket_name)
    with ThreadPoolExecutor(1) as pool, SocketServer(unixsocket=socket_name, timeout=60) as server:
        client = pool.submit(ipi.run, args)
        with pytest.raises(OSError):  # ASE's: the client has gone
            server.calculate(molecule("CH4"))
        with pytest.raises(ValueError, match="sent 5 atoms and the structure has 3"):
            client.result(timeout=60)


def test_positions_that_are_not_finite_are_an_error(
    checkpoint: Path, tmp_path: Path, socket_name: str, water: Atoms
) -> None:
    args = arguments(checkpoint, written(water, tmp_path), "--unix", socket_name)
    water.positions[0] = np.nan
    with ThreadPoolExecutor(1) as pool, SocketServer(unixsocket=socket_name, timeout=60) as server:
        client = pool.submit(ipi.run, args)
        with pytest.raises(OSError):
            server.calculate(water)
        with pytest.raises(ValueError, match="did the dynamics blow up"):
            client.result(timeout=60)


def test_a_server_that_closes_between_evaluations_is_done(
    checkpoint: Path, tmp_path: Path, socket_name: str, water: Atoms, capsys: pytest.CaptureFixture[str]
) -> None:
    """ASE's servers say no EXIT."""
    args = arguments(checkpoint, written(water, tmp_path), "--unix", socket_name)
    with ThreadPoolExecutor(1) as pool:
        with SocketIOCalculator(unixsocket=socket_name, timeout=60) as server:
            client = pool.submit(ipi.run, args)
            water.calc = server
            water.get_forces()
        assert client.result(timeout=60) == 0
    assert "closed the connection, without saying EXIT (as ASE's servers do), after 1 eval" in capsys.readouterr().out


def test_a_server_that_goes_in_the_midst_of_an_evaluation_is_an_error(
    checkpoint: Path, tmp_path: Path, socket_name: str, water: Atoms
) -> None:
    args = arguments(checkpoint, written(water, tmp_path), "--unix", socket_name)
    with ThreadPoolExecutor(1) as pool, SocketServer(unixsocket=socket_name, timeout=60) as server:
        client = pool.submit(ipi.run, args)
        server.calculate(water)
        server.protocol.sendposdata(water.cell.array, water.cell.array, water.positions)
        server.clientsocket.close()
        with pytest.raises(ipi.ServerGone, match="after 2 evaluations, before it fetched the last one's forces"):
            client.result(timeout=60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unix", "nobody", "--timeout", "0"], r"no i-PI server at /tmp/ipi_nobody within 0 s"),
        (["--unix", "a", "--port", "3"], "--unix excludes --host and --port"),
        (["--unix", ""], "--unix: expected the <address>"),
        (["--unix", "/nowhere/socket", "--timeout", "0"], "no i-PI server at /nowhere/socket"),
        (["--unix", "a" * 200], "cannot reach .*path too long"),
        (["--host", "no such host"], "cannot reach no such host:31415"),
        (["--port", "70000"], r"--port: expected 1\.\.65535"),
        (["--unix", "a", "--timeout", "-1"], "--timeout: expected seconds >= 0"),
        (["--unix", "a", "--charge", "7"], "charge 7 is not known"),
        (["--unix", "a", "--multiplicity", "9"], "multiplicity 9 is not known"),
        (["--unix", "a", "--fidelity", "lo"], "did you mean 'low'"),
        (["--unix", "a", "--device", "nothing"], "device 'nothing'"),
    ],
)
def test_bad_arguments_are_errors(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, water: Atoms
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        ipi.run(arguments(checkpoint, written(water, tmp_path), *words))


def test_files_that_are_no_structure_are_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        ipi.run(arguments(checkpoint, tmp_path / "missing.xyz", "--unix", "a"))
    (tmp_path / "text.xyz").write_text("a line\n")
    with pytest.raises(ValueError, match="ASE cannot read it"):
        ipi.run(arguments(checkpoint, tmp_path / "text.xyz", "--unix", "a"))


def input_file(atoms: Atoms, socket_name: str, *, beads: int = 1) -> str:
    """Return i-PI's input for constant-energy dynamics that prints all in atomic units with all digits.

    i-PI's own electronvolt differs from ASE's in the seventh digit, which a total energy would show.
    """
    per_atom = ", ".join(f"atom_{kind}(atom={i})" for kind in "xf" for i in range(len(atoms)))
    cell = ", ".join(str(x) for x in (atoms.cell.array.T if atoms.pbc.any() else 20 * np.eye(3)).ravel())
    return f"""<simulation verbosity='low' floatformat='%24.16e'>
 <output prefix='out'>
  <properties stride='1' filename='energies'> [ step, conserved, potential, virial_md ] </properties>
  <properties stride='1' filename='atoms'> [ {per_atom} ] </properties>
 </output>
 <total_steps>{STEPS}</total_steps>
 <prng><seed>1</seed></prng>
 <ffsocket name='rung' mode='unix'><address>{socket_name}</address><latency>1e-4</latency></ffsocket>
 <system>
  <initialize nbeads='{beads}'>
   <file mode='xyz' units='angstrom'>initial.xyz</file>
   <cell mode='manual' units='angstrom'>[{cell}]</cell>
   <velocities mode='thermal' units='kelvin'>300</velocities>
  </initialize>
  <forces><force forcefield='rung'/></forces>
  <motion mode='dynamics'>
   <dynamics mode='nve'><timestep units='femtosecond'>{TIMESTEP}</timestep></dynamics>
  </motion>
  <ensemble><temperature units='kelvin'>300</temperature></ensemble>
 </system>
</simulation>
"""


@pytest.fixture
def run_ipi(tmp_path: Path, socket_name: str) -> Callable[..., None]:
    """Return a function that runs i-PI (the command beside this Python, or on the path) with one client."""
    command = shutil.which("i-pi", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if command is None:
        pytest.skip("needs rung[ipi]: no command i-pi beside this Python or on the path")

    def run(atoms: Atoms, checkpoint: Path, *, beads: int = 1) -> None:
        structure = written(atoms, tmp_path)
        atoms.write(tmp_path / "initial.xyz", format="xyz")
        (tmp_path / "input.xml").write_text(input_file(atoms, socket_name, beads=beads))
        log = tmp_path / "log"
        with (
            log.open("w") as out,
            subprocess.Popen(
                [sys.executable, command, "input.xml"], cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT
            ) as server,
        ):
            try:
                assert ipi.run(arguments(checkpoint, structure, "--unix", socket_name, "--timeout", "30")) == 0
                assert server.wait(timeout=60) == 0, log.read_text()
            finally:
                server.kill()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["water", "crystal"])
def test_ipi_moves_atoms_by_the_calculators_forces(
    kind: str, checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest, run_ipi: Callable[..., None]
) -> None:
    atoms = request.getfixturevalue(kind)
    run_ipi(atoms, checkpoint)
    energies = np.loadtxt(tmp_path / "out.energies")
    columns = np.loadtxt(tmp_path / "out.atoms").reshape(STEPS + 1, 2, len(atoms), 3)
    positions, forces = columns[:, 0] * units.Bohr, columns[:, 1] * units.Hartree / units.Bohr
    atoms.calc = RungCalculator(checkpoint, "low", dtype="float64")
    potential = []
    for frame in range(STEPS + 1):
        atoms.positions = positions[frame]
        potential.append(atoms.get_potential_energy())
        assert energies[frame, 2] * units.Hartree == pytest.approx(potential[-1], abs=1e-5)
        np.testing.assert_allclose(forces[frame], atoms.get_forces(), atol=1e-5)
        if kind == "crystal":
            virial = energies[frame, 3:] * units.Hartree / units.Bohr**3  # xx, yy, zz, xy, xz, yz, over the volume
            np.testing.assert_allclose(virial, -atoms.get_stress()[[0, 1, 2, 5, 4, 3]], atol=1e-5)
    conserved = energies[:, 1] * units.Hartree
    assert np.ptp(potential) > 1e-2  # the atoms did move
    assert np.ptp(conserved) < 0.05 * np.ptp(potential)


@pytest.mark.slow
def test_path_integrals_run(checkpoint: Path, tmp_path: Path, water: Atoms, run_ipi: Callable[..., None]) -> None:
    run_ipi(water, checkpoint, beads=4)
    conserved, potential = np.loadtxt(tmp_path / "out.energies", usecols=(1, 2)).T * units.Hartree
    assert np.ptp(potential) > 1e-2
    assert np.ptp(conserved) < 0.05 * np.ptp(potential)


@pytest.mark.slow
def test_an_interrupt_ends_the_wait_for_a_server(checkpoint: Path, tmp_path: Path, water: Atoms) -> None:
    code = "import sys; from rung.launch.cli import run_module as r; sys.exit(r(sys.argv[1], 'rung ipi', sys.argv[2:]))"
    words = [str(checkpoint), str(written(water, tmp_path)), "--fidelity", "low", "--unix", f"rung_none_{os.getpid()}"]
    with subprocess.Popen(
        [sys.executable, "-c", code, "rung.model.engines.ipi", *words], stderr=subprocess.PIPE, text=True
    ) as client:
        assert client.stderr is not None
        lines = iter(client.stderr.readline, "")
        assert any("waiting for a server" in line for line in lines)
        client.send_signal(signal.SIGINT)
        assert client.stderr.read() == "rung ipi: interrupted\n"
        assert client.wait(timeout=60) == 130
