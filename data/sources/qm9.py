"""QM9: 134 thousand small organic molecules at their B3LYP minima, one xyz file of its own kind per molecule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.archive import read_texts, text_parts
from rung.data.sources.common import batches
from rung.data.sources.source import Part, Source, SourceInfo, existing
from rung.data.table import StructureTable
from rung.data.units import HARTREE

NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_LEVEL = "b3lyp_631g2dfp"
_PROPERTIES = 17  # gdb, index, A, B, C, mu, alpha, homo, lumo, gap, r2, zpve, U0, U, H, G, Cv
_ZPVE, _U0 = 11, 12
_LINES_AFTER_ATOMS = 3  # frequencies, SMILES, InChI
_ATOMS = {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730}  # hartree; atomref.txt, U at 0 K


class Molecule(NamedTuple):
    """One molecule of GDB-9."""

    gdb9: int  # its index there, from 1
    numbers: list[int]
    positions: list[list[float]]  # [n][3], angstrom
    energy: float  # eV


@dataclass(frozen=True)
class QM9(Source):
    """Energies of QM9 without the zero-point energy: E = U0 - zpve, the electronic energy at the minimum.

    U0, the energy that papers quote, includes the vibrational zero-point energy, which no potential energy surface
    has. `uncharacterized` is the path of the published `uncharacterized.txt`: the 3,054 molecules that it lists, whose
    minima are not of the molecule meant, are left out. The group of a molecule is its index in GDB-9, as in
    MultiXC-QM9, so that both sets put a molecule into the same split. Dipoles are published as lengths only.
    """

    uncharacterized: str = ""
    info: ClassVar[SourceInfo] = SourceInfo(
        name="qm9",
        title="QM9: quantum chemistry structures and properties of 134 kilo molecules",
        files="dsgdb9nsd.xyz.tar.bz2, or a folder of its dsgdb9nsd_*.xyz",
        layout=(
            "xyz per molecule: number of atoms; 'gdb', index and 15 properties (zpve and U0 in hartree); element, x, "
            "y, z (angstrom), Mulliken charge of each atom; frequencies; SMILES; InChI; exponents also written "
            "*^; other properties are not read"
        ),
        url="https://doi.org/10.6084/m9.figshare.c.978904",
        doi="10.1038/sdata.2014.22",
        licence="CC0-1.0",
        citation=(
            "R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld, Quantum chemistry structures and properties "
            "of 134 kilo molecules, Sci. Data 1, 140022 (2014)"
        ),
        fidelities=(Fidelity(_LEVEL, "B3LYP", "6-31G(2df,p)", code="Gaussian 09"),),
        structures=133_885,
        e0={_LEVEL: {number: energy * HARTREE for number, energy in _ATOMS.items()}},
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are the files of a folder; the compressed archive is one part."""
        if self.uncharacterized:
            _indices(Path(self.uncharacterized))
        return [part for path in existing(paths, self.info) for part in text_parts(path, ".xyz")]

    def read(self, part: Part) -> Iterator[StructureTable]:
        left_out = _indices(Path(self.uncharacterized)) if self.uncharacterized else frozenset()
        read = (_molecule(part.path, name, text) for name, text in read_texts(part, ".xyz"))
        molecules = (molecule for molecule in read if molecule.gdb9 not in left_out)
        yield from map(_table, batches(molecules))


def gdb9_key(index: int) -> str:
    """Return the key and group of a molecule: its index in GDB-9."""
    return f"gdb9-{index:06d}"


def parse_atoms(lines: Sequence[str], columns: int) -> tuple[list[int], list[list[float]]]:
    """Return atomic numbers and positions [n][3] of lines "element x y z ..." of so many columns.

    Raises ValueError naming the first line that is of another kind.
    """
    numbers, positions = [], []
    for line in lines:
        fields = line.split()
        try:
            if len(fields) != columns:
                raise ValueError(f"{len(fields)} columns")
            numbers.append(NUMBERS[fields[0]])
            positions.append([float(field) for field in fields[1:4]])
        except (KeyError, ValueError) as error:
            expected = f"an element of {', '.join(NUMBERS)}, x, y, z in {columns} columns"
            raise ValueError(f"expected {expected}, found '{line}' ({error})") from error
    return numbers, positions


def _molecule(path: Path, name: str, text: str) -> Molecule:
    lines = text.replace("*^", "e").splitlines()
    try:
        n = int(lines[0])
        fields = lines[1].split()
        if fields[0] != "gdb" or len(fields) != _PROPERTIES:
            raise ValueError(f"expected 'gdb' and {_PROPERTIES - 1} numbers in line 2, found '{lines[1]}'")
        if len(lines) < 2 + n + _LINES_AFTER_ATOMS:
            raise ValueError(f"expected {2 + n + _LINES_AFTER_ATOMS} lines, found {len(lines)}; truncated?")
        numbers, positions = parse_atoms(lines[2 : 2 + n], columns=5)
        energy = (float(fields[_U0]) - float(fields[_ZPVE])) * HARTREE
        return Molecule(int(fields[1]), numbers, positions, energy)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {name}: not a molecule of QM9: {error}") from error


def _table(molecules: Sequence[Molecule]) -> StructureTable:
    keys = [gdb9_key(molecule.gdb9) for molecule in molecules]
    return StructureTable.make(
        keys=keys,
        groups=keys,
        num_atoms=[len(molecule.numbers) for molecule in molecules],
        numbers=[number for molecule in molecules for number in molecule.numbers],
        positions=np.array([row for molecule in molecules for row in molecule.positions]),
        labels={f"energy.{_LEVEL}": [molecule.energy for molecule in molecules]},
    )


def _indices(path: Path) -> frozenset[int]:
    """Return the indices that lines of `uncharacterized.txt` begin with; the others are its headings."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the published uncharacterized.txt")
    first = (line.split()[0] for line in path.read_text().splitlines() if line.strip())
    if indices := frozenset(int(word) for word in first if word.isdecimal()):
        return indices
    raise ValueError(f"{path}: expected lines that begin with the index of a molecule, found none")
