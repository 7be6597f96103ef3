"""StructureTable: many structures as flat arrays, the form in which they are read, checked, stored, dealt and batched.

A loop over `Structure` objects costs tens of microseconds each; on arrays the same work costs tens of nanoseconds an
atom. `StructureTable.of` and iteration go from the one form to the other; `validate` of `structure.py` stays the
definition of what is valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung.data.structure import MAX_ATOMIC_NUMBER, MAX_FORCE, Labels, Structure, validate

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class LabelKind(NamedTuple):
    """How one kind of label is laid out: one row per structure, or one per atom."""

    dtype: type[np.floating[Any]]
    per_atom: bool
    shape: tuple[int, ...]  # of a row


LABEL_KINDS: dict[str, LabelKind] = {
    "energy": LabelKind(np.float64, False, ()),  # total energy, eV
    "forces": LabelKind(np.float32, True, (3,)),  # eV/angstrom
    "stress": LabelKind(np.float32, False, (3, 3)),  # eV/angstrom^3, ASE's sign
    "dipole": LabelKind(np.float32, False, (3,)),  # e angstrom
}


@dataclass(frozen=True)
class Strings:
    """M texts in one buffer: text m is the UTF-8 of bytes offsets[m]..offsets[m + 1]."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]  # [M + 1], from 0

    @staticmethod
    def of(texts: Sequence[str]) -> Strings:
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return Strings(np.frombuffer(b"".join(encoded), np.uint8), offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.text[self.offsets[index] : self.offsets[index + 1]].tobytes().decode()

    def tolist(self) -> list[str]:
        return [part.decode() for part in self.tobytes()]

    def tobytes(self) -> list[bytes]:
        """Return the UTF-8 of each text."""
        buffer, offsets = self.text.tobytes(), self.offsets.tolist()
        return [buffer[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]

    def part(self, start: int, stop: int) -> Strings:
        """Return texts start..stop; views but for the offsets."""
        offsets = self.offsets[start : stop + 1]
        return Strings(self.text[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, index: NDArray[np.integer]) -> Strings:
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        return Strings(self.text[ragged_index(starts, lengths)], offsets_of(lengths))


@dataclass(frozen=True)
class StructureTable:
    """M structures with N atoms in all; the atoms of structure m are rows offsets[m]..offsets[m + 1].

    `labels` maps "<kind>.<fidelity>" (kinds: LABEL_KINDS) to an array, NaN where a structure does not have the label.
    """

    keys: Strings  # [M], unique within a dataset
    groups: Strings  # [M], the identity (molecule) by which a dataset is split
    num_atoms: NDArray[np.int32]  # [M]
    numbers: NDArray[np.uint8]  # [N], atomic numbers
    positions: NDArray[np.float32]  # [N, 3], angstrom
    cell: NDArray[np.float32]  # [M, 3, 3], rows are lattice vectors; zeros for molecules
    pbc: NDArray[np.bool_]  # [M, 3]
    charge: NDArray[np.int8]  # [M], elementary charges
    multiplicity: NDArray[np.uint8]  # [M], 2S + 1
    labels: dict[str, Array] = field(default_factory=dict)

    @staticmethod
    def make(
        keys: Sequence[str] | Strings,
        groups: Sequence[str] | Strings,
        num_atoms: ArrayLike,
        numbers: ArrayLike,
        positions: ArrayLike,
        *,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | None = None,
        charge: ArrayLike = 0,
        multiplicity: ArrayLike = 1,
        labels: Mapping[str, ArrayLike] | None = None,
    ) -> StructureTable:
        """Return a table of arrays of any dtype and of [M, n, 3] or [N, 3] layout, in the units stated above.

        Scalars of charge and multiplicity hold for all. Raises ValueError naming the array for a length or shape that
        does not fit `num_atoms`, and for a whole number that its dtype cannot hold.
        """
        counts = _whole("num_atoms", num_atoms, np.int32).reshape(-1)
        if counts.size and counts.min() < 0:
            raise ValueError(f"num_atoms: expected no negative number, found {counts.min()}")
        M, N = len(counts), int(counts.sum(dtype=np.int64))
        keys, groups = (value if isinstance(value, Strings) else Strings.of(value) for value in (keys, groups))
        for name, strings in (("keys", keys), ("groups", groups)):
            if len(strings) != M:
                raise ValueError(f"{name}: expected one per structure ({M}), found {len(strings)}")
        return StructureTable(
            keys=keys,
            groups=groups,
            num_atoms=counts,
            numbers=_shaped("numbers", _whole("numbers", numbers, np.uint8), (N,)),
            positions=_shaped("positions", np.asarray(positions, np.float32), (N, 3)),
            cell=_per_structure("cell", np.zeros((3, 3)) if cell is None else cell, np.float32, (M, 3, 3)),
            pbc=_per_structure("pbc", False if pbc is None else pbc, np.bool_, (M, 3)),
            charge=_per_structure("charge", _whole("charge", charge, np.int8), np.int8, (M,)),
            multiplicity=_per_structure("multiplicity", _whole("multiplicity", multiplicity, np.uint8), np.uint8, (M,)),
            labels={name: _label(name, value, M, N) for name, value in (labels or {}).items()},
        )

    @staticmethod
    def of(structures: Sequence[Structure]) -> StructureTable:
        """Return the table of `structures`, each of which must be valid (`rung.data.structure.validate`)."""
        if not structures:
            return StructureTable.make([], [], [], [], np.zeros((0, 3)))
        names = sorted({name for s in structures for name in s.labels})
        labels = {
            f"{kind}.{name}": array
            for name in names
            for kind in LABEL_KINDS
            if (array := _label_rows(structures, name, kind)) is not None
        }
        return StructureTable(
            keys=Strings.of([s.key for s in structures]),
            groups=Strings.of([s.group for s in structures]),
            num_atoms=np.array([s.num_atoms for s in structures], np.int32),
            numbers=np.concatenate([s.numbers for s in structures]),
            positions=np.concatenate([s.positions for s in structures]),
            cell=np.stack([s.cell for s in structures]),
            pbc=np.stack([s.pbc for s in structures]).astype(np.bool_),
            charge=np.array([s.charge for s in structures], np.int8),
            multiplicity=np.array([s.multiplicity for s in structures], np.uint8),
            labels=labels,
        )

    @staticmethod
    def concatenate(tables: Sequence[StructureTable]) -> StructureTable:
        """Return the structures of all tables, in order; a label that a table does not have is NaN there."""
        if len(tables) == 1:
            return tables[0]
        if not tables:
            return StructureTable.of([])
        names = dict.fromkeys(name for table in tables for name in table.labels)
        return StructureTable(
            keys=_joined([table.keys for table in tables]),
            groups=_joined([table.groups for table in tables]),
            labels={name: np.concatenate([table.label(name) for table in tables]) for name in names},
            **{
                name: np.concatenate([getattr(table, name) for table in tables])
                for name in ("num_atoms", "numbers", "positions", "cell", "pbc", "charge", "multiplicity")
            },
        )

    def __len__(self) -> int:
        return len(self.num_atoms)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First atom of each structure, and N; [M + 1]."""
        return offsets_of(self.num_atoms)

    @property
    def structure(self) -> NDArray[np.int64]:
        """The structure of each atom; [N]."""
        return np.repeat(np.arange(len(self)), self.num_atoms)

    @property
    def fidelities(self) -> list[str]:
        """Names of the fidelities that have a label array, sorted."""
        return sorted({name.partition(".")[2] for name in self.labels})

    def has(self, kind: str, fidelity: str) -> Mask:
        """Return which structures have a label: its rows are not all NaN; [M]."""
        array = self.labels.get(f"{kind}.{fidelity}")
        if array is None:
            return np.zeros(len(self), np.bool_)
        missing = np.isnan(array)
        if not missing.any():  # a pass over a flat array costs a tenth of one over its short rows
            return np.ones(len(self), np.bool_)
        known = ~_every(missing)
        return self.any_atom(known) if LABEL_KINDS[kind].per_atom else known

    def carries(self, fidelity: str) -> Mask:
        """Return which structures have any label at `fidelity`; [M]."""
        found = np.zeros(len(self), np.bool_)
        for kind in LABEL_KINDS:
            found |= self.has(kind, fidelity)
        return found

    def any_atom(self, values_N: Mask) -> Mask:
        """Return which structures have an atom for which `values_N` holds; [M]. Every structure must have an atom."""
        found: Mask = np.logical_or.reduceat(values_N, self.offsets[:-1]) if len(self) else values_N[:0]
        return found

    def at(self, fidelity: str) -> StructureTable:
        """Return the structures that carry `fidelity`, with the labels of no other."""
        labels = {name: array for name, array in self.labels.items() if name.partition(".")[2] == fidelity}
        return dataclasses.replace(self, labels=labels).where(self.carries(fidelity))

    def renamed(self, fidelity: str, name: str) -> StructureTable:
        """Return the structures with the labels of `fidelity` alone, under another name."""
        kinds = [kind for kind in LABEL_KINDS if f"{kind}.{fidelity}" in self.labels]
        return dataclasses.replace(self, labels={f"{kind}.{name}": self.labels[f"{kind}.{fidelity}"] for kind in kinds})

    def where(self, mask: Mask) -> StructureTable:
        """Return the structures for which `mask` [M] holds."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def take(self, index: NDArray[np.integer]) -> StructureTable:
        """Return the structures at `index`, in that order; copies."""
        num_atoms = self.num_atoms[index]
        atoms = ragged_index(self.offsets[index], num_atoms)
        rows = {True: atoms, False: index}
        return StructureTable(
            keys=self.keys.take(index),
            groups=self.groups.take(index),
            num_atoms=num_atoms,
            # ndarray.take copies whole rows, at a quarter of the cost of an index in brackets.
            labels={name: array.take(rows[_kind(name).per_atom], axis=0) for name, array in self.labels.items()},
            **{name: getattr(self, name).take(index, axis=0) for name in ("cell", "pbc", "charge", "multiplicity")},
            **{name: getattr(self, name).take(atoms, axis=0) for name in ("numbers", "positions")},
        )

    def part(self, start: int, stop: int) -> StructureTable:
        """Return structures start..stop; their arrays are views, but for the texts."""
        offsets = self.offsets
        some, atoms = slice(start, stop), slice(int(offsets[start]), int(offsets[stop]))
        return StructureTable(
            keys=self.keys.part(start, stop),
            groups=self.groups.part(start, stop),
            labels={n: array[atoms if _kind(n).per_atom else some] for n, array in self.labels.items()},
            **{name: getattr(self, name)[some] for name in ("num_atoms", "cell", "pbc", "charge", "multiplicity")},
            **{name: getattr(self, name)[atoms] for name in ("numbers", "positions")},
        )

    def __getitem__(self, index: int) -> Structure:
        """Return one structure; its arrays are views."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._one(index, slice(*self.offsets[index : index + 2].tolist()))

    def __iter__(self) -> Iterator[Structure]:
        offsets = self.offsets.tolist()
        for index in range(len(self)):
            yield self._one(index, slice(offsets[index], offsets[index + 1]))

    def _one(self, index: int, atoms: slice) -> Structure:
        found: dict[str, dict[str, Any]] = {}
        for name, array in self.labels.items():
            kind, _, fidelity = name.partition(".")
            value = array[atoms if LABEL_KINDS[kind].per_atom else index]
            if not np.isnan(value).all():
                found.setdefault(fidelity, {})[kind] = float(value) if kind == "energy" else value
        return Structure(
            key=self.keys[index],
            group=self.groups[index],
            numbers=self.numbers[atoms],
            positions=self.positions[atoms],
            cell=self.cell[index],
            pbc=self.pbc[index],
            charge=int(self.charge[index]),
            multiplicity=int(self.multiplicity[index]),
            labels={fidelity: Labels(**found[fidelity]) for fidelity in sorted(found)},
        )

    def label(self, name: str) -> Array:
        """Return the label "<kind>.<fidelity>" of every structure or atom, NaN where there is none."""
        if name in self.labels:
            return self.labels[name]
        kind = _kind(name)
        return np.full((len(self.numbers) if kind.per_atom else len(self), *kind.shape), np.nan, kind.dtype)


def joined(
    tables: Iterable[StructureTable],
    max_structures: int,
    max_atoms: float = math.inf,
    *,
    enough: float = math.inf,
) -> Iterator[StructureTable]:
    """Yield the same structures in fewer tables: consecutive ones joined up to the limits, empty ones dropped.

    A table that is larger stays as it is, and so does one of `enough` structures, because joining copies.
    """
    held: list[StructureTable] = []
    structures = atoms = 0
    for table in tables:
        is_enough = len(table) >= enough
        structures, atoms = structures + len(table), atoms + len(table.numbers)
        if held and (is_enough or structures > max_structures or atoms > max_atoms):
            yield StructureTable.concatenate(held)
            held, structures, atoms = [], len(table), len(table.numbers)
        if is_enough:
            yield table
            structures = atoms = 0
        elif len(table):
            held.append(table)
    if held:
        yield StructureTable.concatenate(held)


def faults(table: StructureTable) -> dict[int, str]:
    """Return index -> reason of every structure that `rung.data.structure.validate` refuses."""
    if not len(table):
        return {}
    if int(table.num_atoms.min()) < 1:
        empty, full = np.flatnonzero(table.num_atoms < 1), np.flatnonzero(table.num_atoms > 0)
        found = {int(full[m]): reason for m, reason in faults(table.take(full)).items()}
        return dict(sorted((found | {int(m): _reason(table, int(m)) for m in empty}).items()))
    # Whole arrays first: a look at each row costs ten times as much and is needed only where something is wrong.
    bad = np.zeros(len(table), np.bool_)
    if table.numbers.min() < 1 or table.numbers.max() > MAX_ATOMIC_NUMBER:
        bad |= table.any_atom((table.numbers < 1) | (table.numbers > MAX_ATOMIC_NUMBER))
    if not np.isfinite(table.positions).all():
        bad |= table.any_atom(_any(~np.isfinite(table.positions)))
    bad |= _any(~np.isfinite(table.cell))
    periodic = table.pbc.any(axis=1)
    if periodic.any():
        with np.errstate(invalid="ignore", over="ignore"):  # of a cell that is not finite
            bad[periodic] |= np.abs(np.linalg.det(table.cell[periodic].astype(np.float64))) < 1e-6
    bad |= table.multiplicity < 1
    for name, array in table.labels.items():
        bad |= _label_faults(table, name, array)
    return {int(m): reason for m in np.flatnonzero(bad) if (reason := _reason(table, int(m)))}


def _label_faults(table: StructureTable, name: str, array: Array) -> Mask:
    """Return the structures of which a label is there in part, infinite, or too large to be a force."""
    per_atom = _kind(name).per_atom

    def of_structures(rows: Mask) -> Mask:
        return table.any_atom(_any(rows)) if per_atom else _any(rows)

    bad = np.zeros(len(table), np.bool_)
    if not np.isfinite(array).all():
        bad |= of_structures(np.isinf(array)) | (of_structures(~np.isfinite(array)) & table.has(*name.split(".", 1)))
    if per_atom and array.size and max(np.fmax.reduce(array, axis=None), -np.fmin.reduce(array, axis=None)) > MAX_FORCE:
        bad |= of_structures(np.abs(array) > MAX_FORCE)
    return bad


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return where each of consecutive runs begins, and where the last ends: cumulative sums from 0."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_index(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the concatenation of the ranges starts[m]..starts[m] + lengths[m]."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def cut_by_atoms(num_atoms: NDArray[np.integer], max_atoms: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of consecutive structures of at most `max_atoms` atoms in all, or of one larger structure."""
    offsets, start = offsets_of(num_atoms), 0
    while start < len(num_atoms):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + max_atoms, "right")) - 1)
        yield start, stop
        start = stop


def _any(values: Mask) -> Mask:
    """Return which rows have a value that holds; [len(values)]."""
    found: Mask = np.asarray(values.reshape(len(values), int(np.prod(values.shape[1:]))).any(axis=1))
    return found


def _every(values: Mask) -> Mask:
    return ~_any(~values)


def pair_grid(num_atoms: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the atoms (i, j) of all n^2 ordered pairs of each structure, i = j included, in the order of (i, j)."""
    sizes = np.repeat(num_atoms, num_atoms)  # of each atom's structure
    first = np.repeat(np.arange(len(sizes)), sizes)
    return first, ragged_index(np.repeat(offsets_of(num_atoms)[:-1], num_atoms), sizes)


def _reason(table: StructureTable, index: int) -> str:
    try:
        validate(table[index])
    except ValueError as error:
        return str(error)
    return ""


def _joined(strings: Sequence[Strings]) -> Strings:
    lengths = np.concatenate([np.diff(item.offsets) for item in strings])
    return Strings(np.concatenate([item.text for item in strings]), offsets_of(lengths))


def _kind(name: str) -> LabelKind:
    kind = LABEL_KINDS.get(name.partition(".")[0])
    if kind is None or "." not in name:
        expected = f"'<kind>.<fidelity>' with a kind of {', '.join(LABEL_KINDS)}"
        raise ValueError(f"labels: expected {expected}, found '{name}'")
    return kind


def _label(name: str, value: ArrayLike, M: int, N: int) -> Array:
    kind = _kind(name)
    return _shaped(name, np.asarray(value, kind.dtype), (N if kind.per_atom else M, *kind.shape))


def _label_rows(structures: Sequence[Structure], fidelity: str, kind: str) -> Array | None:
    dtype, per_atom, tail = LABEL_KINDS[kind]
    values = [getattr(s.labels.get(fidelity, Labels()), kind) for s in structures]
    if all(value is None for value in values):
        return None
    shapes = [(s.num_atoms, *tail) if per_atom else (1, *tail) for s in structures]
    rows = [
        np.full(shape, np.nan, dtype) if value is None else np.asarray(value, dtype).reshape(shape)
        for value, shape in zip(values, shapes, strict=True)
    ]
    return np.concatenate(rows)


def _shaped(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return the array in `shape`, from [N, ...] or [M, n, ...]; raise ValueError when it does not hold as much."""
    tail = shape[1:]
    if array.size != np.prod(shape, dtype=np.int64) or array.shape[array.ndim - len(tail) :] != tail:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    return np.ascontiguousarray(array.reshape(shape))


def _per_structure(name: str, value: ArrayLike, dtype: type[np.generic], shape: tuple[int, ...]) -> Array:
    array = np.asarray(value, dtype)
    if array.ndim < len(shape) and array.shape in ((), shape[1:]):
        return np.array(np.broadcast_to(array, shape), order="C")  # else structures would lie innermost
    return _shaped(name, array, shape)


def _whole(name: str, value: ArrayLike, dtype: type[np.integer[Any]]) -> Array:
    array = np.asarray(value)
    if array.size == 0:
        return array.astype(dtype)
    if array.dtype == dtype:
        return array
    limits = np.iinfo(dtype)
    with np.errstate(invalid="ignore"):
        if array.dtype.kind not in "iufb" or (np.round(array) != array).any():
            raise ValueError(f"{name}: expected whole numbers, found {array.dtype} {array.reshape(-1)[:4].tolist()}")
    if array.min() < limits.min or array.max() > limits.max:
        raise ValueError(f"{name}: expected {limits.min}..{limits.max}, found {array.min()}..{array.max()}")
    return array.astype(dtype)
