"""The fine-tuned potential as a checkpoint that says where it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rung.data.fidelity import Fidelity
from rung.data.manifest import is_dataset, read_manifest
from rung.finetune.config import FinetuneConfig
from rung.finetune.dataset import TargetSet
from rung.model.checkpoint import DIGESTS, Checkpoint, save_checkpoint
from rung.model.config import to_mapping
from rung.model.potential import Potential


def save(
    folder: Path,
    config: FinetuneConfig,
    source: Checkpoint,
    target: TargetSet,
    potential: Potential,
    metrics: Mapping[str, Any],
) -> Path:
    """Write the checkpoint: the source's fidelities and the new one, with the digests of all that it was made from."""
    data = [{"name": name, "fidelity": config.fidelity, "sha256": digest} for name, digest in target.sources.items()]
    return save_checkpoint(
        folder,
        potential,
        fidelities=source.fidelities | {config.fidelity: describe(config)},
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
    )


def describe(config: FinetuneConfig) -> Fidelity:
    """Return what is known about the new fidelity: the dataset's own descriptor, or the words of the configuration."""
    if is_dataset(config.data):
        return read_manifest(config.data).entry(config.fidelity).descriptor
    origin = f"labels of {Path(config.data).name}"
    return Fidelity(config.fidelity, config.method, basis=config.basis, code=config.code, description=origin)


def checkpoint_digest(name: str) -> str:
    """Return the SHA-256 of a checkpoint's list of digests (a folder) or of the file (a tar)."""
    path = Path(name)
    return hashlib.sha256((path / DIGESTS if path.is_dir() else path).read_bytes()).hexdigest()
