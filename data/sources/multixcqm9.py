"""MultiXC-QM9: the molecules of QM9 at 76 functionals in three basis sets and at GFN2-xTB."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rung.data.fidelity import Fidelity
from rung.data.sources.archive import read_texts, text_parts
from rung.data.sources.common import batches, labelled
from rung.data.sources.qm9 import gdb9_key, parse_atoms
from rung.data.sources.source import LevelsSource, Part, SourceInfo, existing
from rung.data.table import StructureTable

BASES = ("SZ", "DZP", "TZP")
XTB_FOLDER, XTB_COLUMN, XTB_LEVEL = "XTB", "GFNXTB", "gfn2_xtb"
FUNCTIONALS = (
    *("KCIS-MODIFIED", "KCIS-ORIGINAL", "PKZB", "VS98", "LDA(VWN)", "PW91", "BLYP", "BP", "PBE", "RPBE", "REVPBE"),
    *("OLYP", "FT97", "BLAP3", "HCTH/93", "HCTH/120", "HCTH/147", "HCTH/407", "BMTAU1", "BOP", "PKZBX-KCISCOR"),
    *("VS98-X(XC)", "VS98-X-ONLY", "BECKE00", "BECKE00X(XC)", "BECKE00-X-ONLY", "BECKE88X+BR89C", "OLAP3", "TPSS"),
    *("MPBE", "OPBE", "OPERDEW", "MPBEKCIS", "MPW", "TAU-HCTH", "XLYP", "KT1", "KT2", "M06-L", "BLYP-D", "BP86-D"),
    *("PBE-D", "TPSS-D", "B97-D", "REVTPSS", "PBESOL", "RGE2", "SSB-D", "MVS", "MVSX", "T-MGGA", "TPSSH"),
    *("B3LYP(VWN5)", "O3LYP(VWN5)", "KMLYP(VWN5)", "PBE0", "B3LYP*(VWN5)", "BHANDH", "BHANDHLYP", "B97", "B97-1"),
    *("B97-2", "MPBE0KCIS", "MPBE1KCIS", "B1LYP(VWN5)", "B1PW91(VWN5)", "MPW1PW", "MPW1K", "TAU-HCTH-HYBRID"),
    *("X3LYP(VWN5)", "OPBE0", "M05", "M05-2X", "M06", "M06-2X", "B3LYP-D"),
)


class Column(NamedTuple):
    """Where the energies of one level of theory are."""

    folder: str  # of molecules/molecules.csv
    name: str


class Energies(NamedTuple):
    """One table of energies: [molecules + 1, levels] in eV; the last row, NaN, is for molecules not in it."""

    levels: tuple[str, ...]
    row_of: dict[int, int]  # by the molecule's index in GDB-9
    values: NDArray[np.float64]


def level_name(functional: str, basis: str) -> str:
    """Return the fidelity of a functional's column.

    >>> level_name("B3LYP*(VWN5)", "TZP")
    'b3lyp_star_vwn5_tzp'
    """
    return f"{_slug(functional)}_{basis.lower()}"


def _slug(column: str) -> str:
    return re.sub("[^a-z0-9]+", "_", column.lower().replace("*", "_star_")).strip("_")


COLUMNS = {level_name(name, basis): Column(basis, name) for basis in BASES for name in FUNCTIONALS} | {
    XTB_LEVEL: Column(XTB_FOLDER, XTB_COLUMN)
}


@dataclass(frozen=True)
class MultiXCQM9(LevelsSource):
    """Energies at any of 229 levels; by default PBE, B3LYP-D and M06-2X in the TZP basis and GFN2-xTB.

    Energies of functionals are ADF's bonding energies, relative to its spherical, spin-restricted atoms: they differ
    from total energies by a constant per element, which E0s take up. Functionals other than the one that the orbitals
    are of were evaluated on its density. Energies of GFN2-xTB are total energies.
    The path is the folder that holds `xyzfiles/` (or `xyz.zip`) and, for each basis, `<basis>/molecules/molecules.csv`.
    """

    levels: tuple[str, ...] = ("pbe_tzp", "b3lyp_d_tzp", "m06_2x_tzp", XTB_LEVEL)
    info: ClassVar[SourceInfo] = SourceInfo(
        name="multixcqm9",
        title="MultiXC-QM9: energies of QM9's molecules from multi-level quantum chemical methods",
        files="the folder into which xyz.zip, sz.zip, dzp.zip, tzp.zip and xtb.zip were unpacked",
        layout=(
            "xyzfiles/*_<index>.xyz (angstrom) and SZ|DZP|TZP|XTB/molecules/molecules.csv with a column 'index' and "
            "one per functional (GFNXTB in XTB), in eV; neutral singlets; tables of reactions are not read"
        ),
        url="https://github.com/chemsurajit/largeDFTdata",
        doi="10.1038/s41597-023-02690-2",
        citation=(
            "S. Nandi, T. Vegge, A. Bhowmik, MultiXC-QM9: Large dataset of molecular and reaction energies from "
            "multi-level quantum chemical methods, Sci. Data 10, 783 (2023)"
        ),
        fidelities=tuple(
            Fidelity(level, "GFN2-xTB", code="xtb")
            if level == XTB_LEVEL
            else Fidelity(level, column.name, column.folder, code="ADF", description="bonding energy")
            for level, column in COLUMNS.items()
        ),
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are molecules, after a look at the header of every table that is needed."""
        parts = []
        for folder in existing(paths, self.info):
            for levels in self._by_folder():
                _columns(_table_file(folder, levels[0]), [COLUMNS[level].name for level in levels])
            parts += text_parts(_geometries(folder), ".xyz")
        return parts

    def read(self, part: Part) -> Iterator[StructureTable]:
        energies = [_energies(part.path.parent, levels) for levels in self._by_folder()]
        for batch in batches(read_texts(part, ".xyz")):
            yield labelled(_table(part.path, batch, energies), self.levels)

    def _by_folder(self) -> list[list[str]]:
        folders = dict.fromkeys(COLUMNS[level].folder for level in self.levels)
        return [[level for level in self.levels if COLUMNS[level].folder == folder] for folder in folders]


def _geometries(folder: Path) -> Path:
    for name in ("xyzfiles", "xyz.zip"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder}: expected 'xyzfiles' or 'xyz.zip' in it, found {_listing(folder)}")


def _table_file(folder: Path, level: str) -> Path:
    path = folder / COLUMNS[level].folder / "molecules" / "molecules.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, needed for '{level}'; unpack the set's zip files into {folder} (it has "
            f"{_listing(folder)}), or choose other levels"
        )
    return path


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing" if folder.is_dir() else "a file"


def _columns(path: Path, names: Sequence[str]) -> list[int]:
    """Return where the column 'index' and those of `names` are; names are compared without case and punctuation."""
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    found = [_slug(column) for column in header]
    if missing := [name for name in ("index", *names) if _slug(name) not in found]:
        listing = ", ".join(header) or "an empty file"
        raise ValueError(f"{path}: expected columns {' and '.join(map(repr, missing))}, found {listing}")
    return [found.index(_slug(name)) for name in ("index", *names)]


def _energies(folder: Path, levels: Sequence[str]) -> Energies:
    """Return the energies of levels whose columns are in one table."""
    path = _table_file(folder, levels[0])
    index, *columns = _columns(path, [COLUMNS[level].name for level in levels])
    row_of: dict[int, int] = {}
    rows: list[NDArray[np.float64]] = []
    with path.open(newline="") as file:
        lines = csv.reader(file)
        try:
            for line in islice(lines, 1, None):
                if row_of.setdefault(int(line[index]), len(rows)) != len(rows):
                    raise ValueError(f"molecule {line[index]} a second time")
                rows.append(np.array([float(line[column] or "nan") for column in columns]))
        except (ValueError, IndexError, csv.Error) as error:
            expected = "expected the index of a molecule and energies in eV"
            raise ValueError(f"{path}: line {lines.line_num}: {expected} ({error}); truncated?") from error
    if not rows:
        raise ValueError(f"{path}: expected one line per molecule, found none")
    return Energies(tuple(levels), row_of, np.array([*rows, np.full(len(columns), np.nan)]))


def _table(path: Path, texts: Sequence[tuple[str, str]], energies: Sequence[Energies]) -> StructureTable:
    indices, counts, numbers, positions = [], [], [], []
    for name, text in texts:
        index, (found_numbers, found_positions) = _index(path, name), _atoms(path, name, text)
        indices.append(index)
        counts.append(len(found_numbers))
        numbers += found_numbers
        positions += found_positions
    keys = [gdb9_key(index) for index in indices]
    labels: dict[str, NDArray[np.float64]] = {}
    for levels, row_of, values in energies:
        chosen = values[[row_of.get(index, -1) for index in indices]]
        labels |= {f"energy.{level}": chosen[:, column] for column, level in enumerate(levels)}
    return StructureTable.make(
        keys=keys,
        groups=keys,
        num_atoms=counts,
        numbers=numbers,
        positions=np.array(positions),
        labels=labels,
    )


def _index(path: Path, name: str) -> int:
    if match := re.search(r"(\d+)$", name):
        return int(match.group())
    raise ValueError(f"{path}: {name}.xyz: expected a name that ends in the molecule's index (dsgdb9nsd_000001.xyz)")


def _atoms(path: Path, name: str, text: str) -> tuple[list[int], list[list[float]]]:
    lines = text.splitlines()
    try:
        n = int(lines[0])
        if n < 1 or len(lines) < 2 + n:
            raise ValueError(f"expected {2 + n} lines, found {len(lines)}; truncated?")
        return parse_atoms(lines[2 : 2 + n], columns=4)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {name}: not an xyz file of one molecule: {error}") from error
