"""`rung plan`: the model of time against closed forms and counting, the measurement, the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rung.launch import cli, measure, predict
from rung.launch.clusters import Cluster, Link, Step, names, read_cluster
from rung.launch.plan import workload
from rung.model.config import read_config, to_yaml
from rung.pretrain.config import PretrainConfig
from rung.pretrain.costs import Collective, Operation, Shape
from rung.pretrain.plan import make_plan, make_potential
from rung.pretrain.world import World

DEBUG = Path(__file__).parents[2] / "pretrain/configs/debug.yaml"
STEP = Step("measured", "by hand", 64, 2, 1_000_000, "soap", 10.0, 5.0, 0.5, 2.0, 1.0, 1e6, 1e4, 100.0)
CLUSTER = Cluster(
    "toy", "by hand", 512, 8, 80.0, Link(100.0, 0.0), Link(200.0, 0.0), "assumed", "by hand", STEP,
    price_per_gpu_hour=2.0,
)  # fmt: skip
LOAD = predict.Workload((Shape("weight", (1000, 1000), True),), 64, 2, 10.0, 80.0, 10_000_000, 4096, 65536)
CONFIG = read_config(
    PretrainConfig,
    None,
    ["output=nowhere", "steps=10", "mode=reptile", "optimizer.name=adamw", "data={max_atoms: 1000, max_edges: 100000}"]
    + ["reptile={inner_steps: 20, tasks_per_outer: 4}"]
    + [f"tasks=[{', '.join(f'{{dataset: builtin, fidelity: level{n}}}' for n in range(4))}]"],
)


def after(config: PretrainConfig, *words: str) -> PretrainConfig:
    """Return the config with `key=value` words."""
    found = dataclasses.asdict(config)
    return read_config(PretrainConfig, None, [*(f"{key}={json.dumps(value)}" for key, value in found.items()), *words])


# Collectives


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize(("size", "groups"), [(8, 1), (8, 8), (64, 4), (64, 32), (512, 64), (4096, 512), (4096, 8)])
@pytest.mark.parametrize("across", [False, True])
def test_where_a_groups_members_are(gpus: int, size: int, groups: int, across: bool) -> None:
    world = World(size, groups)
    cluster = dataclasses.replace(CLUSTER, gpus_per_node=gpus)
    members = [world.exchange_ranks(d) for d in range(world.data_ranks)] if across else []
    members = members or [world.group_ranks(group) for group in range(groups)]
    per_node = Counter(rank // gpus for rank in members[0])
    sharing = Counter(node for group in members for node in {rank // gpus for rank in group})
    collective = Collective("outer" if across else "inner", "all_reduce", 1, len(members[0]), across=across)
    spread = predict._spread(collective, world, cluster)
    assert set(per_node.values()) == {spread.per_node}
    assert (len(per_node), max(sharing.values())) == (spread.nodes, spread.sharing)


def time_of(operation: Operation, ranks: int, world: World, across: bool = False) -> float:
    collective = Collective("outer" if across else "inner", operation, 10**9, ranks, across=across)
    return predict.seconds([collective], world, CLUSTER)


def test_collectives_within_a_node_are_rings() -> None:
    assert time_of("all_reduce", 8, World(8)) == pytest.approx(2 * 7 / 8 * 1 / 100)
    assert time_of("all_gather", 8, World(8)) == pytest.approx(7 / 8 * 1 / 100)
    assert time_of("broadcast", 4, World(8, 2)) == pytest.approx(3 / 4 * 1 / 100)


def test_an_all_reduce_over_nodes_goes_through_the_network_once() -> None:
    expected = 2 * 7 / 8 / 100 + 2 * 7 / 8 / 200
    assert time_of("all_reduce", 64, World(64)) == pytest.approx(expected)


def test_exchange_groups_share_their_node_s_network() -> None:
    # 8 groups of a node each: 8 exchanges of 8 nodes at once.
    assert time_of("all_reduce", 8, World(64, 8), across=True) == pytest.approx(8 * 2 * 7 / 8 / 200)


def test_latency_counts_doublings() -> None:
    cluster = dataclasses.replace(CLUSTER, intra_node=Link(1e9, 5.0), inter_node=Link(1e9, 7.0))
    seconds = predict.seconds([Collective("inner", "all_reduce", 8, 4096)], World(4096), cluster)
    assert seconds == pytest.approx(1e-6 * (3 * 5 + 9 * 7), rel=1e-6)


# Forecasts


def test_one_rank_takes_the_measured_time_and_sends_nothing() -> None:
    found = predict.forecast(CONFIG, LOAD, CLUSTER, 1, "joint")
    structures = predict.FILL * 1000 / 10
    seconds = 0.010 + 5e-6 * 10 * structures + 0.5e-6 * 80 * structures + 0.001
    assert found.step_s == pytest.approx(seconds)
    assert found.communication == found.wire_per_structure == 0
    assert found.structures_per_s == pytest.approx(structures / seconds)
    assert found.epoch_h == pytest.approx(10_000_000 / found.structures_per_s / 3600)
    assert found.epoch_cost == pytest.approx(2.0 * found.epoch_h)


def test_micro_batches_share_one_optimizer_step() -> None:
    one = predict.forecast(CONFIG, LOAD, CLUSTER, 1, "joint")
    four = predict.forecast(after(CONFIG, "data.micro_batches=4"), LOAD, CLUSTER, 1, "joint")
    assert four.step_s == pytest.approx(4 * (one.step_s - 0.001) + 0.001)
    assert four.structures_per_s == pytest.approx(4 * one.structures_per_s * one.step_s / four.step_s)


def test_whichever_budget_is_used_up_first_decides() -> None:
    assert predict.batch_size(CONFIG, LOAD)[0] == pytest.approx(predict.FILL * 100)
    assert predict.batch_size(after(CONFIG, "data.max_edges=800"), LOAD)[0] == pytest.approx(predict.FILL * 10)


def test_inner_steps_divide_the_time_of_the_exchange() -> None:
    def outer(steps: int) -> float:
        config = after(CONFIG, f"reptile.inner_steps={steps}")
        return predict.forecast(config, LOAD, CLUSTER, 4, "reptile").outer_s

    assert outer(1) == pytest.approx(20 * outer(20))
    assert outer(20) == pytest.approx(time_of("all_reduce", 4, World(4, 4), across=True) * 4e-3 / 20)


def test_an_overlapped_exchange_is_waited_for_only_when_it_is_longer_than_the_inner_steps() -> None:
    assert predict.forecast(CONFIG, LOAD, CLUSTER, 4, "diloco").outer_s == 0
    slow = dataclasses.replace(CLUSTER, intra_node=Link(1e-3, 0.0))
    exchange = 2 * 3 / 4 * 2e6 / 1e6  # bf16
    found = predict.forecast(CONFIG, LOAD, slow, 4, "diloco")
    assert found.outer_s == pytest.approx((exchange - 20 * found.compute_s) / 20)


def test_groups_within_nodes_beat_one_group_over_all_nodes() -> None:
    many = after(CONFIG, "tasks=" + json.dumps([{"dataset": "d", "fidelity": f"level{n}"} for n in range(512)]))
    many = after(many, "reptile.tasks_per_outer=512")
    slow = dataclasses.replace(CLUSTER, inter_node=Link(1.0, 50.0))
    joint, reptile = (predict.forecast(many, LOAD, slow, 4096, form) for form in ("joint", "reptile"))
    assert reptile.groups == 512
    assert reptile.inner_s < joint.inner_s / 100
    assert reptile.communication < joint.communication


def test_loading_is_waited_for_without_workers_and_hidden_by_enough_of_them() -> None:
    slow = dataclasses.replace(CLUSTER, step=dataclasses.replace(STEP, structures_per_s=1000.0))
    structures = predict.FILL * 100
    assert predict.forecast(CONFIG, LOAD, slow, 1, "joint").loading_s == pytest.approx(structures / 1000)
    assert predict.forecast(after(CONFIG, "data.num_workers=64"), LOAD, slow, 1, "joint").loading_s == 0


def test_memory_says_whether_it_fits() -> None:
    found = predict.forecast(CONFIG, LOAD, CLUSTER, 8, "joint")
    total = sum(found.memory.values())
    for gigabytes, fits in ((1.2e-9 * total, True), (1.05e-9 * total, False)):
        cluster = dataclasses.replace(CLUSTER, gpu_memory_gb=gigabytes)
        assert predict.forecast(CONFIG, LOAD, cluster, 8, "joint").fits is fits


def test_constants_stay_for_the_measured_model_and_grow_for_a_larger() -> None:
    assert predict.scaled(STEP, LOAD, "soap") == STEP
    soap = after(CONFIG, "optimizer.name=soap")
    assert predict.is_measured(CLUSTER, soap, LOAD) and not predict.is_measured(CLUSTER, CONFIG, LOAD)
    larger = dataclasses.replace(LOAD, channels=128, shapes=(Shape("weight", (2000, 2000), True),))
    found = predict.scaled(STEP, larger, "soap")
    assert (found.atom_us, found.edge_us, found.fixed_ms) == (20.0, 1.0, 10.0)
    assert (found.optimizer_ms - found.bases_ms, found.bases_ms) == (4.0, 8.0)
    assert predict.scaled(STEP, larger, "adamw").optimizer_ms == 4.0  # no eigenbases
    assert not predict.is_measured(CLUSTER, soap, larger)


def test_the_data_ranks_share_soaps_eigenbases() -> None:
    soap = after(CONFIG, "optimizer.name=soap")
    one, eight = (predict.forecast(soap, LOAD, CLUSTER, ranks, "joint") for ranks in (1, 8))
    assert one.compute_s - eight.compute_s == pytest.approx(0.001 * (1 - 1 / 8))


# Measuring


def test_fit_finds_the_constants_and_none_below_zero() -> None:
    sizes = np.array([(1, atoms, edges) for atoms in (10, 100) for edges in (5 * atoms, 50 * atoms)], np.float64)
    assert measure.fit(sizes, sizes @ (3.0, 2.0, 0.5)) == pytest.approx([3.0, 2.0, 0.5])
    assert measure.fit(sizes, sizes @ (3.0, 2.0, -0.001)) == pytest.approx([3.0, 2.0, 0.0], rel=0.1)


def test_peak_of_what_is_alive_at_the_same_time() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + 1

    assert measure.peak_bytes(call, torch.device("cpu")) == pytest.approx(8000, rel=0.1)


def test_crystals_have_the_wanted_density() -> None:
    plan = make_plan(read_config(PretrainConfig, DEBUG, []), 1)
    for edges in measure.EDGES_PER_ATOM:
        batch = measure.crystals(plan, 200, edges)
        assert batch.num_atoms == pytest.approx(200, rel=0.3)
        assert batch.num_edges / batch.num_atoms == pytest.approx(edges, rel=0.5)


@pytest.mark.slow
def test_what_is_measured_predicts_the_memory_of_another_batch(tmp_path: Path) -> None:
    config = read_config(PretrainConfig, DEBUG, ["output=nowhere"])
    cluster = measure.measure(config, "here")
    (tmp_path / "here.yaml").write_text(to_yaml(cluster))
    assert read_cluster(str(tmp_path / "here.yaml")) == cluster
    step = cluster.step
    assert step.origin == "measured" and step.atom_us + step.edge_us > 0 and step.optimizer_ms > 0
    assert predict.is_measured(cluster, config, workload(config))
    plan = make_plan(config, 1)
    batch = measure.crystals(plan, 80, 20.0)
    potential = make_potential(plan).train()
    peak = measure.peak_bytes(measure._gradients(potential, batch, config), torch.device("cpu"))
    expected = step.bytes_fixed + step.bytes_per_atom * batch.num_atoms + step.bytes_per_edge * batch.num_edges
    assert peak == pytest.approx(expected, rel=0.15)


# The command


@pytest.mark.parametrize("name", names())
def test_every_cluster_is_readable_and_says_what_was_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = read_cluster(name)
    assert cluster.name == name and cluster.step.source and cluster.network_source
    assert cli.main(["plan", "debug", "--cluster", name, "--gpus", "1,8"]) == 0
    text = capsys.readouterr().out
    assert f"step: {cluster.step.origin}" in text and f"network: {cluster.network_origin}" in text
    assert sum(line.split()[:1] == ["8"] for line in text.splitlines()) == len(predict.FORMS)


def test_json_has_a_line_for_every_size_and_form(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", names()[0], "--gpus", "8,4096", "--json", "reptile.tasks_per_outer=1"]
    assert cli.main(["plan", "debug", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = [(line["ranks"], line["form"]) for line in found["forecasts"]]
    assert lines == [(ranks, form) for ranks in (8, 4096) for form in predict.FORMS]
    assert all(math.isfinite(line["step_s"]) and line["shards_per_rank"] > 0 for line in found["forecasts"])
    assert any("4096 ranks: the cluster has" in text or "packs in" in text for text in found["warnings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "nowhere"], "no file 'nowhere'"),
        (["--cluster", "h200_8", "--gpus", "8;16"], "--gpus: expected numbers of ranks"),
        ([], "either --cluster"),
        (["--cluster", "h200_8", "--measure", "file"], "either --cluster"),
    ],
)
def test_bad_words_are_said(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "debug", *words]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
