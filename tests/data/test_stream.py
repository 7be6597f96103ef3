"""Streams: complete, disjoint, a pure function of their arguments, exactly resumable, and loud about damage."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.manifest import read_manifest
from rung.data.stream import ShardStream, epoch_structures
from rung.data.structure import Labels, Structure

NUM_STRUCTURES = 330


def build(folder: Path, *, pack_atoms: int = 18, shard_bytes: int = 6000, every: int = 4) -> Path:
    """330 diatomics: `low` labels all of them, `high` every fourth, `forces_only` one in `every`."""
    rng = np.random.default_rng(0)
    structures = []
    for index in range(NUM_STRUCTURES):
        labels = {"low": Labels(float(rng.normal()), rng.normal(size=(2, 3)).astype(np.float32))}
        if index % 4 == 0:
            labels["high"] = Labels(float(index))
        if index % every == 0:
            labels["forces_only"] = Labels(forces=np.ones((2, 3), np.float32))
        structures.append(
            Structure(
                key=f"s{index:03d}",
                group=f"s{index:03d}",
                numbers=np.array([1, 8], np.uint8),
                positions=rng.normal(size=(2, 3)).astype(np.float32),
                labels=labels,
            )
        )
    names = ("low", "high", "forces_only")
    build_dataset(
        structures,
        folder,
        name="diatomics",
        fidelities={name: Fidelity(name, method=name) for name in names},
        split=lambda structure: "val" if structure.key < "s030" else "train",
        pack_atoms=pack_atoms,
        shard_bytes=shard_bytes,
        max_energy_deviation=1e6,
    )
    return folder


@pytest.fixture(scope="module")
def many_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training structures in 34 packs of 9 in several shards: `low` is dealt in packs up to 4 consumers."""
    folder = build(tmp_path_factory.mktemp("many"))
    shards = read_manifest(folder).shards_of("train")
    assert sum(shard.packs for shard in shards) == 34 and len(shards) >= 4
    return folder


@pytest.fixture(scope="module")
def one_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("one"), pack_atoms=10_000, every=50)
    assert sum(shard.packs for shard in read_manifest(folder).shards_of("train")) == 1
    return folder


def expected_keys(fidelity: str, every: int = 4) -> set[str]:
    step = {"low": 1, "high": 4, "forces_only": every}[fidelity]
    return {f"s{index:03d}" for index in range(30, NUM_STRUCTURES) if index % step == 0}


def take(stream: ShardStream, count: int) -> list[str]:
    return [structure.key for structure in itertools.islice(stream, count)]


def first_epoch(stream: ShardStream) -> list[str]:
    """Return the keys until the first repetition; an epoch never repeats a key, and the next begins with known ones."""
    keys: dict[str, None] = {}
    for structure in stream:
        if structure.key in keys:
            return list(keys)
        keys[structure.key] = None
    raise AssertionError("a stream is endless")


@pytest.mark.parametrize("fidelity", ["low", "high", "forces_only"])
@pytest.mark.parametrize("world", [1, 4])
def test_consumers_share_every_structure_exactly_once(many_packs: Path, fidelity: str, world: int) -> None:
    shares = [
        first_epoch(ShardStream(many_packs, fidelity, seed=1, rank=rank, world=world, shuffle=False))
        for rank in range(world)
    ]
    counts = Counter(key for share in shares for key in share)
    assert set(counts) == expected_keys(fidelity) and set(counts.values()) == {1}


@pytest.mark.parametrize("fidelity", ["low", "high"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_shuffled_epoch_is_complete(many_packs: Path, fidelity: str, epoch: int) -> None:
    counts: Counter[str] = Counter()
    for rank in range(4):
        stream = ShardStream(many_packs, fidelity, seed=1, rank=rank, world=4)
        stream.load_state(stream.state() | {"epoch": epoch})
        for structure in stream:
            if stream.state()["epoch"] != epoch:
                break
            counts[structure.key] += 1
    assert set(counts) == expected_keys(fidelity) and set(counts.values()) == {1}


def test_a_consumer_opens_only_the_shards_of_its_packs(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / read_manifest(folder).shards_of("train")[-1].file).unlink()
    assert take(ShardStream(folder, "low", seed=0, rank=0, world=4, shuffle=False), 200)
    with pytest.raises(FileNotFoundError):  # a sparse fidelity is dealt by structures, of all packs
        take(ShardStream(folder, "high", seed=0, rank=0, world=4, shuffle=False), 200)


def test_one_pack_is_shared_by_many_consumers(one_pack: Path) -> None:
    for fidelity in ("low", "high", "forces_only"):
        shares = [first_epoch(ShardStream(one_pack, fidelity, seed=0, rank=rank, world=6)) for rank in range(6)]
        assert sorted(itertools.chain(*shares)) == sorted(expected_keys(fidelity, every=50))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_more_consumers_than_labels_is_an_error(one_pack: Path) -> None:
    message = "dataset 'diatomics', fidelity 'forces_only', split 'train': 6 labelled structures for consumer 0 of 7"
    with pytest.raises(ValueError, match=message):
        ShardStream(one_pack, "forces_only", seed=0, world=7)


def test_a_share_without_labels_is_an_error(tmp_path: Path) -> None:
    folder = build(tmp_path, every=200)  # the training split has one such structure, 's200'
    manifest = read_manifest(folder)
    assert manifest.entry("forces_only").num_forces["train"] == 1
    text = (folder / "dataset.yaml").read_text()
    # A manifest that promises more than the shards hold must not make a consumer spin.
    entry = text.index("forces_only:")
    forces = text.index("num_forces:", entry)
    (folder / "dataset.yaml").write_text(text[:forces] + text[forces:].replace("train: 1", "train: 2", 1))
    errors = []
    for rank in range(2):
        try:
            take(ShardStream(folder, "forces_only", seed=0, rank=rank, world=2), 3)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "fidelity 'forces_only', split 'train': no labelled structure" in errors[0]


@pytest.mark.parametrize("fidelity", ["low", "high"])
def test_order_is_a_pure_function_of_its_arguments(many_packs: Path, fidelity: str) -> None:
    def order(**changed: int) -> list[str]:
        arguments = {"seed": 3, "rank": 1, "world": 4} | changed
        return take(ShardStream(many_packs, fidelity, **arguments), 200)

    np.random.seed(1)
    expected = order()
    np.random.seed(2)
    assert order() == expected
    assert order(seed=4) != expected and order(rank=2) != expected


def test_epochs_are_shuffled_differently(many_packs: Path) -> None:
    stream = ShardStream(many_packs, "low", seed=3)
    first, second = take(stream, 300), take(stream, 300)
    assert set(first) == set(second) and first != second


def test_structures_carry_the_labels_of_their_fidelity_only(many_packs: Path) -> None:
    for structure in itertools.islice(ShardStream(many_packs, "high", seed=0), 20):
        assert set(structure.labels) == {"high"}
        assert structure.labels["high"].energy == float(structure.key[1:]) and structure.labels["high"].forces is None


@pytest.mark.parametrize("folder", ["many_packs", "one_pack"])
@pytest.mark.parametrize("consumed", [0, 1, 37, 74, 75, 76, 150, 301])
def test_resumed_stream_continues_exactly(folder: str, consumed: int, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)

    def fresh() -> ShardStream:
        return ShardStream(path, "low", seed=5, rank=1, world=4)

    stream = fresh()
    take(stream, consumed)
    state = stream.state()
    assert all(isinstance(value, int) for value in state.values())
    expected = take(stream, 150)
    resumed = fresh()
    resumed.load_state(state)
    assert take(resumed, 150) == expected


def test_cache_does_not_change_the_order(many_packs: Path) -> None:
    kept = take(ShardStream(many_packs, "low", seed=0), 700)
    assert take(ShardStream(many_packs, "low", seed=0, cache_bytes=0), 700) == kept
    assert take(ShardStream(many_packs, "low", seed=0, cache_bytes=100_000), 700) == kept


def test_state_of_another_set_up_is_refused(many_packs: Path) -> None:
    state = ShardStream(many_packs, "low", seed=0, rank=1, world=2).state()
    with pytest.raises(ValueError, match="fidelity 'low'.*world: expected 4, found 2"):
        ShardStream(many_packs, "low", seed=0, rank=1, world=4).load_state(state)
    with pytest.raises(ValueError, match="version: expected 1, found 99"):
        ShardStream(many_packs, "low", seed=0, rank=1, world=2).load_state(state | {"version": 99})
    with pytest.raises(ValueError, match="rank: expected 0, found 1"):
        ShardStream(many_packs, "low", seed=0, rank=0, world=2).load_state(state)
    with pytest.raises(ValueError, match="seed: expected 1, found 0"):
        ShardStream(many_packs, "low", seed=1, rank=1, world=2).load_state(state)
    with pytest.raises(ValueError, match="task"):
        ShardStream(many_packs, "high", seed=0, rank=1, world=2).load_state(state)


def test_state_of_another_version_of_the_dataset_is_refused(many_packs: Path, tmp_path: Path) -> None:
    state = ShardStream(many_packs, "low", seed=0).state()
    rebuilt = build(tmp_path, every=5)
    with pytest.raises(ValueError, match="content: expected .*resume with the dataset"):
        ShardStream(rebuilt, "low", seed=0).load_state(state)


def test_unknown_names_are_errors(many_packs: Path) -> None:
    with pytest.raises(ValueError, match="unknown fidelity 'hihg'.*did you mean 'high'"):
        ShardStream(many_packs, "hihg", seed=0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        ShardStream(many_packs, "low", "dev", seed=0)
    with pytest.raises(ValueError, match="rank: expected 0..1, found 2"):
        ShardStream(many_packs, "low", seed=0, rank=2, world=2)
    with pytest.raises(ValueError, match="rank: expected 0..1, found 2"):
        next(epoch_structures(many_packs, "low", "val", rank=2, world=2))
    with pytest.raises(ValueError, match="seed: expected a whole number >= 0, found -1"):
        ShardStream(many_packs, "low", seed=-1)


def test_evaluation_sees_every_structure_once(many_packs: Path) -> None:
    keys = [structure.key for structure in epoch_structures(many_packs, "low", "val")]
    assert sorted(keys) == [f"s{index:03d}" for index in range(30)]
    shares = [[s.key for s in epoch_structures(many_packs, "high", "val", rank=r, world=16)] for r in range(16)]
    assert sorted(itertools.chain(*shares)) == [f"s{index:03d}" for index in range(0, 30, 4)]


# Damage: 34 packs of 9 structures; the functions below return how many packs become unreadable.


def flip_magic(shard: Path, packs: int) -> int:
    """Damage the second pack's contents: the length of its safetensors header."""
    data = bytearray(shard.read_bytes())
    start = data.index(b".safetensors", data.index(b".safetensors") + 512)
    start = start // 512 * 512 + 512
    data[start : start + 8] = b"\xff" * 8
    shard.write_bytes(data)
    return 1


def cut_inside_a_pack(shard: Path, packs: int) -> int:
    data = shard.read_bytes()
    last = data.rindex(b".safetensors") // 512 * 512
    shard.write_bytes(data[: last + 512 + 100])
    return 1


def cut_between_packs(shard: Path, packs: int) -> int:
    data = shard.read_bytes()
    second = data.index(b".safetensors", data.index(b".safetensors") + 512) // 512 * 512
    shard.write_bytes(data[:second])
    return packs - 1


def damage_a_header(shard: Path, packs: int) -> int:
    data = bytearray(shard.read_bytes())
    second = data.index(b".safetensors", data.index(b".safetensors") + 512) // 512 * 512
    data[second + 148 : second + 156] = b"\0" * 8
    shard.write_bytes(data)
    return packs - 1


@pytest.mark.parametrize("damage", [flip_magic, cut_inside_a_pack, cut_between_packs, damage_a_header])
def test_damage_is_counted_and_named(
    tmp_path: Path, damage: Callable[[Path, int], int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    shard = read_manifest(folder).shards_of("train")[1]
    num_bad = damage(folder / shard.file, shard.packs)
    with pytest.raises(ValueError, match=rf"dataset 'diatomics'.*max_bad is 0: {shard.file}: .*rung data verify"):
        take(ShardStream(folder, "low", seed=0), NUM_STRUCTURES)
    with pytest.raises(ValueError, match=f"{num_bad} unreadable"):
        take(ShardStream(folder, "low", seed=0, max_bad=num_bad - 1), NUM_STRUCTURES)
    caplog.clear()
    stream = ShardStream(folder, "low", seed=0, max_bad=num_bad)
    keys = first_epoch(stream)
    take(stream, 2 * NUM_STRUCTURES)  # more epochs do not count the same pack again
    assert len(stream.bad) == num_bad and all(shard.file in name for name in stream.bad)
    assert 9 * (num_bad - 1) < 300 - len(keys) <= 9 * num_bad
    assert sum("skipped unreadable pack" in record.message for record in caplog.records) == num_bad


def test_missing_shard_is_an_error_even_with_max_bad(tmp_path: Path) -> None:
    folder = build(tmp_path)
    shard = read_manifest(folder).shards_of("train")[0]
    (folder / shard.file).unlink()
    with pytest.raises(FileNotFoundError, match=shard.file):
        take(ShardStream(folder, "low", seed=0, max_bad=1000), NUM_STRUCTURES)


def test_shards_may_be_read_through_a_command(many_packs: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_bytes((many_packs / "dataset.yaml").read_bytes())
    stream = ShardStream(tmp_path, "low", seed=0, shard_url=f"pipe:cat {many_packs}/{{file}}")
    assert take(stream, 400) == take(ShardStream(many_packs, "low", seed=0), 400)
    failing = ShardStream(tmp_path, "low", seed=0, shard_url="pipe:false {file}")
    with pytest.raises(ValueError, match="unreadable pack.*the tar is damaged"):
        next(failing)
    with pytest.raises(ValueError, match="shard_url: expected '{file}'"):
        ShardStream(tmp_path, "low", seed=0, shard_url="https://host/set/")
