"""ASE databases in LMDB (*.aselmdb), as fairchem publishes them: OMol25, OMat24, OC20, and any other.

A row is JSON, compressed by zlib, under its number in ASCII; `nextid`, `deleted_ids` and `metadata` are beside them.
The older *.lmdb files of the Open Catalyst Project hold pickled objects, which can run code: they are refused.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.ase_file import charge_and_multiplicity
from rung.data.sources.common import formula, slices
from rung.data.sources.json_stream import open_text
from rung.data.sources.records import array, calculated, full_stress, geometry, number, tables
from rung.data.sources.source import OneLevelSource, Part, Source, SourceInfo, cut, existing, whole
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable

MAX_ROW = 1 << 26  # bytes of one row when decompressed
_BYTES_OF_ATOM = 40  # at least, of a file: positions and forces in decimal digits, compressed
_NDARRAY = "__ndarray__"
_LAYOUT = (
    "rows with numbers, positions, cell, pbc, energy (eV), forces (eV/A), stress (eV/A^3, ASE's sign, Voigt) and a "
    "dictionary `data`, as JSON compressed by zlib; magnetic moments, charges of atoms, constraints and other entries "
    "are not read"
)

Row = dict[str, Any]
Convert = Callable[[str, Row], Structure]


class _Rows(Source):
    """What the sources of *.aselmdb share; each says how a row becomes a structure."""

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return ranges of row numbers; of a folder, all *.aselmdb below it."""
        return _lmdb_parts(files_in(paths, (".aselmdb",), self.info))

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the rows of a part that have an energy or forces."""
        yield from _lmdb_tables(part, self._structure)

    @abstractmethod
    def _structure(self, key: str, row: Row) -> Structure:
        """Return the structure of a row; raises ValueError naming the field that is missing or wrong."""


@dataclass(frozen=True)
class AseLmdb(_Rows, OneLevelSource):
    """Rows of any *.aselmdb, all at one level of theory.

    `charge`, `multiplicity` (or `spin`, which also means 2S + 1) and `group_key` come from a row's `data` or its
    key-value pairs; a row without `group_key`, or all when it is "", belong to the group of their formula.
    """

    energy_key: str = "energy"
    forces_key: str = "forces"
    group_key: str = ""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="aselmdb",
        title="ASE database in LMDB, as fairchem writes it",
        files="*.aselmdb, or folders of them",
        layout=_LAYOUT,
        url="https://gitlab.com/ase/ase-db-backends",
    )

    def _structure(self, key: str, row: Row) -> Structure:
        data = {**(row.get("key_value_pairs") or {}), **(row.get("data") or {})}
        charge, multiplicity = charge_and_multiplicity(data)
        atoms = row_atoms(row)
        labels = row_labels(row, len(atoms["numbers"]), self.energy_key, self.forces_key)
        group = data.get(self.group_key) if self.group_key else None
        return Structure(
            key=key,
            group=str(formula(atoms["numbers"]) if group is None else group),
            charge=charge,
            multiplicity=multiplicity,
            labels={self.fidelity: labels},
            **atoms,
        )


_WB97MV = Fidelity("wb97mv_def2tzvpd", "wB97M-V", "def2-TZVPD", code="ORCA 6")


@dataclass(frozen=True)
class OMol25(_Rows):
    """Molecules, complexes and electrolytes; a row must state charge and spin; groups are formulas."""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="omol25",
        title="Open Molecules 2025 (OMol25)",
        files="*.aselmdb of a split such as train_4M, or its folder",
        layout=_LAYOUT + "; `data` has charge (e) and spin (2S + 1)",
        url="https://huggingface.co/facebook/OMol25",
        doi="10.48550/arXiv.2505.08762",
        licence="CC-BY-4.0",
        citation="D. S. Levine et al., arXiv:2505.08762 (2025)",
        fidelities=(_WB97MV,),
        structures=101_666_280,
        size="456 GB (train), 19 GB (train_4M)",
    )

    def _structure(self, key: str, row: Row) -> Structure:
        data = row.get("data") or {}
        if missing := [name for name in ("charge", "spin") if name not in data]:
            raise ValueError(f"data: expected {' and '.join(missing)}, found {_names(data)}")
        charge, multiplicity = charge_and_multiplicity(data)
        return dataclasses.replace(_neutral(_WB97MV.name, key, row), charge=charge, multiplicity=multiplicity)


_OMAT_PBE_U = Fidelity(
    "pbe_u_omat24",
    "PBE / PBE+U",
    code="VASP",
    description="OMat24 settings: newer pseudopotentials than the Materials Project's, total energies not comparable",
)


@dataclass(frozen=True)
class OMat24(_Rows):
    """Inorganic crystals near and far from equilibrium, stored as neutral singlets; groups are formulas."""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="omat24",
        title="Open Materials 2024 (OMat24)",
        files="*.aselmdb of a subset such as rattled-1000, or its folder",
        layout=_LAYOUT,
        url="https://huggingface.co/datasets/fairchem/OMAT24",
        doi="10.48550/arXiv.2410.12771",
        licence="CC-BY-4.0",
        citation="L. Barroso-Luque et al., arXiv:2410.12771 (2024)",
        fidelities=(_OMAT_PBE_U,),
    )

    def _structure(self, key: str, row: Row) -> Structure:
        return _neutral(_OMAT_PBE_U.name, key, row)


_RPBE = Fidelity("rpbe", "RPBE", code="VASP", description="Open Catalyst settings, not spin-polarised")


@dataclass(frozen=True)
class OC20(_Rows):
    """Adsorbates on surfaces, grouped by system; total energies, not adsorption energies.

    `energy_key` is VASP's energy extrapolated to zero smearing ("energy") or the free energy ("free_energy"). Forces on
    atoms that the relaxation held fixed are DFT's, like all others, and are kept.
    """

    energy_key: str = "energy"

    info: ClassVar[SourceInfo] = SourceInfo(
        name="oc20",
        title="Open Catalyst 2020 (OC20), S2EF",
        files="N.extxyz.xz (or N.extxyz) with N.txt.xz beside it, *.aselmdb, or folders of them; not *.lmdb (pickled)",
        layout="frames with energy, free_energy and forces in eV and A; lines 'system,frame,reference energy' in "
        "N.txt; reference energies, tags and constraints are not read",
        url="https://facebookresearch.github.io/fairchem/oc20",
        doi="10.1021/acscatal.0c04525",
        licence="CC-BY-4.0",
        citation="L. Chanussot et al., ACS Catal. 11, 6059 (2021)",
        fidelities=(_RPBE,),
        structures=133_934_018,
        size="225 GB (all), 3.4 GB (2M), 344 MB (200K)",
    )

    def __post_init__(self) -> None:
        if self.energy_key not in ("energy", "free_energy"):
            raise ValueError(f"energy_key: expected 'energy' or 'free_energy', found '{self.energy_key}'")

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return ranges of row numbers of *.aselmdb, and one part per extxyz file (5,000 frames as published)."""
        parts = []
        for path in files_in(paths, (".aselmdb", ".extxyz", ".extxyz.xz"), self.info):
            if path.suffix == ".aselmdb":
                parts += _lmdb_parts([path])
            else:
                _frame_list(path)
                parts.append(whole(path))
        return parts

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the rows or frames of a part."""
        if part.path.suffix == ".aselmdb":
            yield from _lmdb_tables(part, self._structure)
        else:
            yield from tables(_frames(part.path, self.energy_key))

    def _structure(self, key: str, row: Row) -> Structure:
        return _neutral(_RPBE.name, key, row, self.energy_key)


def _neutral(fidelity: str, key: str, row: Row, energy_key: str = "energy") -> Structure:
    """Return a row as a neutral singlet in the group of its formula."""
    atoms = row_atoms(row)
    labels = row_labels(row, len(atoms["numbers"]), energy_key)
    return Structure(key, formula(atoms["numbers"]), **atoms, labels={fidelity: labels})


def files_in(paths: Sequence[Path], suffixes: tuple[str, ...], info: SourceInfo) -> list[Path]:
    """Return the files, with those of folders in the order of their names; refuse other suffixes and pickled *.lmdb."""
    files: list[Path] = []
    for path in existing(paths, info):
        found = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no file for source '{info.name}' in this folder; expected {info.files}")
        files += found
    for path in files:
        if path.suffix == ".lmdb":
            raise ValueError(f"{path}: a *.lmdb file holds pickled objects, which can run code; expected {info.files}")
        if not path.name.endswith(suffixes):
            raise ValueError(f"{path}: source '{info.name}' expects {info.files}")
    return files


def row_atoms(row: Row) -> dict[str, Any]:
    """Return numbers, positions, cell and pbc of a row, as fields of `Structure`."""
    if missing := [name for name in ("numbers", "positions") if name not in row]:
        raise ValueError(f"expected {' and '.join(missing)}, found {_names(row)}")
    numbers = np.asarray(_plain(row["numbers"]))
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or numbers.min(initial=0) < 0 or numbers.max(initial=0) > 255:
        raise ValueError(f"numbers: expected a list of atomic numbers, found {numbers.dtype} {numbers.shape}")
    pbc = np.broadcast_to(np.asarray(_plain(row.get("pbc", False)), np.bool_), (3,))
    cell = array(_plain(row["cell"]), (3, 3), "cell") if pbc.any() else np.zeros((3, 3), np.float32)
    return {
        "numbers": numbers.astype(np.uint8),
        "positions": array(_plain(row["positions"]), (len(numbers), 3), "positions"),
        "cell": cell,
        "pbc": pbc.copy(),
    }


def row_labels(row: Row, num_atoms: int, energy_key: str = "energy", forces_key: str = "forces") -> Labels:
    """Return energy, forces and stress of a row; raises ValueError for a value of another kind or shape."""
    forces, stress, dipole = (_plain(row.get(name)) for name in (forces_key, "stress", "dipole"))
    return Labels(
        energy=number(row.get(energy_key), energy_key),
        forces=None if forces is None else array(forces, (num_atoms, 3), forces_key),
        stress=None if stress is None else array(full_stress(stress), (3, 3), "stress"),
        dipole=None if dipole is None else array(dipole, (3,), "dipole"),
    )


def _plain(value: Any) -> Any:
    """Return what ASE writes as {"__ndarray__": [shape, dtype, flat values]} as an array, other values unchanged."""
    if not isinstance(value, dict):
        return value
    try:
        shape, _, flat = value[_NDARRAY]
        return np.asarray(flat).reshape(shape)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected a list or {{'{_NDARRAY}': [shape, dtype, values]}}, found {_names(value)}"
        ) from error


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, value))) or "nothing"


@contextmanager
def _open(path: Path) -> Iterator[lmdb.Transaction]:
    try:
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if path.stat().st_size < needed:  # reading past the end of a mapped file kills the process
                raise ValueError(f"{path}: truncated: {path.stat().st_size} bytes, the database has {needed}")
            with environment.begin() as transaction:
                yield transaction
    except lmdb.Error as error:
        raise ValueError(f"{path}: not a readable LMDB file ({error}); damaged, or of another format?") from error


def _decode(data: bytes | memoryview | None, place: str) -> Any:
    if data is None:
        raise ValueError(f"{place}: missing; the database is damaged, fetch it again")
    if data[:1] == b"\x80":
        raise ValueError(f"{place}: a pickled object, which can run code; expected JSON compressed by zlib")
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(data, MAX_ROW)
        if not stream.eof:
            raise ValueError(f"truncated, or more than {MAX_ROW} bytes")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON compressed by zlib ({error})") from error


def _lmdb_parts(paths: Sequence[Path]) -> list[Part]:
    """Return ranges of row numbers, the first being 0 for row 1; raises ValueError for a file without `nextid`."""
    parts = []
    for path in paths:
        with _open(path) as transaction:
            count = _row_range(transaction, path)
        parts += cut(path, count, path.stat().st_size // _BYTES_OF_ATOM // max(count, 1))
    return parts


def _row_range(transaction: lmdb.Transaction, path: Path) -> int:
    data = transaction.get(b"nextid")
    if data is None:
        keys = [bytes(key).decode(errors="replace") for key in islice(transaction.cursor().iternext(values=False), 8)]
        raise ValueError(f"{path}: expected an ASE database with 'nextid', found the keys {', '.join(keys) or 'none'}")
    following = _decode(data, f"{path}: nextid")
    if not isinstance(following, int) or following < 1:
        raise ValueError(f"{path}: nextid: expected the number of the next row, found {following!r}")
    return following - 1


def _lmdb_tables(part: Part, convert: Convert) -> Iterator[StructureTable]:
    """Yield tables of rows; the file is closed while a table is out, because a process may open it only once."""
    for rows in slices(part.stop - part.start):
        numbers = range(part.start + rows.start + 1, part.start + rows.stop + 1)
        with _open(part.path) as transaction:
            batch = list(tables(_rows(transaction, part.path, numbers, convert)))
        yield from batch


def _rows(transaction: lmdb.Transaction, path: Path, numbers: range, convert: Convert) -> Iterator[Structure]:
    data = transaction.get(b"deleted_ids")
    deleted = set(_decode(data, f"{path}: deleted_ids")) if data is not None else set()
    stem = f"{path.resolve().parent.name}/{path.stem}"  # published files of all subsets have the same names
    for row_number in numbers:
        if row_number in deleted:
            continue
        place = f"{path}: row {row_number}"
        row = _decode(transaction.get(b"%d" % row_number), place)
        try:
            yield convert(f"{stem}-{row_number:06d}", row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{place}: {error}") from error


def _frame_list(path: Path) -> Path:
    """Return the list of systems and frames beside an extxyz file of OC20; raises FileNotFoundError."""
    stem = path.name.removesuffix(".xz").removesuffix(".extxyz")
    for name in (f"{stem}.txt", f"{stem}.txt.xz"):
        if (found := path.with_name(name)).is_file():
            return found
    raise FileNotFoundError(f"{path}: expected {stem}.txt or {stem}.txt.xz beside it (system, frame), found neither")


def _frames(path: Path, energy_key: str) -> Iterator[Structure]:
    from ase.io import iread

    listed = _frame_list(path)
    with open_text(listed) as file:
        lines = file.read().splitlines()
    count = 0
    try:
        for atoms in iread(str(path), index=":", format="extxyz"):
            structure = _frame(lines[count].split(","), atoms, energy_key)
            count += 1
            yield structure
    except Exception as error:  # ASE's reader raises anything: KeyError, IndexError, XYZError, LZMAError, ...
        message = f"{path}: frame {count}: {type(error).__name__}: {error}"
        raise ValueError(f"{message}; damaged, or not what {listed.name} ({len(lines)} lines) lists?") from error
    if count != len(lines):
        raise ValueError(f"{path}: expected {len(lines)} frames, as {listed.name} lists, found {count}")


def _frame(line: Sequence[str], atoms: Any, energy_key: str) -> Structure:
    system, frame = line[0].strip(), line[1].strip()
    return Structure(
        key=f"{system}-{frame}", group=system, labels={_RPBE.name: calculated(atoms, energy_key)}, **geometry(atoms)
    )
