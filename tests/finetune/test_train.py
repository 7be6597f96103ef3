"""The loop's own decisions: which weights are kept, when it stops, and the schedule."""

from __future__ import annotations

import pytest

from rung.data.structure import Structure
from rung.finetune import train
from rung.finetune.config import TrainingConfig
from rung.finetune.dataset import absolute_rows
from rung.model.potential import Potential


def test_the_latest_weights_within_the_tolerance_are_kept(
    potential: Potential, shifted: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([10.0, 8.0, 8.5, 9.5, 8.7, 20.0, 20.0])
    monkeypatch.setattr(train, "validation_errors", lambda *_: {"row_mae_mev_per_atom": next(errors)})
    rows = absolute_rows(shifted, "low")
    target = train.Target("low", rows[:8], rows[8:], use_forces=False)
    stopping = train.EarlyStopping(potential, target, TrainingConfig(patience=2, evaluate_every=1, tolerance=0.1))
    kept = []
    for step in range(7):
        stopping.judge(potential, step)
        kept.append(stopping.step)
        assert stopping.exhausted(step) == (step == 6)
    assert kept == [0, 1, 2, 2, 4, 4, 4]


def test_without_validation_the_last_weights_are_kept(potential: Potential, shifted: list[Structure]) -> None:
    target = train.Target("low", absolute_rows(shifted, "low"), [], False)
    stopping = train.EarlyStopping(potential, target, TrainingConfig(patience=1, evaluate_every=1))
    assert [stopping.judge(potential, step) for step in range(3)] == [{}, {}, {}]
    assert stopping.step == 2


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainingConfig(steps=100, warmup_steps=20)
    factors = [train.schedule(step, config) for step in range(1, 101)]
    assert factors[0] == pytest.approx(1 / 20)
    assert max(factors) == factors[19] == 1
    assert factors[59] == pytest.approx(0.01 + 0.99 / 2)
    assert factors[-1] == pytest.approx(0.01)


def test_a_set_smaller_than_a_batch_is_one_batch(potential: Potential, shifted: list[Structure]) -> None:
    target = train.Target("low", absolute_rows(shifted[:3], "low"), [], use_forces=False)
    batches = train.make_batches(potential, target, TrainingConfig(batch_size=16), [], [], seed=0)
    assert sorted(next(batches).keys) == sorted(s.key for s in shifted[:3])
