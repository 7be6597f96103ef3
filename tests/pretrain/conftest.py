"""A tiny dataset with two fidelities, and ranks forked from the test."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.emt import EMT

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.structure import Labels, Structure

FIDELITIES = ("high", "low")


@pytest.fixture(scope="session")
def structures() -> list[Structure]:
    """Rattled molecules; `low` is ASE's EMT potential, `high` a distortion of it on every second geometry."""
    random = np.random.default_rng(0)
    made = []
    for name in ("H2O", "CH4", "NH3", "C2H6", "CH3OH", "CO2"):
        for index in range(8):
            atoms = molecule(name)
            atoms.positions = (atoms.positions + random.normal(0, 0.05, atoms.positions.shape)).astype(np.float32)
            atoms.calc = EMT()
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            labels = {"low": Labels(energy, forces.astype(np.float32))}
            if index % 2 == 0:
                labels["high"] = Labels(1.1 * energy + 0.2 * len(atoms), (1.1 * forces).astype(np.float32))
            positions, numbers = atoms.positions.astype(np.float32), atoms.numbers.astype(np.uint8)
            made.append(Structure(f"{name}_{index}", f"{name}_{index}", numbers, positions, labels=labels))
    return made


@pytest.fixture(scope="session")
def dataset(structures: list[Structure], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The structures as a dataset: a quarter of the geometries of each molecule is validation."""
    folder = tmp_path_factory.mktemp("dataset")
    build_dataset(
        structures,
        folder,
        name="emt",
        fidelities={name: Fidelity(name, "emt") for name in FIDELITIES},
        split=lambda group: "val" if group.endswith(("_0", "_1")) else "train",
        pack_atoms=64,
    )
    return folder


@pytest.fixture()
def config_words(dataset: Path) -> list[str]:
    """A tiny run as `key=value` words, without its output."""
    return [
        f"tasks=[{{dataset: {dataset}, fidelity: low}}, {{dataset: {dataset}, fidelity: high}}]",
        "steps=6",
        "model={channels: 16, num_layers: 2, l_max: 2, num_radial: 4, fidelity_dim: 4, readout_hidden: 4}",
        "data.max_atoms=24",
        "data.max_edges=512",
        "optimizer.warmup_steps=2",
        "evaluation={every: 3, max_structures: 8}",
        "log_every=2",
        "save_every=4",
    ]


Body = Callable[..., Any]
RunRanks = Callable[..., list[Any]]


@pytest.fixture()
def run_ranks(tmp_path: Path) -> RunRanks:
    """Return run(body, world, *arguments): body(*arguments) on forked gloo ranks; the results in the ranks' order."""

    def run(body: Body, world: int, *arguments: object) -> list[Any]:
        context = multiprocessing.get_context("fork")
        store = tmp_path / f"store_{len(list(tmp_path.glob('store_*')))}"
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(body, rank, world, store, pipes[rank][1], arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()  # so that a rank that dies is an EOFError here
        results = [_receive(receiver) for receiver, _ in pipes]
        for process in processes:
            process.join()
        failures = [text for failed, text in results if failed]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    return run


def _rank(body: Body, rank: int, world: int, store: Path, sender: Any, arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send((False, body(*arguments)))
    except BaseException:
        sender.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        sender.close()
        os._exit(0)  # nothing of the test's own clean-up belongs here


def _receive(receiver: Any) -> tuple[bool, Any]:
    try:
        failed, value = receiver.recv()
    except EOFError:
        return True, "a rank died without a result"
    return failed, value
