"""The published form of a potential: a folder, or a tar of it, that anyone can open safely (DESIGN.md section 10).

    model.safetensors        the served weights (the moving average, where training kept one), E0s and scale
    raw.safetensors          optional: the weights before averaging
    uncertainty.safetensors  optional: what the error bars of some fidelities need (uncertainty.py)
    rung.yaml                format version, model config, fidelities with E0s, datasets, training config, versions
    evaluation.json          errors on held-out structures
    reference.json           optional: energies and forces of some structures, for who wants to check (publish.py)
    README.md                model card
    SHA256SUMS               digests of all of the above, verified on load

Loading reads bytes, JSON-like YAML and safetensors: it executes nothing from the file. A fidelity's E0s in rung.yaml
are there for people; the model's are the buffer in the weights, where NaN marks an element without training data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rung.data.fidelity import Fidelity, unknown_fidelity
from rung.model import uncertainty as uncertainties
from rung.model.card import model_card
from rung.model.checkpoint_files import (
    CARD,
    DIGESTS,
    EVALUATION,
    INFO,
    RAW_WEIGHTS,
    REFERENCE,
    UNCERTAINTY,
    WEIGHTS,
    check_replaceable,
    pack_files,
    read_files,
    write_files,
)
from rung.model.config import ModelConfig, config_from_mapping, to_mapping
from rung.model.hub import resolve
from rung.model.potential import Potential
from rung.model.provenance import git_commit, package_versions
from rung.model.uncertainty import Uncertainty

__all__ = ["DIGESTS", "FORMAT_VERSION", "Checkpoint", "load_checkpoint", "pack_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Stored:
    """What the files hold, before a model is built from it: what an upgrade of an old format works on."""

    info: dict[str, Any]  # rung.yaml
    weights: dict[str, Tensor]
    raw_weights: dict[str, Tensor] | None
    uncertainty: dict[str, Tensor] = field(default_factory=dict)


def _add_uncertainty(old: Stored) -> Stored:
    """Version 2 says at which fidelities it has error bars; version 1 had none."""
    return dataclasses.replace(old, info=old.info | {"format_version": 2, "uncertainty": {}})


# From each old format version to the next.
UPGRADES: dict[int, Callable[[Stored], Stored]] = {1: _add_uncertainty}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded potential, in evaluation mode on the CPU, with everything its files say about it."""

    potential: Potential
    info: dict[str, Any]  # rung.yaml, in the current format
    evaluation: dict[str, Any]  # evaluation.json
    raw_state: Mapping[str, Tensor] | None  # state_dict before averaging
    uncertainty: Mapping[str, Uncertainty] = field(default_factory=dict)  # by fidelity, where there is one
    reference: dict[str, Any] | None = None  # reference.json

    @property
    def fidelities(self) -> dict[str, Fidelity]:
        """The levels of theory by name, in the model's order."""
        described = self.info["fidelities"]
        fields = [field.name for field in dataclasses.fields(Fidelity) if field.name != "name"]
        return {name: Fidelity(name, **{field: described[name][field] for field in fields}) for name in described}


def save_checkpoint(
    folder: Path | str,
    potential: Potential,
    *,
    fidelities: Mapping[str, Fidelity],
    training_config: Mapping[str, Any],
    datasets: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    raw_state: Mapping[str, Tensor] | None = None,
    uncertainty: Mapping[str, Uncertainty] | None = None,
    card: str | None = None,
) -> Path:
    """Write `potential` as a checkpoint folder and return it; an older checkpoint of that name is replaced.

    fidelities describes each of the model's levels; datasets says what it was trained on (name, version, licence,
    the manifest's SHA-256); training_config is the resolved config as plain values; raw_state is a state_dict before
    averaging; uncertainty gives error bars to some of the fidelities; without `card` a model card is written from the
    rest. The folder appears under its name only when it is complete.

    Raises:
        ValueError: a fidelity without description, error bars of an unknown one, or a value JSON cannot hold (NaN).
        FileExistsError: the folder exists, is not empty and is not a checkpoint.
    """
    info = {
        "format_version": FORMAT_VERSION,
        "model": to_mapping(potential.config),
        "fidelities": _describe_fidelities(potential, fidelities),
        "uncertainty": {},
        "datasets": [dict(dataset) for dataset in datasets],
        "training": dict(training_config),
        "git_commit": git_commit(),
        "versions": package_versions(),
    }
    return write_checkpoint(folder, Checkpoint(potential, info, dict(evaluation), raw_state, uncertainty or {}), card)


def write_checkpoint(folder: Path | str, checkpoint: Checkpoint, card: str | None = None) -> Path:
    """Write a checkpoint as it stands, with the versions and the commit of who made it, and return the folder.

    Raises what `save_checkpoint` does.
    """
    folder = Path(folder)
    check_replaceable(folder)
    for name in checkpoint.uncertainty:
        if name not in checkpoint.potential.config.fidelities:
            raise unknown_fidelity(name, checkpoint.potential.config.fidelities)
    entries, tensors = uncertainties.encode(checkpoint.uncertainty)
    info = checkpoint.info | {"uncertainty": entries}
    files = {
        WEIGHTS: _tensor_bytes(checkpoint.potential.state_dict()),
        INFO: yaml.safe_dump(info, sort_keys=False, allow_unicode=True).encode(),
        EVALUATION: _json_bytes(checkpoint.evaluation),
        CARD: (model_card(info, checkpoint.evaluation) if card is None else card).encode(),
    }
    if checkpoint.raw_state is not None:
        files[RAW_WEIGHTS] = _tensor_bytes(checkpoint.raw_state)
    if tensors:
        files[UNCERTAINTY] = _tensor_bytes(tensors)
    if checkpoint.reference is not None:
        files[REFERENCE] = _json_bytes(checkpoint.reference)
    write_files(folder, files)
    return folder


def pack_checkpoint(folder: Path | str) -> Path:
    """Write the tar of a checkpoint folder beside it, as `<folder>.tar`, and return its path.

    The bytes depend on the files alone: no times, no owners.
    """
    return pack_files(Path(folder))


def load_checkpoint(name: Path | str) -> Checkpoint:
    """Read a checkpoint: a folder, its tar, or `user/repository[@revision]` on a hub; every digest is verified first.

    What is not a local path and looks like a repository is looked for in the cache and on the hub (`hub.resolve`).

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the hub cannot be reached.
        ValueError: a missing, damaged or truncated file, a format of a newer Rung, or weights that do not fit the
            model config; the message names the file.
    """
    path = resolve(name)
    files = read_files(path)
    stored = Stored(
        info=_info(files[INFO], path / INFO),
        weights=_tensors(files[WEIGHTS], path / WEIGHTS),
        raw_weights=_tensors(files[RAW_WEIGHTS], path / RAW_WEIGHTS) if RAW_WEIGHTS in files else None,
        uncertainty=_tensors(files[UNCERTAINTY], path / UNCERTAINTY) if UNCERTAINTY in files else {},
    )
    stored = _upgrade(stored, path)
    for key in ("model", "fidelities", "uncertainty", "datasets", "training"):
        if key not in stored.info:
            raise ValueError(f"{path / INFO}: key '{key}' is missing")
    try:
        uncertainty = uncertainties.decode(stored.info["uncertainty"], stored.uncertainty)
    except ValueError as error:
        raise ValueError(f"{path / UNCERTAINTY}: {error}") from error
    evaluation = _json(files[EVALUATION], path / EVALUATION)
    reference = _json(files[REFERENCE], path / REFERENCE) if REFERENCE in files else None
    return Checkpoint(_potential(stored, path), stored.info, evaluation, stored.raw_weights, uncertainty, reference)


def _potential(stored: Stored, path: Path) -> Potential:
    potential = Potential(config_from_mapping(ModelConfig, stored.info["model"], str(path / INFO)))
    name, parameter = next(potential.named_parameters())
    potential.to(stored.weights.get(name, parameter).dtype)
    try:
        potential.load_state_dict(stored.weights)
    except RuntimeError as error:
        raise ValueError(f"{path / WEIGHTS}: the weights do not fit the model config in {INFO}: {error}") from error
    return potential.eval()


def _json(data: bytes, source: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a mapping of names to values, found {type(value).__name__}")
    return value


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _info(data: bytes, source: Path) -> dict[str, Any]:
    try:
        info = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{source}: expected a mapping of names to values, found {type(info).__name__}")
    return info


def _upgrade(stored: Stored, path: Path) -> Stored:
    version = stored.info.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path / INFO}: format_version: expected a whole number >= 1, found {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path / INFO}: format_version {version} is newer than this Rung reads ({FORMAT_VERSION}); update Rung"
        )
    for old in range(version, FORMAT_VERSION):
        stored = UPGRADES[old](stored)
    return stored


def _describe_fidelities(potential: Potential, fidelities: Mapping[str, Fidelity]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for row, name in enumerate(potential.config.fidelities):
        if name not in fidelities:
            known = ", ".join(fidelities) or "none"
            raise ValueError(f"fidelity '{name}' of the model has no description; given: {known}")
        entry = dataclasses.asdict(fidelities[name])
        del entry["name"]
        e0 = zip(potential.config.elements, potential.e0_FZ[row].tolist(), strict=True)
        entry["e0"] = {number: value for number, value in e0 if value == value}  # NaN: not trained there
        described[name] = entry
    return described


def _tensor_bytes(state: Mapping[str, Tensor]) -> bytes:
    # Copies: safetensors refuses tensors that share memory, as the members of an ensemble may.
    return safetensors.torch.save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()})


def _tensors(data: bytes, source: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{source}: not a whole safetensors file: {error}") from error
