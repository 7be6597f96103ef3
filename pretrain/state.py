"""Training state: everything a stopped run needs to go on as if it had never stopped, on the same number of ranks.

    <output>/state/latest                  name of the newest whole state; moved last
    <output>/state/step_000000123/
        state.json                         version, world, step, updates of the average, skipped steps, config, datasets
        model.safetensors                  weights; ema.safetensors: their averages
        rank_0000.json                     every loader's position on that rank
        optimizer_0000.pt                  optimizer state: one file, or with ZeRO one partition per rank
        rng_0000.safetensors               torch's random generator
        SHA256SUMS

A folder is written beside and moved when it is whole. The optimizer's file is torch's own format, read with
weights_only=True, which executes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rung.data.loader import BatchLoader
from rung.data.shard import file_sha256
from rung.pretrain.ema import Ema
from rung.pretrain.engine import Engine

STATE_VERSION = 1
DIGESTS = "SHA256SUMS"
# Config fields that may change between a stop and a resume: none of them changes what is computed.
FREE_FIELDS = ("log_every", "save_every", "keep_states", "stop_at", "timeout_minutes", "evaluation", "output")


@dataclass
class TrainingState:
    """The live objects that a state is taken from and put back into."""

    engine: Engine
    ema: Ema
    loaders: Sequence[BatchLoader]
    config: Mapping[str, Any]  # the resolved config and the datasets' digests, plain values
    step: int = 0
    skipped: int = 0


def save_state(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write the state of every rank into `folder` and return its place; all ranks call it. The `keep` newest stay."""
    ranks = state.engine.ranks
    name = f"step_{state.step:09d}"
    partial, final = folder / f".{name}.partial", folder / name
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    _write_rank(partial, state)
    ranks.barrier()
    if ranks.rank == 0:
        _write_common(partial, state)
        sums = "".join(f"{file_sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir()))
        (partial / DIGESTS).write_text(sums)
        shutil.rmtree(final, ignore_errors=True)  # the same step, left by a run that this one repeats
        partial.rename(final)
        pointer = folder / ".latest.partial"
        pointer.write_text(name + "\n")
        os.replace(pointer, folder / "latest")
        for old in sorted(folder.glob("step_*"))[:-keep]:
            if old != final:  # later states may be there when a run was sent back to an earlier one
                shutil.rmtree(old)
    ranks.barrier()
    return final


def load_state(folder: Path, state: TrainingState) -> Path:
    """Put the newest state under `folder` back and return its place; all ranks call it.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: it is damaged, or was saved by another world size, config or version.
    """
    source = _latest(folder)
    _verify(source)
    saved = json.loads((source / "state.json").read_text())
    ranks = state.engine.ranks
    _check_fits(source, saved, ranks.world, state.config)
    weights, averages = load_file(source / "model.safetensors"), load_file(source / "ema.safetensors")
    names = [name for name, _ in state.ema.module.named_parameters()]
    state.engine.write_parameters([weights[name] for name in names])
    state.ema.load(averages, saved["ema_updates"])
    optimizer_file = source / f"optimizer_{state.engine.optimizer_part:04d}.pt"
    state.engine.load_optimizer_state(torch.load(optimizer_file, map_location=ranks.device, weights_only=True))
    for loader, position in zip(state.loaders, json.loads(_rank_file(source, ranks.rank).read_text()), strict=True):
        loader.load_state(position)
    torch.set_rng_state(load_file(source / f"rng_{ranks.rank:04d}.safetensors")["torch"])
    state.step, state.skipped = saved["step"], saved["skipped"]
    return source


def _write_rank(partial: Path, state: TrainingState) -> None:
    rank = state.engine.ranks.rank
    _rank_file(partial, rank).write_text(json.dumps([loader.state() for loader in state.loaders]))
    save_file({"torch": torch.get_rng_state()}, partial / f"rng_{rank:04d}.safetensors")
    if state.engine.optimizer_part == rank:
        torch.save(state.engine.optimizer_state(), partial / f"optimizer_{rank:04d}.pt")


def _write_common(partial: Path, state: TrainingState) -> None:
    weights = {name: parameter.detach() for name, parameter in state.ema.module.named_parameters()}
    save_file(_contiguous(weights), partial / "model.safetensors")
    save_file(_contiguous(state.ema.averages), partial / "ema.safetensors")
    document = {
        "version": STATE_VERSION,
        "world": state.engine.ranks.world,
        "step": state.step,
        "ema_updates": state.ema.updates,
        "skipped": state.skipped,
        "config": dict(state.config),
    }
    (partial / "state.json").write_text(json.dumps(document, indent=2))


def _check_fits(source: Path, saved: Mapping[str, Any], world: int, config: Mapping[str, Any]) -> None:
    if saved["version"] != STATE_VERSION:
        raise ValueError(
            f"state {source}: version {saved['version']}, this Rung reads {STATE_VERSION}; start a new run"
        )
    if saved["world"] != world:
        raise ValueError(
            f"state {source}: saved by {saved['world']} rank(s), found {world}; "
            "resume with the same number of ranks, so that the streams go on where they stood"
        )
    present = json.loads(json.dumps(config))  # tuples as lists, like the saved one
    changed = [
        f"{key}: {saved['config'].get(key)} -> {present.get(key)}"
        for key in sorted({*saved["config"], *present} - set(FREE_FIELDS))
        if saved["config"].get(key) != present.get(key)
    ]
    if changed:
        raise ValueError(f"state {source}: the config or a dataset has changed: {'; '.join(changed)}; start a new run")


def _latest(folder: Path) -> Path:
    pointer = folder / "latest"
    if not pointer.is_file():
        raise FileNotFoundError(f"--resume: no state in {folder}; start without --resume")
    source = folder / pointer.read_text().strip()
    if not source.is_dir():
        raise FileNotFoundError(f"--resume: {pointer} names {source.name}, which does not exist")
    return source


def _verify(source: Path) -> None:
    for line in (source / DIGESTS).read_text().splitlines():
        digest, name = line.split("  ", 1)
        if not (source / name).is_file():
            raise ValueError(
                f"state {source}: {name} is missing; put another state's name into 'latest' to resume from it"
            )
        if file_sha256(source / name) != digest:
            raise ValueError(
                f"state {source}: {name} is damaged (its SHA-256 is not the one in {DIGESTS}); "
                "put another state's name into 'latest' to resume from it"
            )


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:04d}.json"


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
