"""What Slurm's srun tells its tasks: their place, the hosts of the step, and a port that no other step takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from itertools import product

# Below the ports that systems hand out to outgoing connections (from 32768). The stride, a prime, keeps the steps of
# one job apart from the jobs numbered after it.
FIRST_PORT, NUM_PORTS = 12_000, 20_011
_STEP_STRIDE = 7919
_INTERACTIVE_STEP = "4294967290"  # the step of salloc's own shell (LaunchParameters=use_interactive_step)


def is_task(environment: Mapping[str, str]) -> bool:
    """Tell a task of srun from the batch script, which has a SLURM_PROCID too, and from a shell at a terminal."""
    interactive = "SLURM_PTY_PORT" in environment or environment.get("SLURM_STEP_ID") == _INTERACTIVE_STEP
    return "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment and not interactive


def step_port(environment: Mapping[str, str]) -> int:
    """Return the port of a step: another one for every job and step that may be on a node at the same time."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job + _STEP_STRIDE * step) % NUM_PORTS


def tasks_here(environment: Mapping[str, str], world: int) -> int:
    """Return the number of the step's tasks on this node, of `world` in all."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeats or 1)  # 2(x3),1
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else -(-world // int(environment.get("SLURM_STEP_NUM_NODES", "1")))


def host_names(node_list: str) -> list[str]:
    """Return the hosts of a node list such as gpu[01-03,7],login1; without Slurm's own program by `expand`."""
    if scontrol := shutil.which("scontrol"):
        result = subprocess.run([scontrol, "show", "hostnames", node_list], capture_output=True, text=True)
        if result.returncode == 0 and result.stdout.split():
            return result.stdout.split()
    return expand(node_list)


def expand(node_list: str) -> list[str]:
    """Return the hosts of a node list; a name may have several brackets: rack[1-2]n[01-16].

    Raises ValueError for a list that is not one.
    """
    words = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list)
    if ",".join(words) != node_list or not words:
        raise ValueError(f"Slurm: expected a node list such as gpu[01-03,7],login1, found '{node_list}'")
    hosts: list[str] = []
    for word in words:
        parts = [_values(part) for part in re.split(r"(\[[^\]]*\])", word)]
        hosts += ["".join(choice) for choice in product(*parts)]
    return hosts


def _values(part: str) -> list[str]:
    if not part.startswith("["):
        return [part]
    values: list[str] = []
    for item in part[1:-1].split(","):
        if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", item)):
            raise ValueError(f"Slurm: expected numbers and ranges in {part}, found '{item}'")
        first, last = found[1], found[2] or found[1]
        values += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return values
