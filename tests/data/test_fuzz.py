"""Whatever bytes a pack, a shard or a manifest holds: it is read, or it is a ValueError, in memory of its own size."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rung.data.fidelity import Fidelity
from rung.data.manifest import MANIFEST_FILE, FidelityEntry, Manifest, read_manifest, write_manifest
from rung.data.pack import PACK_VERSION, arrays_of, decode, encode
from rung.data.shard import ShardInfo, read_packs, tar_bytes
from rung.data.structure import Labels, Structure, validate
from rung.data.table import StructureTable, faults
from rung.data.tar import members

SCALE = int(os.environ.get("RUNG_FUZZ_SCALE", "1"))  # for a longer campaign
KNOWN_DTYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "F8_E4M3"]


def fuzz(num_examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=num_examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def table() -> StructureTable:
    rng = np.random.default_rng(0)
    return StructureTable.of(
        [
            Structure(
                key=f"molecule {index} é",
                group=f"g{index // 2}",
                numbers=np.arange(1, index + 2, dtype=np.uint8),
                positions=rng.normal(size=(index + 1, 3)).astype(np.float32),
                cell=np.eye(3, dtype=np.float32) * 9,
                pbc=np.array([True, False, True]),
                labels={"pbe": Labels(-1.5 * index, rng.normal(size=(index + 1, 3)).astype(np.float32))},
            )
            for index in range(4)
        ]
    )


def manifest() -> Manifest:
    shard = ShardInfo("train-000000.tar", "0" * 64, 10240, 2, 4, 10, 12, "train", {"pbe": [2, 2]})
    entry = FidelityEntry(
        Fidelity("pbe", "PBE", "def2-svp"), {"train": 4}, {"train": 4}, "train", {1: -13.6}, "isolated_atoms", 0.1
    )
    return Manifest(
        name="fuzzed",
        version="1",
        source="https://example.org/é",
        doi="",
        licence="CC0-1.0",
        citation="A. Author: a title, with 'quotes'",
        description="Several words of text",
        cutoff=5.0,
        fidelities={"pbe": entry},
        elements={1: 4, 8: 6},
        splits=("train",),
        shards=[shard],
    )


PACK = encode(table())
SHARD = tar_bytes([(f"train-{index:06d}.safetensors", PACK) for index in range(3)])


@st.composite
def mutated(draw: st.DrawFn, original: bytes, *, focus: int | None = None) -> bytes:
    """Draw `original` with a few bytes replaced, inserted, removed or repeated, mostly within the first `focus`."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        last = len(data) if focus is None or draw(st.integers(0, 3)) == 0 else min(focus, len(data))
        at = draw(st.integers(0, last))
        how = draw(st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut"]))
        length = draw(st.integers(1, 64))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "replace":
            value = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(value)] = value
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif how == "remove":
            del data[at : at + length]
        elif how == "repeat":
            data[at:at] = data[at : at + length]
        elif how == "cut" and draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


def read_pack(data: bytes) -> None:
    """Decode, look at every value, and hold what passes as valid to the definition of it, structure by structure."""
    try:
        decoded = decode(data, "fuzz")
    except ValueError as error:
        assert str(error).startswith("fuzz: ")
        return
    refused = faults(decoded)
    for index, structure in enumerate(decoded):
        try:
            validate(structure)
        except ValueError:
            assert index in refused
        else:
            assert index not in refused
    if not refused:
        assert len(decode(encode(decoded), "again")) == len(decoded)


def read_shard(data: bytes, path: Path) -> None:
    try:
        found = members(io.BytesIO(data), "fuzz")
    except ValueError as error:
        assert str(error).startswith("fuzz: member ")
        found = []
    for name, offset, size in found:
        assert name.endswith(".safetensors") and ".." not in name.split("/") and not name.startswith("/")
        assert offset >= 512 and offset + size <= len(data)
        read_pack(data[offset : offset + size])
    path.write_bytes(data)
    try:
        assert len(list(read_packs(path))) == len(found)
    except ValueError as error:
        assert str(error).startswith(str(path))


def read_text(data: bytes, folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_bytes(data)
    try:
        read = read_manifest(folder)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 4000
        return
    write_manifest(read, folder)
    assert read_manifest(folder) == read


def pack_of_header(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


@fuzz(300)
@given(st.binary(max_size=300))
def test_packs_of_random_bytes(data: bytes) -> None:
    read_pack(data)
    read_pack(len(data).to_bytes(8, "little") + data)


@fuzz(300)
@given(mutated(PACK, focus=1400))
def test_packs_with_changed_bytes(data: bytes) -> None:
    read_pack(data)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Draw a safetensors file with the names of a pack and others, any dtypes, shapes and places."""
    names = [
        "pack_version",
        "num_atoms",
        "numbers",
        "positions",
        "key",
        "key_offsets",
        "energy.pbe",
        "forces.",
        "a",
        "",
    ]
    big = st.sampled_from([2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, 2**64, -1])
    length = st.one_of(st.integers(0, 64), big)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*KNOWN_DTYPES, "C64", "", 3]),
            "shape": st.lists(length, max_size=4),
            "data_offsets": st.lists(length, min_size=2, max_size=2),
        }
    )
    chosen = draw(st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=5)), entry, max_size=5))
    return pack_of_header(
        chosen, draw(st.binary(max_size=64)), draw(st.one_of(st.none(), big.filter(lambda n: 0 <= n < 2**64)))
    )


@fuzz(100)
@given(headers())
def test_safetensors_headers(data: bytes) -> None:
    read_pack(data)


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """Draw a pack of which some arrays have other dtypes, shapes and values, or are missing."""
    chosen: dict[str, Any] = arrays_of(table()) | {"pack_version": np.array([PACK_VERSION], np.uint8)}
    dtypes = ["bool", "uint8", "int8", "int32", "int64", "uint64", "float16", "float32", "float64"]
    extremes = [0, 1, -1, 127, 255, 2**31 - 1, -(2**31), 2**62, np.nan, np.inf, -np.inf, 1e38, 1e-40, 1e300]
    for name in draw(st.lists(st.sampled_from([*chosen, "energy.b", "stress.b", "dipole.b"]), max_size=3, unique=True)):
        array = np.array(chosen.get(name, np.zeros(4)))
        how = draw(st.sampled_from(["remove", "value", "dtype", "shape", "shorter"]))
        if how == "remove":
            chosen.pop(name, None)
            continue
        with np.errstate(all="ignore"):
            if how == "value":
                wide = array.reshape(-1).astype(np.float64)
                wide[draw(st.integers(0, max(0, wide.size - 1))) :][:2] = draw(st.sampled_from(extremes))
                array = _cast(wide, str(array.dtype)).reshape(array.shape)
            elif how == "dtype":
                array = _cast(array, draw(st.sampled_from(dtypes)))
            elif how == "shape":
                array = array.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])))
            else:
                array = array[: draw(st.integers(0, len(array)))]
        chosen[name] = np.ascontiguousarray(array)
    return bytes(save(chosen))


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        if np.dtype(dtype).kind in "iu":
            limits = np.iinfo(dtype)
            return np.nan_to_num(np.clip(array.astype(np.float64), limits.min, limits.max / 2)).astype(dtype)
        return array.astype(dtype)


@fuzz(300)
@given(arrays())
def test_packs_of_other_arrays(data: bytes) -> None:
    read_pack(data)


@pytest.mark.parametrize("between", [[2**63 - 1, -2, 52], [-1, 0, 0], [53, 0, 0], [30, 20, 40], [-(2**63), 0, 52]])
def test_offsets_of_text_that_do_not_rise(between: list[int]) -> None:
    """The differences of the first are positive, and sum to what they should, in arithmetic modulo 2^64."""
    chosen: dict[str, Any] = arrays_of(table()) | {"pack_version": np.array([PACK_VERSION], np.uint8)}
    assert len(chosen["key"]) == 52
    with pytest.raises(ValueError, match="fuzz: key_offsets: expected to rise from 0 to 52"):
        decode(save(chosen | {"key_offsets": np.array([0, *between, 52], np.int64)}), "fuzz")


@fuzz(150)
@given(mutated(SHARD, focus=2200))
def test_shards_with_changed_bytes(tmp_path: Path, data: bytes) -> None:
    read_shard(data, tmp_path / "x.tar")


@st.composite
def signed_headers(draw: st.DrawFn) -> bytes:
    """Draw a shard with changed fields in its headers, under checksums that fit."""
    data = bytearray(SHARD)
    step = 512 + -(-len(PACK) // 512) * 512
    for number in draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)):
        start = number * step
        field, length = draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (157, 100)]))
        texts = st.sampled_from([b"../a", b"/a", b"a\0b.safetensors", b"\x80\xff", b"77777777777\0", b"-1", b"x", b"L"])
        value = draw(st.one_of(texts, st.binary(min_size=1, max_size=length)))[:length]
        data[start + field : start + field + len(value)] = value
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


@fuzz(150)
@given(signed_headers())
def test_shards_with_changed_headers(tmp_path: Path, data: bytes) -> None:
    read_shard(data, tmp_path / "x.tar")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("manifest")
    write_manifest(manifest(), folder)
    return (folder / MANIFEST_FILE).read_bytes()


@fuzz(150)
@given(st.data())
def test_manifests_with_changed_bytes(tmp_path: Path, text: bytes, data: st.DataObject) -> None:
    read_text(data.draw(mutated(text)), tmp_path)


def yaml_values() -> st.SearchStrategy[Any]:
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.binary(max_size=4),
        st.sampled_from(["pbe", "train", "1e5", "0x_", "1:30", "<<", "=", "~"]),
    )
    keys = st.one_of(st.integers(-1, 120), st.sampled_from(["pbe", "train", "name", "descriptor", "file"]), scalars)
    return st.recursive(
        scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3))
    )


@fuzz(150)
@given(yaml_values())
def test_manifests_of_random_documents(tmp_path: Path, value: Any) -> None:
    read_text(yaml.safe_dump(value, allow_unicode=True).encode(), tmp_path)


@fuzz(200)
@given(st.data(), yaml_values())
def test_manifests_with_a_random_value(tmp_path: Path, text: bytes, data: st.DataObject, value: Any) -> None:
    document = yaml.safe_load(text)
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    read_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode(), tmp_path)


@fuzz(200)
@given(st.text(alphabet="ab:-[]{},&*!|>'\"#%?@ \n\t0.~<=é\0\ud7ff", max_size=40))
@example("- ? a\n  : &b\n")
def test_manifests_of_random_text(tmp_path: Path, text: str) -> None:
    read_text(b"format: 1\n" + text.encode(), tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little"),
        pack_of_header({"num_atoms": {"dtype": "I32", "shape": [2**58], "data_offsets": [0, 2**60]}}),
        pack_of_header({"num_atoms": {"dtype": "I32", "shape": [2**60, 2**60, 0], "data_offsets": [0, 0]}}),
        pack_of_header(b"[" * 100_000),
        pack_of_header(b'{"__metadata__":' * 10_000),
        save({**{f"a{i}": np.zeros(1) for i in range(100)}, "num_atoms": np.full(3, 2**31 - 1, np.int32)}),
    ],
)
def test_a_pack_takes_memory_of_its_size_only(data: bytes) -> None:
    assert peak(lambda: read_pack(data)) < 1_000_000 + 20 * len(data)


def test_a_tar_takes_memory_of_its_headers_only() -> None:
    data = tar_bytes([(f"{index}.safetensors", bytes(1_000_000)) for index in range(10)])
    assert peak(lambda: members(io.BytesIO(data), "fuzz")) < 200_000  # BytesIO shares the bytes


@pytest.mark.parametrize(
    "line", [b"- []\n", b"[" * 50 + b"\n", b"- &a [*a, *a]\n", b"a: {b: 1}\n", b"? a\n", b"x" * 99]
)
def test_a_manifest_takes_memory_of_its_size_only(tmp_path: Path, line: bytes) -> None:
    data = line * (40_000 // len(line))
    assert peak(lambda: read_text(data, tmp_path)) < 1_000_000 + 60 * len(data)


def peak(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that Python and numpy held at once for `run`."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
