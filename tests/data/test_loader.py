"""The loader: the same batches in-process and from workers, complete, and exactly resumable."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from rung.data.batch import Batch, Budget
from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.loader import BatchLoader
from rung.data.mixing import MixedStream, Task, open_tasks
from rung.data.structure import Labels, Structure

FIDELITIES = {"low": 0, "high": 1}
NUM_STRUCTURES = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    structures = []
    for index in range(NUM_STRUCTURES):
        n = 2 + index % 7
        labels = {"low": Labels(0.0, rng.normal(size=(n, 3)).astype(np.float32))}
        structures.append(
            Structure(
                key=f"s{index:03d}",
                group=f"s{index:03d}",
                numbers=np.ones(n, np.uint8),
                positions=rng.uniform(0, 6, (n, 3)).astype(np.float32),
                labels=labels | ({"high": Labels(0.0)} if index % 3 == 0 else {}),
            )
        )
    fidelities = {name: Fidelity(name, method=name) for name in FIDELITIES}
    build_dataset(structures, folder, name="h", fidelities=fidelities, split=lambda _: "train", pack_atoms=60)
    return str(folder)


@contextmanager
def open_loader(dataset: str, *, seed: int = 0, names: tuple[str, ...] = ("low", "high"), **options: Any) -> Any:
    tasks = [Task(dataset, name) for name in names]

    def make_stream(consumer: int, num_consumers: int) -> MixedStream:
        return open_tasks(tasks, seed=seed, rank=consumer, world=num_consumers)

    loader = BatchLoader([make_stream], FIDELITIES, 4.0, Budget(40, 300), **options)
    try:
        yield loader
    finally:
        loader.close()


def content(batch: Batch) -> tuple[Any, ...]:
    return (batch.keys, batch.fidelity.tolist(), batch.positions.sum().item(), batch.num_edges)


def take(loader: Iterator[Batch], count: int) -> list[tuple[Any, ...]]:
    return [content(batch) for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_keep_to_the_budget_and_repeat_exactly(dataset: str, num_workers: int) -> None:
    with open_loader(dataset, num_workers=num_workers) as loader:
        made = list(itertools.islice(loader, 30))
        assert all(batch.num_atoms <= 40 and batch.num_edges <= 300 for batch in made)
        assert {row for batch in made for row in batch.fidelity.tolist()} == {0, 1}
    with open_loader(dataset, num_workers=num_workers) as loader:
        assert take(loader, 30) == [content(batch) for batch in made]


def test_workers_take_turns_as_explicit_consumers(dataset: str) -> None:
    with open_loader(dataset, num_workers=2, rank=1, world=3) as loader:
        found = take(loader, 20)
    expected = []
    for consumer in (2, 3):
        with open_loader(dataset, rank=consumer, world=6) as loader:
            expected.append(take(loader, 10))
    assert found[0::2] == expected[0] and found[1::2] == expected[1]


def test_two_ranks_with_two_workers_see_everything_once_per_epoch(dataset: str) -> None:
    counts: Counter[str] = Counter()
    for rank in range(2):
        with open_loader(dataset, names=("low",), num_workers=2, rank=rank, world=2) as loader:
            shares: list[list[str]] = [[], []]
            while min(map(len, shares)) < 2 * NUM_STRUCTURES // 4:
                for share in shares:
                    share.extend(next(loader).keys)
        for share in shares:
            counts.update(share[: NUM_STRUCTURES // 4])
    assert len(counts) == NUM_STRUCTURES and set(counts.values()) == {1}


def epoch_ended(loader: BatchLoader) -> bool:
    (state,) = loader.state()["consumers"][0]
    return state is not None and (state["streams"][0]["epoch"] > 0 or not state["streams"][0]["todo"])


def test_another_world_goes_on_with_what_is_left(dataset: str) -> None:
    """Two ranks of two workers stop in the first epoch; three ranks of one worker each read the rest of it."""
    seen: Counter[str] = Counter()
    states = []
    for rank in range(2):
        with open_loader(dataset, names=("low",), num_workers=2, rank=rank, world=2) as loader:
            for batch in itertools.islice(loader, 3 - rank):
                seen.update(batch.keys)
            states.append(json.loads(json.dumps(loader.state())))
    for rank in range(3):
        with open_loader(dataset, names=("low",), rank=rank, world=3) as loader:
            loader.redeal(states, batches=0)
            while not epoch_ended(loader):
                seen.update(next(loader).keys)
    # A consumer's last batch of the epoch runs on into the next one.
    assert set(seen) == {f"s{index:03d}" for index in range(NUM_STRUCTURES)}
    assert sum(count > 1 for count in seen.values()) <= 3 * 10
    with open_loader(dataset, names=("low",), seed=1) as loader, pytest.raises(ValueError, match="seed: expected 1"):
        loader.redeal(states, batches=0)


def test_a_killed_worker_is_an_error_and_not_a_hang(dataset: str) -> None:
    with open_loader(dataset, num_workers=2) as loader:
        take(loader, 2)
        (worker, *_) = multiprocessing.active_children()
        assert worker.pid is not None
        with pytest.raises(RuntimeError, match="(?s)worker.*(killed|exited unexpectedly)"):
            os.kill(worker.pid, signal.SIGKILL)  # the signal of its death may raise at once
            take(loader, 1000)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 7, 40])
def test_resumed_loader_continues_exactly(dataset: str, num_workers: int, consumed: int) -> None:
    with open_loader(dataset, num_workers=num_workers, rank=1, world=2) as loader:
        take(loader, consumed)
        state = json.loads(json.dumps(loader.state()))
        expected = take(loader, 15)
    with open_loader(dataset, num_workers=num_workers, rank=1, world=2) as loader:
        take(loader, 3)  # whatever the loader did before, load_state decides
        loader.load_state(state)
        assert take(loader, 15) == expected


def test_closed_loader_continues_where_it_stood(dataset: str) -> None:
    with open_loader(dataset, num_workers=2) as loader:
        expected = take(loader, 12)
    with open_loader(dataset, num_workers=2) as loader:
        first = take(loader, 5)
        loader.close()
        assert first + take(loader, 7) == expected


def test_loader_leaves_the_global_generators_alone(dataset: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with open_loader(dataset, num_workers=1) as loader:
        take(loader, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_of_another_set_up_is_refused(dataset: str) -> None:
    with open_loader(dataset, num_workers=2) as loader:
        take(loader, 1)
        state = loader.state()
    with (
        open_loader(dataset, num_workers=0) as loader,
        pytest.raises(ValueError, match="loader state: num_workers: expected 0, found 2"),
    ):
        loader.load_state(state)
    with (
        open_loader(dataset, num_workers=2) as loader,
        pytest.raises(ValueError, match="loader state: version: expected 3, found 0"),
    ):
        loader.load_state(state | {"version": 0})
    with (
        open_loader(dataset, num_workers=2, world=2) as loader,
        pytest.raises(ValueError, match="world: expected 4, found 2"),
    ):
        loader.load_state(state)


def test_an_error_in_a_worker_reaches_the_caller(dataset: str) -> None:
    tasks = [Task(dataset, "low")]
    loader = BatchLoader(
        [lambda rank, world: open_tasks(tasks, seed=0, rank=rank, world=world)],
        FIDELITIES,
        4.0,
        Budget(3, 300),
        num_workers=1,
    )
    with pytest.raises(ValueError, match="exceed the budget of 3 atoms and 300 edges per batch"):
        take(loader, 1000)
    loader.close()


def test_an_error_does_not_end_the_loader(dataset: str) -> None:
    """Whoever catches it gets the same error again, and not an end of what is endless."""
    tasks = [Task(dataset, "low")]
    loader = BatchLoader(
        [lambda rank, world: open_tasks(tasks, seed=0, rank=rank, world=world)], FIDELITIES, 4.0, Budget(3, 300)
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="exceed the budget of 3 atoms"):
            take(loader, 1000)


def test_a_refused_state_leaves_the_loader_where_it_was(dataset: str) -> None:
    with open_loader(dataset, seed=1) as other:
        take(other, 2)
        foreign = other.state()
    with open_loader(dataset) as loader:
        expected = take(loader, 6)
    with open_loader(dataset) as loader:
        first = take(loader, 3)
        with pytest.raises(ValueError, match="seed: expected 0, found 1"):
            loader.load_state(foreign)
        assert first + take(loader, 3) == expected


def test_workers_outlive_a_signal_to_all_processes(dataset: str) -> None:
    with open_loader(dataset, num_workers=2) as loader:
        expected = take(loader, 40)
    with open_loader(dataset, num_workers=2) as loader:
        first = take(loader, 2)  # both workers have begun
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        assert first + take(loader, 38) == expected


def test_bad_options_are_named(dataset: str) -> None:
    with (
        pytest.raises(ValueError, match="num_workers >= 0 and prefetch >= 1, found -1 and 4"),
        open_loader(dataset, num_workers=-1),
    ):
        pass
    if not torch.cuda.is_available():
        with (
            pytest.raises(ValueError, match="pin_memory needs a GPU"),
            open_loader(dataset, pin_memory=True),
        ):
            pass


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_from_several_streams_in_the_given_order(dataset: str, num_workers: int) -> None:
    """The order is asked for the number of the batch, which a resume goes on counting, also within the workers."""
    pattern = [0, 0, 1, 0, 1]

    def open_both() -> BatchLoader:
        makers = [
            lambda rank, world, name=name: open_tasks([Task(dataset, name)], seed=0, rank=rank, world=world)
            for name in ("low", "high")
        ]
        order = lambda number: pattern[number % len(pattern)]  # noqa: E731
        return BatchLoader(makers, FIDELITIES, 4.0, Budget(40, 300), order=order, num_workers=num_workers)

    loader = open_both()
    first = take(loader, 7)
    state = json.loads(json.dumps(loader.state()))
    rest = take(loader, 6)
    loader.close()
    for number, (_, fidelities, *_) in enumerate(first + rest):
        assert set(fidelities) == {pattern[number % len(pattern)]}
    again = open_both()
    again.load_state(state)
    assert take(again, 6) == rest
    again.close()
