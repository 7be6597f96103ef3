"""MD17, revised MD17 and MD22: molecular dynamics of single molecules, one npz file per molecule, in kcal/mol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rung.data.fidelity import Fidelity
from rung.data.sources.common import labelled, of_one_size
from rung.data.sources.npz import check_header, read_array, read_headers, read_rows
from rung.data.sources.source import LevelsSource, Part, SourceInfo, cut, existing
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.data.table import StructureTable
from rung.data.units import KCAL_MOL

_UNITS = {"e_unit": "kcal/mol", "r_unit": "Ang"}  # stated by newer sGDML files, understood in older ones
_PBE_TS = Fidelity("pbe_ts", "PBE", dispersion="TS", code="FHI-aims")


class LabelKeys(NamedTuple):
    """Names of the arrays of one level of theory."""

    energy: str
    forces: str


@dataclass(frozen=True)
class Trajectories(LevelsSource):
    """Files of one molecule each: atomic numbers [n] and, per frame, positions [n, 3], energies and forces [n, 3]."""

    numbers_key: ClassVar[str] = "z"
    positions_key: ClassVar[str] = "R"

    def labels_of(self, path: Path) -> dict[str, LabelKeys]:
        """Return the levels of theory of a file and the arrays that hold them."""
        return {fidelity.name: LabelKeys("E", "F") for fidelity in self.info.fidelities[:1]}

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are frames; a compressed file, which must be read from its start, is one part.

        A folder stands for the npz files below it.
        """
        return [part for path in existing(paths, self.info) for file in _files(path) for part in self._parts_of(file)]

    def _parts_of(self, path: Path) -> list[Part]:
        headers = read_headers(path)
        (n,) = check_header(path, headers, self.numbers_key, "iu", (-1,))
        frames, *_ = check_header(path, headers, self.positions_key, "f", (-1, n, 3))
        for keys in self._chosen(path).values():
            check_header(path, headers, keys.energy, "f", (frames,), (frames, 1))
            check_header(path, headers, keys.forces, "f", (frames, n, 3))
        _check_units(path, headers.keys() & _UNITS.keys())
        compressed = any(headers[name].compressed for name in self._row_names(path))
        return [Part(path, 0, frames, path.stat().st_size)] if compressed else cut(path, frames, n)

    def _row_names(self, path: Path) -> list[str]:
        return [self.positions_key, *(name for keys in self._chosen(path).values() for name in keys)]

    def _chosen(self, path: Path) -> dict[str, LabelKeys]:
        labels = self.labels_of(path)
        if chosen := {level: keys for level, keys in labels.items() if level in self.levels}:
            return chosen
        raise ValueError(
            f"{path}: expected labels at {' or '.join(self.levels)}, found {', '.join(labels)}; "
            "leave the file out, or choose its level"
        )

    def read(self, part: Part) -> Iterator[StructureTable]:
        numbers = _numbers(part.path, self.numbers_key)
        first = part.start
        for rows in read_rows(part.path, self._row_names(part.path), part.start, part.stop):
            table = self._table(part.path, first, numbers, rows)
            first += len(table)
            yield labelled(table, self.levels)

    def _table(
        self, path: Path, first: int, numbers: NDArray[np.uint8], rows: Mapping[str, NDArray[np.floating[Any]]]
    ) -> StructureTable:
        positions = rows[self.positions_key]
        labels: dict[str, NDArray[np.floating[Any]]] = {}
        for level, keys in self._chosen(path).items():
            labels[f"energy.{level}"] = rows[keys.energy].reshape(len(positions)).astype(np.float64) * KCAL_MOL
            labels[f"forces.{level}"] = rows[keys.forces] * KCAL_MOL
        return of_one_size(path.stem, first, molecule_of(path), numbers, positions, labels)


@dataclass(frozen=True)
class MD17(Trajectories):
    """The original trajectories; a file's name tells its level of theory (`*_ccsd*` coupled cluster, else DFT)."""

    levels: tuple[str, ...] = ("pbe_ts",)
    info: ClassVar[SourceInfo] = SourceInfo(
        name="md17",
        title="MD17: ab initio molecular dynamics of small organic molecules",
        files="md17_aspirin.npz, benzene2018_dft.npz, ... and ethanol_ccsd_t-train.npz, ... (unpacked), or a folder",
        layout=(
            "npz: z [n] atomic numbers, R [M, n, 3] angstrom, E [M, 1] kcal/mol, F [M, n, 3] kcal/mol/angstrom; "
            "neutral singlets; texts about the set are not read, but for its units where it states them"
        ),
        url="http://www.sgdml.org/#datasets",
        doi="10.1126/sciadv.1603015",
        citation=(
            "S. Chmiela et al., Machine learning of accurate energy-conserving molecular force fields, Sci. Adv. 3, "
            "e1603015 (2017); coupled cluster: Nat. Commun. 9, 3887 (2018)"
        ),
        fidelities=(
            _PBE_TS,
            Fidelity("ccsd_ccpvdz", "CCSD", "cc-pVDZ"),
            Fidelity("ccsdt_ccpvdz", "CCSD(T)", "cc-pVDZ"),
            Fidelity("ccsdt_ccpvtz", "CCSD(T)", "cc-pVTZ"),
        ),
        structures=3_611_115,  # the eight molecules of 2017, DFT
    )

    def labels_of(self, path: Path) -> dict[str, LabelKeys]:
        name = path.stem.lower()
        if "ccsd_t" in name:
            level = "ccsdt_ccpvtz" if "ethanol" in name else "ccsdt_ccpvdz"
        else:
            level = "ccsd_ccpvdz" if "ccsd" in name else "pbe_ts"
        return {level: LabelKeys("E", "F")}


@dataclass(frozen=True)
class RevisedMD17(Trajectories):
    """MD17's structures recalculated; the original labels are in the same files and can be chosen too (`pbe_ts`)."""

    levels: tuple[str, ...] = ("pbe_def2svp",)
    numbers_key: ClassVar[str] = "nuclear_charges"
    positions_key: ClassVar[str] = "coords"
    info: ClassVar[SourceInfo] = SourceInfo(
        name="rmd17",
        title="Revised MD17: ten molecules of MD17 at tight convergence",
        files="rmd17_aspirin.npz, ... of rmd17.tar.bz2 (unpacked), or a folder",
        layout=(
            "npz: nuclear_charges [n], coords [M, n, 3] angstrom, energies [M] kcal/mol, forces [M, n, 3] "
            "kcal/mol/angstrom, old_energies and old_forces (MD17's own), old_indices (not read); neutral singlets"
        ),
        url="https://figshare.com/articles/dataset/Revised_MD17_dataset_rMD17_/12672038",
        doi="10.6084/m9.figshare.12672038",
        licence="CC0-1.0",
        citation=(
            "A. S. Christensen, O. A. von Lilienfeld, On the role of gradients for machine learning of molecular "
            "energies and forces, Mach. Learn.: Sci. Technol. 1, 045018 (2020)"
        ),
        fidelities=(Fidelity("pbe_def2svp", "PBE", "def2-SVP", code="ORCA"), _PBE_TS),
        structures=999_988,
    )

    def labels_of(self, path: Path) -> dict[str, LabelKeys]:
        return {"pbe_def2svp": LabelKeys("energies", "forces"), "pbe_ts": LabelKeys("old_energies", "old_forces")}


@dataclass(frozen=True)
class MD22(Trajectories):
    """Seven molecules of 42 to 370 atoms."""

    levels: tuple[str, ...] = ("pbe_mbd",)
    info: ClassVar[SourceInfo] = SourceInfo(
        name="md22",
        title="MD22: ab initio molecular dynamics of bio- and supramolecules",
        files="md22_Ac-Ala3-NHMe.npz, ... (7 files), or a folder",
        layout=(
            "npz: z [n] atomic numbers, R [M, n, 3] angstrom, E [M, 1] kcal/mol, F [M, n, 3] kcal/mol/angstrom; "
            "neutral singlets; texts about the set are not read, but for its units where it states them"
        ),
        url="http://www.sgdml.org/#datasets",
        doi="10.1126/sciadv.adf0873",
        citation=(
            "S. Chmiela et al., Accurate global machine learning force fields for molecules with hundreds of atoms, "
            "Sci. Adv. 9, eadf0873 (2023)"
        ),
        fidelities=(Fidelity("pbe_mbd", "PBE", dispersion="MBD", code="FHI-aims"),),
        structures=223_422,
    )


def molecule_of(path: Path) -> str:
    """Return the molecule a file is of: its name without set, level, year and split.

    >>> [molecule_of(Path(name)) for name in ("rmd17_benzene.npz", "md17_benzene2017.npz", "benzene_ccsd_t-test.npz")]
    ['benzene', 'benzene', 'benzene']
    """
    name = re.sub(r"^r?md(17|22)_", "", path.stem)
    return re.sub(r"(20\d\d)?(_old)?(_dft|_ccsd_t|_ccsd)?(-train|-test)?$", "", name) or path.stem


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if files := sorted(path.rglob("*.npz")):
        return files
    raise ValueError(f"{path}: expected npz files in this folder, found none")


def _check_units(path: Path, names: set[str]) -> None:
    for name in sorted(names):
        unit = read_array(path, name)
        text = unit.item() if unit.ndim == 0 else str(unit)
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        if text.lower() != _UNITS[name].lower():
            raise ValueError(f"{path}: {name}: expected '{_UNITS[name]}', found '{text}'")


def _numbers(path: Path, name: str) -> NDArray[np.uint8]:
    numbers = read_array(path, name)
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        found = f"{numbers.min()}..{numbers.max()}"
        raise ValueError(f"{path}: {name}: expected atomic numbers 1..{MAX_ATOMIC_NUMBER}, found {found}")
    return numbers.astype(np.uint8)
