"""The published form of a potential: a folder, or a tar of it, that anyone can open safely (DESIGN.md section 10).

    model.safetensors   the served weights (the moving average, where training kept one), E0s and scale
    raw.safetensors     optional: the weights before averaging
    rung.yaml           format version, model config, fidelities with E0s, datasets, training config, versions
    evaluation.json     errors on held-out structures
    README.md           model card
    SHA256SUMS          digests of all of the above, verified on load

Loading reads bytes, JSON-like YAML and safetensors: it executes nothing from the file. A fidelity's E0s in rung.yaml
are there for people; the model's are the buffer in the weights, where NaN marks an element without training data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from rung.data.fidelity import Fidelity
from rung.data.shard import tar_bytes, write_beside
from rung.model.card import model_card
from rung.model.config import ModelConfig, config_from_mapping, to_mapping
from rung.model.potential import Potential
from rung.model.provenance import git_commit, package_versions

FORMAT_VERSION = 1
WEIGHTS, RAW_WEIGHTS, INFO, EVALUATION, CARD = (
    "model.safetensors",
    "raw.safetensors",
    "rung.yaml",
    "evaluation.json",
    "README.md",
)
DIGESTS = "SHA256SUMS"
REQUIRED = (WEIGHTS, INFO, EVALUATION, CARD)


@dataclass(frozen=True)
class Stored:
    """What the files hold, before a model is built from it: what an upgrade of an old format works on."""

    info: dict[str, Any]  # rung.yaml
    weights: dict[str, Tensor]
    raw_weights: dict[str, Tensor] | None


# From each old format version to the next: UPGRADES[1] would turn version 1 into version 2.
UPGRADES: dict[int, Callable[[Stored], Stored]] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded potential, in evaluation mode on the CPU, with everything its files say about it."""

    potential: Potential
    info: dict[str, Any]  # rung.yaml, in the current format
    evaluation: dict[str, Any]  # evaluation.json
    raw_state: dict[str, Tensor] | None  # state_dict before averaging

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
    card: str | None = None,
) -> Path:
    """Write `potential` as a checkpoint folder and return it; an older checkpoint of that name is replaced.

    fidelities describes each of the model's levels; datasets says what it was trained on (name, version, licence,
    the manifest's SHA-256); training_config is the resolved config as plain values; raw_state is a state_dict before
    averaging; without `card` a model card is written from the rest.
    The folder appears under its name only when it is complete.

    Raises:
        ValueError: a fidelity without description, or a value that JSON cannot hold (NaN).
        FileExistsError: the folder exists, is not empty and is not a checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / INFO).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a checkpoint: choose another folder or remove it")
    info = {
        "format_version": FORMAT_VERSION,
        "model": to_mapping(potential.config),
        "fidelities": _describe_fidelities(potential, fidelities),
        "datasets": [dict(dataset) for dataset in datasets],
        "training": dict(training_config),
        "git_commit": git_commit(),
        "versions": package_versions(),
    }
    files = {
        WEIGHTS: _tensor_bytes(potential.state_dict()),
        INFO: yaml.safe_dump(info, sort_keys=False, allow_unicode=True).encode(),
        EVALUATION: (json.dumps(evaluation, indent=2, sort_keys=True, allow_nan=False) + "\n").encode(),
        CARD: (model_card(info, evaluation) if card is None else card).encode(),
    }
    if raw_state is not None:
        files[RAW_WEIGHTS] = _tensor_bytes(raw_state)
    files[DIGESTS] = "".join(f"{_sha256(data)}  {name}\n" for name, data in sorted(files.items())).encode()
    _write_folder(folder, files)
    return folder


def pack_checkpoint(folder: Path | str) -> Path:
    """Write the tar of a checkpoint folder beside it, as `<folder>.tar`, and return its path.

    The bytes depend on the files alone: no times, no owners.
    """
    folder = Path(folder)
    files = _read_files(folder)
    _verify(files, folder)
    target = folder.with_name(folder.name + ".tar")
    write_beside(target, tar_bytes((f"{folder.name}/{name}", data) for name, data in sorted(files.items())))
    return target


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder or its tar; every digest is verified first.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a missing, damaged or truncated file, a format of a newer Rung, or weights that do not fit the
            model config; the message names the file.
    """
    path = Path(path)
    files = _read_files(path)
    _verify(files, path)
    stored = Stored(
        info=_info(files[INFO], path / INFO),
        weights=_tensors(files[WEIGHTS], path / WEIGHTS),
        raw_weights=_tensors(files[RAW_WEIGHTS], path / RAW_WEIGHTS) if RAW_WEIGHTS in files else None,
    )
    stored = _upgrade(stored, path)
    for key in ("model", "fidelities", "datasets", "training"):
        if key not in stored.info:
            raise ValueError(f"{path / INFO}: key '{key}' is missing")
    config = config_from_mapping(ModelConfig, stored.info["model"], str(path / INFO))
    potential = Potential(config)
    name, parameter = next(potential.named_parameters())
    potential.to(stored.weights.get(name, parameter).dtype)
    try:
        potential.load_state_dict(stored.weights)
    except RuntimeError as error:
        raise ValueError(f"{path / WEIGHTS}: the weights do not fit the model config in {INFO}: {error}") from error
    try:
        evaluation = json.loads(files[EVALUATION])
    except ValueError as error:
        raise ValueError(f"{path / EVALUATION}: not valid JSON: {error}") from error
    return Checkpoint(potential.eval(), stored.info, evaluation, stored.raw_weights)


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


def _read_files(path: Path) -> dict[str, bytes]:
    """Return the checkpoint's files by name; files that are none of ours are left alone."""
    ours = (*REQUIRED, RAW_WEIGHTS, DIGESTS)
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in ours if (path / name).is_file()}
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: expected a checkpoint folder or a .tar of one")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None and Path(member.name).name in ours:
                    files[Path(member.name).name] = content.read()
    except tarfile.TarError as error:
        raise ValueError(f"checkpoint {path}: not a whole tar file: {error}; copy it again") from error
    return files


def _verify(files: Mapping[str, bytes], path: Path) -> None:
    if DIGESTS not in files:
        raise ValueError(f"checkpoint {path}: expected a file {DIGESTS}, found none; is this a Rung checkpoint?")
    try:
        expected = {name: digest for digest, name in map(str.split, files[DIGESTS].decode().splitlines())}
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {DIGESTS}: expected lines of '<digest>  <file>'") from error
    for name in sorted({*REQUIRED, *expected}):
        if name not in files:
            raise ValueError(f"checkpoint {path}: {name} is missing; copy the checkpoint again")
    for name, data in files.items():
        if name == DIGESTS:
            continue
        if name not in expected:
            raise ValueError(
                f"checkpoint {path}: {name} has no digest in {DIGESTS}, so it was not part of what was saved"
            )
        if _sha256(data) != expected[name]:
            raise ValueError(
                f"checkpoint {path}: {name}: expected SHA-256 {expected[name]}, found {_sha256(data)}: "
                "the file is damaged or was edited; copy the checkpoint again"
            )


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write beside, then move: whoever looks at `folder` sees a whole checkpoint or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{kind}.{os.getpid()}") for kind in ("partial", "old"))
    partial.mkdir()
    try:
        for name, data in files.items():
            write_beside(partial / name, data)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if old.exists():
        shutil.rmtree(old)


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
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _tensors(data: bytes, source: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{source}: not a whole safetensors file: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
