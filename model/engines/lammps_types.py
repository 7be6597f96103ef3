"""Which elements LAMMPS's atom types are: by a list that is held against their masses, or by the masses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from rung.data.structure import MAX_ATOMIC_NUMBER

HEAVIEST_HYDROGEN = 3.5  # u; tritium, and hydrogens that were made heavier for a longer time step


class TypeElements:
    """The elements of LAMMPS's atom types."""

    def __init__(self, lmp: Any, elements: Sequence[str] | None, *, check_masses: bool) -> None:
        """Check the symbols; raises ValueError for one that is none, and for more or fewer than there are types."""
        self._lmp, self._check_masses = lmp, check_masses
        self.listed: list[int] = []
        self._numbers: NDArray[np.uint8] | None = None  # by type; known once the masses are
        if elements is None:
            return
        count = lmp.extract_setting("ntypes")
        for symbol in elements:
            if not 1 <= atomic_numbers.get(symbol, 0) <= MAX_ATOMIC_NUMBER:
                raise ValueError(f"elements: expected symbols such as H or Cl, found '{symbol}'")
        if len(elements) != count:
            raise ValueError(
                f"elements: expected one for each of LAMMPS's {count} atom types, in their order, found "
                f"{len(elements)}: {', '.join(elements)}"
            )
        self.listed = [atomic_numbers[symbol] for symbol in elements]

    def of(self, types: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the atomic numbers of atoms of these types.

        Raises ValueError naming the first type whose mass is not its element's.
        """
        if self._numbers is None:
            self._numbers = np.array([0, *self._by_type()], np.uint8)
        numbers: NDArray[np.uint8] = self._numbers[types]
        return numbers

    def _by_type(self) -> list[int]:
        masses = self._lmp.numpy.extract_atom("mass")
        if masses is None:  # atoms with a mass of their own
            if not self.listed:
                raise ValueError("elements: LAMMPS has no mass per atom type to tell them by; list them: H,O for ...")
            return self.listed
        nearest = [element_of_mass(float(mass)) for mass in masses[1:]]
        if not self.listed:
            return nearest
        for index, (given, found) in enumerate(zip(self.listed, nearest, strict=True)):
            if given != found and self._check_masses:
                raise ValueError(
                    f"elements: atom type {index + 1} is {chemical_symbols[given]} by the list, but its mass of "
                    f"{masses[index + 1]:g} u is that of {chemical_symbols[found]}; put the list in the order of the "
                    "types, or allow any masses (check_masses=False, --any-masses)"
                )
        return self.listed


def element_of_mass(mass: float) -> int:
    """Return the atomic number of the element with the nearest mass, in u."""
    if mass < HEAVIEST_HYDROGEN:
        return 1
    return int(np.abs(atomic_masses[1 : MAX_ATOMIC_NUMBER + 1] - mass).argmin()) + 1
