"""What a training state holds: everything that a stopped run needs to go on as if it had never stopped.

    model.safetensors        weights (between rounds all ranks have the same); ema.safetensors: their averages
    rank_00000.safetensors   that rank's share of the optimizer's and the outer step's state, torch's random generator
    rank_00000.json          where that rank's loader stands
    state.json               version, world, step, updates of the average, skipped steps, best criterion, config

`store.py` keeps such states. With as many ranks and groups as before, a run goes on bit for bit. With others, the
optimizer's state is dealt again by parameters or partitions, and what is left of the streams' epochs by structures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rung.pretrain.ema import Ema
from rung.pretrain.engine import Engine
from rung.pretrain.rounds import Rounds
from rung.pretrain.state_folder import state_document, state_tensors
from rung.pretrain.store import Snapshot, to_host
from rung.pretrain.world import World

# What may change between a stop and a resume: none of it changes what is computed, but for the order of batches.
FREE_FIELDS = (
    "activation_checkpointing", "data.max_bad", "data.num_workers", "data.prefetch", "data.remote", "evaluation",
    "keep_states", "log_every", "optimizer.max_skipped", "output", "save_every", "stop_at", "wandb", "world",
)  # fmt: skip


@dataclass
class TrainingState:
    """The live objects that a state is taken from and put back into."""

    engine: Engine
    ema: Ema
    rounds: Rounds
    config: Mapping[str, Any]  # the resolved config and the datasets' digests, plain values
    steps_per_round: int
    readers: Callable[[World, int], range]  # the ranks of a world that the loader's i-th stream is dealt to
    step: int = 0
    skipped: int = 0
    best: float | None = None  # the lowest criterion of an evaluation so far

    def snapshot(self) -> Snapshot:
        """Return this rank's part of the state, copied to the host."""
        ranks = self.engine.ranks
        tensors = {f"optimizer/{name}": tensor for name, tensor in self.engine.optimizer_state().items()}
        tensors |= {f"outer/{name}": tensor for name, tensor in self.rounds.state().items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if ranks.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(ranks.device)
        files = {_tensor_file(ranks.rank): to_host(tensors)}
        if ranks.rank == 0:
            named = dict(self.ema.module.named_parameters())
            files["model.safetensors"] = to_host({name: parameter.detach() for name, parameter in named.items()})
            files["ema.safetensors"] = to_host(self.ema.averages)
        return Snapshot(files, {_loader_file(ranks.rank): self.rounds.loader.state()})

    def document(self) -> dict[str, Any]:
        """Return what rank 0 writes into state.json."""
        return {
            "groups": self.engine.ranks.world.groups,
            "partitions": self.engine.partition_sizes(),
            "ema_updates": self.ema.updates,
            "skipped": self.skipped,
            "best": self.best,
            "config": dict(self.config),
        }

    def load(self, place: Path) -> str:
        """Put a state back, on all ranks, and return in words what was not as it had been saved (usually nothing).

        Raises ValueError when the config or a dataset has changed.
        """
        saved = state_document(place)
        self._check(place, saved["config"])
        ranks, before = self.engine.ranks, World(saved["world"], saved["groups"])
        self.step, self.skipped = saved["step"], saved["skipped"]
        same_evaluation = saved["config"]["evaluation"] == _plain(self.config)["evaluation"]
        self.best = saved["best"] if same_evaluation else None  # else the numbers are of other structures
        weights, averages = (state_tensors(place, f"{name}.safetensors") for name in ("model", "ema"))
        self.engine.write_parameters([weights[name] for name, _ in self.ema.module.named_parameters()])
        self.ema.load(averages, saved["ema_updates"])
        same_ranks = before == ranks.world
        parts = _Parts(place, before)
        group = ranks.group if before.groups == ranks.world.groups else ranks.group % before.groups
        self.engine.load_optimizer_state(_inner_states(parts, before, group, before.groups == ranks.world.groups))
        self.rounds.load_state(self._outer(parts, before, group, saved["partitions"]))
        if same_ranks:
            random = parts.of(ranks.rank, "rng")
            torch.set_rng_state(random["cpu"])
            if "cuda" in random and ranks.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"], ranks.device)
        loader = self.rounds.loader
        mine = state_document(place, _loader_file(ranks.rank)) if same_ranks else None
        if mine is not None and mine["num_workers"] == loader.num_workers:
            loader.load_state(mine)
            return ""
        batches = self.step // self.steps_per_round * self.rounds.batches_per_round
        states = [state_document(place, _loader_file(rank)) for rank in range(before.size)]
        loader.redeal(states, batches, lambda stream: self.readers(before, stream))
        return f"saved by {before.size} rank(s) in {before.groups} group(s): what is left of the epochs is dealt again"

    def _outer(self, parts: _Parts, before: World, group: int, sizes: Sequence[int]) -> dict[str, Tensor]:
        """Return the outer step's state of this rank, from the groups and partitions of before."""
        ranks = self.engine.ranks
        names = parts.of(before.group_ranks(group)[0], "outer")

        def whole(name: str, group: int) -> Tensor:
            return self.engine.repartition([parts.of(rank, "outer")[name] for rank in before.group_ranks(group)], sizes)

        state = {name: whole(name, group) if name != "pending_tasks" else names[name] for name in names}
        if "residual" in state and before.groups != ranks.world.groups:
            # What all groups together still owe goes into the exchange once.
            owed = [whole("residual", other) for other in range(before.groups)]
            state["residual"] = torch.stack(owed).sum(0) if ranks.group == 0 else torch.zeros_like(owed[0])
        return state

    def _check(self, place: Path, saved: Mapping[str, Any]) -> None:
        before, now = _flat(saved), _flat(_plain(self.config))
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in FREE_FIELDS)
        ]
        if changed:
            raise ValueError(
                f"state {place}: the config or a dataset has changed: {'; '.join(changed)}; start a new run"
            )


class _Parts:
    """The tensors of the ranks' files of a state, each file read once."""

    def __init__(self, place: Path, world: World) -> None:
        self._place, self._world = place, world
        self._files: dict[int, dict[str, Tensor]] = {}

    def of(self, rank: int, kind: str) -> dict[str, Tensor]:
        """Return what a rank saved under `kind`."""
        if rank not in self._files:
            self._files[rank] = state_tensors(self._place, _tensor_file(rank))
        named = (name.split("/", 1) for name in self._files[rank])
        return {name: self._files[rank][f"{kind}/{name}"] for found, name in named if found == kind}


def _inner_states(parts: _Parts, before: World, group: int, only_its_own: bool) -> list[dict[str, Tensor]]:
    """Return the optimizer's states of a group of before, by data rank, and those of tasks that other groups had."""
    groups = [group] if only_its_own else [group, *(other for other in range(before.groups) if other != group)]
    states = {other: [parts.of(rank, "optimizer") for rank in before.group_ranks(other)] for other in groups}
    owner: dict[str, int] = {}
    for other in groups:
        for name in {_name(key) for share in states[other] for key in share}:
            at_home = name.startswith("task") and int(name.removeprefix("task")) % before.groups == other
            if name not in owner and (name or other == group) or at_home and not only_its_own:
                owner[name] = other  # a task's home group knows it best
    return [
        {key: value for other in groups for key, value in states[other][rank].items() if owner.get(_name(key)) == other}
        for rank in range(before.data_ranks)
    ]


def _name(key: str) -> str:
    return key.split("/", 1)[0]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON gives it back: tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _tensor_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _loader_file(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
