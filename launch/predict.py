"""Predicts a run on N ranks of a cluster: memory, time of a step, communication, throughput and cost.

    step    = micro_batches * max(compute, loading) + optimizer + collectives of an inner step
              + collectives of an outer step / its inner steps (less what overlaps with the first of them)
    compute = fixed + per_atom * atoms + per_edge * edges            of the cluster file, scaled to the model
    all-reduce of B bytes by n ranks, m on each node, groups that share the nodes' network taken into account:
              2 (m-1)/m B / intra + 2 (n/m-1)/(n/m) B * sharing / inter + latency * log2 of each number

Ranks are taken to have equal batches, filled to the budget, and collectives to follow the computation, which is what
DeepSpeed does with overlap_comm off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rung.launch.clusters import Cluster, Step
from rung.pretrain.config import PretrainConfig, ReptileConfig
from rung.pretrain.costs import (
    Activations,
    Collective,
    Held,
    Shape,
    inner_collectives,
    memory,
    outer_collectives,
    steps_per_outer,
    wire,
)
from rung.pretrain.world import World, choose_groups

FORMS = ("joint", "reptile", "diloco")
FILL = 0.95  # of the budget that a batch has on average; the next structure does not fit any more
MEMORY_FRACTION = 0.9  # of a rank's memory that may be planned; the rest is fragmentation and what is not modelled


@dataclass(frozen=True)
class Workload:
    """What of a config and its datasets the prediction needs."""

    shapes: tuple[Shape, ...]
    channels: int
    num_layers: int
    atoms_per_structure: float
    edges_per_structure: float
    structures: int  # labelled training structures of all tasks: one epoch
    shards: int
    packs: int

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(shape.size for shape in self.shapes)


@dataclass(frozen=True)
class Forecast:
    """One line of the table: one form of training on one number of ranks."""

    form: str
    ranks: int
    groups: int
    memory: dict[str, int]  # bytes by component, `runtime` included
    fits: bool
    step_s: float
    compute_s: float  # optimizer included
    loading_s: float  # waiting for batches
    inner_s: float  # collectives of an inner step
    outer_s: float  # the part of an outer step's collectives that is waited for, per inner step
    wire_per_structure: float  # bytes that a rank sends per structure that it trains on
    structures_per_s: float
    epoch_h: float
    epoch_cost: float  # 0: no price given

    @property
    def communication(self) -> float:
        """Share of the step's time."""
        return (self.inner_s + self.outer_s) / self.step_s


def forecast(config: PretrainConfig, load: Workload, cluster: Cluster, ranks: int, form: str) -> Forecast:
    """Predict one form (joint, reptile as configured, or diloco: momentum, bf16 exchange, overlap) on `ranks` ranks."""
    reptile = None if form == "joint" else diloco(config.reptile) if form == "diloco" else config.reptile
    groups = 1 if reptile is None else choose_groups(ranks, reptile.tasks_per_outer, config.world.groups)
    world = World(ranks, groups)
    step = scaled(cluster.step, load, config.optimizer.name)
    structures, atoms, edges = batch_size(config, load)
    micro = config.data.micro_batches
    batch_s = 1e-3 * step.fixed_ms + 1e-6 * (step.atom_us * atoms + step.edge_us * edges)
    loading_s = _loading(config, step, structures, batch_s)
    shared = (step.optimizer_ms - step.bases_ms) + step.bases_ms / world.data_ranks
    compute_s = micro * batch_s + 1e-3 * shared
    inner = inner_collectives(load.shapes, config.optimizer, world, len(config.tasks), micro)
    inner_s = seconds(inner, world, cluster)
    inner_wire, outer_s = wire(inner), 0.0
    if reptile is not None:
        outer = outer_collectives(load.shapes, config.optimizer, world, reptile)
        count = steps_per_outer(world, reptile)
        exchange_s = seconds([c for c in outer if c.across], world, cluster)
        # With overlap the exchange has a whole outer step to run in; only what is longer is waited for.
        hidden = count * (compute_s + micro * loading_s + inner_s) if reptile.overlap else 0.0
        local_s = seconds([c for c in outer if not c.across], world, cluster)
        outer_s = (max(0.0, exchange_s - hidden) + local_s) / count
        inner_wire += wire(outer) / count
    step_s = compute_s + micro * loading_s + inner_s + outer_s
    held = Held(
        config.data.max_atoms,
        config.data.max_edges,
        batches_ahead=config.data.num_workers * config.data.prefetch,
        averaged_weights=config.ema_decay > 0,
        reptile=reptile,
        tasks=len(config.tasks),
    )
    activations = Activations(step.bytes_fixed, step.bytes_per_atom, step.bytes_per_edge)
    components = memory(load.shapes, config.optimizer, world, activations, held)
    components["runtime"] = int(1e9 * cluster.runtime_gb)
    per_second = ranks * micro * structures / step_s
    hours = load.structures / per_second / 3600
    return Forecast(
        form, ranks, groups, components,
        fits=sum(components.values()) <= MEMORY_FRACTION * 1e9 * cluster.gpu_memory_gb,
        step_s=step_s, compute_s=compute_s, loading_s=micro * loading_s, inner_s=inner_s, outer_s=outer_s,
        wire_per_structure=inner_wire / (micro * structures),
        structures_per_s=per_second, epoch_h=hours, epoch_cost=hours * ranks * cluster.price_per_gpu_hour,
    )  # fmt: skip


def diloco(reptile: ReptileConfig) -> ReptileConfig:
    """Return the settings in the form of DiLoCo (arXiv:2311.08105) with the exchange in bf16 and overlapped."""
    return dataclasses.replace(reptile, outer_optimizer="nesterov", exchange="bfloat16", overlap=True)


def batch_size(config: PretrainConfig, load: Workload) -> tuple[float, float, float]:
    """Return the structures, atoms and edges of an average batch: whichever budget is used up first."""
    data = config.data
    structures = FILL * min(data.max_atoms / load.atoms_per_structure, data.max_edges / load.edges_per_structure)
    return structures, structures * load.atoms_per_structure, structures * load.edges_per_structure


def scaled(step: Step, load: Workload, optimizer: str) -> Step:
    """Return a step's constants for another model; only SOAP has eigenbases, the rest of any optimizer costs alike.

    What is spent per atom goes with the parameters (every weight matrix is applied to every atom), what is spent per
    edge and what is kept per atom and edge with channels times layers, and the number of kernels with the layers.
    """
    weights = load.parameters / step.parameters
    width = load.channels * load.num_layers / (step.channels * step.num_layers)
    depth = load.num_layers / step.num_layers
    # Eigenbases take length^3 for each axis.
    bases_ms = step.bases_ms * weights * load.channels / step.channels if optimizer == "soap" else 0.0
    return dataclasses.replace(
        step,
        fixed_ms=step.fixed_ms * depth,
        atom_us=step.atom_us * weights,
        edge_us=step.edge_us * width,
        optimizer_ms=(step.optimizer_ms - step.bases_ms) * weights + bases_ms,
        bases_ms=bases_ms,
        bytes_per_atom=step.bytes_per_atom * width,
        bytes_per_edge=step.bytes_per_edge * width,
    )


def is_measured(cluster: Cluster, config: PretrainConfig, load: Workload) -> bool:
    """Return whether the cluster's step was measured for just this model and optimizer."""
    step = cluster.step
    model = (step.channels, step.num_layers, step.parameters) == (load.channels, load.num_layers, load.parameters)
    return step.origin == "measured" and model and step.optimizer == config.optimizer.name


# Time of collectives


def seconds(collectives: Sequence[Collective], world: World, cluster: Cluster) -> float:
    """Return the time of collectives one after another, all groups of the world running theirs at the same time."""
    return sum(c.calls * _one(c, _spread(c, world, cluster), cluster) for c in collectives)


@dataclass(frozen=True)
class Spread:
    """Where the members of one process group are."""

    per_node: int  # members on one node
    nodes: int
    sharing: int  # groups of this kind whose members are on the same node, and use its network at the same time


def _spread(collective: Collective, world: World, cluster: Cluster) -> Spread:
    """Return where a group's members are: neighbours for a task group, data_ranks apart for an exchange group."""
    gpus = cluster.gpus_per_node
    stride = world.data_ranks if collective.across else 1
    per_node = max(1, min(collective.ranks, gpus // stride if stride <= gpus else 1))
    on_node = min(gpus, world.size)
    return Spread(per_node, math.ceil(collective.ranks / per_node), max(1, on_node // per_node))


def _one(collective: Collective, spread: Spread, cluster: Cluster) -> float:
    """Return the time of one call: first within the nodes, then between them, each as a ring."""
    rounds = 2 if collective.operation == "all_reduce" else 1
    size, inside, between = collective.bytes, spread.per_node, spread.nodes
    time = 0.0
    if inside > 1:
        time += rounds * (inside - 1) / inside * size / (1e9 * cluster.intra_node.bandwidth_gb_s)
        time += 1e-6 * cluster.intra_node.latency_us * math.log2(inside)
    if between > 1:
        # The members on a node send a part each, together the whole tensor, through a network that groups share.
        wire_bytes = rounds * (between - 1) / between * size * spread.sharing
        time += wire_bytes / (1e9 * cluster.inter_node.bandwidth_gb_s)
        time += 1e-6 * cluster.inter_node.latency_us * math.log2(between)
    return time


def _loading(config: PretrainConfig, step: Step, structures: float, batch_s: float) -> float:
    """Return the time that a batch is waited for: all of its making without workers, else what they are behind."""
    if step.structures_per_s == 0:
        return 0.0
    making = structures / step.structures_per_s
    workers = config.data.num_workers
    return making if workers == 0 else max(0.0, making / workers - batch_s)
