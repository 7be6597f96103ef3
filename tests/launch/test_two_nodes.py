"""Two nodes, simulated by network namespaces with host names that resolve nowhere: every launcher, check and training.

All tests need root and `ip netns`; they are skipped, with the reason, where that is not allowed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from rung.data.manifest import resolve_dataset

pytestmark = pytest.mark.slow

PROGRAMS = Path(sys.executable).parent  # of the environment: torchrun, deepspeed, mpirun
SSH = Path(__file__).with_name("fakessh")
SECONDS = 200
_ports = itertools.count(23000)  # the namespaces are ours alone


@dataclass(frozen=True)
class Node:
    """One machine."""

    host: str
    namespace: str
    address: str

    def command(self, words: Sequence[str], hidden: Sequence[Path] = ()) -> list[str]:
        """Return a command line that runs `words` there; folders that are `hidden` are empty there."""
        mounts = "".join(f"mount -t tmpfs none '{folder}' && " for folder in hidden)
        shell = f'{mounts}hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", shell, self.host, *words]


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that are joined by a cable."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"no `{program}` on this machine")
    tag = f"rung{os.getpid()}"
    pair = (Node("nodea", f"{tag}a", "10.77.0.1"), Node("nodeb", f"{tag}b", "10.77.0.2"))
    try:
        for node in pair:
            ip(f"netns add {node.namespace}")
        ip(f"link add veth0 netns {pair[0].namespace} type veth peer name veth0 netns {pair[1].namespace}")
        for node in pair:
            ip(f"-n {node.namespace} addr add {node.address}/24 dev veth0")
            ip(f"-n {node.namespace} link set veth0 up")
            ip(f"-n {node.namespace} link set lo up")
        subprocess.run(pair[0].command(["true"]), check=True, capture_output=True, text=True)
        yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    finally:
        for node in pair:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)


Task = tuple[Node, Sequence[str], Mapping[str, str]]  # what is started by hand on a node, with its variables
Launcher = Callable[[tuple[Node, Node], Path, Sequence[str]], list[Task]]


def torchrun(nodes: tuple[Node, Node], folder: Path, words: Sequence[str]) -> list[Task]:
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", nodes[0].address]
    options += ["--master_port", str(next(_ports))]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return [(node, [*launcher, "--node_rank", str(rank), "-m", *words], {}) for rank, node in enumerate(nodes)]


def deepspeed(nodes: tuple[Node, Node], folder: Path, words: Sequence[str]) -> list[Task]:
    """Without pdsh, which CI machines do not have: the launcher is started on each node."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node.host} slots=1\n" for node in nodes))
    options = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", nodes[0].address]
    options += ["--master_port", str(next(_ports)), "--no_local_rank", "--module"]
    return [
        (node, [str(PROGRAMS / "deepspeed"), f"--node_rank={rank}", *options, *words], {})
        for rank, node in enumerate(nodes)
    ]


def mpirun(nodes: tuple[Node, Node], folder: Path, words: Sequence[str]) -> list[Task]:
    options = ["-np", "2", "-H", ",".join(node.host for node in nodes), "--bind-to", "none"]
    options += ["--prtemca", "plm_ssh_agent", str(SSH), "--allow-run-as-root"]
    for name in ("PYTHONSAFEPATH", "PYTHONPATH", "OMP_NUM_THREADS"):
        options += ["-x", name] if name in os.environ else []
    variables = {"TEST_NODES": " ".join(f"{node.host}={node.namespace}" for node in nodes)}
    return [(nodes[0], [str(PROGRAMS / "mpirun"), *options, sys.executable, "-m", *words], variables)]


def srun(nodes: tuple[Node, Node], folder: Path, words: Sequence[str]) -> list[Task]:
    """What srun sets for its tasks; host names do not resolve here, so the list has addresses."""
    common = {
        "SLURM_JOB_ID": str(next(_ports)),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "10.77.0.[1-2]",
        "SLURM_LOCALID": "0",
    }
    return [
        (node, [sys.executable, "-m", *words], {**common, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)})
        for rank, node in enumerate(nodes)
    ]


LAUNCHERS: list[Launcher] = [torchrun, deepspeed, mpirun, srun]


def start(tasks: Sequence[Task], hidden: Sequence[Path] = ()) -> list[tuple[int, str]]:
    """Run tasks until all have ended; return status and output of each. On the second node folders may be hidden."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            node.command(words, hidden if node.host == "nodeb" else ()),
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, words, variables in tasks
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def config(folder: Path, *more: str) -> list[str]:
    words = ["debug", f"output={folder / 'run'}", "steps=4", "model.channels=16", "world.size=2"]
    return [*words, "evaluation={every: 4, max_structures: 8}", "world.timeout_minutes=1", *more]


CHECK = ["--timeout", "30", "--megabytes", "1"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_joins_two_nodes(launcher: Launcher, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    words = config(tmp_path)
    results = start(launcher(nodes, tmp_path, ["rung.launch", "check", *words, *CHECK]))
    output = "\n".join(text for _, text in results)
    assert all(status == 0 for status, _ in results), output
    assert "2 host(s) (nodea: 0; nodeb: 1)" in output
    assert any(line.startswith("fit") for line in output.splitlines())
    results = start(launcher(nodes, tmp_path, ["rung.pretrain", *words]))
    output = "\n".join(text for _, text in results)
    assert all(status == 0 for status, _ in results), output
    assert (tmp_path / "run" / "checkpoint").is_dir()


def check(nodes: tuple[Node, Node], folder: Path, words: Sequence[str], other: Sequence[str] | None = None) -> str:
    """Check by srun's variables, the second node perhaps with `other` words, and return what rank 0 printed."""
    tasks = srun(nodes, folder, ["rung.launch", "check", *words, *CHECK])
    if other is not None:
        tasks[1] = (nodes[1], [sys.executable, "-m", "rung.launch", "check", *other, *CHECK], tasks[1][2])
    return _rank_0(start(tasks))


def _rank_0(results: Sequence[tuple[int, str]]) -> str:
    status, output = results[0]
    assert status == 1, output
    return output


def test_a_node_without_the_shards_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(resolve_dataset("builtin"), data)
    words = config(tmp_path, f"tasks=[{{dataset: {data}, fidelity: gfn1_xtb}}]")
    output = _rank_0(start(srun(nodes, tmp_path, ["rung.launch", "check", *words, *CHECK]), hidden=[data]))
    assert f"rank 1 (nodeb): dataset '{data}': no dataset.yaml" in " ".join(output.split())
    assert "NOT FIT: config failed, on nodeb" in output


def test_a_node_with_another_output_folder_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tasks = srun(nodes, tmp_path, ["rung.launch", "check", *config(tmp_path), "--timeout", "10"])
    output = _rank_0(start(tasks, hidden=[tmp_path / "run"]))
    assert "NOT FIT: output failed, on nodeb" in output and "a folder that all machines share" in output


def test_a_node_with_another_config_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    output = check(nodes, tmp_path, config(tmp_path), config(tmp_path, "optimizer.lr=1e-4"))
    assert "rank 1 (nodeb): config " in output and "NOT FIT: config failed, on nodeb" in output


def test_a_wrong_interface_is_told_from_a_missing_rank(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    tasks = srun(nodes, tmp_path, ["rung.launch", "check", *config(tmp_path), "--timeout", "3"])
    results = start([(node, words, {**variables, "GLOO_SOCKET_IFNAME": "lo"}) for node, words, variables in tasks])
    assert any("cannot reach each other" in output and "set GLOO_SOCKET_IFNAME" in output for _, output in results)
    assert [status for status, _ in results] == [1, 1], results


def test_a_node_that_is_cut_off_is_named(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """The second node waits at the wrong address; the first says who is missing, the second whom it cannot reach."""
    tasks = srun(nodes, tmp_path, ["rung.launch", "check", *config(tmp_path), "--timeout", "5"])
    tasks[1] = (*tasks[1][:2], {**tasks[1][2], "RUNG_MASTER_ADDR": "10.77.0.3"})
    (first, here), (second, there) = start(tasks)
    assert first == second == 1
    assert "these did not come: 1 (there are, on nodea: 0)" in here
    assert "rank 1 on nodeb: cannot reach rank 0 at 10.77.0.3" in there
