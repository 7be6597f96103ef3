"""SPICE 1 and 2: drug-like molecules, peptides, dimers, clusters at wB97M-D3(BJ)/def2-TZVPPD, in one HDF5 file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.common import gathered, labelled, of_one_size, slices
from rung.data.sources.hdf5 import Group, child, group_parts, names_in, naming, opened, small, where
from rung.data.sources.source import Part, Source, SourceInfo, existing, span
from rung.data.table import Array, StructureTable
from rung.data.units import BOHR, HARTREE, HARTREE_BOHR

_LEVEL = Fidelity("wb97md3bj_def2tzvppd", "wB97M-D3(BJ)", "def2-TZVPPD", "D3(BJ)", "Psi4")
_UNITS = {
    "conformations": "bohr",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
    "scf_dipole": "elementary_charge*bohr",
}
_ATOM_MAP = re.compile(r":\d+\]")
_ATOM_CHARGE = re.compile(r"\[[^\[\]+-]*(\++|-+)(\d*)(?::\d+)?\]")  # [N+:3], [O-], [Mg+2], [Ca++]


@dataclass(frozen=True)
class Spice(Source):
    """Read one release of SPICE; the releases overlap, so a dataset is made of one of them."""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="spice",
        title="SPICE, small-molecule/protein interaction chemical energies",
        files="SPICE-2.0.1.hdf5, or an earlier release such as SPICE-1.1.4.hdf5",
        layout="HDF5, one group per molecule: smiles [1] (with atom maps), atomic_numbers [n], conformations [M, n, 3] "
        "(bohr), dft_total_energy [M] (hartree), dft_total_gradient [M, n, 3] (hartree/bohr), for most scf_dipole "
        "[M, 3] (e bohr); the charge is that of the SMILES, all are singlets; formation energies, charges, multipoles "
        "and bond orders are not read",
        url="https://github.com/openmm/spice-dataset",
        doi="10.5281/zenodo.10975225",
        licence="CC0-1.0",
        citation="Eastman et al., SPICE, a dataset of drug-like molecules and peptides for training machine learning "
        "potentials, Scientific Data 10, 11 (2023), 10.1038/s41597-022-01882-6; for SPICE 2: Eastman, Pritchard, "
        "Chodera, Markland, Nutmeg and SPICE, J. Chem. Theory Comput. 20, 8583 (2024), 10.1021/acs.jctc.4c00794",
        fidelities=(_LEVEL,),
        structures=2_008_628,
        size="37 GB",
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are groups (molecules)."""
        return [part for path in existing(paths, self.info) for part in group_parts(path, "conformations")]

    def read(self, part: Part) -> Iterator[StructureTable]:
        with opened(part.path) as file:
            names = names_in(file)
            chosen = [names[index] for index in span(part, len(names))]
            for name in chosen[:1]:  # a file is written in one go
                _check_units(child(file, name))
            yield from gathered(table for name in chosen for table in _tables(child(file, name), name))


def _tables(group: Group, name: str) -> Iterator[StructureTable]:
    """Yield the conformations of one molecule that have a label."""
    numbers = small(group, ["atomic_numbers"], (None,), np.int64)
    texts = small(group, ["smiles"], (1,), h5py.string_dtype())
    with naming(group):
        smiles = texts[0].decode()
    n = len(numbers)
    positions = small(group, ["conformations"], (None, n, 3), np.float32) * np.float32(BOHR)
    M = len(positions)
    labels: dict[str, Array] = {
        "energy": small(group, ["dft_total_energy"], (M,), np.float64) * HARTREE,
        "forces": small(group, ["dft_total_gradient"], (M, n, 3), np.float32) * np.float32(-HARTREE_BOHR),
    }
    if "scf_dipole" in group:
        labels["dipole"] = small(group, ["scf_dipole"], (M, 3), np.float32) * np.float32(BOHR)
    group_name, charge = _ATOM_MAP.sub("]", smiles), charge_of(smiles)
    for rows in slices(M):
        chosen = {f"{kind}.{_LEVEL.name}": values[rows] for kind, values in labels.items()}
        with naming(group):
            table = of_one_size(name, rows.start, group_name, numbers, positions[rows], chosen, charge=charge)
        yield labelled(table, [_LEVEL.name])


def charge_of(smiles: str) -> int:
    """Return the sum of the formal charges in a SMILES."""
    return sum(
        (1 if signs[0] == "+" else -1) * (int(digits) if digits else len(signs))
        for signs, digits in _ATOM_CHARGE.findall(smiles)
    )


def _check_units(group: Group) -> None:
    """Raise ValueError when a dataset states another unit than the published one."""
    for name, expected in _UNITS.items():
        if name in group and (unit := group[name].attrs.get("units", expected)) != expected:
            raise ValueError(f"{where(group)}: {name}: expected the unit {expected}, found {unit}")
