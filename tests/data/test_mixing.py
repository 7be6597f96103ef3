"""Mixing: exact shares in the long run, a pure function of seed and rank, resumable."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

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
    return [(sample.fidelity, sample.structure.key) for sample in itertools.islice(stream, count)]


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
    for sample in itertools.islice(open_tasks(tasks(dataset), seed=0), 50):
        assert set(sample.structure.labels) == {sample.fidelity}
        expected = (0.5, 1.0) if sample.fidelity == "low" else (1.0, 0.0)
        assert (sample.energy_weight, sample.forces_weight) == expected


def test_order_is_a_pure_function_of_its_arguments(dataset: Path) -> None:
    def order(seed: int, rank: int) -> list[tuple[str, str]]:
        return take(open_tasks(tasks(dataset), seed=seed, rank=rank, world=2), 200)

    assert order(0, 0) == order(0, 0)
    assert [task for task, _ in order(0, 0)] != [task for task, _ in order(0, 1)]
    assert [task for task, _ in order(0, 0)] != [task for task, _ in order(1, 0)]


@pytest.mark.parametrize("consumed", [0, 1, 150, 1023, 1024, 1025])
def test_resumed_mix_continues_exactly(dataset: Path, consumed: int) -> None:
    stream = open_tasks(tasks(dataset), seed=2, rank=1, world=2)
    take(stream, consumed)
    state = json.loads(json.dumps(stream.state()))
    expected = take(stream, 100)
    resumed = open_tasks(tasks(dataset), seed=2, rank=1, world=2)
    resumed.load_state(state)
    assert take(resumed, 100) == expected


def test_bad_input_is_named(dataset: Path) -> None:
    state = open_tasks(tasks(dataset), seed=0).state()
    with pytest.raises(ValueError, match="mixing state: seed: expected 1, found 0"):
        open_tasks(tasks(dataset), seed=1).load_state(state)
    with pytest.raises(ValueError, match="mixing state: version: expected 1, found 7"):
        open_tasks(tasks(dataset), seed=0).load_state(state | {"version": 7})
    with pytest.raises(ValueError, match="expected 1 tasks, found 2"):
        open_tasks(tasks(dataset)[:1], seed=0).load_state(state)
    with pytest.raises(ValueError, match="weight: expected positive numbers"):
        open_tasks([Task(str(dataset), "low", weight=0.0)], seed=0)
    with pytest.raises(ValueError, match="at least one stream"):
        MixedStream([], [], 0)
