"""GEOM: conformer ensembles of drug-like and QM9 molecules with energies at GFN2-xTB, from the crude MessagePack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import msgpack
import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.archive import damage_named, tar_members
from rung.data.sources.common import gathered, labelled, numbered, repeated
from rung.data.sources.source import Part, Source, SourceInfo, existing, whole
from rung.data.table import StructureTable
from rung.data.units import HARTREE

_LEVEL = Fidelity("gfn2_xtb", "GFN2-xTB", code="xtb", description="energies of CREST conformers, no forces")
_SUFFIXES = (".msgpack", ".msgpack.tar.gz")
_MAX_MOLECULE = 1 << 30  # bytes of one molecule with all its conformers
_REFUSED = {
    "featurized": "it holds graph features without energies",
    "rdkit_folder": "it holds pickles, which run code when opened",
    ".pickle": "a pickle runs code when opened",
    ".pkl": "a pickle runs code when opened",
}


@dataclass(frozen=True)
class Geom(Source):
    """Stream molecules out of `*_crude.msgpack`, packed or not; one molecule is in memory at a time, and one table."""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="geom",
        title="GEOM, energy-annotated molecular conformations",
        files="drugs_crude.msgpack.tar.gz, qm9_crude.msgpack.tar.gz, or the .msgpack files inside",
        layout="maps of some 1,000 molecules each, SMILES -> {charge, conformers: [{xyz, totalenergy, ...}]}; xyz is "
        "[n, 4], atomic number and position (angstrom); totalenergy is in hartree; no forces; weights and "
        "what else is stated of conformers is not read",
        url="https://github.com/learningmatter-mit/geom",
        doi="10.7910/DVN/JNGTDF",
        citation="Axelrod, Gomez-Bombarelli, GEOM, energy-annotated molecular conformations for property prediction "
        "and molecular generation, Scientific Data 9, 185 (2022), 10.1038/s41597-022-01288-4",
        fidelities=(_LEVEL,),
        size="43 GB (drugs_crude), 1.0 GB (qm9_crude)",
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return one part per file: neither MessagePack nor gzip has an index."""
        for path in existing(paths, self.info):
            for word, reason in _REFUSED.items():
                if word in path.name:
                    raise ValueError(f"{path}: refused, {reason}; expected {self.info.files}")
            if not path.is_file() or not path.name.endswith(_SUFFIXES):
                raise ValueError(f"{path}: expected {self.info.files}, found another name or a folder")
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: the file is empty; expected {self.info.files}")
        return [whole(path) for path in paths]

    def read(self, part: Part) -> Iterator[StructureTable]:
        yield from gathered(_tables(part.path))


def _tables(path: Path) -> Iterator[StructureTable]:
    stem = path.name.partition(".")[0]
    with damage_named(path):
        for smiles, molecule in _molecules(path):
            yield _table(molecule, f"{stem}-{smiles}", smiles, f"{path}: {smiles}")


def _molecules(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield SMILES and content of every molecule; raise ValueError for an archive that does not hold them."""
    if path.suffix == ".msgpack":
        with path.open("rb") as stream:
            yield from _unpacked(stream, path)
        return
    empty = True
    for _, _, content in tar_members(path, ".msgpack"):
        empty = False
        yield from _unpacked(content, path)
    if empty:
        raise ValueError(f"{path}: expected a member *_crude.msgpack, found none")


def _unpacked(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    unpacker = msgpack.Unpacker(stream, max_buffer_size=_MAX_MOLECULE)
    molecules = 0
    while count := _entries(unpacker, stream, path):
        for _ in range(count):
            try:
                smiles, molecule = unpacker.unpack(), unpacker.unpack()
            except (msgpack.UnpackException, ValueError) as error:
                raise _damaged(path, molecules, error) from error
            if not isinstance(smiles, str) or not isinstance(molecule, dict):
                found = f"{type(smiles).__name__} -> {type(molecule).__name__}"
                raise ValueError(f"{path}: molecule {molecules}: expected SMILES -> map, found {found}")
            yield smiles, molecule
            molecules += 1
    if not molecules:
        raise ValueError(f"{path}: expected maps SMILES -> molecule, found none")


def _entries(unpacker: msgpack.Unpacker, stream: IO[bytes], path: Path) -> int:
    """Return how many molecules the next map has; 0 at the end of the file."""
    try:
        while not (count := int(unpacker.read_map_header())):
            pass
        return count
    except msgpack.OutOfData as error:
        if unpacker.tell() != stream.tell():
            raise _damaged(path, 0, error) from error
        return 0
    except (msgpack.UnpackException, ValueError) as error:
        raise _damaged(path, 0, error) from error


def _damaged(path: Path, molecules: int, error: Exception) -> ValueError:
    reason = f"{type(error).__name__} {error}".strip()
    place = f"{path}: after {molecules} molecules" if molecules else f"{path}"
    return ValueError(f"{place}: expected maps SMILES -> molecule, found {reason}; damaged or truncated?")


def _table(molecule: Mapping[str, Any], name: str, smiles: str, place: str) -> StructureTable:
    """Return the conformers of one molecule that have an energy."""
    charge, conformers = _field(molecule, "charge", place), _field(molecule, "conformers", place)
    energies = [_field(conformer, "totalenergy", place) for conformer in conformers]
    rows = [_field(conformer, "xyz", place) for conformer in conformers]
    try:
        atoms = np.array([atom for xyz in rows for atom in xyz], np.float64).reshape(-1, 4)
        table = StructureTable.make(
            numbered(name, 0, len(rows)),
            repeated(smiles, len(rows)),
            [len(xyz) for xyz in rows],
            atoms[:, 0],
            np.ascontiguousarray(atoms[:, 1:]),
            charge=charge,
            labels={f"energy.{_LEVEL.name}": HARTREE * np.array(energies, np.float64)},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: expected conformers with xyz [n, 4] and totalenergy, found otherwise: {error}"
        ) from error
    return labelled(table, [_LEVEL.name])


def _field(values: Any, name: str, place: str) -> Any:
    if not isinstance(values, dict) or name not in values:
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{place}: expected the key '{name}', found {found}")
    return values[name]
