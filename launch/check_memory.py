"""Pre-flight: is there memory for the largest batch that the budget allows?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from rung.data.batch import Batch, collate
from rung.data.graph import edge_counts
from rung.data.stream import LabelReader
from rung.data.structure import Structure
from rung.launch.check_site import Check, Site, Verdict, gibibytes
from rung.pretrain.config import PretrainConfig
from rung.pretrain.ema import Ema
from rung.pretrain.engine import make_engine
from rung.pretrain.plan import Plan, make_potential
from rung.pretrain.reptile import Outer

SAMPLED = 256  # structures of a task's densest shard
HEAD_ROOM = 0.9  # of what is free: the rest is for fragmentation and for what other programs take
STEPS = 2  # optimizers make their state in the first, and use all of it in the second


def largest_batch(plan: Plan, config: PretrainConfig) -> Batch:
    """Return a batch that is as full as both limits of the budget allow, made of the data's own structures.

    It repeats the structure with the most edges per atom, from the shard of each task with the most edges per
    structure, and fills up with the one with the fewest. Raises ValueError naming a structure above the budget.
    """
    found: list[tuple[Structure, str, int]] = []  # with its fidelity and edges
    for task in plan.tasks:
        reader = LabelReader(task.dataset, task.fidelity, "train", shard_url=task.shard_url, remote=task.remote)
        shard = max(range(len(reader.shards)), key=lambda i: reader.shards[i].edges / reader.shards[i].structures)
        table, _ = reader.read(shard, 0, min(SAMPLED, int(reader.counts[shard])))
        reader.close()
        edges = edge_counts(table, plan.model.cutoff)
        rows = {int(np.argmax(edges)), int(np.argmax(edges / table.num_atoms)), int(np.argmin(edges))}
        found += [(table[row], task.fidelity, int(edges[row])) for row in rows]
    budget = config.data
    for structure, _, num_edges in found:
        if structure.num_atoms > budget.max_atoms or num_edges > budget.max_edges:
            raise ValueError(
                f"structure '{structure.key}': {structure.num_atoms} atoms and {num_edges} edges exceed data.max_atoms="
                f"{budget.max_atoms} or data.max_edges={budget.max_edges}; raise them, or remove the structure"
            )
    chosen: list[tuple[Structure, str, int]] = []
    atoms_left, edges_left = budget.max_atoms, budget.max_edges
    dense_first = sorted(found, key=lambda row: row[2] / row[0].num_atoms, reverse=True)
    for structure, fidelity, num_edges in dense_first:
        copies = min(atoms_left // structure.num_atoms, edges_left // max(1, num_edges))
        chosen += [(structure, fidelity, num_edges)] * copies
        atoms_left -= copies * structure.num_atoms
        edges_left -= copies * num_edges
    return collate(
        [structure for structure, _, _ in chosen],
        fidelities=[fidelity for _, fidelity, _ in chosen],
        fidelity_index=plan.fidelity_index,
        cutoff=plan.model.cutoff,
    )


def _memory(site: Site) -> dict[str, Any]:
    ranks, plan, config = site.grouped or site.ranks, site.plan, site.config
    batch = largest_batch(plan, config)
    free, before = _free(ranks.device), _start(ranks.device)
    potential = make_potential(plan).to(ranks.device)
    engine = make_engine(potential, plan, config, ranks)
    held: list[object] = [Ema(potential, config.ema_decay)]
    names = [""]  # of the inner states
    if config.mode == "reptile":
        held.append(Outer(engine.masters(), engine.master_rows(), config.reptile, ranks.exchange_, plan.world.groups))
        if config.reptile.inner_state == "task":
            names = [f"task{task}" for task in range(len(plan.tasks))]
    for number in range(max(STEPS, len(names))):
        engine.use_inner_state(names[number % len(names)])
        engine.step([batch] * config.data.micro_batches, config.optimizer.lr)
    size = {"structures": batch.num_structures, "atoms": batch.num_atoms, "edges": batch.num_edges}
    return {**size, "peak": _peak(ranks.device) - before, "free": free}


def _judge_memory(site: Site, readings: Sequence[Any]) -> Verdict:
    """Compare per GPU, or per machine, whose ranks share its memory."""
    on_cpu = site.ranks.device.type == "cpu"
    share = []
    for rank in site.hosts:
        sharing = [other for other in site.hosts if on_cpu and site.hosts[other] == site.hosts[rank]] or [rank]
        needed = sum(readings[other]["peak"] for other in sharing)
        share.append(needed / max(1, min(readings[other]["free"] for other in sharing)))
    bad = {
        rank: f"the largest batch takes {share[rank]:.0%} of the free memory" + (" with its neighbours" * on_cpu)
        for rank in site.hosts
        if share[rank] > HEAD_ROOM
    }
    first = readings[0]
    result = (
        f"largest batch: {first['structures']} structures, {first['atoms']} atoms, {first['edges']} edges; "
        f"a rank's peak {gibibytes(max(reading['peak'] for reading in readings))}, "
        f"at most {max(share):.0%} of what is free"
    )
    advice = "lower data.max_atoms and data.max_edges (with data.micro_batches for as large a step), or "
    advice += "set activation_checkpointing=true"
    return Verdict(result, bad, advice, worst=share.index(max(share)))


def _free(device: torch.device) -> int:
    """Return the bytes that this device, or this machine within the limit of the job, has free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (path := Path(folder, limit)).exists() and (text := path.read_text().strip()).isdigit():
            free = min(free, int(text) - int(Path(folder, used).read_text()))
    return free


def _start(device: torch.device) -> int:
    """Begin to measure the peak, and return what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    with suppress(OSError):  # an earlier peak may hide this one then
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again (man 5 proc)
    return int(psutil.Process().memory_info().rss)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


CHECKS = (Check("memory", _memory, _judge_memory, ("shards", "kernels", "all-reduce"), 600.0),)
