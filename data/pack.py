"""A pack: many structures as flat arrays in one safetensors buffer, the unit that shards store and streams deal.

Arrays of a pack with M structures and N atoms in all:

    pack_version uint8 [1]      num_atoms int32 [M]       numbers uint8 [N]        positions float32 [N, 3]
    cell float32 [M, 3, 3]      pbc bool [M, 3]           charge int8 [M]          multiplicity uint8 [M]
    key, group uint8 [bytes]    key_offsets, group_offsets int64 [M + 1]           (UTF-8, concatenated)
    energy.<fidelity> float64 [M]                         forces.<fidelity> float32 [N, 3]
    stress.<fidelity> float32 [M, 3, 3]                   dipole.<fidelity> float32 [M, 3]

A label that a structure does not have is NaN; a label that no structure of the pack has is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rung.data.fidelity import check_name
from rung.data.structure import Labels, Structure, validate

PACK_VERSION = 1

Array = NDArray[Any]

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
_LABELS: dict[str, tuple[type[np.generic], str, tuple[int, ...]]] = {
    "energy": (np.float64, "M", ()),
    "forces": (np.float32, "N", (3,)),
    "stress": (np.float32, "M", (3, 3)),
    "dipole": (np.float32, "M", (3,)),
}


def encode(structures: Sequence[Structure]) -> bytes:
    """Return the pack of `structures`; the same structures always give the same bytes.

    Raises ValueError for an empty sequence, and for a structure that `rung.data.structure.validate` refuses.
    """
    if not structures:
        raise ValueError("pack: expected at least one structure, found none")
    for structure in structures:
        validate(structure)
    arrays: dict[str, Array] = {
        "pack_version": np.array([PACK_VERSION], np.uint8),
        "num_atoms": np.array([s.num_atoms for s in structures], np.int32),
        "numbers": np.concatenate([s.numbers for s in structures]).astype(np.uint8),
        "positions": np.concatenate([s.positions for s in structures]),
        "cell": np.stack([s.cell for s in structures]),
        "pbc": np.stack([s.pbc for s in structures]).astype(np.bool_),
        "charge": np.array([s.charge for s in structures], np.int8),
        "multiplicity": np.array([s.multiplicity for s in structures], np.uint8),
    }
    arrays["key"], arrays["key_offsets"] = _encode_strings([s.key for s in structures])
    arrays["group"], arrays["group_offsets"] = _encode_strings([s.group for s in structures])
    for fidelity in sorted({name for s in structures for name in s.labels}):
        check_name(fidelity)
        for label in _LABELS:
            if (array := _label_array(structures, fidelity, label)) is not None:
                arrays[f"{label}.{fidelity}"] = array
    return save(arrays)


def decode(data: bytes, source: str, fidelity: str | None = None) -> list[Structure]:
    """Return the structures of a pack; their arrays are views of one buffer.

    With `fidelity`, return only the structures that carry it, with the labels of no other.
    `source` says in errors where the bytes came from. Raises ValueError when they are not a well-formed pack.
    """
    try:
        arrays = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
        raise ValueError(f"{source}: not a readable pack ({error}); the file is damaged, fetch it again") from error
    _check_version(arrays, source)
    sizes = _check_arrays(arrays, source)
    keys = _decode_strings(arrays, "key", source)
    groups = _decode_strings(arrays, "group", source)
    ends = np.cumsum(arrays["num_atoms"], dtype=np.int64).tolist()
    starts = [0, *ends[:-1]]
    present: dict[tuple[str, str], list[bool]] = {}
    for name, array in arrays.items():
        label, _, of = name.partition(".")
        if label in _LABELS and fidelity in (None, of):
            present[label, of] = _present(array, starts if _LABELS[label][1] == "N" else None)
    structures = []
    for m in range(sizes["M"]):
        atoms = slice(starts[m], ends[m])
        found: dict[str, dict[str, Any]] = {}
        for (label, of), has_label in present.items():
            if has_label[m]:
                value = arrays[f"{label}.{of}"][atoms if _LABELS[label][1] == "N" else m]
                found.setdefault(of, {})[label] = float(value) if label == "energy" else value
        if fidelity is not None and not found:
            continue
        structures.append(
            Structure(
                key=keys[m],
                group=groups[m],
                numbers=arrays["numbers"][atoms],
                positions=arrays["positions"][atoms],
                cell=arrays["cell"][m],
                pbc=arrays["pbc"][m],
                charge=int(arrays["charge"][m]),
                multiplicity=int(arrays["multiplicity"][m]),
                labels={name: Labels(**found[name]) for name in sorted(found)},
            )
        )
    return structures


def _present(array: Array, starts: Sequence[int] | None) -> list[bool]:
    """Return which structures have a label: their rows, which begin at `starts` if not one each, are not all NaN."""
    has_value: Any = ~np.isnan(array).reshape(len(array), -1).all(axis=1)
    if starts is not None:
        has_value = np.logical_or.reduceat(has_value, starts)
    present: list[bool] = has_value.tolist()
    return present


def _label_array(structures: Sequence[Structure], fidelity: str, label: str) -> Array | None:
    dtype, axis, tail = _LABELS[label]
    values = [getattr(s.labels.get(fidelity, Labels()), label) for s in structures]
    if all(value is None for value in values):
        return None
    shapes = [(s.num_atoms, *tail) if axis == "N" else (1, *tail) for s in structures]
    rows = [
        np.full(shape, np.nan, dtype) if value is None else np.asarray(value, dtype).reshape(shape)
        for value, shape in zip(values, shapes, strict=True)
    ]
    return np.concatenate(rows)


def _encode_strings(strings: Sequence[str]) -> tuple[Array, Array]:
    encoded = [text.encode() for text in strings]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _decode_strings(arrays: dict[str, Array], name: str, source: str) -> list[str]:
    text, offsets = arrays[name].tobytes(), arrays[f"{name}_offsets"].tolist()
    if offsets[0] != 0 or offsets[-1] != len(text) or sorted(offsets) != offsets:
        raise ValueError(f"{source}: {name}_offsets: expected to rise from 0 to {len(text)}, found otherwise")
    try:
        return [text[start:end].decode() for start, end in zip(offsets, offsets[1:], strict=False)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: {name}: expected UTF-8 text ({error})") from error


def _check_version(arrays: dict[str, Array], source: str) -> None:
    if "pack_version" not in arrays:
        raise ValueError(f"{source}: expected a Rung pack, found a safetensors file without 'pack_version'")
    if (version := arrays["pack_version"].tolist()) != [PACK_VERSION]:
        raise ValueError(f"{source}: pack version {version}, this Rung reads [{PACK_VERSION}]; update Rung")


def _check_arrays(arrays: dict[str, Array], source: str) -> dict[str, int]:
    """Return the length of every axis, after holding every array to its dtype and shape."""
    for name in _ARRAYS:
        if name not in arrays:
            raise ValueError(f"{source}: pack: array '{name}' is missing")
    num_atoms = arrays["num_atoms"]
    sizes = {"M": num_atoms.size, "N": int(num_atoms.sum(dtype=np.int64)), "M+1": num_atoms.size + 1}
    if num_atoms.size == 0 or num_atoms.min() < 1:
        raise ValueError(f"{source}: num_atoms: expected at least one structure of at least one atom, found otherwise")
    sizes |= {"bytes of key": arrays["key"].size, "bytes of group": arrays["group"].size, "1": 1}
    for name, array in arrays.items():
        layout = _ARRAYS.get(name) or _LABELS.get(name.partition(".")[0])
        if layout is None:
            raise ValueError(f"{source}: pack: array '{name}' is not one that this Rung knows; update Rung")
        dtype, axis, tail = layout
        shape = (sizes[axis], *tail)
        if array.shape != shape or array.dtype != dtype:
            expected = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"{source}: {name}: expected {expected}, found {array.dtype} {array.shape}")
    return sizes
