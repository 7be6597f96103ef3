"""Levels of theory by name: what a fidelity is called, how it was computed, and the error for one nobody knows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Fidelity:
    """One level of theory; `basis` and `dispersion` are "" where the method has none."""

    name: str  # such as "wb97x_631gd"
    method: str
    basis: str = ""
    dispersion: str = ""
    code: str = ""  # program and version
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name a fidelity, a dataset or a split (a part of array and file names)."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: expected lower-case letters, digits and underscores, such as 'wb97x_631gd'")


def unknown_fidelity(name: str, known: Iterable[str]) -> ValueError:
    """Return (not raise) the error for a fidelity that is not among `known`: it lists them and suggests the nearest."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return ValueError(f"unknown fidelity '{name}'; known: {', '.join(names) if names else 'none'}{hint}")
