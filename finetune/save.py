"""The fine-tuned potential as a checkpoint that says where it comes from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rung.data.fidelity import Fidelity
from rung.data.manifest import is_dataset, read_manifest
from rung.finetune.config import FROZEN_TRUNK, FinetuneConfig
from rung.finetune.dataset import TargetSet, digest
from rung.finetune.recipe import Outcome
from rung.model.checkpoint import DIGESTS, Checkpoint, save_checkpoint
from rung.model.config import to_mapping
from rung.model.hub import resolve
from rung.model.potential import Potential
from rung.model.uncertainty import Uncertainty


def save(
    folder: Path,
    config: FinetuneConfig,
    source: Checkpoint,
    target: TargetSet,
    tuned: Outcome,
    metrics: Mapping[str, Any],
) -> Path:
    """Write the checkpoint: the source's fidelities and the new one, with the digests of all that it was made from."""
    names = [*target.sources, *(task.rpartition(":")[0] for task in config.also)]
    fidelities = [config.fidelity] * len(target.sources) + [task.rpartition(":")[2] for task in config.also]
    data = [
        describe_source(name, fidelity, target.sources.get(name) or digest(name))
        for name, fidelity in zip(names, fidelities, strict=True)
    ]
    described = {config.fidelity: describe(config)}
    described |= {name: describe_data(data, name) for data, _, name in (task.rpartition(":") for task in config.also)}
    return save_checkpoint(
        folder,
        as_published(tuned.potential, source.potential),
        fidelities=source.fidelities | described,
        training_config={
            "finetune": to_mapping(config),
            "source": {
                "checkpoint": config.checkpoint,
                "sha256": checkpoint_digest(config.checkpoint),
                "training": source.info["training"],
            },
        },
        datasets=[*source.info["datasets"], *data],
        evaluation={config.fidelity: metrics["target"]["after"]}
        | {row["fidelity"]: row["after"] for row in metrics["forgetting"]},
        uncertainty=uncertainties(config, source, tuned),
    )


def as_published(tuned: Potential, source: Potential) -> Potential:
    """Return the potential where the old fidelities know only the elements that they were trained on."""
    potential = copy.deepcopy(tuned)
    new = [i for i, number in enumerate(potential.config.elements) if number not in source.config.elements]
    for fidelity in source.config.fidelities:
        potential.e0_FZ[potential.fidelity_row(fidelity), new] = math.nan
    return potential


def uncertainties(config: FinetuneConfig, source: Checkpoint, tuned: Outcome) -> dict[str, Uncertainty]:
    """Return the new uncertainty, and the source's where nothing that they rest on has changed."""
    same_elements = tuned.potential.config.elements == source.potential.config.elements
    kept = dict(source.uncertainty) if config.strategy in FROZEN_TRUNK and same_elements else {}
    return kept | ({config.fidelity: tuned.uncertainty} if tuned.uncertainty is not None else {})


def describe(config: FinetuneConfig) -> Fidelity:
    """Return what is known about the new fidelity: the dataset's own descriptor, or the words of the configuration."""
    described = describe_data(config.data, config.fidelity)
    if is_dataset(config.data):
        return described
    return dataclasses.replace(described, method=config.method, basis=config.basis, code=config.code)


def describe_data(data: str, fidelity: str) -> Fidelity:
    """Return a dataset's descriptor of a fidelity; of a file only where the labels come from."""
    if is_dataset(data):
        return read_manifest(data).entry(fidelity).descriptor
    return Fidelity(fidelity, "", description=f"labels of {Path(data).name}")


def describe_source(name: str, fidelity: str, sha256: str) -> dict[str, str]:
    """Return what the checkpoint says of a file or a dataset that it was fine-tuned on."""
    known = {"name": name}
    if is_dataset(name):
        manifest = read_manifest(name)
        known = {"name": manifest.name, "version": manifest.version, "licence": manifest.licence}
    return {**known, "fidelity": fidelity, "sha256": sha256}


def checkpoint_digest(name: str) -> str:
    """Return the SHA-256 of a checkpoint's list of digests (a folder) or of the file (a tar)."""
    path = resolve(name)
    return hashlib.sha256((path / DIGESTS if path.is_dir() else path).read_bytes()).hexdigest()
