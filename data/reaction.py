"""Relative energies: labels on a linear combination of the energies of structures.

Reaction, interaction, conformer and atomisation energies are all known only as sums over structures with
stoichiometric coefficients. An absolute energy is the combination of one structure with the coefficient 1, so that
everything that learns from energies can learn from `Reaction`s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rung.data.structure import Structure


@dataclass(frozen=True)
class Reaction:
    """One energy: sum over structures of coefficient x energy, products positive.

    `group` is the identity by which a set is split (a molecule), `key` names this row within its set.
    """

    key: str
    group: str
    structures: tuple[Structure, ...]
    coefficients: tuple[float, ...]  # stoichiometric, one for each structure
    energy: float  # eV

    @classmethod
    def absolute(cls, structure: Structure, energy: float) -> Reaction:
        """Return the total energy of one structure, in eV, as a row."""
        return cls(structure.key, structure.group, (structure,), (1.0,), energy)

    @property
    def is_absolute(self) -> bool:
        """Whether this is the total energy of one structure."""
        return self.coefficients == (1.0,)

    @property
    def num_atoms(self) -> float:
        """How many atoms the energy is of: those of the larger side; what an error per atom is divided by."""
        sides = [0.0, 0.0]
        for structure, coefficient in zip(self.structures, self.coefficients, strict=True):
            sides[coefficient < 0] += abs(coefficient) * structure.num_atoms
        return max(sides)

    def combined(self, values: Mapping[int, Any]) -> Any:
        """Return the sum over structures of coefficient x value; `values` are by `id` of the structure."""
        return sum(c * values[id(s)] for s, c in zip(self.structures, self.coefficients, strict=True))

    def composition(self) -> dict[int, float]:
        """Return by atomic number how many atoms appear from left to right; without zeros: empty when balanced."""
        change: Counter[int] = Counter()
        for structure, coefficient in zip(self.structures, self.coefficients, strict=True):
            for number in structure.numbers.tolist():
                change[number] += coefficient  # type: ignore[assignment]
        return {number: count for number, count in sorted(change.items()) if abs(count) > 1e-9}


def structures_of(reactions: Sequence[Reaction]) -> list[Structure]:
    """Return every structure of the reactions once, in the order of their first appearance."""
    return list({id(structure): structure for reaction in reactions for structure in reaction.structures}.values())
