"""Dealing as properties: nothing twice, nothing left out, equal shares, whatever the portions and the worlds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.data.dealing import Dealing, Position, Segment, Work

Place = tuple[int, int, int, int]  # (epoch, start, stop, i): structure i, in shuffled order, of a block
Made = tuple[int, int, list[int]]  # total, block, world sizes


@st.composite
def worlds(draw: st.DrawFn, changes: int = 1) -> Made:
    """Return total, block and world sizes, none of which exceeds the total (streams refuse that)."""
    total = draw(st.integers(1, 60))
    sizes = draw(st.lists(st.integers(1, min(9, total)), min_size=changes, max_size=changes))
    return total, draw(st.integers(1, 70)), sizes


def consumers(total: int, block: int, world: int) -> list[Dealing]:
    return [Dealing(total, block, rank, world) for rank in range(world)]


def places(segments: list[Segment]) -> list[Place]:
    return [(s.epoch, s.start, s.stop, i) for s in segments for i in range(s.first, s.last)]


def size(position: Position) -> int:
    return sum(work.stop - work.start - work.offset for work in position.todo)


def to_the_end_of(epoch: int, dealing: Dealing, position: Position) -> Iterator[Place]:
    """Yield what a consumer still deals up to the end of an epoch."""
    assert position.epoch <= epoch
    while position.epoch < epoch or position.todo:
        position, segments = dealing.advance(position, 1)
        yield from places(segments)


def assert_complete(found: list[Place], total: int, epochs: int) -> None:
    """Assert that blocks hold every position of every epoch once and that each block was dealt whole, each place once.

    Which structure a place is, is decided by its block alone; so this is what 'each structure once' means.
    """
    assert max(Counter(found).values()) == 1
    blocks: dict[tuple[int, int, int], set[int]] = {}
    for epoch, start, stop, index in found:
        blocks.setdefault((epoch, start, stop), set()).add(index)
    assert all(indices == set(range(stop - start)) for (_, start, stop), indices in blocks.items())
    covered = Counter((epoch, at) for epoch, start, stop in blocks for at in range(start, stop))
    assert covered == Counter(itertools.product(range(epochs), range(total)))


@given(worlds(), st.lists(st.integers(0, 40), max_size=12), st.data())
def test_any_portions_give_the_same_structures(made: Made, counts: list[int], data: st.DataObject) -> None:
    total, block, [world] = made
    dealing = Dealing(total, block, data.draw(st.integers(0, world - 1)), world)
    at_once, whole = dealing.advance(dealing.start(), sum(counts))
    position, found = dealing.start(), []
    for count in counts:
        position, segments = dealing.advance(position, count)
        assert sum(s.last - s.first for s in segments) == count and all(s.last > s.first for s in segments)
        found += places(segments)
    assert found == places(whole) and position == at_once


@given(worlds(), st.integers(1, 3))
def test_every_epoch_is_complete_and_equally_shared(made: Made, epochs: int) -> None:
    total, block, [world] = made
    shares = [list(to_the_end_of(epochs - 1, d, d.start())) for d in consumers(total, block, world)]
    assert_complete([place for share in shares for place in share], total, epochs)
    for epoch in range(epochs):
        lengths = [sum(place[0] == epoch for place in share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


@given(worlds(), st.integers(0, 100))
def test_blocks_are_no_larger_than_asked(made: Made, count: int) -> None:
    total, block, [world] = made
    for dealing in consumers(total, block, world):
        _, segments = dealing.advance(dealing.start(), count)
        assert all(0 <= s.start < s.stop <= total and s.stop - s.start <= block for s in segments)


@settings(max_examples=300)
@given(worlds(changes=4), st.data())
def test_any_chain_of_worlds_deals_everything_once(made: Made, data: st.DataObject) -> None:
    total, block, sizes = made
    found: list[Place] = []
    positions = [dealing.start() for dealing in consumers(total, block, sizes[0])]
    for world in sizes:
        dealings = consumers(total, block, world)
        positions = [dealing.redeal(positions) for dealing in dealings]
        for rank, dealing in enumerate(dealings):
            count = data.draw(st.integers(0, 2 * total // world + 2))
            positions[rank], segments = dealing.advance(positions[rank], count)
            found += places(segments)
    last = max(position.epoch for position in positions)
    for dealing, position in zip(dealings, positions, strict=True):
        found += to_the_end_of(last, dealing, position)
    assert_complete(found, total, last + 1)


@given(worlds(changes=2), st.data())
def test_what_is_left_is_equally_shared_but_for_begun_blocks(made: Made, data: st.DataObject) -> None:
    total, block, [before, after] = made
    positions = []
    for dealing in consumers(total, block, before):
        positions.append(dealing.advance(dealing.start(), data.draw(st.integers(0, total // before)))[0])
    begun = any(work.offset for position in positions for work in position.todo)
    dealt = [dealing.redeal(positions) for dealing in consumers(total, block, after)]
    epoch = max(position.epoch for position in positions)
    assert {position.epoch for position in dealt} == {epoch}
    fair = sum(map(size, dealt)) / after
    assert all(abs(size(position) - fair) < 1 + begun * block for position in dealt)


@given(worlds(changes=2), st.data())
def test_positions_survive_json(made: Made, data: st.DataObject) -> None:
    total, block, [before, after] = made
    positions = [
        dealing.advance(dealing.start(), data.draw(st.integers(0, 3 * total)))[0]
        for dealing in consumers(total, block, before)
    ]
    for position in [*positions, Dealing(total, block, after - 1, after).redeal(positions)]:
        read = json.loads(json.dumps({"epoch": position.epoch, "todo": position.todo}))
        assert Position(read["epoch"], tuple(Work(*work) for work in read["todo"])) == position


def test_an_example() -> None:
    """Ten positions, two consumers, blocks of three: the second takes two structures and one of four continues."""
    first, second = consumers(10, 3, 2)
    assert first.start().todo == (Work(0, 0, 5),) and second.start().todo == (Work(0, 5, 10),)
    position, segments = second.advance(second.start(), 2)
    assert segments == [Segment(0, 5, 8, 0, 2)]
    assert position == Position(0, (Work(0, 5, 10, 2),))
    shares = [dealing.redeal([first.start(), position]).todo for dealing in consumers(10, 3, 4)]
    assert shares == [(Work(0, 0, 2),), (Work(0, 2, 4),), (Work(0, 4, 5), Work(0, 5, 8, 2)), (Work(0, 8, 10),)]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_position_is_not_changed_by_advancing(count: int) -> None:
    dealing = Dealing(5, 2, 0, 1)
    start = dealing.start()
    assert dealing.advance(start, count) == dealing.advance(start, count) and start == dealing.start()
