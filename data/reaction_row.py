"""One row of a table of relative energies, checked: what the readers of such tables have in common."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ase.data import chemical_symbols

from rung.data.reaction import Reaction
from rung.data.structure import Structure
from rung.data.units import ENERGY_UNITS


@dataclass(frozen=True)
class Row:
    """One reaction as a table states it: everything is still text."""

    where: str  # file and line, for error messages
    name: str
    energy: str
    unit: str
    terms: tuple[tuple[str, str], ...]  # species, coefficient
    group: str = ""
    allow_unbalanced: bool = False
    allow_bare: bool = False  # electrons, or protons, whose energies are 0, may be left out


def reactions_of(source: str, rows: Iterable[Row], structure_of: Callable[[str], Structure]) -> list[Reaction]:
    """Return the reactions of a table's rows, in order, with their energies in eV.

    `structure_of` gives the structure of a species, always the same object for the same one, and raises ValueError
    for an unknown one. Raises ValueError naming the row for everything that is wrong with one, for two rows of the
    same name, and for a table without rows.
    """
    reactions: list[Reaction] = []
    first: dict[str, str] = {}
    for row in rows:
        if row.name in first:
            raise ValueError(f"{row.where}: reaction '{row.name}' is there twice; the first is {first[row.name]}")
        first[row.name] = row.where
        try:
            reactions.append(_reaction(row, structure_of))
        except ValueError as error:
            raise ValueError(f"{row.where}: reaction '{row.name}': {error}") from error
    if not reactions:
        raise ValueError(f"{source}: expected at least one reaction, found none")
    return reactions


def _reaction(row: Row, structure_of: Callable[[str], Structure]) -> Reaction:
    if not row.terms:
        raise ValueError("structures: expected at least one species with its coefficient, found none")
    energy = _number(row.energy) * unit_factor(row.unit)
    terms: dict[int, tuple[Structure, Fraction]] = {}
    for species, text in row.terms:
        structure = structure_of(species)
        _, before = terms.get(id(structure), (structure, Fraction()))
        terms[id(structure)] = structure, before + _coefficient(species, text)
    if vanished := [structure.key for structure, coefficient in terms.values() if coefficient == 0]:
        raise ValueError(f"the coefficients of '{vanished[0]}' add up to 0; take it out, or correct them")
    structures, coefficients = zip(*terms.values(), strict=True)
    largest = max(structures, key=lambda structure: structure.num_atoms)
    group = row.group or largest.group
    reaction = Reaction(row.name, group, structures, tuple(map(float, coefficients)), energy)
    allowed = row.allow_unbalanced or (row.allow_bare and _only_bare(reaction))
    if not allowed and (change := imbalance(reaction)):
        raise ValueError(
            f"expected the same atoms and charge on both sides, found {', '.join(change)} from left to right; correct "
            "the species, their charges or the coefficients, or set allow_unbalanced: true"
        )
    return reaction


def imbalance(reaction: Reaction) -> list[str]:
    """Return what appears from left to right, such as "C +1"; nothing when atoms and charge are balanced."""
    change = [f"{chemical_symbols[number]} {count:+g}" for number, count in reaction.composition().items()]
    charge = _charge(reaction)
    return [*change, f"charge {charge:+g}"] if abs(charge) > 1e-9 else change


def _charge(reaction: Reaction) -> float:
    """Return what charge appears from left to right."""
    pairs = zip(reaction.structures, reaction.coefficients, strict=True)
    return sum(coefficient * structure.charge for structure, coefficient in pairs)


def _only_bare(reaction: Reaction) -> bool:
    """Tell whether nothing is missing but electrons, or nothing but protons.

    Both together would be H atoms, whose energy is not 0: as much charge must appear as hydrogen, if any does.
    """
    change = reaction.composition()
    return not change or (set(change) == {1} and abs(_charge(reaction) - change[1]) < 1e-9)


def unit_factor(unit: str) -> float:
    """Return what one of a unit is in eV; raise ValueError that lists the known ones."""
    if not unit:
        raise ValueError(f"unit: expected one of {', '.join(ENERGY_UNITS)}, found none")
    if unit not in ENERGY_UNITS:
        raise ValueError(
            f"unit: unknown unit '{unit}'; known: {', '.join(ENERGY_UNITS)}{hint(unit, list(ENERGY_UNITS))}"
        )
    return ENERGY_UNITS[unit]


def hint(word: str, known: Sequence[str]) -> str:
    """Return the end of an error message that suggests the known word nearest to `word`, if one is near."""
    by_lower = {one.lower(): one for one in known}
    nearest = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f"; did you mean '{by_lower[nearest[0]]}'?" if nearest else ""


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"energy: expected a number, found {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"energy: expected a finite number, found {text!r}")
    return value


def _coefficient(species: str, text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"coefficient of '{species}': expected a number or a fraction, found {text!r}") from None
    if value == 0:
        raise ValueError(f"coefficient of '{species}': expected one other than 0")
    return value
