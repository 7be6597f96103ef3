"""A pack: a StructureTable in one safetensors buffer, the unit that shards store and streams read.

Arrays of a pack with M structures and N atoms in all:

    pack_version uint8 [1]      num_atoms int32 [M]       numbers uint8 [N]        positions float32 [N, 3]
    cell float32 [M, 3, 3]      pbc bool [M, 3]           charge int8 [M]          multiplicity uint8 [M]
    key, group uint8 [bytes]    key_offsets, group_offsets int64 [M + 1]           (UTF-8, concatenated)
    energy.<fidelity> float64 [M]                         forces.<fidelity> float32 [N, 3]
    stress.<fidelity> float32 [M, 3, 3]                   dipole.<fidelity> float32 [M, 3]

A label that a structure does not have is NaN; a label that no structure of the pack has is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rung.data.fidelity import check_name
from rung.data.table import LABEL_KINDS, Array, Strings, StructureTable

PACK_VERSION = 1

# name -> (dtype, name of the first axis, lengths of the axes after it)
_ARRAYS: dict[str, tuple[type[np.generic], str, tuple[int, ...]]] = {
    "pack_version": (np.uint8, "1", ()),
    "num_atoms": (np.int32, "M", ()),
    "numbers": (np.uint8, "N", ()),
    "positions": (np.float32, "N", (3,)),
    "cell": (np.float32, "M", (3, 3)),
    "pbc": (np.bool_, "M", (3,)),
    "charge": (np.int8, "M", ()),
    "multiplicity": (np.uint8, "M", ()),
    "key": (np.uint8, "bytes of key", ()),
    "key_offsets": (np.int64, "M+1", ()),
    "group": (np.uint8, "bytes of group", ()),
    "group_offsets": (np.int64, "M+1", ()),
}
_LABELS = {name: (kind.dtype, "N" if kind.per_atom else "M", kind.shape) for name, kind in LABEL_KINDS.items()}
_SAME_IN_TABLE = ("num_atoms", "numbers", "positions", "cell", "pbc", "charge", "multiplicity")


def encode(table: StructureTable) -> bytes:
    """Return the pack of `table`, whose values are not looked at; the same structures always give the same bytes.

    Raises ValueError for an empty table and for a name that cannot be a fidelity's.
    """
    if not len(table):
        raise ValueError("pack: expected at least one structure, found none")
    for fidelity in table.fidelities:
        check_name(fidelity)
    arrays = arrays_of(table) | {"pack_version": np.array([PACK_VERSION], np.uint8)}
    return save_arrays(arrays)


def save_arrays(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays as safetensors; its own `save` stores the memory of an array whose rows are not contiguous."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def arrays_of(table: StructureTable) -> dict[str, Array]:
    """Return the arrays of a table by the names above, but for the version."""
    arrays: dict[str, Array] = {name: getattr(table, name) for name in _SAME_IN_TABLE}
    for name, strings in (("key", table.keys), ("group", table.groups)):
        arrays[name], arrays[f"{name}_offsets"] = strings.text, strings.offsets
    return arrays | {name: array for name, array in table.labels.items() if not np.isnan(array).all()}


def table_of(arrays: Mapping[str, Array], source: str) -> StructureTable:
    """Return the table of arrays by the names above; `source` says in errors where they came from."""
    return StructureTable(
        keys=_strings(arrays, "key", source),
        groups=_strings(arrays, "group", source),
        labels={name: array for name, array in sorted(arrays.items()) if name not in _ARRAYS},
        **{name: arrays[name] for name in _SAME_IN_TABLE},
    )


def decode(data: bytes, source: str) -> StructureTable:
    """Return the structures of a pack; `source` says in errors where the bytes came from.

    Raises ValueError when the bytes are not a well-formed pack. The values are not looked at: see `faults`.
    """
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError) as error:  # KeyError: a dtype that numpy does not have
        raise ValueError(f"{source}: not a readable pack ({error}); the file is damaged, fetch it again") from error
    _check_version(arrays, source)
    _check_arrays(arrays, source)
    return table_of(arrays, source)


def _strings(arrays: Mapping[str, Array], name: str, source: str) -> Strings:
    text, offsets = arrays[name], arrays[f"{name}_offsets"]
    if offsets[0] != 0 or offsets[-1] != len(text) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{source}: {name}_offsets: expected to rise from 0 to {len(text)}, found otherwise")
    starts = text[offsets[:-1][offsets[:-1] < len(text)]]
    try:
        text.tobytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: {name}: expected UTF-8 text ({error})") from error
    if ((starts & 0xC0) == 0x80).any():  # a continuation byte
        raise ValueError(f"{source}: {name}_offsets: expected to point at characters, found one cut in two")
    return Strings(text, offsets)


def _check_version(arrays: dict[str, Array], source: str) -> None:
    if "pack_version" not in arrays:
        raise ValueError(f"{source}: expected a Rung pack, found a safetensors file without 'pack_version'")
    if (version := arrays["pack_version"].tolist()) != [PACK_VERSION]:
        raise ValueError(f"{source}: pack version {version}, this Rung reads [{PACK_VERSION}]; update Rung")


def _check_arrays(arrays: dict[str, Array], source: str) -> None:
    """Hold every array to its dtype and shape."""
    for name in _ARRAYS:
        if name not in arrays:
            raise ValueError(f"{source}: pack: array '{name}' is missing")
    num_atoms = arrays["num_atoms"]
    if num_atoms.ndim != 1 or num_atoms.dtype != np.int32 or num_atoms.size == 0 or num_atoms.min() < 1:
        raise ValueError(f"{source}: num_atoms: expected at least one structure of at least one atom, found otherwise")
    sizes = {"M": num_atoms.size, "N": int(num_atoms.sum(dtype=np.int64)), "M+1": num_atoms.size + 1}
    sizes |= {"bytes of key": arrays["key"].size, "bytes of group": arrays["group"].size, "1": 1}
    for name, array in arrays.items():
        kind, _, fidelity = name.partition(".")
        layout = _ARRAYS.get(name) or (_LABELS.get(kind) if fidelity else None)
        if layout is None:
            raise ValueError(f"{source}: pack: array '{name}' is not one that this Rung knows; update Rung")
        dtype, axis, tail = layout
        shape = (sizes[axis], *tail)
        if array.shape != shape or array.dtype != dtype:
            expected = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"{source}: {name}: expected {expected}, found {array.dtype} {array.shape}")
