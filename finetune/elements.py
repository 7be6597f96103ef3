"""New elements: which known ones a new one resembles, by the periodic table."""

from __future__ import annotations

from collections.abc import Sequence

from ase.data import chemical_symbols

from rung.data.structure import Structure
from rung.model.potential import Potential

NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
MAX_RELATIVES = 2


def period_and_group(number: int) -> tuple[int, int]:
    """Return the period (1..7) and the IUPAC group (1..18) of an element; f elements count as group 3."""
    period = next(i for i, noble in enumerate(NOBLE_GASES) if number <= noble)
    place, from_end = number - NOBLE_GASES[period - 1], NOBLE_GASES[period] - number
    if period == 1:
        return 1, 1 if place == 1 else 18
    return period, place if place <= 2 else max(3, 18 - from_end)


def relatives(number: int, known: Sequence[int]) -> list[int]:
    """Return the known elements that a new one starts from, at most two, nearest first.

    Of the same group, the periods nearest; else of the same period, the groups nearest; else the nearest of all.
    """
    period, group = period_and_group(number)

    def distance(other: int) -> tuple[int, int, int]:
        other_period, other_group = period_and_group(other)
        rows, columns = abs(other_period - period), abs(other_group - group)
        return (0 if columns == 0 else 1 if rows == 0 else 2, rows + columns, other)

    ranked = sorted(known, key=distance)
    nearest = distance(ranked[0])
    return [other for other in ranked if distance(other)[:2] == nearest[:2]][:MAX_RELATIVES]


def unknown_elements(potential: Potential, structures: Sequence[Structure]) -> list[int]:
    """Return the atomic numbers that occur and that the potential does not have, ascending."""
    return sorted({int(z) for s in structures for z in s.numbers} - set(potential.config.elements))


def add_elements(potential: Potential, structures: Sequence[Structure], allowed: bool) -> tuple[list[int], list[str]]:
    """Add the unknown elements of the structures to the potential; return them, and a sentence on each for the report.

    Their reference energies are unknown to all fidelities. Raises ValueError where new elements are not allowed.
    """
    new = unknown_elements(potential, structures)
    if not new:
        return [], []
    known = potential.config.elements
    symbols = ", ".join(chemical_symbols[z] for z in new)
    if not allowed:
        raise ValueError(
            f"the checkpoint does not know {symbols}; it knows {', '.join(chemical_symbols[z] for z in known)}. Pass "
            "--new-elements to start them from their neighbours in the periodic table (then train on enough structures "
            "with them), or leave those structures out"
        )
    chosen = {z: relatives(z, known) for z in new}
    potential.add_elements(chosen)
    return new, [
        f"new element {chemical_symbols[z]}: starts as {' and '.join(chemical_symbols[o] for o in others)}, "
        f"trained on {sum(z in s.numbers for s in structures)} structures"
        for z, others in chosen.items()
    ]
