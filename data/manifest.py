"""The manifest `dataset.yaml`: what a dataset is, where it comes from, its labels and the digest of every shard."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rung.data.fidelity import Fidelity, check_name, unknown_fidelity
from rung.data.shard import ShardInfo, write_beside
from rung.data.structure import MAX_ATOMIC_NUMBER

MANIFEST_FILE = "dataset.yaml"
MANIFEST_FORMAT = 1
BUILTIN = "builtin"
MAX_MANIFEST_BYTES = 200_000_000

_MAX_DEPTH = 16  # of nested lists and mappings; a manifest has 5
_MAX_NODES = 10_000_000
_MAX_NUMBER = 64  # characters
_WHOLE_LIMIT = 2**63
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal would obey, UTF-8 cannot write
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without libyaml
_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_SCALARS = {
    "tag:yaml.org,2002:null": _CONSTRUCTOR.construct_yaml_null,
    "tag:yaml.org,2002:bool": _CONSTRUCTOR.construct_yaml_bool,
    "tag:yaml.org,2002:int": _CONSTRUCTOR.construct_yaml_int,
    "tag:yaml.org,2002:float": _CONSTRUCTOR.construct_yaml_float,
}

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
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)  # what was wrong -> structures left out

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
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is ten times faster
    text = yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    write_beside(folder / MANIFEST_FILE, text.encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a dataset (anything `resolve_dataset` takes).

    Raises ValueError, naming the file and the place in it, for one that is not whole, has a value of another type than
    the fields of Manifest, or contradicts itself: manifests come from anywhere.
    """
    path = resolve_dataset(folder) / MANIFEST_FILE
    status = path.stat()
    if status.st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, found {status.st_size}")
    return _read(path.absolute(), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _read(path: Path, mtime_ns: int, size: int) -> Manifest:
    """Read a manifest once for each state of its file: every task, and every worker that is forked, asks for it."""
    document = _parse(_text(path), str(path))
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError(f"{path}: expected a mapping with 'format: {MANIFEST_FORMAT}', found none")
    version = document.pop("format")
    if type(version) is not int or version != MANIFEST_FORMAT:
        raise ValueError(f"{path}: format {reprlib.repr(version)}, this Rung reads {MANIFEST_FORMAT}; update Rung")
    manifest = _build(Manifest, document, str(path))
    try:
        _check_consistent(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}); fetch or build it again") from None


def _parse(text: str, source: str) -> Any:
    """Return the content of a YAML text of plain lists, mappings and scalars; raise ValueError for anything more.

    PyYAML's own loaders follow aliases, which can stand for more than fits in memory, recurse as deep as the text does,
    and keep the last of equal keys.
    """
    frames: list[list[Any]] = [[]]
    num_nodes = 0
    event: yaml.Event | None = None
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.NodeEvent):
                num_nodes += 1
                _check_plain(event, len(frames), num_nodes)
                if isinstance(event, yaml.ScalarEvent):
                    frames[-1].append(_scalar(event))
                else:
                    frames.append([])
            elif isinstance(event, yaml.CollectionEndEvent):
                items = frames.pop()
                frames[-1].append(_pairs(items) if isinstance(event, yaml.MappingEndEvent) else items)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not readable YAML: {error}") from None
    except ValueError as error:
        line = f"line {event.start_mark.line + 1}" if event and event.start_mark else "beginning"
        raise ValueError(f"{source}: {line}: {error}") from None
    if len(frames[0]) > 1:
        raise ValueError(f"{source}: expected one YAML document, found {len(frames[0])}")
    return frames[0][0] if frames[0] else None


def _check_plain(event: yaml.NodeEvent, depth: int, num_nodes: int) -> None:
    fault = ""
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        fault = "an anchor or alias"
    elif (tag := getattr(event, "tag", None)) is not None:
        fault = f"the tag {reprlib.repr(tag)}"
    elif depth > _MAX_DEPTH:
        fault = f"more than {_MAX_DEPTH} levels of lists and mappings"
    elif num_nodes > _MAX_NODES:
        fault = f"more than {_MAX_NODES} values"
    if fault:
        raise ValueError(f"expected plain values, found {fault}")


def _scalar(event: yaml.ScalarEvent) -> Any:
    value: str = event.value
    if not event.implicit[0]:  # in quotes
        return value
    if value.isascii() and value.isdigit() and value[0] != "0" and len(value) <= _MAX_NUMBER:
        return int(value)
    tag = _RESOLVER.resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
    if (convert := _SCALARS.get(tag)) is None:  # a text, or a date, which no field is
        return value
    try:
        if len(value) > _MAX_NUMBER:
            raise ValueError(value)
        return convert(yaml.ScalarNode(tag, value))
    except ValueError:
        fault = f"expected a number of at most {_MAX_NUMBER} characters, found {reprlib.repr(value)}"
        raise ValueError(fault) from None


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Return the mapping of a list of keys and values in turn; raise ValueError for a key that is there twice."""
    keys = items[::2]
    if any(isinstance(key, list | dict) for key in keys):
        raise ValueError("mapping that ends here: expected names as keys, found a list or a mapping")
    pairs = dict(zip(keys, items[1::2], strict=True))
    if len(pairs) != len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(f"mapping that ends here: key {reprlib.repr(twice)} is there twice")
    return pairs


def _check_consistent(manifest: Manifest) -> None:
    """Raise ValueError for what the types of the fields do not exclude."""
    for name in (manifest.name, *manifest.splits):
        check_name(name)
    _check_distinct("splits", manifest.splits)
    _check_distinct("shards", (shard.file for shard in manifest.shards))
    if manifest.cutoff <= 0:
        raise ValueError(f"cutoff: expected a distance in angstrom, found {manifest.cutoff}")
    _check_elements("elements", manifest.elements)
    for name, entry in manifest.fidelities.items():
        if entry.descriptor.name != name:
            raise ValueError(f"fidelities.{name}: described under another name, '{entry.descriptor.name}'")
        _check_elements(f"fidelities.{name}.e0", entry.e0)
        _check_elements(f"fidelities.{name}.e0_fit", entry.e0_fit)
    for shard in manifest.shards:
        _check_shard(shard, manifest)


def _check_shard(shard: ShardInfo, manifest: Manifest) -> None:
    if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"{shard.file}: sha256: expected 64 hexadecimal digits, found {reprlib.repr(shard.sha256)}")
    for fidelity, counts in shard.labels.items():
        manifest.entry(fidelity)
        if len(counts) != shard.packs:
            found = f"one for each of {shard.packs} packs, found {len(counts)}"
            raise ValueError(f"{shard.file}: labels.{fidelity}: expected counts, {found}")


def _check_distinct(what: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{what}: expected distinct names, found '{name}' {count} times")


def _check_elements(what: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        if not 1 <= number <= MAX_ATOMIC_NUMBER:
            raise ValueError(f"{what}: expected atomic numbers 1..{MAX_ATOMIC_NUMBER}, found {number}")


def _build(cls: type[T], values: Any, *place: str | int) -> T:
    """Make a dataclass of a mapping, each value held to the annotation of its field.

    `place` says where in the file it is. Raises ValueError for unknown and missing keys as well.
    """
    if not isinstance(values, dict):
        raise _misfit("a mapping", values, place)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _hints(cls)  # type: ignore[arg-type]
    typed = {name: _typed(hints[name], value, *place, name) for name, value in values.items() if name in fields}
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key)[:_MAX_NUMBER], fields, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; known: {', '.join(fields)}"
            raise ValueError(f"{_written(place)}: unknown key {reprlib.repr(key)}{hint}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{_written(place)}: key '{name}' is missing")
    try:
        return cls(**typed)
    except ValueError as error:  # of its __post_init__
        raise ValueError(f"{_written(place)}: {error}") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _typed(hint: Any, value: Any, *place: str | int) -> Any:
    """Return the value as an annotation wants it; raise ValueError naming the place when it is of another type."""
    if hint is int:
        if type(value) is not int or not 0 <= value < _WHOLE_LIMIT:
            raise _misfit("a whole number from 0 to 2^63 - 1", value, place)
        return value
    if hint is str:
        if not isinstance(value, str) or _CONTROL.search(value):
            raise _misfit("text without control characters (numbers in quotes)", value, place)
        return value
    if hint is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _misfit("a finite number", value, place)
        return float(value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, *place)  # type: ignore[arg-type]
    return _typed_generic(get_origin(hint), get_args(hint), value, *place)


def _typed_generic(origin: Any, arguments: tuple[Any, ...], value: Any, *place: str | int) -> Any:
    if origin is Literal:
        if value not in arguments:
            raise _misfit(f"one of {', '.join(arguments)}", value, place)
        return value
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _typed(arguments[0], value, *place)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _misfit("a list", value, place)
        return origin(_typed(arguments[0], item, *place, index) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _misfit("a mapping", value, place)
        of_key, of_value = arguments
        return {
            _typed(of_key, key, *place, "keys"): _typed(of_value, item, *place, str(key)) for key, item in value.items()
        }
    raise TypeError(f"{_written(place)}: no check for a field of type {origin}")


def _misfit(expected: str, found: Any, place: tuple[str | int, ...]) -> ValueError:
    return ValueError(f"{_written(place)}: expected {expected}, found {reprlib.repr(found)}")


def _written(place: tuple[str | int, ...]) -> str:
    """Return "dataset.yaml: shards[3].bytes" of ("dataset.yaml", "shards", 3, "bytes")."""
    source, *steps = place
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return f"{source}: {path[1:]}" if path else str(source)
