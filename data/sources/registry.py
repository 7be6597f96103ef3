"""Readers by name: those of this package, and those that other packages register under the entry point `rung.sources`.

An entry point names a class that extends `rung.data.sources.source.Source`, in the package's pyproject.toml:

    [project.entry-points."rung.sources"]
    my_format = "my_package.reader:MyReader"
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, get_args, get_type_hints

from rung.data.sources.source import Source

ENTRY_POINTS = "rung.sources"
_PACKAGE = "rung.data.sources"
_READERS = {
    "ase": "ase_file:AseFile",
    "aimnet2": "aimnet2:Aimnet2",
    "ani1x": "ani1x:Ani1x",
    "ani2x": "ani2x:Ani2x",
    "aselmdb": "aselmdb:AseLmdb",
    "deepmd": "deepmd:DeepMD",
    "geom": "geom:Geom",
    "matpes": "matpes:MatPES",
    "md17": "md17:MD17",
    "md22": "md17:MD22",
    "mptrj": "mptrj:MPtrj",
    "multixcqm9": "multixcqm9:MultiXCQM9",
    "oc20": "aselmdb:OC20",
    "omat24": "aselmdb:OMat24",
    "omol25": "aselmdb:OMol25",
    "pyanitools": "pyanitools:PyAniTools",
    "qcschema": "qcschema:QCSchema",
    "qm7x": "qm7x:QM7X",
    "qm9": "qm9:QM9",
    "qmugs": "qmugs:QMugs",
    "rmd17": "md17:RevisedMD17",
    "spice": "spice:Spice",
    "transition1x": "transition1x:Transition1x",
}


def source_names() -> list[str]:
    """Return the names of all readers, sorted."""
    return sorted(_targets())


def source_class(name: str) -> type[Source]:
    """Return the reader of a name.

    Raises ValueError listing the known names for another one, for what is no reader, and for a reader whose library is
    not installed.
    """
    targets = _targets()
    if name not in targets:
        nearest = difflib.get_close_matches(name, targets, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise ValueError(f"unknown source '{name}'; known: {', '.join(sorted(targets))}{hint}")
    module, _, attribute = targets[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        message = f"source '{name}' needs a library: {error}; install it with: pip install 'rung[sources]'"
        raise ValueError(message) from error
    except AttributeError as error:
        raise ValueError(f"source '{name}': {error}; is its entry point right?") from error
    if not (isinstance(found, type) and issubclass(found, Source) and dataclasses.is_dataclass(found)):
        raise ValueError(f"source '{name}': expected a dataclass that extends {Source.__qualname__}, found {found!r}")
    return found


def open_source(name: str, options: Mapping[str, str]) -> Source:
    """Return a reader with options given as text; lists are separated by commas.

    Raises ValueError naming an option that the reader does not have, lacks, or cannot read.
    """
    cls = source_class(name)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    types = get_type_hints(cls)
    for option in options:
        if option not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"source '{name}' has no option '{option}'; its options: {known}")
    for option, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and option not in options:
            raise ValueError(f"source '{name}' needs the option '{option}'")
    return cls(**{option: _parse(f"{name}: {option}", text, types[option]) for option, text in options.items()})


def _targets() -> dict[str, str]:
    registered = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return registered | {name: f"{_PACKAGE}.{target}" for name, target in _READERS.items()}


def _parse(place: str, text: str, kind: Any) -> Any:
    if kind is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in known:
            raise ValueError(f"source option {place}: expected true or false, found '{text}'")
        return known[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"source option {place}: expected a number, found '{text}'") from None
    if get_args(kind):  # tuple[str, ...]
        return tuple(part for part in text.split(",") if part)
    return text
