"""How thousands of ranks are arranged, and the process groups that `Ranks` really makes for them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from rung.data.batch import collate
from rung.data.stream import epoch_structures
from rung.model.config import read_config
from rung.pretrain.config import PretrainConfig
from rung.pretrain.costs import handed, inner_collectives, outer_parts, shapes_of
from rung.pretrain.plan import make_plan, make_potential
from rung.pretrain.ranks import Ranks
from rung.pretrain.world import World, choose_groups, divisors

RunRanks = Callable[..., list[Any]]  # conftest.py
SIZE = 4096
GROUPS = (1, 8, 64, 512)
GPUS_PER_NODE = 8


@pytest.mark.parametrize("groups", GROUPS)
def test_every_pair_of_group_and_data_rank_is_one_rank(groups: int) -> None:
    world = World(SIZE, groups)
    pairs = Counter((world.group(rank), world.data_rank(rank)) for rank in range(SIZE))
    assert set(pairs.values()) == {1}
    assert set(pairs) == {(group, data) for group in range(groups) for data in range(SIZE // groups)}


@pytest.mark.parametrize("groups", GROUPS)
def test_the_ranks_of_groups_and_exchanges_are_those_with_the_same_number(groups: int) -> None:
    world = World(SIZE, groups)
    for group in range(groups):
        assert list(world.group_ranks(group)) == [rank for rank in range(SIZE) if world.group(rank) == group]
    for data_rank in {0, 1 % world.data_ranks, world.data_ranks - 1}:
        found = [rank for rank in range(SIZE) if world.data_rank(rank) == data_rank]
        assert list(world.exchange_ranks(data_rank)) == found


@pytest.mark.parametrize("groups", GROUPS)
def test_a_group_fills_whole_nodes_before_it_takes_another(groups: int) -> None:
    world = World(SIZE, groups)
    for group in range(groups):
        nodes = {rank // GPUS_PER_NODE for rank in world.group_ranks(group)}
        assert len(nodes) == max(1, world.data_ranks // GPUS_PER_NODE)


@pytest.mark.parametrize("groups", [0, 3, SIZE + 1])
def test_groups_of_unequal_size_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=rf"world.groups: expected a divisor of the 4096 .* found {groups}"):
        World(SIZE, groups)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 rank, found 0"):
        World(0)


@pytest.mark.parametrize(("size", "tasks"), [(1, 1), (4096, 12), (4096, 512), (96, 36), (7, 5)])
def test_chosen_groups_are_the_greatest_common_divisor(size: int, tasks: int) -> None:
    assert choose_groups(size, tasks, None) == math.gcd(size, tasks)


def test_a_wanted_number_of_groups_is_taken_or_refused_with_what_fits() -> None:
    assert choose_groups(4096, 12, 2) == 2
    with pytest.raises(ValueError, match=r"divisor of both 4096 rank\(s\) and .*=12 \(1, 2, 4\), found 8"):
        choose_groups(4096, 12, 8)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# The real process groups, of a world whose collectives do nothing


@contextmanager
def fake_rank(rank: int, size: int = SIZE) -> Iterator[None]:
    """Be one rank of a world that is not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def make_ranks(groups: int) -> Ranks:
    return Ranks(torch.device("cpu"), timedelta(seconds=1), groups)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("place", ["first", "last of the first group", "first of the second", "middle", "last"])
def test_process_groups_of_a_large_world_have_the_ranks_of_its_map(groups: int, place: str) -> None:
    world = World(SIZE, groups)
    rank = {
        "first": 0,
        "last of the first group": world.data_ranks - 1,
        "first of the second": world.data_ranks % SIZE,
        "middle": SIZE // 2 + 1,
        "last": SIZE - 1,
    }[place]
    with fake_rank(rank):
        ranks = make_ranks(groups)
        members = torch.distributed.get_process_group_ranks
        assert members(ranks.get_data_parallel_group()) == list(world.group_ranks(world.group(rank)))
        assert members(ranks.get_model_parallel_group()) == [rank]
        assert members(ranks._exchange) == list(world.exchange_ranks(world.data_rank(rank)))
        assert set(members(ranks.get_data_parallel_group())) & set(members(ranks._exchange)) == {rank}
        assert ranks.get_data_parallel_world_size() == world.data_ranks
        assert ranks.get_data_parallel_rank() == world.data_rank(rank)
        assert torch.distributed.get_rank(ranks.get_data_parallel_group()) == world.data_rank(rank)
        assert ranks.get_data_parallel_group_ranks() == list(world.group_ranks(world.group(rank)))


@pytest.mark.parametrize(
    ("groups", "purpose", "collective"),
    [
        (512, "inner", lambda ranks, tensor: ranks.sum_(tensor)),
        (512, "outer", lambda ranks, tensor: ranks.exchange_(tensor).wait()),
        (1, "inner", lambda ranks, tensor: ranks.sum_(tensor)),
    ],
)
def test_collectives_of_a_large_world_are_counted(
    groups: int, purpose: str, collective: Callable[[Ranks, torch.Tensor], object]
) -> None:
    with fake_rank(77):
        ranks = make_ranks(groups)
        collective(ranks, torch.zeros(10))
        assert ranks.traffic.bytes == {purpose: 40}


def test_what_stays_on_one_rank_is_not_counted() -> None:
    with fake_rank(77):
        ranks = make_ranks(SIZE)  # groups of one rank
        ranks.sum_(torch.zeros(10))
        assert ranks.traffic.bytes == {}
        assert make_ranks(1).exchange_(torch.zeros(10)) is None


@pytest.mark.slow
@pytest.mark.parametrize("groups", [8, 512])
@pytest.mark.parametrize("words", ["optimizer.name=soap", "optimizer={name: adamw, zero_stage: 1}"])
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning", "ignore:`torch.distributed.:FutureWarning")
def test_the_real_engine_of_one_rank_of_a_large_world(
    run_ranks: RunRanks, config_words: list[str], groups: int, words: str
) -> None:
    config = read_config(PretrainConfig, None, [*config_words, words, "output=nowhere"])
    (found,) = run_ranks(engine_of_one_rank, 1, config, groups)
    world, potential = World(SIZE, groups), make_potential(make_plan(config, 1))
    shapes = shapes_of(potential, [parameter for _, parameter in potential.fidelity_parameters()])
    assert found["data_parallel"] == list(world.group_ranks(found["group"]))
    assert found["masters"] == sum(outer_parts(shapes, config.optimizer, world.data_ranks)) // world.data_ranks
    # One step: the first, in which SOAP's bases go round.
    optimizer = dataclasses.replace(config.optimizer, precondition_frequency=1)
    expected = handed(inner_collectives(shapes, optimizer, world, len(config.tasks)), "inner")
    assert found["bytes"] == {"inner": expected}


def engine_of_one_rank(config: PretrainConfig, groups: int) -> dict[str, Any]:
    """Build the real engine on a rank in the middle of a world of `SIZE` that is not there; take one step."""
    from rung.pretrain.engine import connect, make_engine  # seconds, which the other tests here need not wait

    rank = SIZE // 2 + 1
    torch.distributed.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK="1")
    with fake_rank(rank):
        ranks = connect(timedelta(seconds=1), lambda size: groups)
        plan = make_plan(config, 1)
        engine = make_engine(make_potential(plan), plan, config, ranks)
        ranks.traffic.bytes.clear()
        task = plan.tasks[0]
        structures = list(islice(epoch_structures(task.dataset, task.fidelity, "train"), 2))
        fidelities = [task.fidelity] * len(structures)
        batch = collate(structures, fidelities=fidelities, fidelity_index=plan.fidelity_index, cutoff=plan.model.cutoff)
        engine.step([batch], 1e-3)
        return {
            "group": ranks.group,
            "data_parallel": torch.distributed.get_process_group_ranks(engine._engine.data_parallel_group),
            "masters": len(engine.masters()),
            "bytes": dict(ranks.traffic.bytes),
        }
