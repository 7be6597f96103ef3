"""Divisions keep molecules whole, use every structure once, and say when they cannot."""

from __future__ import annotations

import dataclasses

import pytest

from rung.data.reaction import Reaction
from rung.data.structure import Labels, Structure
from rung.finetune import dataset
from rung.finetune.config import FinetuneConfig, SplitConfig, TrainingConfig


def test_folds_are_a_partition_without_leaks(shifted: list[Structure]) -> None:
    notes: list[str] = []
    folds = dataset.partition(shifted, 4, 0, notes, "cross-validation")
    assert sorted(i for fold in folds for i in fold) == list(range(len(shifted)))
    assert {len(fold) for fold in folds} == {8}
    groups = [{shifted[i].group for i in fold} for fold in folds]
    assert sum(len(names) for names in groups) == len(set().union(*groups))
    assert notes == []


def test_the_division_depends_on_the_seed_alone(shifted: list[Structure]) -> None:
    first, again, other = (dataset.partition(shifted, 4, seed, [], "folds") for seed in (0, 0, 1))
    assert first == again != other


def test_a_held_out_set_shares_no_molecule(shifted: list[Structure]) -> None:
    kept, held = dataset.hold_out(shifted, 0.25, 0, "test", [])
    assert len(kept) + len(held) == len(shifted)
    assert len(held) == 8
    assert not {s.group for s in kept} & {s.group for s in held}


def test_one_molecule_is_divided_by_structure_and_says_so(shifted: list[Structure]) -> None:
    water = [s for s in shifted if s.group == "H2O"]
    notes: list[str] = []
    kept, held = dataset.hold_out(water, 0.25, 0, "validation", notes)
    assert (len(kept), len(held)) == (3, 1)
    assert notes == [
        "validation: only 1 molecules, so it is divided by structure: its errors do not tell about other molecules"
    ]


def test_too_few_structures_are_named(shifted: list[Structure]) -> None:
    with pytest.raises(ValueError, match="cross-validation: expected at least 5 structures to divide, found 3"):
        dataset.partition(shifted[:3], 5, 0, [], "cross-validation")


def test_structures_without_an_energy_are_named(shifted: list[Structure]) -> None:
    broken = dataclasses.replace(shifted[3], labels={"high": Labels(forces=shifted[3].labels["high"].forces)})
    with pytest.raises(ValueError, match="my.extxyz: expected an energy at 'high' .* 1 have none \\(first: C2H6-0\\)"):
        dataset.require_energies([*shifted[:3], broken], "high", "my.extxyz")


def test_a_training_view_holds_only_what_may_be_trained_on(high: list[Reaction]) -> None:
    for use_forces in (False, True):
        for row, seen in zip(high, dataset.training_view(high, "high", use_forces), strict=True):
            (structure,), (old,) = seen.structures, row.structures
            assert set(structure.labels) == {"high"} and seen.energy == row.energy == old.labels["high"].energy
            assert (structure.labels["high"].forces is not None) == use_forces


def test_a_structure_that_rows_share_stays_one(high: list[Reaction]) -> None:
    a, b, c = (row.structures[0] for row in high[:3])
    rows = [Reaction("1", "g", (a, b), (1.0, -1.0), 0.0), Reaction("2", "g", (a, c), (1.0, -1.0), 0.0)]
    first, second = dataset.training_view(rows, "high", use_forces=False)
    assert first.structures[0] is second.structures[0]


@pytest.mark.parametrize(("folds", "structures", "expected"), [(-1, 199, 5), (-1, 200, 0), (0, 20, 0), (3, 900, 3)])
def test_small_sets_get_folds(folds: int, structures: int, expected: int) -> None:
    assert dataset.num_folds(FinetuneConfig("c", "d", "high", split=SplitConfig(folds=folds)), structures) == expected


def test_an_ensemble_has_folds_whatever_the_size() -> None:
    assert dataset.num_folds(FinetuneConfig("c", "d", "high", uncertainty="ensemble"), 5000) == 5


def test_a_large_molecule_is_not_held_out_whole(shifted: list[Structure]) -> None:
    """One molecule has most of the structures: the others are drawn, whatever the seed."""
    water = [s for s in shifted if s.group == "H2O"]
    large = [dataclasses.replace(water[0], key=f"large-{i}", group="large") for i in range(60)]
    for seed in range(10):
        notes: list[str] = []
        kept, held = dataset.hold_out([*large, *shifted], 0.15, seed, "validation", notes)
        assert {s.group for s in held}.isdisjoint(s.group for s in kept) and "large" not in {s.group for s in held}
        assert 10 <= len(held) <= 20 and notes == []
    kept, held = dataset.hold_out([*large, *shifted[:4]], 0.15, 0, "validation", notes := [])
    assert len(held) == 4 and "molecules stay whole" in notes[0]


def test_molecules_that_share_a_geometry_are_one(high: list[Reaction]) -> None:
    copy = dataclasses.replace(high[0], group="water under another name")
    notes: list[str] = []
    train, _ = dataset.with_equal_grouped([*high, copy], [], 1e-3, notes)
    assert train[-1].group == train[0].group and len({row.group for row in train}) == 8
    assert notes == ["1 pairs of groups share a geometry and are treated as one molecule"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay": ("builtin",)}, "replay: expected DATASET:FIDELITY, found builtin"),
        ({"replay": ("builtin:low",), "strategy": "embedding"}, "replay: expected strategy full or adapter"),
        ({"replay": ("builtin:low",), "strategy": "ridge"}, "replay: expected strategy full or adapter"),
        ({"use_forces": True, "strategy": "ridge"}, "use_forces: expected strategy embedding, adapter or full"),
        ({"also": ("builtin",)}, "also: expected DATASET:FIDELITY, found builtin"),
        ({"uncertainty": "ensemble", "split": SplitConfig(folds=0)}, "uncertainty: expected split.folds of at least 2"),
        ({"training": TrainingConfig(max_forgetting=0.1)}, "training.max_forgetting: expected replay=DATASET"),
        (
            {"training": TrainingConfig(optimizer="lbfgs", ema=0.5)},
            "training.ema: expected nothing with optimizer=lbfgs",
        ),
        ({"training": TrainingConfig(layer_decay=1.5)}, "training.layer_decay: expected 0 < layer_decay <= 1"),
        ({"split": SplitConfig(folds=1)}, "split.folds: expected -1"),
        ({"fidelity": "CCSD(T)"}, "expected lower-case letters"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"checkpoint": "c", "data": "d", "fidelity": "high"}
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**(values | changes))  # type: ignore[arg-type]
