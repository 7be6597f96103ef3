"""Measures what `rung plan` needs to know of this machine: a step's time and memory, the loader, the link of two ranks.

The batches are crystals of the model's elements whose density is chosen, so that atoms and edges vary separately.
"""

from __future__ import annotations

import datetime
import itertools
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed
from ase.build import bulk
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rung.data.batch import Batch, collate
from rung.data.stream import epoch_structures
from rung.data.structure import Labels, Structure
from rung.kernels.memory import keep_freed_memory
from rung.launch.clusters import Cluster, Link, Step
from rung.model.loss import loss_terms, total
from rung.model.potential import Potential
from rung.pretrain.config import PretrainConfig
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import Plan, make_plan, make_potential

EDGES_PER_ATOM = (8.0, 40.0)  # molecules, and crystals
SIZES = (0.25, 1.0)  # of the config's budget of atoms
ROUNDS = 15  # of all batches in turn; the fastest of each counts, because other work only ever delays
LINK_BYTES = (8, 1 << 24)


def measure(config: PretrainConfig, name: str) -> Cluster:
    """Return this machine as a cluster of one node, with a step of the config's model measured on one rank."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = measure_step(config, device)
    memory_gb, ranks = psutil.virtual_memory().total / 1e9, len(os.sched_getaffinity(0))
    if device.type == "cuda":
        memory_gb, ranks = torch.cuda.get_device_properties(device).total_memory / 1e9, torch.cuda.device_count()
    link, origin, source = Link(1.0, 100.0), "assumed", "one rank only: nothing was measured"
    if device.type == "cpu" and ranks > 1:
        link, origin = measure_link(), "measured"
        source = f"all-reduce of {LINK_BYTES[1] >> 20} MiB and of {LINK_BYTES[0]} bytes by two gloo ranks here"
    return Cluster(
        name=name,
        description=f"{machine(device)}; a rank is one {'GPU' if device.type == 'cuda' else 'core'}",
        nodes=1,
        gpus_per_node=ranks,
        gpu_memory_gb=round(memory_gb / (ranks if device.type == "cpu" else 1), 1),
        intra_node=link,
        inter_node=link,
        network_origin="measured" if origin == "measured" else "assumed",
        network_source=source,
        step=step,
        sizes=tuple(n for n in (1, 2, 4, 8) if n <= ranks),
    )


def machine(device: torch.device) -> str:
    """Return the processor (and the GPU) in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(os.sched_getaffinity(0))} cores {models[0] if models else platform.machine()}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def measure_step(config: PretrainConfig, device: torch.device) -> Step:
    """Return the constants of the config's step on one rank (one thread per rank on a CPU)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = make_plan(config, 1)
        potential = make_potential(plan).to(device)
        potential.train()
        shapes = [(round(part * config.data.max_atoms), edges) for part in SIZES for edges in EDGES_PER_ATOM]
        batches = [crystals(plan, atoms, edges).to(device) for atoms, edges in shapes]
        steps = [_gradients(potential, batch, config) for batch in batches]
        seconds = fastest(steps, clock_of(device))
        peaks = [peak_bytes(step, device) for step in steps]
        sizes = np.array([(1, batch.num_atoms, batch.num_edges) for batch in batches], np.float64)
        time_fit, memory_fit = fit(sizes, np.array(seconds)), fit(sizes, np.array(peaks))
        optimizer_s, bases_s = _optimizer_seconds(potential, config, steps[0], device)
        rate = loader_rate(config, plan)
    finally:
        torch.set_num_threads(threads)
    today, kernels = datetime.date.today().isoformat(), potential.kernels().split(" libraries")[0]
    source = (
        f"rung plan --measure, {today}, {machine(device)}, one rank, {kernels} kernels; "
        f"{len(batches)} batches of {sizes[0, 1]:.0f} to {sizes[-1, 1]:.0f} atoms, {EDGES_PER_ATOM[0]:.0f} and "
        f"{EDGES_PER_ATOM[1]:.0f} edges per atom; the fit is off by at most {_worst(sizes, time_fit, seconds):.0%} "
        f"in time and {_worst(sizes, memory_fit, peaks):.0%} in memory"
    )
    return Step(
        origin="measured",
        source=source,
        channels=plan.model.channels,
        num_layers=plan.model.num_layers,
        parameters=sum(parameter.numel() for parameter in potential.parameters()),
        optimizer=config.optimizer.name,
        fixed_ms=_round(1e3 * time_fit[0]),
        atom_us=_round(1e6 * time_fit[1]),
        edge_us=_round(1e6 * time_fit[2]),
        optimizer_ms=_round(1e3 * optimizer_s),
        bases_ms=_round(1e3 * bases_s),
        bytes_fixed=_round(memory_fit[0]),
        bytes_per_atom=_round(memory_fit[1]),
        bytes_per_edge=_round(memory_fit[2]),
        structures_per_s=_round(rate),
    )


def crystals(plan: Plan, atoms: int, edges_per_atom: float) -> Batch:
    """Return a batch of about `atoms` atoms in rattled fcc crystals with about `edges_per_atom` neighbours."""
    elements, fidelity = plan.model.elements, plan.model.fidelities[0]
    # 4 atoms in a cube of side a: (4/3) pi cutoff^3 * 4 / a^3 neighbours
    side = plan.model.cutoff * (16 / 3 * math.pi / edges_per_atom) ** (1 / 3)
    repeats = max(1, round((min(atoms, 256) / 4) ** (1 / 3)))
    random = np.random.default_rng(0)
    made = []
    for index in range(max(1, round(atoms / (4 * repeats**3)))):
        cell = bulk("Cu", "fcc", a=side, cubic=True).repeat(repeats)
        cell.rattle(0.05, seed=index)
        numbers = random.choice(elements, len(cell)).astype(np.uint8)
        labels = {fidelity: Labels(0.0, np.zeros((len(cell), 3), np.float32))}
        positions, box = cell.positions.astype(np.float32), cell.cell.array.astype(np.float32)
        name = f"crystal_{index}"
        made.append(Structure(name, name, numbers, positions, box, np.ones(3, np.bool_), labels=labels))
    names = [fidelity] * len(made)
    return collate(made, fidelities=names, fidelity_index=plan.fidelity_index, cutoff=plan.model.cutoff)


def fastest(calls: Sequence[Callable[[], Any]], clock: Callable[[], float]) -> list[float]:
    """Return the shortest time of each call in seconds, taking turns."""
    best = [math.inf] * len(calls)
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            begin = clock()
            call()
            best[index] = min(best[index], clock() - begin)
    return best


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock for work of one thread: on a CPU it stands still while other processes have the core."""

    def after_the_device() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_the_device if device.type == "cuda" else time.process_time


def fit(sizes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients >= 0 of sizes [n, 3] with the smallest relative squared errors."""
    best, smallest = np.zeros(3), math.inf
    for columns in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
        weighted = sizes[:, columns] / values[:, None]
        found = np.linalg.lstsq(weighted, np.ones(len(values)), rcond=None)[0]
        error = float(np.square(weighted @ found - 1).sum())
        if (found >= 0).all() and error < smallest:
            smallest, best = error, np.zeros(3)
            best[list(columns)] = found
    return best


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes of tensors that are alive at most during a call, beyond those that were before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def loader_rate(config: PretrainConfig, plan: Plan, count: int = 2000) -> float:
    """Return the structures per second that one process makes into batches of the first task's."""
    task = plan.tasks[0]
    stream = epoch_structures(task.dataset, task.fidelity, "train", shard_url=task.shard_url, remote=task.remote)
    structures = list(itertools.islice(stream, count))
    mean = sum(structure.num_atoms for structure in structures) / len(structures)
    per_batch = max(1, int(config.data.max_atoms / mean))
    begin = time.process_time()
    for first in range(0, len(structures), per_batch):
        part = structures[first : first + per_batch]
        names = [task.fidelity] * len(part)
        collate(part, fidelities=names, fidelity_index=plan.fidelity_index, cutoff=plan.model.cutoff)
    return len(structures) / (time.process_time() - begin)


def measure_link() -> Link:
    """Return bandwidth and latency of an all-reduce by two gloo ranks on this machine."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(2) as pool:
        small, large = pool.starmap(_all_reduces, [(rank, f"{folder}/store") for rank in range(2)], chunksize=1)[0]
    wire = 2 * (2 - 1) / 2 * LINK_BYTES[1]
    return Link(_round(wire / max(1e-9, large - small) / 1e9), _round(1e6 * small))  # log2(2) = 1


def _all_reduces(rank: int, store: str) -> list[float]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensors = [torch.zeros(size // 4) for size in LINK_BYTES]
    calls = [lambda tensor=tensor: torch.distributed.all_reduce(tensor) for tensor in tensors]
    seconds = fastest(calls, time.perf_counter)
    torch.distributed.destroy_process_group()
    return seconds


def _gradients(potential: Potential, batch: Batch, config: PretrainConfig) -> Callable[[], Tensor]:
    """Return the forward, forces and backward of one batch as a call."""

    def call() -> Tensor:
        potential.zero_grad()
        terms = loss_terms(potential(batch, forces=config.loss.forces_weight > 0), batch, config.loss, potential.scale)
        loss = total(terms, terms.statistics(), config.loss)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return call


def _optimizer_seconds(
    potential: Potential, config: PretrainConfig, gradients: Callable[[], Any], device: torch.device
) -> tuple[float, float]:
    """Return the mean time of an optimizer step and the part of it that only the steps with new eigenbases take."""
    unshared = [parameter for _, parameter in potential.fidelity_parameters()]
    optimizer = make_optimizer(potential, unshared, config.optimizer)
    period = config.optimizer.precondition_frequency if config.optimizer.name == "soap" else 5
    gradients()
    optimizer.step()
    clock, times = clock_of(device), []
    for _ in range(3 * period):
        begin = clock()
        optimizer.step()
        times.append(clock() - begin)
    phases = np.array(times).reshape(3, period).min(axis=0)  # of a step's place in the period
    return float(phases.mean()), float(phases.mean() - np.median(phases))


def _worst(sizes: NDArray[np.float64], coefficients: NDArray[np.float64], values: Sequence[float]) -> float:
    return float(np.abs(sizes @ coefficients / np.asarray(values) - 1).max())


def _round(value: float) -> float:
    return float(f"{value:.4g}")
