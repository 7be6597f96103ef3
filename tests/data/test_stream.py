"""Streams: complete, disjoint, a pure function of their arguments, exactly resumable, and loud about damage."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.data.build import build_dataset
from rung.data.fetch import RemoteConfig, ShardUnavailable
from rung.data.fidelity import Fidelity
from rung.data.manifest import read_manifest
from rung.data.stream import ShardStream, epoch_structures
from rung.data.structure import Labels, Structure

NUM_STRUCTURES = 330


def build(folder: Path, *, pack_atoms: int = 18, shard_bytes: int = 7000, every: int = 4) -> Path:
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
        split=lambda group: "val" if group < "s030" else "train",
        pack_atoms=pack_atoms,
        shard_bytes=shard_bytes,
        max_energy_deviation=1e6,
    )
    return folder


@pytest.fixture(scope="module")
def many_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training structures in packs of 9 in several shards."""
    folder = build(tmp_path_factory.mktemp("many"))
    shards = read_manifest(folder).shards_of("train")
    assert sum(shard.packs for shard in shards) >= 34 and len(shards) >= 4
    return folder


@pytest.fixture(scope="module")
def one_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("one"), pack_atoms=10_000, shard_bytes=10**6, every=50)
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


def left_of_epoch(streams: list[ShardStream], epoch: int, limit: int = 1000) -> Counter[str]:
    """Take what these consumers still deal in an epoch, up to `limit` each, and return the keys."""
    keys: Counter[str] = Counter()
    for stream in streams:
        for _ in range(limit):
            if stream.position.epoch == epoch and stream.position.todo:
                keys.update(take(stream, 1))
    return keys


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
@pytest.mark.parametrize("block", [7, 8192])
def test_every_shuffled_epoch_is_complete(
    many_packs: Path, fidelity: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.data.stream.MAX_BLOCK", block)
    epochs: list[Counter[str]] = [Counter(), Counter(), Counter()]
    for rank in range(4):
        stream = ShardStream(many_packs, fidelity, seed=1, rank=rank, world=4)
        share = stream.dealing.start().todo[0]
        for epoch in epochs:
            epoch.update(take(stream, share.stop - share.start))
    for counts in epochs:
        assert set(counts) == expected_keys(fidelity) and set(counts.values()) == {1}


def test_a_consumer_opens_only_the_shards_of_its_structures(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / read_manifest(folder).shards_of("train")[-1].file).unlink()
    for fidelity in ("low", "high"):
        assert take(ShardStream(folder, fidelity, seed=0, rank=0, world=4, shuffle=False), 18)
        with pytest.raises(FileNotFoundError):
            take(ShardStream(folder, fidelity, seed=0, rank=3, world=4, shuffle=False), 18)


def test_one_pack_is_shared_by_many_consumers(one_pack: Path) -> None:
    for fidelity in ("low", "high", "forces_only"):
        streams = [ShardStream(one_pack, fidelity, seed=0, rank=rank, world=6) for rank in range(6)]
        shares = [list(left_of_epoch([stream], 0)) for stream in streams]
        assert sorted(itertools.chain(*shares)) == sorted(expected_keys(fidelity, every=50))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_more_consumers_than_labels_is_an_error(one_pack: Path) -> None:
    message = "dataset 'diatomics', fidelity 'forces_only', split 'train': 6 labelled structures for consumer 0 of 7"
    with pytest.raises(ValueError, match=message):
        ShardStream(one_pack, "forces_only", seed=0, world=7)


def test_a_manifest_that_promises_other_labels_is_an_error(tmp_path: Path) -> None:
    folder = build(tmp_path, every=200, pack_atoms=10_000, shard_bytes=10**6)  # 's200' is the only one in train
    text = (folder / "dataset.yaml").read_text()
    assert "forces_only: [1]" in text
    (folder / "dataset.yaml").write_text(text.replace("forces_only: [1]", "forces_only: [2]"))
    with pytest.raises(ValueError, match="manifest says 2 structures with labels at 'forces_only', found 1"):
        take(ShardStream(folder, "forces_only", seed=0, rank=1, world=2), 3)
    stream = ShardStream(folder, "forces_only", seed=0, rank=1, world=2, max_bad=1)
    with pytest.raises(ValueError, match="none of its 2 labelled structures can be read"):  # it must not spin
        take(stream, 3)


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
    state = json.loads(json.dumps(stream.state()))
    expected = take(stream, 150)
    resumed = fresh()
    resumed.load_state(state)
    assert take(resumed, 150) == expected


def test_portions_do_not_change_the_order(many_packs: Path) -> None:
    expected = take(ShardStream(many_packs, "low", seed=0), 700)
    stream = ShardStream(many_packs, "low", seed=0)
    portions = [stream.take(count) for count in (0, 1, 299, 1, 250, 149)]
    assert [key for table, found in portions for key in table.keys.tolist() if found.all()] == expected


@pytest.mark.parametrize("worlds", [(4, 3), (3, 5), (2, 1), (1, 4), (5, 2, 3)])
@pytest.mark.parametrize("block", [20, 8192])
def test_another_world_goes_on_with_what_is_left(
    many_packs: Path, worlds: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.data.stream.MAX_BLOCK", block)
    random = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    states: list[dict[str, Any] | None] = []
    for world in worlds:
        streams = [ShardStream(many_packs, "low", seed=7, rank=rank, world=world) for rank in range(world)]
        for stream in streams:
            if states:
                stream.redeal(states)
            seen += left_of_epoch([stream], 0, int(random.integers(0, 30)))
        states = [json.loads(json.dumps(stream.state())) for stream in streams]
    seen += left_of_epoch(streams, 0)
    assert set(seen) == expected_keys("low") and set(seen.values()) == {1}


def test_a_consumer_that_was_ahead_is_waited_for(many_packs: Path) -> None:
    streams = [ShardStream(many_packs, "low", seed=7, rank=rank, world=2) for rank in range(2)]
    seen = Counter(take(streams[0], 190))  # 150 of epoch 0, 40 of epoch 1
    seen.update(take(streams[1], 20))
    states = [streams[0].state(), streams[1].state()]
    dealt = [ShardStream(many_packs, "low", seed=7, rank=rank, world=3) for rank in range(3)]
    for stream in dealt:
        stream.redeal(states)
    seen += left_of_epoch(dealt, 1)
    assert set(seen) == expected_keys("low") and set(seen.values()) == {2}
    following = [take(stream, 100) for stream in dealt]
    assert sorted(itertools.chain(*following)) == sorted(expected_keys("low"))


def test_a_stream_that_was_used_may_be_dealt_again(many_packs: Path) -> None:
    """A block that it holds begins where a new, shorter one does."""
    used, fresh = (ShardStream(many_packs, "low", seed=7, rank=0, world=2) for _ in range(2))
    states = [ShardStream(many_packs, "low", seed=7, rank=rank, world=3).state() for rank in range(3)]
    take(used, 5)
    used.redeal(states)
    fresh.redeal(states)
    assert take(used, 150) == take(fresh, 150)


def test_consumers_that_had_not_begun_are_dealt_too(many_packs: Path) -> None:
    begun = ShardStream(many_packs, "low", seed=7, rank=0, world=2)
    seen = Counter(take(begun, 10))
    (alone,) = dealt = [ShardStream(many_packs, "low", seed=7)]
    alone.redeal([begun.state(), None])
    seen += left_of_epoch(dealt, 0)
    assert set(seen) == expected_keys("low") and set(seen.values()) == {1}
    with pytest.raises(ValueError, match="seed: expected 8, found 7"):
        ShardStream(many_packs, "low", seed=8).redeal([begun.state(), None])


def test_state_of_another_set_up_is_refused(many_packs: Path) -> None:
    state = ShardStream(many_packs, "low", seed=0, rank=1, world=2).state()
    with pytest.raises(ValueError, match="fidelity 'low'.*world: expected 4, found 2"):
        ShardStream(many_packs, "low", seed=0, rank=1, world=4).load_state(state)
    with pytest.raises(ValueError, match="version: expected 2, found 99"):
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


# Damage: packs of 9 structures; the functions below return how many packs become unreadable.


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
    assert 0 < 300 - len(keys) <= 9 * num_bad
    assert sum("skipped unreadable pack" in record.message for record in caplog.records) == num_bad


def test_missing_shard_is_an_error_even_with_max_bad(tmp_path: Path) -> None:
    folder = build(tmp_path)
    shard = read_manifest(folder).shards_of("train")[0]
    (folder / shard.file).unlink()
    with pytest.raises(FileNotFoundError, match=shard.file):
        take(ShardStream(folder, "low", seed=0, max_bad=1000), NUM_STRUCTURES)


def test_shards_may_be_read_through_a_command(many_packs: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_bytes((many_packs / "dataset.yaml").read_bytes())
    remote = RemoteConfig(cache_folder=str(tmp_path / "cache"))
    stream = ShardStream(tmp_path, "low", seed=0, shard_url=f"pipe:cat {many_packs}/{{file}}", remote=remote)
    assert take(stream, 400) == take(ShardStream(many_packs, "low", seed=0), 400)
    remote = RemoteConfig(cache_folder=str(tmp_path / "other"), retries=0)
    failing = ShardStream(tmp_path, "low", seed=0, shard_url="pipe:false {file}", remote=remote)
    with pytest.raises(ShardUnavailable, match="false .*exit status 1"):
        failing.take(1)
    with pytest.raises(ValueError, match="shard_url: expected '{file}'"):
        ShardStream(tmp_path, "low", seed=0, shard_url="https://host/set/")
