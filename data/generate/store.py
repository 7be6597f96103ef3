"""The label store: one SQLite file, written only by the parent process, committed after every result.

A killed run loses at most the calculations in flight. What a store was started with (seed, settings, code versions) is
kept in it; a run with anything else is refused instead of mixing two data sets.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.generate.sampling import Sample, Sampled

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS molecules (
    smiles TEXT PRIMARY KEY, num_samples INTEGER NOT NULL, dropped TEXT NOT NULL, error TEXT);
CREATE TABLE IF NOT EXISTS structures (
    key TEXT PRIMARY KEY, smiles TEXT NOT NULL, multiplicity INTEGER NOT NULL,
    numbers BLOB NOT NULL, positions BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS labels (
    key TEXT NOT NULL, fidelity TEXT NOT NULL, energy REAL, forces BLOB, failure TEXT, seconds REAL NOT NULL,
    PRIMARY KEY (key, fidelity), CHECK ((energy IS NULL) = (failure IS NOT NULL)));
"""
_BLOB_FLOAT = np.dtype("<f4")  # the file is the same on every machine


@dataclass(frozen=True)
class Geometry:
    """One structure to label: a sampled molecule, or an isolated atom (`smiles` is "")."""

    key: str
    smiles: str
    multiplicity: int
    numbers: NDArray[np.uint8]  # [n]
    positions: NDArray[np.float32]  # [n, 3], angstrom


@dataclass(frozen=True)
class LabelRow:
    """The outcome of one calculation: energy (eV) with or without forces [n, 3] (eV/angstrom), or why it failed."""

    key: str
    fidelity: str
    energy: float | None
    forces: NDArray[np.float32] | None
    failure: str | None
    seconds: float


class LabelStore:
    """Opens or creates the store at `path`; a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._connection = sqlite3.connect(path, isolation_level=None)  # every statement commits by itself
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.executescript(_SCHEMA)

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def check_meta(self, **values: Any) -> None:
        """Remember `values` on first use; raise ValueError when the store was started with others."""
        for name, value in values.items():
            text = json.dumps(value, sort_keys=True)
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            if row is None:
                self._connection.execute("INSERT INTO meta VALUES (?, ?)", (name, text))
            elif row[0] != text:
                raise ValueError(
                    f"{self.path}: {name}: expected {row[0]} as this store was started with, found {text}; "
                    "continue with the same, or choose a new --out"
                )

    def meta(self, name: str) -> Any:
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise ValueError(f"{self.path}: expected a label store with '{name}' in its meta table, found none")
        return json.loads(row[0])

    def add_molecule(self, smiles: str, sampled: Sampled | None, error: str | None = None) -> None:
        """Record one molecule's structures, or why it has none, in one transaction."""
        samples = sampled.samples if sampled else []
        with self._transaction():
            self.add_geometries(_geometry(sample) for sample in samples)
            self._connection.execute(
                "INSERT INTO molecules VALUES (?, ?, ?, ?)",
                (smiles, len(samples), json.dumps(sampled.dropped if sampled else {}, sort_keys=True), error),
            )

    def add_geometries(self, geometries: Iterable[Geometry]) -> None:
        self._connection.executemany(
            "INSERT OR IGNORE INTO structures VALUES (?, ?, ?, ?, ?)",
            (
                (g.key, g.smiles, g.multiplicity, g.numbers.tobytes(), g.positions.astype(_BLOB_FLOAT).tobytes())
                for g in geometries
            ),
        )

    def add_label(self, row: LabelRow) -> None:
        forces = None if row.forces is None else row.forces.astype(_BLOB_FLOAT).tobytes()
        values = (row.key, row.fidelity, row.energy, forces, row.failure, row.seconds)
        self._connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?)", values)

    def molecules(self) -> dict[str, tuple[int, dict[str, int], str | None]]:
        """SMILES -> (structures kept, dropped by reason, error of the sampling itself)."""
        rows = self._connection.execute("SELECT smiles, num_samples, dropped, error FROM molecules ORDER BY smiles")
        return {smiles: (count, json.loads(dropped), error) for smiles, count, dropped, error in rows}

    def geometries(self) -> Iterator[Geometry]:
        """All structures and isolated atoms, by key."""
        for key, smiles, multiplicity, numbers, positions in self._connection.execute(
            "SELECT key, smiles, multiplicity, numbers, positions FROM structures ORDER BY key"
        ):
            coordinates = np.frombuffer(positions, _BLOB_FLOAT).astype(np.float32).reshape(-1, 3)
            yield Geometry(key, smiles, multiplicity, np.frombuffer(numbers, np.uint8), coordinates)

    def done(self) -> set[tuple[str, str]]:
        """(key, fidelity) of every finished calculation, failures included."""
        return set(self._connection.execute("SELECT key, fidelity FROM labels"))

    def labels(self, fidelity: str) -> dict[str, LabelRow]:
        """All rows of one fidelity by key, failures included."""
        rows = self._connection.execute(
            "SELECT key, energy, forces, failure, seconds FROM labels WHERE fidelity = ? ORDER BY key", (fidelity,)
        )
        return {
            key: LabelRow(key, fidelity, energy, _forces(blob), failure, seconds)
            for key, energy, blob, failure, seconds in rows
        }

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _geometry(sample: Sample) -> Geometry:
    return Geometry(sample.key, sample.smiles, 1, sample.numbers, sample.positions)


def _forces(blob: bytes | None) -> NDArray[np.float32] | None:
    return None if blob is None else np.frombuffer(blob, _BLOB_FLOAT).astype(np.float32).reshape(-1, 3)
