"""The manifest `dataset.yaml`: what a dataset is, where it comes from, its labels and the digest of every shard."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rung.data.fidelity import Fidelity, unknown_fidelity
from rung.data.shard import ShardInfo, write_beside

MANIFEST_FILE = "dataset.yaml"
MANIFEST_FORMAT = 1
BUILTIN = "builtin"

T = TypeVar("T")


@dataclass(frozen=True)
class FidelityEntry:
    """What a dataset holds at one fidelity.

    Statistics ignore missing labels. They, and a fitted E0, are taken on `statistics_split`: "train", or "all" for a
    dataset without labels in train.
    """

    descriptor: Fidelity
    num_energies: dict[str, int]  # split -> structures with an energy
    num_forces: dict[str, int]  # split -> structures with forces
    statistics_split: Literal["train", "all"]
    e0: dict[int, float] = dataclasses.field(default_factory=dict)  # atomic number -> eV; empty without energies
    e0_source: Literal["isolated_atoms", "least_squares", "none"] = "none"
    e0_residual: float | None = None  # eV/atom, RMS of what the E0s leave
    e0_fit: dict[int, float] = dataclasses.field(default_factory=dict)  # least squares over the compositions, eV
    e0_note: str = ""  # what the compositions leave undetermined in e0_fit
    energy_mean: float | None = None  # eV/atom, of E - sum E0
    energy_std: float | None = None  # eV/atom, of E - sum E0
    force_rms: float | None = None  # eV/angstrom, over Cartesian components
    force_max: float | None = None  # eV/angstrom, largest component


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.yaml`."""

    name: str
    version: str
    source: str  # URL, or how the labels were made
    doi: str
    licence: str
    citation: str
    description: str
    cutoff: float  # angstrom, at which the shards' edges are counted
    fidelities: dict[str, FidelityEntry]
    elements: dict[int, int]  # atomic number -> atoms
    splits: tuple[str, ...]
    shards: list[ShardInfo]

    def entry(self, fidelity: str) -> FidelityEntry:
        """Return what the dataset holds at `fidelity`; raise ValueError listing the known ones when that is nothing."""
        if fidelity not in self.fidelities:
            raise unknown_fidelity(fidelity, self.fidelities)
        return self.fidelities[fidelity]

    def shards_of(self, split: str) -> list[ShardInfo]:
        """Return the shards of one split in order; raise ValueError listing the known splits for another name."""
        if split not in self.splits:
            raise ValueError(f"dataset '{self.name}': unknown split '{split}'; known: {', '.join(self.splits)}")
        return [shard for shard in self.shards if shard.split == split]


def is_dataset(name_or_path: str | Path) -> bool:
    """Tell a dataset (its folder, its `dataset.yaml` or `builtin`) from a file of structures."""
    path = Path(name_or_path)
    return str(name_or_path) == BUILTIN or path.is_dir() or path.name == MANIFEST_FILE


def resolve_dataset(name_or_path: str | Path) -> Path:
    """Return the folder of a dataset given its folder, its `dataset.yaml` or the word `builtin`."""
    path = Path(str(resources.files("rung.data.builtin"))) if str(name_or_path) == BUILTIN else Path(name_or_path)
    folder = path.parent if path.name == MANIFEST_FILE else path
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(
            f"dataset '{name_or_path}': no {MANIFEST_FILE} in {folder}; "
            f"expected a folder made by 'rung data build', its {MANIFEST_FILE}, or the word '{BUILTIN}'"
        )
    return folder


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `folder/dataset.yaml`, moved into place when complete."""
    document = {"format": MANIFEST_FORMAT, **dataclasses.asdict(manifest), "splits": list(manifest.splits)}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    write_beside(folder / MANIFEST_FILE, text.encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a dataset (anything `resolve_dataset` takes); raise ValueError for one that is not whole."""
    path = resolve_dataset(folder) / MANIFEST_FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable YAML: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError(f"{path}: expected a mapping with 'format: {MANIFEST_FORMAT}', found none")
    if (version := document.pop("format")) != MANIFEST_FORMAT:
        raise ValueError(f"{path}: format {version}, this Rung reads {MANIFEST_FORMAT}; update Rung")
    fidelities = {}
    for name, entry in _mapping(document.get("fidelities", {}), f"{path}: fidelities").items():
        place = f"{path}: fidelities.{name}"
        entry = _mapping(entry, place)
        descriptor = _build(Fidelity, entry.get("descriptor", {}), f"{place}.descriptor")
        fidelities[name] = _build(FidelityEntry, {**entry, "descriptor": descriptor}, place)
    shards = [_build(ShardInfo, shard, f"{path}: shards[{i}]") for i, shard in enumerate(document.get("shards") or [])]
    splits = tuple(document.get("splits") or ())
    return _build(Manifest, {**document, "fidelities": fidelities, "shards": shards, "splits": splits}, str(path))


def _mapping(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: expected a mapping of names to values, found {value!r}")
    return value


def _build(cls: type[T], values: Any, source: str) -> T:
    """Make a dataclass of a mapping; unknown and missing keys are errors naming the key."""
    values = _mapping(values, source)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; known: {', '.join(fields)}"
            raise ValueError(f"{source}: unknown key '{key}'{hint}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{source}: key '{name}' is missing")
    return cls(**values)
