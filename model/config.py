"""The shape of a potential, and how every YAML file of ours becomes a frozen dataclass.

`read_config` serves pretrain and finetune too: the dataclass is the schema, the file holds the values, and
`key=value` words from the command line come last. OmegaConf merges and checks the types.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from rung.data.fidelity import check_name
from rung.data.structure import MAX_ATOMIC_NUMBER

Config = TypeVar("Config")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters' shapes and the arithmetic of a potential (DESIGN.md section 5).

    The four tuples are the rows of the model's embeddings, in order: an input outside them is an error.
    """

    elements: tuple[int, ...]  # atomic numbers, ascending
    fidelities: tuple[str, ...]  # levels of theory
    charges: tuple[int, ...] = (0,)  # elementary charges
    multiplicities: tuple[int, ...] = (1,)  # 2S + 1
    channels: int = 64
    num_layers: int = 2
    l_max: int = 3  # highest degree of the harmonics in a convolution
    l_hidden: int = 1  # 0: nodes carry scalars only; 1: scalars and vectors
    num_radial: int = 8  # radial functions per edge
    cutoff: float = 5.0  # angstrom
    conditioning: Literal["film", "heads"] = "film"
    fidelity_dim: int = 16  # length of a fidelity's learned vector (film)
    readout_hidden: int = 16
    average_neighbours: float = 10.0  # n of the n^-1/2 before each sum over neighbours
    seed: int = 0  # of the initial weights

    def __post_init__(self) -> None:
        _check_rows("elements", self.elements)
        if not all(1 <= number <= MAX_ATOMIC_NUMBER for number in self.elements):
            raise _bad("elements", f"atomic numbers 1..{MAX_ATOMIC_NUMBER}", self.elements)
        if list(self.elements) != sorted(self.elements):
            raise _bad("elements", "ascending atomic numbers", self.elements)
        _check_rows("fidelities", self.fidelities)
        for name in self.fidelities:
            check_name(name)
        _check_rows("charges", self.charges)
        _check_rows("multiplicities", self.multiplicities)
        if not all(-128 <= charge <= 127 for charge in self.charges):  # what a Structure may have
            raise _bad("charges", "-128..127 elementary charges", self.charges)
        if not all(1 <= multiplicity <= 255 for multiplicity in self.multiplicities):
            raise _bad("multiplicities", "2S + 1 in 1..255", self.multiplicities)
        sizes = ("channels", "num_layers", "num_radial", "fidelity_dim", "readout_hidden")
        for field in (*sizes, "cutoff", "average_neighbours"):
            if not (0 < getattr(self, field) < math.inf):
                raise _bad(field, "a positive number", getattr(self, field))
        if self.l_max not in (1, 2, 3):
            raise _bad("l_max", "1, 2 or 3", self.l_max)
        if self.l_hidden not in (0, 1):
            raise _bad("l_hidden", "0 or 1", self.l_hidden)
        if self.conditioning not in ("film", "heads"):
            raise _bad("conditioning", "film or heads", self.conditioning)


def _check_rows(field: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise _bad(field, "at least one entry", "none")
    if len(set(values)) != len(values):
        raise _bad(field, "distinct entries", values)


def _bad(field: str, expected: str, found: object) -> ValueError:
    return ValueError(f"model config: {field}: expected {expected}, found {found}")


def read_config(cls: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Build the frozen dataclass `cls` from a YAML file and `key=value` words; later ones win.

    Nested keys are dotted (`model.channels=32`). Fields may be dataclasses, `list[SomeDataclass]`, tuples of plain
    values, dictionaries, literals and paths; a mapping merges into a field's default mapping, a sequence replaces it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key (the nearest known one is named), a wrong type or a missing value.
    """
    layers: list[tuple[str, DictConfig]] = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override '{override}': expected key=value, for example model.channels=32")
        try:
            layers.append((f"override '{override}'", OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"override '{override}': {error}") from error
    return _build(cls, layers)


def config_from_mapping(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build the frozen dataclass `cls` from plain values, as `read_config` does; errors name `source`."""
    return _build(cls, [(source, OmegaConf.create(dict(values)))])


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dictionaries, lists, numbers and strings, ready for YAML or JSON."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def to_yaml(config: Any) -> str:
    """Return a config dataclass as YAML that `read_config` reads back to an equal object."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = OmegaConf.load(path)
    except (OmegaConfBaseException, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, DictConfig) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected a mapping of names to values at the top level")
    return values


def _build(cls: type[Config], layers: Sequence[tuple[str, DictConfig]]) -> Config:
    """Merge the layers into the schema key by key, so that an error names the layer and the key it came from."""
    merged = OmegaConf.structured(cls)
    OmegaConf.set_readonly(merged, False)  # a frozen dataclass gives a read-only schema
    for source, values in layers:
        for key in map(str, values):
            try:
                merged = OmegaConf.merge(merged, OmegaConf.masked_copy(values, key))
            except (OmegaConfBaseException, TypeError) as error:
                raise ValueError(f"{source}: {_explain(error, key)}") from error
    sources = ", ".join(source for source, _ in layers) or cls.__name__
    try:
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{sources}: {_explain(error, 'config')}") from error
    assert isinstance(built, cls)
    return built


def _explain(error: Exception, key: str) -> str:
    """Return one line: the key, what is wrong with it and, for an unknown key, the nearest known one."""
    path = getattr(error, "full_key", None) or key
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        known = [field.name for field in dataclasses.fields(error.object_type)]
        nearest = difflib.get_close_matches(str(error.key), known, n=1)
        hint = f"did you mean '{nearest[0]}'? " if nearest else ""
        return f"unknown key '{path}'; {hint}known: {', '.join(known)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{path}: required, but no value was given"
    message = str(getattr(error, "msg", None) or error).splitlines()[0]
    # OmegaConf leaves these two words unfilled for the entries of a sequence.
    return f"{path}: " + message.replace("Value '$VALUE' of type '$VALUE_TYPE'", "an entry")
