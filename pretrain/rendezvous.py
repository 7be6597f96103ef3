"""Where this rank stands and where rank 0 is, from what the launcher left in the environment.

    RANK ...                     torchrun, deepspeed
    OMPI_COMM_WORLD_RANK ...     Open MPI's mpirun
    PMI_RANK ...                 MPICH's and Intel's mpirun, srun --mpi=pmi2
    SLURM_PROCID ...             srun; needs no MPI
    none of them                 one process

The first that is found counts: mpirun within a Slurm job leaves the variables of both, and those of Slurm are then
those of its daemon. Two more variables are ours: RUNG_WORLD_SIZE, the number of ranks that must be there, and
RUNG_MASTER_ADDR (or MASTER_ADDR), the host of rank 0, for an MPI whose library mpi4py cannot load.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rung.pretrain import slurm
from rung.pretrain.network import LOOPBACK, free_port, gloo_interface, own_address

DEFAULT_PORT = 29500  # torch's

Agree = Callable[[int, int], tuple[str, int]]  # (rank, world) -> rank 0's (address, port), the same on every rank


@dataclass(frozen=True)
class Rendezvous:
    """One rank's place in the world, and the address at which rank 0 waits for the others."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    launcher: str

    def variables(self) -> dict[str, str]:
        """Return what torch.distributed's `env://` and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def join(requested: int | None = None) -> Rendezvous:
    """Find this rank's place, set the variables that torch and DeepSpeed read, and choose Gloo's network interface.

    Raises ValueError as `find` and `gloo_interface` do.
    """
    place = find(os.environ, requested)
    os.environ.update(place.variables())
    several_machines = place.local_world < place.world
    if several_machines and "GLOO_SOCKET_IFNAME" not in os.environ and (name := gloo_interface(place.address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return place


def launched(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher has started this process as one of its ranks."""
    return "RANK" in environment or any(kind.rank in environment for kind in MPI_KINDS) or slurm.is_task(environment)


def find(environment: Mapping[str, str], requested: int | None = None, agree: Agree | None = None) -> Rendezvous:
    """Return the place of the process that has this environment.

    `requested` (or RUNG_WORLD_SIZE) is the number of ranks that must be there. `agree` asks rank 0 for its address
    where the environment has none; None: by MPI.
    Raises ValueError where variables are missing, contradict each other, or tell of another number of ranks.
    """
    if requested is None and environment.get("RUNG_WORLD_SIZE"):
        requested = _number(environment, "RUNG_WORLD_SIZE")
    if "RANK" in environment:
        place = _from_torch(environment)
    elif kind := next((kind for kind in MPI_KINDS if kind.rank in environment), None):
        place = _from_mpi(environment, kind, agree or agree_by_mpi)
    elif slurm.is_task(environment):
        place = _from_slurm(environment)
    else:
        place = _alone(environment, requested)
    if not 0 <= place.rank < place.world or not 0 <= place.local_rank < place.local_world <= place.world:
        raise ValueError(
            f"{place.launcher}: expected a rank below the world size and a local rank below the local world size, "
            f"found rank {place.rank} of {place.world}, local rank {place.local_rank} of {place.local_world}; "
            "were some of these variables set by hand, or by another launcher?"
        )
    if requested is not None and place.world != requested:
        raise ValueError(
            f"expected {requested} rank(s), but by {place.launcher} the world has {place.world}; "
            "correct the number in the command, or in --ranks or RUNG_WORLD_SIZE. (Several worlds of one rank each: "
            "mpirun and the MPI library are not of the same MPI.)"
        )
    return place


def _alone(environment: Mapping[str, str], requested: int | None) -> Rendezvous:
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and requested != 1:
        raise ValueError(
            f"this is a Slurm allocation of {tasks} tasks, and srun did not start this process; put `srun` before the "
            "command, or start the ranks of this machine with --ranks N, or set RUNG_WORLD_SIZE=1 for a single rank"
        )
    return Rendezvous(0, 1, 0, 1, LOOPBACK, free_port(), "no launcher")


def _from_torch(environment: Mapping[str, str]) -> Rendezvous:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR") if name not in environment]
    if missing:
        raise ValueError(
            f"RANK is {environment['RANK']}, but {' and '.join(missing)} is not set; launchers set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT: set them all, or unset RANK"
        )
    return Rendezvous(
        _number(environment, "RANK"),
        _number(environment, "WORLD_SIZE"),
        _first(environment, ("LOCAL_RANK", "RANK")),
        _first(environment, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")),
        environment["MASTER_ADDR"],
        _first(environment, ("MASTER_PORT",), DEFAULT_PORT),
        _started_by(environment),
    )


def _started_by(environment: Mapping[str, str]) -> str:
    marks = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    return next((name for mark, name in marks.items() if mark in environment), "RANK and WORLD_SIZE")


@dataclass(frozen=True)
class MpiKind:
    """The names of one family of MPI launchers for the variables; those of the local ones differ within it."""

    name: str
    rank: str
    world: str
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]


MPI_KINDS = (
    MpiKind(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    MpiKind(
        "MPI (PMI_RANK)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)


def _from_mpi(environment: Mapping[str, str], kind: MpiKind, agree: Agree) -> Rendezvous:
    if kind.world not in environment:
        raise ValueError(f"{kind.name}: {kind.rank} is set, but {kind.world} is not; start the ranks with mpirun")
    rank, world = _number(environment, kind.rank), _number(environment, kind.world)
    local_world = _first(environment, kind.local_world, slurm.tasks_here(environment, world))
    given = environment.get("RUNG_MASTER_ADDR") or environment.get("MASTER_ADDR")
    if given or world == 1:
        address, port = given or LOOPBACK, _first(environment, ("MASTER_PORT",), _job_port(environment))
    else:
        address, port = agree(rank, world)
    local_rank = _first(environment, kind.local_rank, rank % max(1, local_world))
    return Rendezvous(rank, world, local_rank, local_world, address, port, kind.name)


def _job_port(environment: Mapping[str, str]) -> int:
    """Return a port that every rank of one MPI job derives alike, where the environment names the job."""
    names = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
    job = next((environment[name] for name in names if name in environment), None)
    return DEFAULT_PORT if job is None else slurm.FIRST_PORT + zlib.crc32(job.encode()) % slurm.NUM_PORTS


def agree_by_mpi(rank: int, world: int) -> tuple[str, int]:
    """Return an address of rank 0's machine and a free port there, told to every rank by MPI.

    Raises ValueError where mpi4py has no MPI library, or one that is not the launcher's.
    """
    remedy = "set RUNG_MASTER_ADDR to the host name or address of rank 0, and no MPI library is needed"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"rank {rank}: mpi4py cannot load an MPI library ({error}); {remedy}") from error
    if (size := MPI.COMM_WORLD.Get_size()) != world:
        raise ValueError(
            f"rank {rank}: mpirun started {world} ranks, but the MPI library that mpi4py loads sees {size}: they are "
            f"not of the same MPI. Use the mpirun that belongs to the library; or {remedy}"
        )
    hosts = set(MPI.COMM_WORLD.allgather(socket.gethostname()))
    own = (LOOPBACK if len(hosts) == 1 else own_address(), free_port()) if rank == 0 else None
    found: tuple[str, int] = MPI.COMM_WORLD.bcast(own)
    return found


def _from_slurm(environment: Mapping[str, str]) -> Rendezvous:
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"} & set(environment):
        raise ValueError("Slurm: SLURM_PROCID is set, but SLURM_NTASKS is not; start the ranks with srun --ntasks=N")
    world = _first(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    given = environment.get("RUNG_MASTER_ADDR") or environment.get("MASTER_ADDR")
    return Rendezvous(
        _number(environment, "SLURM_PROCID"),
        world,
        _number(environment, "SLURM_LOCALID"),
        slurm.tasks_here(environment, world),
        given or slurm.host_names(environment["SLURM_STEP_NODELIST"])[0],
        _first(environment, ("MASTER_PORT",), slurm.step_port(environment)),
        "Slurm",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d+", text.strip()):
        raise ValueError(f"{name}: expected a whole number, found '{text}'")
    return int(text)


def _first(environment: Mapping[str, str], names: Iterable[str], default: int = 0) -> int:
    return next((_number(environment, name) for name in names if name in environment), default)
