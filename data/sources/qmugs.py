"""QMugs: conformers of ChEMBL molecules with energies at GFN2-xTB and at wB97X-D/def2-SVP, as SDF files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from ase.data import atomic_numbers

from rung.data.fidelity import Fidelity
from rung.data.sources.archive import damage_named, tar_members
from rung.data.sources.common import batches
from rung.data.sources.source import LevelsSource, Part, SourceInfo, cut_groups, existing, span, whole
from rung.data.table import StructureTable
from rung.data.units import HARTREE

_LEVELS = {
    "gfn2_xtb": Fidelity("gfn2_xtb", "GFN2-xTB", code="xtb", description="geometries are optimised at this level"),
    "wb97xd_def2svp": Fidelity("wb97xd_def2svp", "wB97X-D", "def2-SVP", "D", "Psi4"),
}
_PROPERTIES = {"gfn2_xtb": "GFN2:TOTAL_ENERGY", "wb97xd_def2svp": "DFT:TOTAL_ENERGY"}  # hartree
_CONFORMERS, _ATOMS = 3, 60  # of a molecule, about
_MAX_SDF = 16_000_000  # bytes; the largest molecule (some 200 atoms) needs far less than 1 MB
_OLD_CHARGES = {"1": 3, "2": 2, "3": 1, "5": -1, "6": -2, "7": -3}  # codes of the atom block of V2000


@dataclass(frozen=True)
class QMugs(LevelsSource):
    """Read `structures.tar.gz` as it is, or the folder `structures` that it unpacks to."""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="qmugs",
        title="QMugs, quantum mechanical properties of drug-like molecules",
        files="structures.tar.gz, or the folder 'structures' unpacked from it (<ChEMBL id>/conf_<nn>.sdf)",
        layout="one SDF (V2000, angstrom) per conformer with the properties GFN2:TOTAL_ENERGY and DFT:TOTAL_ENERGY "
        "(hartree); no forces; geometries are optimised at GFN2-xTB; the charge is the sum of formal charges; other "
        "properties are not read",
        url="https://www.research-collection.ethz.ch/handle/20.500.11850/482129",
        doi="10.3929/ethz-b-000482129",
        citation="Isert, Atz, Jimenez-Luna, Schneider, QMugs, quantum mechanical properties of drug-like molecules, "
        "Scientific Data 9, 273 (2022), 10.1038/s41597-022-01390-7",
        fidelities=tuple(_LEVELS.values()),
        structures=1_992_984,
        size="7.2 GB",
    )
    levels: tuple[str, ...] = tuple(_LEVELS)

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return one part per archive (gzip has no index); items of a folder's parts are its molecules, by name."""
        parts = []
        for path in existing(paths, self.info):
            if path.is_dir():
                molecules = len(_molecules(path))
                parts += cut_groups(path, [_CONFORMERS] * molecules, [_ATOMS] * molecules)
            elif path.name.endswith((".tar.gz", ".tgz")):
                parts.append(whole(path))
            else:
                raise ValueError(f"{path}: expected {self.info.files}, found another file")
        return parts

    def read(self, part: Part) -> Iterator[StructureTable]:
        yield from map(self._table, batches(self._conformers(part)))

    def _conformers(self, part: Part) -> Iterator[_Conformer]:
        files = _in_folder(part) if part.path.is_dir() else _in_archive(part.path)
        empty = True
        with damage_named(part.path):
            for molecule, name, content in files:
                empty = False
                place = f"{part.path}: {molecule}/{name}"
                conformer = _parse(content, place, molecule, name.removesuffix(".sdf"), self.levels)
                if not np.isnan(conformer.energies).all():
                    yield conformer
        if empty:
            raise ValueError(f"{part.path}: expected files <ChEMBL id>/conf_<nn>.sdf, found no .sdf")

    def _table(self, conformers: Sequence[_Conformer]) -> StructureTable:
        energies = HARTREE * np.array([conformer.energies for conformer in conformers])
        return StructureTable.make(
            [conformer.key for conformer in conformers],
            [conformer.group for conformer in conformers],
            [len(conformer.numbers) for conformer in conformers],
            [number for conformer in conformers for number in conformer.numbers],
            np.array([xyz for conformer in conformers for xyz in conformer.positions]),
            charge=[conformer.charge for conformer in conformers],
            labels={f"energy.{level}": energies[:, i] for i, level in enumerate(self.levels)},
        )


class _Conformer(NamedTuple):
    key: str
    group: str
    numbers: list[int]
    positions: list[list[float]]  # angstrom
    charge: int
    energies: list[float]  # hartree, of each level; NaN where the file has none


def _molecules(folder: Path) -> list[str]:
    """Return the names of the molecules' folders, sorted; raise ValueError when there is none."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ValueError(f"{folder}: expected folders <ChEMBL id> with conf_<nn>.sdf, found no folder")
    return names


def _in_folder(part: Part) -> Iterator[tuple[str, str, bytes]]:
    names = _molecules(part.path)
    for molecule in (names[index] for index in span(part, len(names))):
        files = sorted((part.path / molecule).glob("*.sdf"))
        if not files:
            raise ValueError(f"{part.path / molecule}: expected conf_<nn>.sdf, found no .sdf")
        for file in files:
            yield molecule, file.name, file.read_bytes()


def _in_archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    for name, size, content in tar_members(path, ".sdf"):
        if size > _MAX_SDF:
            raise ValueError(f"{path}: {name}: expected an SDF of one conformer, found {size} bytes")
        folder, _, file = name.rpartition("/")
        if not folder:
            raise ValueError(f"{path}: expected members <ChEMBL id>/conf_<nn>.sdf, found '{name}'")
        yield folder.rpartition("/")[2], file, content.read()


def _parse(content: bytes, place: str, molecule: str, name: str, levels: Sequence[str]) -> _Conformer:
    """Return the one record of a V2000 SDF; raise ValueError naming the place for another layout."""
    try:
        lines = content.decode().splitlines()
        counts = "".join(lines[3:4])
        whole = counts.rstrip().endswith("V2000") and "M  END" in lines
        if lines.count("$$$$") != 1 or not whole:
            found = f"{lines.count('$$$$')} ends of records ($$$$) and the counts line '{counts}'"
            raise ValueError(f"expected one whole V2000 record, found {found}")
        atoms = lines[4 : 4 + int(counts[:3])]
        if not atoms:
            raise ValueError("atom block: expected at least one atom, found none")
        numbers = [_number(line[31:34].strip()) for line in atoms]
        positions = [[float(line[0:10]), float(line[10:20]), float(line[20:30])] for line in atoms]
        return _Conformer(
            f"{molecule}-{name}", molecule, numbers, positions, _charge(lines, atoms), _energies(lines, levels)
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _number(symbol: str) -> int:
    number = atomic_numbers.get(symbol, 0)
    if not number:
        raise ValueError(f"atom block: expected an element's symbol, found '{symbol}'")
    return int(number)


def _charge(lines: Sequence[str], atoms: Sequence[str]) -> int:
    """Return the sum of formal charges: of the M  CHG lines, which overrule the old codes of the atom block."""
    stated = [line[9:].split()[1::2] for line in lines if line.startswith("M  CHG")]
    if stated:
        return sum(int(charge) for line in stated for charge in line)
    return sum(_OLD_CHARGES.get(line[36:39].strip(), 0) for line in atoms)


def _energies(lines: Sequence[str], levels: Sequence[str]) -> list[float]:
    """Return the energy in hartree at each level, NaN for none; raise ValueError for a file with no energy at all."""
    properties = {
        line[line.find("<") + 1 : line.rfind(">")]: value
        for line, value in zip(lines, lines[1:], strict=False)
        if line.startswith(">")
    }
    if not properties.keys() & set(_PROPERTIES.values()):
        expected = " or ".join(_PROPERTIES.values())
        raise ValueError(f"expected the property {expected}, found {', '.join(properties) or 'no property'}")
    return [float(properties.get(_PROPERTIES[level], "").strip() or "nan") for level in levels]
