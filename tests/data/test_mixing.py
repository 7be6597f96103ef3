"""Mixing: exact shares in the long run, a pure function of seed and rank, resumable."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.data.batch import DRAWN
from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.mixing import MixedStream, Task, label_counts, mixing_weights, open_tasks
from rung.data.structure import Labels, Structure


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    rng = np.random.default_rng(0)
    structures = [
        Structure(
            key=f"s{index:03d}",
            group=f"s{index:03d}",
            numbers=np.array([1, 1, 8], np.uint8),
            positions=rng.normal(size=(3, 3)).astype(np.float32),
            labels={"low": Labels(0.0)} | ({"high": Labels(1.0)} if index % 5 == 0 else {}),
        )
        for index in range(100)
    ]
    fidelities = {name: Fidelity(name, method=name) for name in ("low", "high")}
    build_dataset(structures, folder, name="water", fidelities=fidelities, split=lambda _: "train", pack_atoms=60)
    return folder


def tasks(dataset: Path) -> list[Task]:
    low = Task(str(dataset), "low", weight=3.0, energy_weight=0.5)
    return [low, Task(str(dataset), "high", weight=1.0, forces_weight=0.0)]


def take(stream: MixedStream, count: int) -> list[tuple[str, str]]:
    """Return (fidelity, key) of the next `count` samples."""
    return take_and_state(stream, count)[0]


def take_and_state(stream: MixedStream, count: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Return (fidelity, key) of the next `count` samples, and the state after them."""
    taken: list[tuple[str, str]] = []
    state = stream.state()
    while len(taken) < count:
        samples = next(stream)
        used = min(len(samples), count - len(taken))
        names = [samples.fidelities[task] for task in samples.fidelity[:used].tolist()]
        taken += zip(names, samples.table.keys.tolist()[:used], strict=True)
        state = stream.state(used)
    return taken, json.loads(json.dumps(state))


def test_weights_by_temperature() -> None:
    assert mixing_weights([300, 100], 1.0) == pytest.approx([0.75, 0.25])
    assert mixing_weights([400, 100], 2.0) == pytest.approx([2 / 3, 1 / 3])
    assert mixing_weights([10**9, 1, 7], math.inf) == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="temperature: expected >= 1"):
        mixing_weights([1, 2], 0.5)
    with pytest.raises(ValueError, match="at least one label in every task, found counts"):
        mixing_weights([1, 0], 1.0)


def test_label_counts_come_from_the_manifest(dataset: Path) -> None:
    assert label_counts(tasks(dataset)) == [100, 20]
    assert label_counts(tasks(dataset), "val") == [0, 0]


def test_shares_follow_the_weights(dataset: Path) -> None:
    count = 20_000
    shares = Counter(fidelity for fidelity, _ in take(open_tasks(tasks(dataset), seed=0), count))
    assert abs(shares["low"] - 0.75 * count) < 5 * math.sqrt(count * 0.75 * 0.25)


def test_samples_carry_the_labels_and_weights_of_their_task(dataset: Path) -> None:
    samples = next(open_tasks(tasks(dataset), seed=0))
    assert samples.fidelities == ("low", "high") and samples.table.fidelities == [DRAWN]
    is_high = samples.fidelity == 1
    np.testing.assert_array_equal(samples.table.label(f"energy.{DRAWN}"), is_high)  # 0 eV at low, 1 eV at high
    np.testing.assert_array_equal(samples.energy_weight, np.where(is_high, 1.0, 0.5))
    np.testing.assert_array_equal(samples.forces_weight, np.where(is_high, 0.0, 1.0))


def test_order_is_a_pure_function_of_its_arguments(dataset: Path) -> None:
    def order(seed: int, rank: int) -> list[tuple[str, str]]:
        return take(open_tasks(tasks(dataset), seed=seed, rank=rank, world=2), 200)

    assert order(0, 0) == order(0, 0)
    assert [task for task, _ in order(0, 0)] != [task for task, _ in order(0, 1)]
    assert [task for task, _ in order(0, 0)] != [task for task, _ in order(1, 0)]


@pytest.mark.parametrize("consumed", [0, 1, 150, 1023, 1024, 1025])
def test_resumed_mix_continues_exactly(dataset: Path, consumed: int) -> None:
    _, state = take_and_state(open_tasks(tasks(dataset), seed=2, rank=1, world=2), consumed)
    expected = take(open_tasks(tasks(dataset), seed=2, rank=1, world=2), consumed + 100)[consumed:]
    resumed = open_tasks(tasks(dataset), seed=2, rank=1, world=2)
    resumed.load_state(state)
    assert take(resumed, 100) == expected


def test_another_world_goes_on_with_what_is_left(dataset: Path) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    states: list[dict[str, Any] | None] = [None]
    for rank in range(2):
        samples, state = take_and_state(open_tasks(tasks(dataset), seed=2, rank=rank, world=3), 20)
        seen.update(samples)
        states.insert(rank, state)
    dealt = [open_tasks(tasks(dataset), seed=2, rank=rank, world=2) for rank in range(2)]
    for stream in dealt:
        stream.redeal(states)
        seen.update(take(stream, 20))
    low = [count for (fidelity, _), count in seen.items() if fidelity == "low"]
    assert set(low) == {1}  # 100 of them; about 60 are drawn
    with pytest.raises(ValueError, match="mixing state: seed: expected 3, found 2"):
        open_tasks(tasks(dataset), seed=3).redeal(states)


def test_unreadable_structures_are_draws_without_a_sample(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1  # in the first pack
    shard.write_bytes(data)
    low = tasks(tmp_path / "damaged")[:1]
    stream = open_tasks(low, seed=0, max_bad=1)
    first = take(stream, 1500)
    assert 0 < len({key for _, key in first}) < 100
    _, state = take_and_state(open_tasks(low, seed=0, max_bad=1), 700)
    resumed = open_tasks(low, seed=0, max_bad=1)
    resumed.load_state(state)
    assert take(resumed, 800) == first[700:]


def test_bad_input_is_named(dataset: Path) -> None:
    state = open_tasks(tasks(dataset), seed=0).state()
    with pytest.raises(ValueError, match="mixing state: seed: expected 1, found 0"):
        open_tasks(tasks(dataset), seed=1).load_state(state)
    with pytest.raises(ValueError, match="mixing state: version: expected 2, found 7"):
        open_tasks(tasks(dataset), seed=0).load_state(state | {"version": 7})
    with pytest.raises(ValueError, match="expected 1 tasks, found 2"):
        open_tasks(tasks(dataset)[:1], seed=0).load_state(state)
    with pytest.raises(ValueError, match="weight: expected positive numbers"):
        open_tasks([Task(str(dataset), "low", weight=0.0)], seed=0)
    with pytest.raises(ValueError, match="at least one stream"):
        MixedStream([], [], 0)
