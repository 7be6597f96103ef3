"""Packs: what goes in comes out, for any structures; damaged bytes are named."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from rung.data.pack import decode, encode
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    n = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    periodic = draw(st.booleans())
    labels = {}
    for fidelity in draw(st.sets(st.sampled_from(["gfn2_xtb", "pbe", "ccsdt_ccpvdz"]))):
        has = draw(st.tuples(*[st.booleans()] * 4).filter(any))
        labels[fidelity] = Labels(
            energy=float(rng.normal(scale=1e5)) if has[0] else None,
            forces=rng.normal(size=(n, 3)).astype(np.float32) if has[1] else None,
            stress=rng.normal(size=(3, 3)).astype(np.float32) if has[2] else None,
            dipole=rng.normal(size=3).astype(np.float32) if has[3] else None,
        )
    return Structure(
        key=draw(st.text(max_size=8)),
        group=draw(st.text(max_size=8)),
        numbers=rng.integers(1, 119, n).astype(np.uint8),
        positions=rng.normal(size=(n, 3)).astype(np.float32),
        cell=np.eye(3, dtype=np.float32) * 5 if periodic else np.zeros((3, 3), np.float32),
        pbc=np.array([periodic, False, periodic]),
        charge=draw(st.integers(-128, 127)),
        multiplicity=draw(st.integers(1, 255)),
        labels=labels,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(structures(), min_size=1, max_size=6))
def test_round_trip(originals: list[Structure]) -> None:
    data = encode(StructureTable.of(originals))
    copies = decode(data, "test")
    assert encode(copies) == data
    for original, copy in zip(originals, copies, strict=True):
        np.testing.assert_equal(asdict(copy), asdict(original))
        assert copy.positions.dtype == np.float32 and copy.pbc.dtype == np.bool_


def single() -> Structure:
    return Structure("a", "g", np.array([1], np.uint8), np.zeros((1, 3), np.float32), labels={"pbe": Labels(-13.6)})


def test_labels_without_any_value_are_absent() -> None:
    unlabelled = Structure("b", "g", *_one_atom(), labels={"pbe": Labels()})
    copies = decode(encode(StructureTable.of([single(), unlabelled])), "test")
    assert [list(copy.labels) for copy in copies] == [["pbe"], []]


def _one_atom() -> tuple[np.ndarray, np.ndarray]:
    return np.array([1], np.uint8), np.zeros((1, 3), np.float32)


def test_refuses_to_store_what_has_no_place_in_a_pack() -> None:
    with pytest.raises(ValueError, match="name 'B3LYP': expected lower-case"):
        encode(StructureTable.of([Structure("b", "g", *_one_atom(), labels={"B3LYP": Labels(-1.0)})]))
    with pytest.raises(ValueError, match="expected at least one structure, found none"):
        encode(StructureTable.of([]))


def test_damaged_bytes_name_their_source() -> None:
    data = encode(StructureTable.of([single()]))
    for damaged in (b"", data[:40], data[:-1], b"not a pack at all"):
        with pytest.raises(ValueError, match="train-000000.tar: not a readable pack .* damaged"):
            decode(damaged, "train-000000.tar")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pack_version", np.array([9], np.uint8), r"pack version \[9\], this Rung reads \[1\]; update Rung"),
        ("pack_version", np.zeros(0, np.uint8), r"pack version \[\], this Rung reads \[1\]; update Rung"),
        ("pack_version", None, "found a safetensors file without 'pack_version'"),
        ("positions", None, "array 'positions' is missing"),
        ("positions", np.zeros((2, 3), np.float32), r"positions: expected float32 \(1, 3\), found float32 \(2, 3\)"),
        ("energy.pbe", np.zeros(1, np.float32), r"energy.pbe: expected float64 \(1,\), found float32"),
        ("num_atoms", np.array([0], np.int32), "num_atoms: expected at least one"),
        ("key_offsets", np.array([0, 7], np.int64), "key_offsets: expected to rise from 0 to 1"),
        ("key", np.array([255], np.uint8), "test: key: expected UTF-8 text"),
        ("num_atoms", np.array([[1]], np.int32), "num_atoms: expected at least one"),
        ("num_atoms", np.array([1], np.int64), "num_atoms: expected at least one"),
        ("energy", np.zeros(1), "array 'energy' is not one that this Rung knows"),
        ("colour", np.zeros(1, np.float32), "array 'colour' is not one that this Rung knows"),
    ],
)
def test_malformed_packs_are_refused(name: str, value: np.ndarray | None, message: str) -> None:
    arrays = load(encode(StructureTable.of([single()])))
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(ValueError, match=message):
        decode(save(arrays), "test")
