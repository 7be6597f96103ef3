"""What one rank of a run sends and holds, from shapes and settings alone: collectives, bytes on the wire, memory.

The collectives are those that DeepSpeed 0.19.8 really runs with overlap_comm off and its other settings at their
defaults: tests/pretrain/test_costs.py counts them on real ranks. P are all parameters, D the ranks of a task group.

    stage 0     one all-reduce of P gradients
    stage 1     the same, one number per parameter group for the norm, and an all-gather of every parameter group
    stage 2     the same as stage 1 (use_multi_rank_bucket_allreduce joins the reductions to each owner into one
                all-reduce), but gradients are reduced after every micro-batch

Collectives of a group of one rank are not listed: nothing travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rung.pretrain.config import OptimizerConfig, ReptileConfig
from rung.pretrain.eigenbasis import deal, owner_cost, preconditioned_axes
from rung.pretrain.step import TASK_NAMES
from rung.pretrain.world import World

FLOAT = 4  # bytes of a parameter, a gradient and every optimizer state

STATISTICS = 4 + 4  # numbers beside the tasks' in the vector of sums: loss terms (rmse_mae has 2 more) and sizes

Operation = Literal["all_reduce", "all_gather", "broadcast"]


@dataclass(frozen=True)
class Shape:
    """One parameter; `decayed` says which of the optimizer's two parameter groups has it."""

    name: str
    shape: tuple[int, ...]
    decayed: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def axes(self) -> list[int]:
        """Lengths of the axes that SOAP preconditions: none of a vector."""
        return [self.shape[axis] for axis in preconditioned_axes(self.shape)]

    @property
    def hidden(self) -> bool:
        """Whether Muon steps it: a decayed stack of square matrices (muon.is_hidden)."""
        return self.decayed and len(self.shape) > 1 and self.shape[-1] == self.shape[-2] > 1


def shapes_of(module: nn.Module, unshared: Iterable[nn.Parameter] = ()) -> list[Shape]:
    """Return the shapes of a module's parameters, grouped as `optimizer.make_optimizer` groups them."""
    kept = {id(parameter) for parameter in unshared}
    return [
        Shape(name, tuple(parameter.shape), parameter.dim() > 1 and id(parameter) not in kept)
        for name, parameter in module.named_parameters()
    ]


@dataclass(frozen=True)
class Collective:
    """One collective: `bytes` of the whole tensor (of an all-gather, the gathered one), `calls` per step."""

    purpose: Literal["inner", "outer"]
    operation: Operation
    bytes: int
    ranks: int
    calls: float = 1.0
    across: bool = False  # the task groups; else among the neighbours of one group

    @property
    def handed(self) -> float:
        """Bytes that a rank hands over per step, counted as `ranks.Traffic` does."""
        return self.calls * self.bytes

    @property
    def wire(self) -> float:
        """Bytes that a rank sends per step over a ring: each part goes round once (all-gather, broadcast) or twice."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return self.handed * rounds * (self.ranks - 1) / self.ranks


def padded_groups(shapes: Sequence[Shape], optimizer: OptimizerConfig, data_ranks: int) -> list[int]:
    """Return the elements of ZeRO's flat parameter groups, padded so that each rank's part starts at 4 bytes."""
    totals: dict[tuple[bool, int], int] = {}
    for shape in shapes:
        own = optimizer.name == "muon" and shape.hidden  # a group for each size of matrix
        key = shape.decayed, shape.shape[-1] if own else 0
        totals[key] = totals.get(key, 0) + shape.size
    alignment = 2 * data_ranks
    return [math.ceil(total / alignment) * alignment for total in totals.values()]


def inner_collectives(
    shapes: Sequence[Shape], optimizer: OptimizerConfig, world: World, num_tasks: int, micro_batches: int = 1
) -> list[Collective]:
    """Return the collectives of one inner step within a task group of a run with so many tasks."""
    ranks = world.data_ranks
    if ranks == 1:
        return []
    size = sum(shape.size for shape in shapes)
    found = [
        Collective("inner", "all_reduce", statistics_bytes(num_tasks), ranks, micro_batches),
        Collective("inner", "all_reduce", FLOAT * size, ranks, micro_batches if optimizer.zero_stage == 2 else 1),
    ]
    if optimizer.zero_stage > 0:
        groups = padded_groups(shapes, optimizer, ranks)
        found.append(Collective("inner", "all_reduce", FLOAT, ranks, len(groups)))
        found += [Collective("inner", "all_gather", FLOAT * group, ranks) for group in groups]
    if optimizer.name == "soap":
        shares = [basis_bytes(share) for share in owners(shapes, optimizer, ranks)]
        every = 1 / optimizer.precondition_frequency
        found += [Collective("inner", "broadcast", share, ranks, every) for share in shares if share]
    return found


def statistics_bytes(num_tasks: int) -> int:
    """Return the size of the float64 vector that every micro-batch adds up over its group (step.StepModule.forward)."""
    return 8 * (STATISTICS + len(TASK_NAMES) * num_tasks)


def outer_collectives(
    shapes: Sequence[Shape], optimizer: OptimizerConfig, world: World, reptile: ReptileConfig
) -> list[Collective]:
    """Return the collectives of one outer step: each data rank's part across the groups, and all parts within a group.

    The weights are gathered whenever they are written: between two tasks of a group and after the outer update.
    """
    found = []
    padded = outer_parts(shapes, optimizer, world.data_ranks)
    if world.groups > 1:
        element = 2 if reptile.exchange == "bfloat16" else FLOAT
        part = sum(padded) // world.data_ranks
        found.append(Collective("outer", "all_reduce", element * part, world.groups, across=True))
    if world.data_ranks > 1:
        writes = reptile.tasks_per_outer // world.groups + reptile.overlap
        found += [Collective("outer", "all_gather", FLOAT * group, world.data_ranks, writes) for group in padded]
    return found


def outer_parts(shapes: Sequence[Shape], optimizer: OptimizerConfig, data_ranks: int) -> list[int]:
    """Return the elements of what the data ranks hold parts of for the outer step, padded to equal parts."""
    if optimizer.zero_stage:
        return padded_groups(shapes, optimizer, data_ranks)
    return [math.ceil(sum(shape.size for shape in shapes) / data_ranks) * data_ranks]


def steps_per_outer(world: World, reptile: ReptileConfig) -> int:
    """Return the inner steps that a group takes between two outer steps; all groups have equally many tasks."""
    return reptile.inner_steps * (reptile.tasks_per_outer // world.groups)


def handed(collectives: Iterable[Collective], purpose: str) -> float:
    """Return the bytes that a rank hands to the collectives of one purpose per step."""
    return sum(collective.handed for collective in collectives if collective.purpose == purpose)


def wire(collectives: Iterable[Collective]) -> float:
    """Return the bytes that a rank sends per step."""
    return sum(collective.wire for collective in collectives)


# SOAP's matrices


def basis_bytes(shapes: Iterable[Shape]) -> int:
    """Return the bytes of the eigenbases of some parameters; their covariances take as many."""
    return FLOAT * sum(length * length for shape in shapes for length in shape.axes)


def owners(shapes: Sequence[Shape], optimizer: OptimizerConfig, ranks: int) -> list[list[Shape]]:
    """Return the parameters that each data rank owns, dealt as `soap.Soap` deals them."""
    ordered = [shape for decayed in (True, False) for shape in shapes if shape.decayed is decayed]
    dealt = deal([owner_cost(shape.shape, optimizer.precondition_frequency) for shape in ordered], ranks)
    return [[shape for shape, rank in zip(ordered, dealt, strict=True) if rank == own] for own in range(ranks)]


# Memory


@dataclass(frozen=True)
class Activations:
    """What a step holds besides the weights, measured: bytes = fixed + per_atom * atoms + per_edge * edges."""

    fixed: float = 0.0
    per_atom: float = 0.0
    per_edge: float = 0.0


@dataclass(frozen=True)
class Held:
    """What of a run's settings decides its memory, besides shapes, optimizer and world."""

    max_atoms: int
    max_edges: int
    batches_ahead: int = 1  # made and not yet used, by all loader workers of a rank
    averaged_weights: bool = True  # an EMA is kept
    reptile: ReptileConfig | None = None  # None: joint training
    tasks: int = 1  # whose optimizer states a rank keeps when reptile.inner_state is "task"


def memory(
    shapes: Sequence[Shape], optimizer: OptimizerConfig, world: World, activations: Activations, held: Held
) -> dict[str, int]:
    """Return the bytes that one rank holds at most, by component; the fullest rank where ranks differ.

    Left out: what the runtime itself takes (CUDA context, NCCL buffers), and fragmentation.
    """
    size = sum(shape.size for shape in shapes)
    zero = optimizer.zero_stage > 0
    part = sum(padded_groups(shapes, optimizer, world.data_ranks)) // world.data_ranks if zero else size
    outer = sum(outer_parts(shapes, optimizer, world.data_ranks))
    states = held.tasks if held.reptile and held.reptile.inner_state == "task" else 1
    atoms, edges = held.max_atoms, held.max_edges
    gradients = part if optimizer.zero_stage == 2 else size + part if zero else size
    components = {
        "weights": FLOAT * (size + (part if zero else 0)),  # ZeRO steps from a copy of its part
        "gradients": FLOAT * gradients,
        "reduction_buffer": FLOAT * size,  # the gradients flattened, or ZeRO's bucket, which is as large
        "optimizer": states * optimizer_bytes(shapes, optimizer, world.data_ranks, part / max(1, size)),
        "ema": FLOAT * size if held.averaged_weights else 0,
        "outer": _outer_bytes(outer // world.data_ranks, held.reptile) if held.reptile else 0,
        "activations": int(activations.fixed + activations.per_atom * atoms + activations.per_edge * edges),
        "loader": (held.batches_ahead + 1) * batch_bytes(atoms, edges),
    }
    return components


def optimizer_bytes(shapes: Sequence[Shape], optimizer: OptimizerConfig, data_ranks: int, part: float = 1.0) -> int:
    """Return the bytes of the optimizer's state on the rank that has most; `part` is its share of the parameters."""
    moments = 2 * FLOAT * sum(shape.size for shape in shapes)
    if optimizer.name == "soap":
        own = max((basis_bytes(share) for share in owners(shapes, optimizer, data_ranks)), default=0)
        return moments + basis_bytes(shapes) + own
    if optimizer.name == "muon":  # one momentum for its matrices, AdamW's two moments for the rest
        moments -= FLOAT * sum(shape.size for shape in shapes if shape.hidden)
    return math.ceil(part * moments)


def batch_bytes(atoms: int, edges: int) -> int:
    """Return the bytes of a `Batch`, but for the few per structure: see the dtypes there."""
    per_atom = 8 + 12 + 8 + 4 + 12  # numbers, positions, structure, row_ptr, forces
    per_edge = 4 + 4 + 4 + 12  # receivers, senders, reverse, shifts
    return per_atom * atoms + per_edge * edges


def _outer_bytes(part: int, reptile: ReptileConfig) -> int:
    """Return the bytes of `reptile.Outer`: phi, the sum, two temporaries, and what the settings add."""
    reduced = reptile.exchange == "bfloat16"
    kept = 4 + (reptile.outer_optimizer != "sgd") + reduced
    under_way = part * (2 if reduced else FLOAT) if reptile.overlap else 0
    return FLOAT * part * kept + under_way
