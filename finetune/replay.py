"""Structures of other fidelities that are mixed into the batches: of the pretraining, so that they are not forgotten,
and of more new fidelities, which are learned together with the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rung.data.fidelity import check_name, unknown_fidelity
from rung.data.manifest import is_dataset
from rung.data.reaction import Reaction
from rung.data.read import read_any, read_dataset
from rung.data.structure import Structure
from rung.finetune.config import TrainingConfig
from rung.finetune.dataset import absolute_rows, draw, hold_out, require_energies, training_view
from rung.finetune.objective import WeightedRow

MAX_EVALUATED = 200  # structures per replay task on which forgetting is measured


@dataclass(frozen=True)
class ReplayTask:
    """One (dataset, fidelity) pair: structures to train on, and others on which errors are measured."""

    dataset: str
    fidelity: str
    train: list[Structure]
    held_out: list[Structure]
    weight: float = 1.0  # of the loss terms of a structure, relative to those of a target row

    def with_labels(self, use_forces: bool) -> ReplayTask:
        """Return the task with only those labels of its training structures that may be trained on."""
        rows = training_view(absolute_rows(self.train, self.fidelity), self.fidelity, use_forces)
        return dataclasses.replace(self, train=[row.structures[0] for row in rows])


def load_replay(
    names: Sequence[str], known: Sequence[str], training: TrainingConfig, seed: int, notes: list[str]
) -> list[ReplayTask]:
    """Read the DATASET:FIDELITY pairs of the pretraining; `known` are the fidelities of the checkpoint.

    A dataset's own validation split is held out, of a file 10 % of the molecules.
    Raises ValueError for an unknown fidelity or a task without structures.
    """
    for name in names:
        fidelity = name.rpartition(":")[2]
        if fidelity not in known:
            raise unknown_fidelity(fidelity, known)
    return [_load("replay", name, training.replay_weight, training.replay_limit, seed, notes) for name in names]


def load_also(names: Sequence[str], taken: Sequence[str], seed: int, notes: list[str]) -> list[ReplayTask]:
    """Read the DATASET:FIDELITY pairs of more new fidelities, which count as much as the target.

    `taken` are the fidelities of the checkpoint and of the target.
    Raises ValueError for one of those, and for structures without an energy.
    """
    tasks = []
    for name in names:
        fidelity = name.rpartition(":")[2]
        check_name(fidelity)
        if fidelity in taken:
            raise ValueError(f"also {name}: expected a new fidelity, found one of {', '.join(taken)}")
        tasks.append(_load("also", name, 1.0, 0, seed, notes))
        require_energies(tasks[-1].train, fidelity, tasks[-1].dataset)
        taken = [*taken, fidelity]
    return tasks


def _load(purpose: str, name: str, weight: float, limit: int, seed: int, notes: list[str]) -> ReplayTask:
    dataset, _, fidelity = name.rpartition(":")
    if is_dataset(dataset):
        train = _sample(read_dataset(dataset, fidelity, "train"), limit, seed)
        held_out = read_any(dataset, fidelity, split="val")
    else:
        train, held_out = hold_out(read_any(dataset, fidelity), 0.1, seed, f"{purpose} {name}", notes)
        train = draw(train, limit, seed)
    if not train or not held_out:
        raise ValueError(f"{purpose} {name}: expected structures to train on and to hold out, found none")
    return ReplayTask(dataset, fidelity, train, draw(held_out, MAX_EVALUATED, seed), weight)


def _sample(structures: Iterator[Structure], limit: int, seed: int) -> list[Structure]:
    """Return `limit` structures of a stream, all as likely (reservoir sampling); all where `limit` is 0."""
    generator = np.random.default_rng(seed)
    kept: list[Structure] = []
    for seen, structure in enumerate(structures):
        if not limit or len(kept) < limit:
            kept.append(structure)
        elif (place := int(generator.integers(seen + 1))) < limit:
            kept[place] = structure
    return kept


def replay_rows(tasks: Sequence[ReplayTask], seed: int) -> Iterator[WeightedRow]:
    """Yield rows without end, tasks in turn and each in a new random order every pass.

    A structure without an energy has forces only: its row's energy is not a number, which the loss leaves out.
    """
    orders = [_endless(task.train, np.random.default_rng([seed, index])) for index, task in enumerate(tasks)]
    while True:
        for task, order in zip(tasks, orders, strict=True):
            structure = next(order)
            energy = structure.labels[task.fidelity].energy
            row = Reaction.absolute(structure, float("nan") if energy is None else energy)
            yield WeightedRow(row, task.fidelity, task.weight)


def _endless(structures: Sequence[Structure], generator: np.random.Generator) -> Iterator[Structure]:
    while True:
        for index in generator.permutation(len(structures)):
            yield structures[index]
