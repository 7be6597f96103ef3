"""What a stranger's or a damaged dataset can hold: a manifest is refused with its place, `verify` names each fault."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

import rung.data.manifest
from rung.data.fidelity import Fidelity
from rung.data.manifest import MANIFEST_FILE, FidelityEntry, Manifest, read_manifest, write_manifest
from rung.data.pack import PACK_VERSION, arrays_of, encode
from rung.data.shard import ShardInfo, tar_bytes, write_shard
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable
from rung.data.verify import file_fault, verify


def structure(index: int, **changed: Any) -> Structure:
    """Molecule `index // 2` in one of its two geometries: `low` labels all, `high` the even ones, with an energy."""
    rng = np.random.default_rng(index)
    forces = rng.normal(size=(2, 3)).astype(np.float32)
    labels = {"low": Labels(float(rng.normal()), forces)}
    if index % 2 == 0:
        labels["high"] = Labels(float(index))
    made = Structure(
        key=f"s{index:02d}",
        group=f"molecule{index // 2}",
        numbers=np.array([1, 8], np.uint8),
        positions=np.array([[0, 0, 0], [1 + 0.01 * index, 0, 0]], np.float32),
        labels=labels,
    )
    return dataclasses.replace(made, **changed)


def write(folder: Path, parts: dict[str, list[Structure]]) -> Manifest:
    """Write a shard for each part and a manifest that counts with loops over the structures."""
    folder.mkdir(exist_ok=True)
    shards = [
        write_shard(
            [StructureTable.of(members[start : start + 3]) for start in range(0, len(members), 3)],
            folder / f"{part}.tar",
            part.split("-")[0],
        )
        for part, members in parts.items()
    ]
    counts: dict[str, dict[str, Counter[str]]] = {name: {"e": Counter(), "f": Counter()} for name in ("low", "high")}
    for part, members in parts.items():
        for member in members:
            for name, labels in member.labels.items():
                counts[name]["e"][part.split("-")[0]] += labels.energy is not None
                counts[name]["f"][part.split("-")[0]] += labels.forces is not None
    manifest = Manifest(
        name="diatomics",
        version="1",
        source="",
        doi="",
        licence="CC0-1.0",
        citation="",
        description="",
        cutoff=5.0,
        fidelities={
            name: FidelityEntry(Fidelity(name, name.upper()), dict(found["e"]), dict(found["f"]), "train", {1: -13.6})
            for name, found in counts.items()
        },
        elements=dict(Counter(int(z) for members in parts.values() for s in members for z in s.numbers)),
        splits=tuple(dict.fromkeys(part.split("-")[0] for part in parts)),
        shards=shards,
    )
    write_manifest(manifest, folder)
    return manifest


def plain() -> dict[str, list[Structure]]:
    made = [structure(index) for index in range(20)]
    return {"train-000000": made[:8], "train-000001": made[8:14], "val-000000": made[14:]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set", plain())
    return tmp_path / "set"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as a document."""
    path = folder / MANIFEST_FILE
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def put(value: Any, *place: str | int) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in place[:-1]:
            document = document[step]
        document[place[-1]] = value

    return change


class TestManifest:
    def test_round_trip(self, tmp_path: Path) -> None:
        manifest = write(tmp_path, plain())
        assert read_manifest(tmp_path) == manifest

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("format",), True, "format True, this Rung reads"),
            (("name",), 3, "name: expected text without control characters (numbers in quotes), found 3"),
            (("name",), "../etc", "name '../etc': expected lower-case"),
            (("version",), 1.0, "version: expected text"),
            (("description",), "\x1b[2J", "description: expected text without control characters"),
            (("citation",), ["a", "b"], "citation: expected text"),
            (("cutoff",), "5", "cutoff: expected a finite number, found '5'"),
            (("cutoff",), float("nan"), "cutoff: expected a finite number, found nan"),
            (("cutoff",), -5.0, "cutoff: expected a distance in angstrom, found -5.0"),
            (("cutoff",), True, "cutoff: expected a finite number, found True"),
            (("elements",), [1, 8], "elements: expected a mapping, found [1, 8]"),
            (("elements",), {"H": 4}, "elements.keys: expected a whole number from 0 to 2^63 - 1, found 'H'"),
            (("elements",), {1: -4}, "elements.1: expected a whole number from 0 to 2^63 - 1, found -4"),
            (("elements",), {119: 4}, "elements: expected atomic numbers 1..118, found 119"),
            (("splits",), "train", "splits: expected a list, found 'train'"),
            (("splits",), ["train", 3], "splits[1]: expected text"),
            (("splits",), ["train", "train"], "splits: expected distinct names, found 'train' 2 times"),
            (("splits",), ["Train"], "name 'Train': expected lower-case"),
            (("shards",), {}, "shards: expected a list, found {}"),
            (("shards",), None, "shards: expected a list, found None"),
            (("shards", 1), "train.tar", "shards[1]: expected a mapping, found 'train.tar'"),
            (("shards", 1, "bytes"), "10", "shards[1].bytes: expected a whole number from 0 to 2^63 - 1, found '10'"),
            (("shards", 1, "bytes"), 1e3, "shards[1].bytes: expected a whole number"),
            (("shards", 1, "bytes"), 10**40, "shards[1].bytes: expected a whole number"),
            (("shards", 1, "atoms"), None, "shards[1].atoms: expected a whole number"),
            (("shards", 1, "file"), "a/b.tar", "shards[1]: shard 'a/b.tar': expected the plain name"),
            (("shards", 1, "file"), "train-000000.tar", "shards: expected distinct names, found 'train-000000.tar' 2"),
            (("shards", 1, "sha256"), "0" * 63, "train-000001.tar: sha256: expected 64 hexadecimal digits, found '00"),
            (("shards", 1, "colour"), 1, "shards[1]: unknown key 'colour'; known: file, sha256"),
            (("shards", 1, "labels", "low", 0), "2", "shards[1].labels.low[0]: expected a whole number"),
            (("shards", 1, "labels", "low"), [1], "labels.low: expected counts, one for each of 2 packs, found 1"),
            (("shards", 1, "labels"), {"lo": [1, 1]}, "unknown fidelity 'lo'; known: low, high; did you mean 'low'"),
            (("fidelities",), {1: {}}, "fidelities.keys: expected text"),
            (("fidelities", "low"), [], "fidelities.low: expected a mapping, found []"),
            (("fidelities", "low"), {}, "fidelities.low: key 'descriptor' is missing"),
            (("fidelities", "low", "descriptor", "name"), "l", "fidelities.low: described under another name, 'l'"),
            (("fidelities", "low", "descriptor", "name"), "L", "fidelities.low.descriptor: name 'L': expected lower"),
            (("fidelities", "low", "num_forces", "train"), [4], "fidelities.low.num_forces.train: expected a whole"),
            (("fidelities", "low", "statistics_split"), "test", "statistics_split: expected one of train, all, found"),
            (("fidelities", "low", "e0", 1), float("inf"), "fidelities.low.e0.1: expected a finite number, found inf"),
            (("fidelities", "low", "e0", 0), -1.0, "fidelities.low.e0: expected atomic numbers 1..118, found 0"),
            (("fidelities", "low", "e0_residual"), "small", "e0_residual: expected a finite number, found 'small'"),
        ],
    )
    def test_names_the_place_of_a_wrong_value(
        self, folder: Path, place: tuple[str | int, ...], value: Any, message: str
    ) -> None:
        rewrite(folder, put(value, *place))
        with pytest.raises(ValueError, match=r"dataset\.yaml: ") as error:
            read_manifest(folder)
        assert message in str(error.value)

    def test_a_whole_number_may_stand_for_a_real_one(self, folder: Path) -> None:
        rewrite(folder, put(5, "cutoff"))
        assert repr(read_manifest(folder).cutoff) == "5.0"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a mapping with 'format: "),
            ("- format", "expected a mapping with 'format: "),
            ("format: 1\nname: [", "not readable YAML"),
            ("format: 1\n---\nformat: 1\n", "expected one YAML document, found 2"),
            ("format: 1\nname: a\nname: b\n", "line 4: mapping that ends here: key 'name' is there twice"),
            ("format: 1\n1: a\n1.0: b\n", "key 1 is there twice"),
            ("? [1]\n: 2\n", "expected names as keys, found a list"),
            ("a: &a [x]\nb: 3\n", "line 1: expected plain values, found an anchor or alias"),
            ("a: 1\nb: *a\n", "line 2: expected plain values, found an anchor or alias"),
            ("a: !!python/object/apply:os.system [ls]\n", "found the tag 'tag:yaml.org...ply:os.system'"),
            ("a: !!str 3\n", "found the tag"),
            ("[" * 100_000, "line 1: expected plain values, found more than 16 levels of lists and mappings"),
            ("format: " + "9" * 100_000, "line 1: expected a number of at most 64 characters, found '99999"),
            ("format: " + ":".join("1" * 50_000), "expected a number of at most 64 characters"),
            ("format: 0x_", "expected a number of at most 64 characters, found '0x_'"),
            ("format: 2020-01-01", "format '2020-01-01', this Rung reads"),
            ("format: \x00", "not readable YAML"),
        ],
    )
    def test_refuses_other_yaml(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / MANIFEST_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.yaml: ") as error:
            read_manifest(tmp_path)
        assert message in str(error.value) and len(str(error.value)) < 1000

    def test_refuses_a_billion_laughs(self, tmp_path: Path) -> None:
        lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")]
        (tmp_path / MANIFEST_FILE).write_text("a: &a [ha, ha]\n" + "\n".join(lines))
        with pytest.raises(ValueError, match="found an anchor or alias"):
            read_manifest(tmp_path)

    def test_refuses_what_is_no_text_and_what_is_too_large(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        size = (folder / MANIFEST_FILE).stat().st_size
        monkeypatch.setattr(rung.data.manifest, "MAX_MANIFEST_BYTES", size)
        read_manifest(folder)
        monkeypatch.setattr(rung.data.manifest, "MAX_MANIFEST_BYTES", size - 1)
        with pytest.raises(ValueError, match=f"expected a manifest of at most {size - 1} bytes, found {size}"):
            read_manifest(folder)
        (folder / MANIFEST_FILE).write_bytes(b"format: \xff\xfe")
        with pytest.raises(ValueError, match="dataset.yaml: expected UTF-8 text"):
            read_manifest(folder)

    def test_numbers_are_read_as_pyyaml_reads_them(self) -> None:
        texts = "0 -3 +7 017 0x1F 1_000 1:30 1.5 -2.5e-05 .5 .inf -.inf 1e5 true No null ~ '' '3' on 2020-01-01 a"
        text = "\n".join(f"- {item}" for item in texts.split())
        expected = [str(v) if hasattr(v, "isoformat") else v for v in yaml.safe_load(text)]
        assert rung.data.manifest._parse(text, "x") == expected
        assert rung.data.manifest._parse("a: {b: [1, {c: []}], d: {}}", "x") == {"a": {"b": [1, {"c": []}], "d": {}}}

    def test_works_without_libyaml(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = read_manifest(folder)
        monkeypatch.setattr(rung.data.manifest, "_LOADER", yaml.SafeLoader)
        assert read_manifest(folder) == expected


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resign(folder: Path, file: str) -> None:
    """Let the manifest state the bytes and the digest that the file has."""
    data = (folder / file).read_bytes()

    def change(document: dict[str, Any]) -> None:
        for row in document["shards"]:
            if row["file"] == file:
                row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    rewrite(folder, change)


class TestVerify:
    def test_nothing_to_find(self, folder: Path) -> None:
        assert verify(folder) == []

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (flip, r"val-000000.tar: SHA-256 \w{12}..., manifest says \w{12}...; fetch or build it again \(first: .*"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "val-000000.tar: .* truncated. fetch or build it"),
            (lambda path: path.write_bytes(b""), "val-000000.tar: manifest says .* bytes, found 0"),
            (Path.unlink, "val-000000.tar: missing; fetch or build it again"),
            (lambda path: path.with_name("stray.tar").touch(), "stray.tar: not in the manifest"),
            (lambda path: path.with_name(".a.tar.partial").touch(), ".a.tar.partial: left by a build .* delete it"),
            (lambda path: path.with_name(".building").mkdir(), ".building: left by a build"),
        ],
    )
    def test_names_every_damaged_file(self, folder: Path, damage: Callable[[Path], Any], message: str) -> None:
        damage(folder / "val-000000.tar")
        (fault,) = verify(folder)
        assert re.fullmatch(f"{message}.*", fault)

    def test_file_fault_agrees(self, folder: Path) -> None:
        shard = read_manifest(folder).shards[2]
        path = folder / shard.file
        assert file_fault(path, shard) == ""
        flip(path)
        assert file_fault(path, shard).startswith("val-000000.tar: SHA-256")
        path.unlink()
        assert file_fault(path, shard).startswith("val-000000.tar: missing")

    def test_names_several_faults_at_once(self, folder: Path) -> None:
        flip(folder / "train-000000.tar")
        (folder / "val-000000.tar").unlink()
        (folder / "stray.tar").touch()
        starts = [fault.split(":")[0] for fault in verify(folder)]
        assert starts == ["stray.tar", "train-000000.tar", "val-000000.tar"]

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (
                ("shards", 0, "structures"),
                9,
                "train-000000.tar: packs, structures, atoms: manifest says (3, 9, 16), fo",
            ),
            (("shards", 0, "atoms"), 15, "train-000000.tar: packs, structures, atoms: manifest says (3, 8, 15), found"),
            (("elements", 8), 7, "elements: atoms of Z = 8: manifest says 7, found 20"),
            (("elements", 6), 1, "elements: atoms of Z = 6: manifest says 1, found 0"),
            (
                ("fidelities", "high", "num_energies", "val"),
                4,
                "high: energies in split 'val': manifest says 4, found 3",
            ),
            (("fidelities", "low", "num_forces", "test"), 1, "low: forces in split 'test': manifest says 1, found 0"),
            (
                ("shards", 0, "labels", "high"),
                [2, 2, 1],
                "train-000000.tar: structures of each pack labelled at 'high': manifest says [2, 2, 1], found [2, 1,",
            ),
            (("splits",), ["train"], "val-000000.tar: split: expected one of train, found 'val'"),
            (("shards", 0, "labels"), {"low": [3, 3, 2]}, "at 'high': manifest says [0, 0, 0], found [2, 1, 1]"),
        ],
    )
    def test_names_a_wrong_count(self, folder: Path, place: tuple[str | int, ...], value: Any, message: str) -> None:
        rewrite(folder, put(value, *place))
        (fault,) = verify(folder)
        assert message in fault

    def test_names_a_key_that_is_there_twice(self, tmp_path: Path) -> None:
        parts = plain()
        parts["train-000001"][3] = dataclasses.replace(parts["train-000001"][3], key="s05")
        parts["val-000000"][5] = dataclasses.replace(parts["val-000000"][5], key="s05")
        write(tmp_path, parts)
        files = "train-000000.tar, train-000001.tar, val-000000.tar"
        assert verify(tmp_path) == [f"key 's05' names 3 structures, in {files}; keys must be unique in a dataset"]

    def test_names_a_group_in_two_splits(self, tmp_path: Path) -> None:
        parts = plain()
        parts["train-000001"][0] = dataclasses.replace(parts["train-000001"][0], group="molecule9")
        write(tmp_path, parts)
        assert verify(tmp_path) == ["val-000000.tar: group 'molecule9' is in split 'val' and in 'train'"]

    def test_does_not_list_all_of_many_faults(self, tmp_path: Path) -> None:
        made = [structure(index) for index in range(15)]
        copies = [dataclasses.replace(s, group=f"{s.group}c") for s in made]
        write(tmp_path, {"train-0": made, "val-0": copies})
        found = verify(tmp_path)
        assert len(found) == 11 and found[-1] == "... and 5 more of this kind"
        assert all(
            re.match(r"key 's\d\d' names 2 structures, in train-0.tar, val-0.tar;", fault) for fault in found[:10]
        )

    def test_every_leaking_group_is_one_fault(self, tmp_path: Path) -> None:
        made = [structure(index) for index in range(24)]
        copies = [dataclasses.replace(s, key=f"{s.key}c") for s in made]
        write(tmp_path, {"train-0": made, "val-0": copies, "test-0": [structure(30, group="molecule3")]})
        found = verify(tmp_path)
        assert len(found) == 11 and found[-1] == "... and 2 more of this kind"

    def test_a_tar_that_is_not_of_packs_is_named(self, folder: Path) -> None:
        (folder / "val-000000.tar").write_bytes(tar_bytes([("a.pkl", b"x")]))
        resign(folder, "val-000000.tar")
        (fault,) = verify(folder)
        assert "val-000000.tar: member 0, at byte 0: the name 'a.pkl' has no ending" in fault

    def test_every_bad_pack_and_structure_is_named(self, folder: Path) -> None:
        wrong = dataclasses.replace(StructureTable.of([structure(1)]), numbers=np.array([1, 200], np.uint8))
        good, bad = encode(StructureTable.of([structure(0)])), _encode_unchecked(wrong)
        packs = [("a.safetensors", good), ("b.safetensors", b"junk"), ("c.safetensors", bad)]
        (folder / "val-000000.tar").write_bytes(tar_bytes([*packs, ("d-00000000.safetensors", good)]))
        resign(folder, "val-000000.tar")
        found = verify(folder)
        assert len(found) == 3 and all(fault.startswith("val-000000.tar") for fault in found)
        assert "b.safetensors: not a readable pack" in found[0]
        assert "c.safetensors: structure 's01': numbers: expected atomic numbers" in found[1]
        assert "d-00000000.safetensors: damaged: its CRC-32" in found[2]

    def test_reads_the_manifest_strictly(self, folder: Path) -> None:
        rewrite(folder, put("many", "shards", 0, "packs"))
        with pytest.raises(ValueError, match=r"shards\[0\].packs: expected a whole number"):
            verify(folder)
        with pytest.raises(FileNotFoundError, match="no dataset.yaml in"):
            verify(folder / "nothing")


def _encode_unchecked(table: StructureTable) -> bytes:
    return save(arrays_of(table) | {"pack_version": np.array([PACK_VERSION], np.uint8)})


def test_a_shard_must_have_a_plain_name() -> None:
    for file in ("pipe:curl evil.tar", "../a.tar", "a.tar\n", "a\0.tar"):
        with pytest.raises(ValueError, match="expected the plain name"):
            ShardInfo(file, "", 0, 0, 0, 0, 0, "train", {})
