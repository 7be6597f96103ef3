"""Records, one structure each, as arrays: the values of JSON, of ASE and of pymatgen, checked and named in errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rung.data.sources.common import batches
from rung.data.structure import MAX_ATOMIC_NUMBER, Labels, Structure
from rung.data.table import StructureTable

if TYPE_CHECKING:
    from ase import Atoms

_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]  # xx, yy, zz, yz, xz, xy


def tables(structures: Iterable[Structure]) -> Iterator[StructureTable]:
    """Yield tables of TABLE_STRUCTURES structures, whose arrays must have their shapes, without the unlabelled ones."""
    yield from map(StructureTable.of, batches(filter(_has_label, structures)))


def crystal(structure: Any) -> dict[str, Any]:
    """Return numbers, positions, cell, pbc and charge of a pymatgen structure, as fields of `Structure`.

    Raises ValueError for another layout, a site with several species or with a vacancy, and an unknown element.
    """
    try:
        lattice, sites = structure["lattice"], structure["sites"]
        cell = array(lattice["matrix"], (3, 3), "lattice.matrix", np.float64)
        fractional = array([site["abc"] for site in sites], (len(sites), 3), "sites.abc", np.float64)
        symbols = [_whole_site(site["species"]) for site in sites]
    except (KeyError, TypeError) as error:
        expected = "a pymatgen structure {lattice: {matrix}, sites: [{species, abc}]}"
        raise ValueError(f"structure: expected {expected}, found {_found(structure)} ({error!r})") from error
    return {
        "numbers": numbers_of(symbols),
        "positions": (fractional @ cell).astype(np.float32),
        "cell": cell.astype(np.float32),
        "pbc": np.array(lattice.get("pbc", (True, True, True)), np.bool_),
        "charge": int(structure.get("charge") or 0),
    }


def geometry(atoms: Atoms) -> dict[str, Any]:
    """Return numbers, positions, cell and pbc of ASE's atoms, as fields of `Structure`; a molecule has no cell."""
    return {
        "numbers": atoms.numbers.astype(np.uint8),
        "positions": atoms.positions.astype(np.float32),
        "cell": np.asarray(atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3)), np.float32),
        "pbc": np.asarray(atoms.pbc, np.bool_),
    }


def calculated(atoms: Atoms, energy_key: str = "energy") -> Labels:
    """Return energy, forces and stress that ASE's calculator holds; raises what `array` and `number` raise."""
    results = {} if atoms.calc is None else atoms.calc.results
    forces, stress = results.get("forces"), results.get("stress")
    return Labels(
        energy=number(results.get(energy_key), energy_key),
        forces=None if forces is None else array(forces, (len(atoms), 3), "forces"),
        stress=None if stress is None else array(full_stress(stress), (3, 3), "stress"),
    )


def numbers_of(symbols: Iterable[str]) -> NDArray[np.uint8]:
    """Return the atomic numbers of element symbols; D and T are hydrogen. Raises ValueError for an unknown one."""
    elements = _elements()
    try:
        return np.array([elements[symbol] for symbol in symbols], np.uint8)
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected symbols of elements, found {error}") from error


def array(value: Any, shape: tuple[int, ...], name: str, dtype: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """Return numbers in `shape`, which nested lists must have; raise ValueError naming `name` otherwise."""
    try:
        found = np.array(value, dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected numbers of shape {shape}, found {_found(value)} ({error})") from error
    if found.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {found.shape}")
    return found


def number(value: Any, name: str) -> float | None:
    """Return a number, None where it is null or NaN; raise ValueError naming `name` for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number or null, found {_found(value)}")
    return None if value != value else float(value)


def whole_number(value: Any, name: str) -> int:
    """Return a whole number, such as a charge; raise ValueError naming `name` for anything else."""
    numeric = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not numeric or not float(value).is_integer():
        raise ValueError(f"{name}: expected a whole number, found {value!r}")
    return int(value)


def full_stress(stress: Any) -> NDArray[np.float32]:
    """Return [3, 3] of a stress in Voigt's order (xx, yy, zz, yz, xz, xy) or of nine numbers; others unchanged."""
    array = np.asarray(stress, np.float32)
    if array.shape == (6,):
        return array[_VOIGT]
    return array.reshape(3, 3) if array.shape == (9,) else array


def _has_label(structure: Structure) -> bool:
    values = (value for labels in structure.labels.values() for value in vars(labels).values())
    return any(value is not None and not np.isnan(value).all() for value in values)


@lru_cache(maxsize=1)
def _elements() -> dict[str, int]:
    from ase.data import atomic_numbers

    return {**{s: z for s, z in atomic_numbers.items() if 1 <= z <= MAX_ATOMIC_NUMBER}, "D": 1, "T": 1}


def _whole_site(species: Any) -> str:
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise ValueError(f"structure: expected one whole species on each site, found {species}")
    return str(species[0]["element"])


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(value)) or 'nothing'}"
    return f"{type(value).__name__} {value!r}"[:80]
