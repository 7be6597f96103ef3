"""ANI-1x and ANI-1ccx: organic molecules of H, C, N, O at DFT, MP2 and coupled-cluster levels, in one HDF5 file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.common import gathered, labelled, of_one_size, slices
from rung.data.sources.hdf5 import Dataset, Group, child, dataset, group_parts, names_in, naming, opened
from rung.data.sources.source import LevelsSource, Part, SourceInfo, existing, span
from rung.data.table import Array, StructureTable
from rung.data.units import HARTREE

WB97X_631GD = Fidelity("wb97x_631gd", "wB97X", "6-31G(d)", code="Gaussian 09")
# Isolated atoms at that level in eV, from the README of the ANI-1 data set (there in hartree).
_ATOMS = {1: -0.500607632585, 6: -37.8302333826, 7: -54.5680045287, 8: -75.0362229210}
WB97X_631GD_ATOMS = {number: energy * HARTREE for number, energy in _ATOMS.items()}


class Level(NamedTuple):
    """Where a level of theory is in the file; energies under several names are added."""

    fidelity: Fidelity
    energy: tuple[str, ...]  # Hartree
    forces: str = ""  # Hartree/angstrom
    dipole: str = ""  # e angstrom


def _correlated(name: str, method: str, basis: str, code: str, key: str) -> Level:
    cardinal = {"cc-pVDZ": "dz", "cc-pVTZ": "tz", "cc-pVQZ": "qz"}[basis]
    described = "Hartree-Fock and correlation energy, added"
    fidelity = Fidelity(name, method, basis, code=code, description=described)
    return Level(fidelity, (f"hf_{cardinal}.energy", f"{key}_{cardinal}.corr_energy"))


_ORCA = "ORCA"
LEVELS = {
    level.fidelity.name: level
    for level in (
        Level(WB97X_631GD, ("wb97x_dz.energy",), "wb97x_dz.forces", "wb97x_dz.dipole"),
        Level(
            Fidelity("wb97x_def2tzvpp", "wB97X", "def2-TZVPP", code=_ORCA),
            ("wb97x_tz.energy",),
            "wb97x_tz.forces",
            "wb97x_tz.dipole",
        ),
        Level(
            Fidelity(
                "ccsdt_cbs", "CCSD(T)", "CBS", code=_ORCA, description="CCSD(T)*/CBS: DLPNO and MP2 extrapolation"
            ),
            ("ccsd(t)_cbs.energy",),
        ),
        Level(Fidelity("hf_ccpvdz", "HF", "cc-pVDZ", code=_ORCA), ("hf_dz.energy",)),
        Level(Fidelity("hf_ccpvtz", "HF", "cc-pVTZ", code=_ORCA), ("hf_tz.energy",)),
        Level(Fidelity("hf_ccpvqz", "HF", "cc-pVQZ", code=_ORCA), ("hf_qz.energy",)),
        _correlated("mp2_ccpvdz", "MP2", "cc-pVDZ", _ORCA, "mp2"),
        _correlated("mp2_ccpvtz", "MP2", "cc-pVTZ", _ORCA, "mp2"),
        _correlated("mp2_ccpvqz", "MP2", "cc-pVQZ", _ORCA, "mp2"),
        _correlated("npno_ccsdt_ccpvdz", "DLPNO-CCSD(T), normal PNO", "cc-pVDZ", _ORCA, "npno_ccsd(t)"),
        _correlated("npno_ccsdt_ccpvtz", "DLPNO-CCSD(T), normal PNO", "cc-pVTZ", _ORCA, "npno_ccsd(t)"),
        _correlated("tpno_ccsdt_ccpvdz", "DLPNO-CCSD(T), tight PNO", "cc-pVDZ", _ORCA, "tpno_ccsd(t)"),
    )
}


@dataclass(frozen=True)
class Ani1x(LevelsSource):
    """The reader of `ani1x-release.h5`; `levels` chooses among LEVELS, a conformer without any of them is left out."""

    levels: tuple[str, ...] = ("wb97x_631gd", "wb97x_def2tzvpp", "ccsdt_cbs")

    info: ClassVar[SourceInfo] = SourceInfo(
        name="ani1x",
        title="ANI-1x and ANI-1ccx: coupled-cluster and density functional theory properties for molecules",
        files="ani1x-release.h5",
        layout=(
            "HDF5, one group per formula: atomic_numbers [n], coordinates [conformers, n, 3] in angstrom, "
            "<level>.energy and <level>.corr_energy in Hartree, <level>.forces in Hartree/angstrom, <level>.dipole in "
            "e angstrom; NaN where a conformer was not computed; charges and higher multipoles are not read"
        ),
        url="https://doi.org/10.6084/m9.figshare.c.4712477.v1",
        doi="10.1038/s41597-020-0473-z",
        licence="CC0-1.0",
        citation="J. S. Smith, R. Zubatyuk, B. Nebgen, et al., Sci. Data 7, 134 (2020)",
        fidelities=tuple(level.fidelity for level in LEVELS.values()),
        structures=4_956_005,
        size="5 GB",
        e0={WB97X_631GD.name: WB97X_631GD_ATOMS},
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are groups (formulas)."""
        return [part for path in existing(paths, self.info) for part in group_parts(path, "coordinates")]

    def read(self, part: Part) -> Iterator[StructureTable]:
        with opened(part.path) as file:
            names = names_in(file)
            chosen = (names[index] for index in span(part, len(names)))
            yield from gathered(table for name in chosen for table in self._tables(child(file, name), name))

    def _tables(self, group: Group, name: str) -> Iterator[StructureTable]:
        numbers = dataset(group, "atomic_numbers", (None,), "iu")[()]
        coordinates = dataset(group, "coordinates", (None, len(numbers), 3))
        levels = [LEVELS[fidelity] for fidelity in self.levels]
        stored = _stored(group, levels, len(coordinates), len(numbers))
        for rows in slices(len(coordinates)):
            labels = _labels({key: item[rows] for key, item in stored.items()}, levels)
            with naming(group):
                table = of_one_size(name, rows.start, name, numbers, coordinates[rows], labels)
            yield labelled(table, self.levels)


def _stored(group: Group, levels: Sequence[Level], M: int, n: int) -> dict[str, Dataset]:
    stored: dict[str, Dataset] = {}
    for level in levels:
        stored |= {key: dataset(group, key, (M,)) for key in level.energy}
        if level.forces:
            stored[level.forces] = dataset(group, level.forces, (M, n, 3))
        if level.dipole:
            stored[level.dipole] = dataset(group, level.dipole, (M, 3))
    return stored


def _labels(values: Mapping[str, Array], levels: Sequence[Level]) -> dict[str, Array]:
    labels: dict[str, Array] = {}
    for level in levels:
        name = level.fidelity.name
        energies = [values[key].astype(np.float64) for key in level.energy]
        labels[f"energy.{name}"] = np.sum(energies, axis=0) * HARTREE
        if level.forces:
            labels[f"forces.{name}"] = values[level.forces] * HARTREE
        if level.dipole:
            labels[f"dipole.{name}"] = values[level.dipole]
    return labels
