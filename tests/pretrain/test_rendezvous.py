"""What each launcher leaves in the environment, and the roll call of the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rung.pretrain import network, slurm
from rung.pretrain.network import LOOPBACK, free_port, gloo_interface, own_address
from rung.pretrain.rendezvous import Rendezvous, find, join
from rung.pretrain.roll_call import by_host, roll_call, words

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29511",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node0-17@1",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
# What the batch script itself sees, and the daemon that mpirun starts on a node by srun.
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1234", "SLURM_NODEID": "0"}
DAEMON = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


def agree(rank: int, world: int) -> tuple[str, int]:
    return "node0", 20000 + world


def no_agreement(rank: int, world: int) -> tuple[str, int]:
    raise AssertionError("MPI was asked although the environment has an address")


@pytest.mark.parametrize(
    ("environment", "port"),
    [
        (TORCHRUN, 29511),
        ({**TORCHRUN, **DAEMON}, 29511),
        (OPENMPI, 20008),
        ({**DAEMON, **OPENMPI}, 20008),
        (MPICH, 20008),
        ({**DAEMON, **MPICH}, 20008),
        (SRUN, 13234),
        ({**SRUN, "PMIX_RANK": "5"}, 13234),  # srun --mpi=pmix
        ({**SRUN, "MASTER_PORT": "4000"}, 4000),
    ],
)
def test_every_launcher_tells_the_same_place(
    environment: Mapping[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # no scontrol
    place = find(environment, 8, agree)
    assert replace(place, launcher="") == Rendezvous(5, 8, 1, 4, "node0", port, "")


def test_deepspeed_names_the_local_size_otherwise() -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert find({**environment, "LOCAL_SIZE": "4"}).local_world == 4


def test_without_a_launcher_there_is_one_rank_at_a_free_port() -> None:
    place = find({})
    assert (place.rank, place.world, place.local_rank, place.local_world) == (0, 1, 0, 1)
    assert place.address == LOOPBACK and 1024 < place.port < 65536


@pytest.mark.parametrize("environment", [OPENMPI, MPICH, SRUN])
def test_a_named_host_of_rank_0_needs_nobody_else(environment: dict[str, str]) -> None:
    for name in ("RUNG_MASTER_ADDR", "MASTER_ADDR"):
        assert find({**environment, name: "10.1.2.3"}, agree=no_agreement).address == "10.1.2.3"


def test_all_ranks_of_an_mpi_job_derive_one_port_and_two_jobs_two() -> None:
    def port(rank: int, job: str) -> int:
        own = {"OMPI_COMM_WORLD_RANK": str(rank), "PMIX_NAMESPACE": job, "MASTER_ADDR": "node0"}
        return find({**OPENMPI, **own}).port

    assert port(0, "prterun-node0-17@1") == port(7, "prterun-node0-17@1") != port(0, "prterun-node0-18@1")


def test_neighbouring_slurm_jobs_and_steps_have_different_ports() -> None:
    ports = {
        slurm.step_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(500_000, 501_000)
        for step in range(4)
    }
    assert len(ports) == 4000
    assert min(ports) >= 1024 and max(ports) < 32768


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, found 'two'"),
        ({**TORCHRUN, "RANK": "8"}, "found rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not;"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node0"}, "SLURM_NTASKS is not"),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[0-"}, "expected a node list"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=message):
        find(environment, agree=agree)


def test_a_world_of_another_size_is_refused() -> None:
    """Mixed MPI runtimes start N worlds of one rank; nothing else would notice."""
    with pytest.raises(ValueError, match="expected 4 rank.* the world has 8"):
        find(TORCHRUN, 4)
    with pytest.raises(ValueError, match="expected 2 rank.* the world has 1"):
        find({"RUNG_WORLD_SIZE": "2"})
    assert find({**TORCHRUN, "RUNG_WORLD_SIZE": "8"}).world == 8


@pytest.mark.parametrize(
    "environment",
    [BATCH, {**SRUN, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "4000"}, {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8"}],
)
def test_a_shell_inside_an_allocation_is_not_a_task(environment: dict[str, str]) -> None:
    """A batch script and `srun --pty` have SLURM_PROCID=0 as well: as rank 0 of 8 they would wait for nobody."""
    with pytest.raises(ValueError, match="put `srun` before the command"):
        find(environment)
    assert find({**environment, "RUNG_WORLD_SIZE": "1"}).world == 1
    assert find({**environment, "SLURM_NTASKS": "1"}).world == 1


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("node0", ["node0"]),
        ("a,b-1,c.d", ["a", "b-1", "c.d"]),
        ("gpu[01-03,7],login1", ["gpu01", "gpu02", "gpu03", "gpu7", "login1"]),
        ("rack[1-2]n[09-10]", ["rack1n09", "rack1n10", "rack2n09", "rack2n10"]),
        ("n[008-012]-ib", ["n008-ib", "n009-ib", "n010-ib", "n011-ib", "n012-ib"]),
    ],
)
def test_node_lists_expand(node_list: str, hosts: list[str]) -> None:
    assert slurm.expand(node_list) == hosts


@pytest.mark.parametrize("node_list", ["", "a[", "a]", "a[1-]", "a[x]", "a[[1]]", ",a"])
def test_broken_node_lists_are_refused(node_list: str) -> None:
    with pytest.raises(ValueError, match="Slurm: expected"):
        slurm.expand(node_list)


def test_scontrol_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames any[1]" ] && printf "one\\ntwo\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.host_names("any[1]") == ["one", "two"]
    assert slurm.host_names("n[1-2]") == ["n1", "n2"]  # it fails on this one


def test_tasks_of_this_node() -> None:
    tasks = {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert [slurm.tasks_here({**tasks, "SLURM_NODEID": str(node)}, 7) for node in range(4)] == [2, 2, 2, 1]
    assert slurm.tasks_here({"SLURM_STEP_NUM_NODES": "2"}, 8) == 4


def test_mpi_that_sees_another_world_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MPI library of this process was started by nobody, so it is a world of one rank, as with mixed runtimes."""
    code = (
        "from rung.pretrain.rendezvous import agree_by_mpi\n"
        "try: agree_by_mpi(0, 2)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "set RUNG_MASTER_ADDR to the host name" in done.stdout


def test_join_sets_what_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    try:
        for name in [*TORCHRUN, "GLOO_SOCKET_IFNAME", "RUNG_WORLD_SIZE"]:
            os.environ.pop(name, None)
        place = join(1)
        assert {name: os.environ[name] for name in TORCHRUN} == place.variables()
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_gloo_is_told_where_the_host_name_is_a_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "is_loopback", lambda host: False)
    assert gloo_interface("node0") is None
    monkeypatch.setattr(network, "is_loopback", lambda host: True)
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.5", "ib0": "10.1.0.5"})
    monkeypatch.setattr(network, "_source_address", lambda destination: "10.1.0.5")
    assert gloo_interface("node0") == "ib0"
    assert own_address() == "10.1.0.5"
    monkeypatch.setattr(network, "_source_address", lambda destination: LOOPBACK)
    with pytest.raises(ValueError, match=r"set GLOO_SOCKET_IFNAME .*eth0, ib0"):
        gloo_interface("node0")
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.5"})
    assert gloo_interface("node0") == "eth0"


def test_loopback_and_unknown_names_are_recognised() -> None:
    assert network.is_loopback("127.0.0.1") and network.is_loopback("no-such-host.invalid")
    assert not network.is_loopback("192.0.2.1")


def roll(rank: int, world: int, port: int, seconds: float) -> Any:
    place = Rendezvous(rank, world, rank, world, LOOPBACK, port, "test")
    try:
        return roll_call(place, seconds).hosts
    except ValueError as error:
        return str(error)


def call_roll(world: int, port: int, seconds: float) -> Any:
    return roll(int(os.environ["RANK"]), world, port, seconds)


def test_the_roll_call_names_hosts_and_those_that_are_missing(run_ranks: Any) -> None:
    host = os.uname().nodename
    assert run_ranks(call_roll, 3, 3, free_port(), 60.0) == [{0: host, 1: host, 2: host}] * 3
    for text in run_ranks(call_roll, 2, 4, free_port(), 1.0):
        assert f"these did not come: 2-3 (there are, on {host}: 0-1)" in text


def test_a_rank_that_cannot_reach_rank_0_says_so() -> None:
    assert "cannot reach rank 0 at 127.0.0.1:" in roll(1, 2, free_port(), 1.0)


def test_ranks_are_written_as_runs() -> None:
    assert words([0, 1, 2, 3, 7, 9, 8]) == "0-3, 7-9" and words([4]) == "4"
    assert by_host({0: "a", 2: "b", 1: "a"}) == {"a": [0, 1], "b": [2]}
