"""Structures of the pretraining fidelities that are mixed into the batches, so that they are not forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rung.data.fidelity import unknown_fidelity
from rung.data.manifest import is_dataset
from rung.data.read import read_any
from rung.data.structure import Structure
from rung.finetune.dataset import draw, hold_out

MAX_EVALUATED = 200  # structures per replay task on which forgetting is measured


@dataclass(frozen=True)
class ReplayTask:
    """One (dataset, fidelity) pair: structures to train on, and others on which forgetting is measured."""

    dataset: str
    fidelity: str
    train: list[Structure]
    held_out: list[Structure]


def load_replay(names: Sequence[str], known: Sequence[str], seed: int, notes: list[str]) -> list[ReplayTask]:
    """Read the DATASET:FIDELITY pairs; `known` are the fidelities of the checkpoint.

    A dataset's own validation split is held out, of a file 10 % of the molecules.
    Raises ValueError for an unknown fidelity or a task without structures.
    """
    tasks = []
    for name in names:
        dataset, _, fidelity = name.rpartition(":")
        if fidelity not in known:
            raise unknown_fidelity(fidelity, known)
        if is_dataset(dataset):
            train = read_any(dataset, fidelity, split="train")
            held_out = read_any(dataset, fidelity, split="val")
        else:
            train, held_out = hold_out(read_any(dataset, fidelity), 0.1, seed, f"replay {name}", notes)
        if not train or not held_out:
            raise ValueError(f"replay {name}: expected structures to train on and to hold out, found none")
        tasks.append(ReplayTask(dataset, fidelity, train, draw(held_out, MAX_EVALUATED, seed)))
    return tasks


def replay_structures(tasks: Sequence[ReplayTask], seed: int) -> Iterator[tuple[Structure, str]]:
    """Yield (structure, fidelity) without end, tasks in turn and each in a new random order every pass."""
    orders = [_endless(task.train, np.random.default_rng([seed, index])) for index, task in enumerate(tasks)]
    while True:
        for task, order in zip(tasks, orders, strict=True):
            yield next(order), task.fidelity


def _endless(structures: Sequence[Structure], generator: np.random.Generator) -> Iterator[Structure]:
    while True:
        for index in generator.permutation(len(structures)):
            yield structures[index]
