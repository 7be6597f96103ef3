"""What the configuration refuses, and what follows from it."""

from __future__ import annotations

import math
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import torch

from rung.data.manifest import read_manifest
from rung.model.config import read_config, to_yaml
from rung.pretrain.config import OptimizerConfig, PretrainConfig
from rung.pretrain.plan import Plan, make_plan, make_potential
from rung.pretrain.schedule import draw_tasks, learning_rate

MINIMAL = ["output=out", "steps=10", "tasks=[{dataset: builtin, fidelity: low}, {dataset: builtin, fidelity: high}]"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.wieght_decay=0", "did you mean 'weight_decay'"),
        ("optimizer.zero_stage=1", "soap needs matrix-shaped parameters and ZeRO stage 1 flattens them"),
        ("optimizer={name: adamw, zero_stage: 3}", "3 cannot differentiate forces"),
        ("optimizer.name=sgd", "soap"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("steps=0", "steps: expected a number >= 1, found 0"),
        ("mode=maml", "joint"),
        ("reptile.inner_steps=0", "reptile.inner_steps"),
        ("data.temperature=0.5", "data.temperature"),
        ("tasks=[]", "tasks: expected at least one"),
        ("tasks=[{dataset: a, fidelity: low}, {dataset: a, fidelity: low}]", "distinct"),
        ("tasks=[{dataset: a, fidelity: low, weight: 1}, {dataset: a, fidelity: b}]", "for every task or for none"),
        ("tasks=[{dataset: a}]", "fidelity"),
    ],
)
def test_bad_values_are_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(PretrainConfig, None, [*MINIMAL, word])


def test_reptile_cannot_draw_more_tasks_than_there_are() -> None:
    with pytest.raises(ValueError, match="at most the number of tasks, 2, found 3"):
        read_config(PretrainConfig, None, [*MINIMAL, "mode=reptile", "reptile.tasks_per_outer=3"])


def test_required_values_have_no_default() -> None:
    with pytest.raises(ValueError, match="output"):
        read_config(PretrainConfig, None, MINIMAL[1:])


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = read_config(PretrainConfig, None, [*MINIMAL, "model.channels=8", "loss.kind=l2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(PretrainConfig, tmp_path / "config.yaml") == config


def test_plan_derives_model_shares_references_and_rounds(config_words: list[str]) -> None:
    words = [*config_words, "output=out", "mode=reptile", "reptile.inner_steps=4", "data.temperature=1"]
    plan = make_plan(read_config(PretrainConfig, None, words), size=2)
    assert plan.model.elements == (1, 6, 7, 8)
    assert plan.model.fidelities == ("low", "high")
    assert plan.counts == (36, 18)
    assert [task.weight for task in plan.tasks] == pytest.approx([2 / 3, 1 / 3])
    assert (plan.steps_per_round, plan.rounds, plan.steps) == (8, 1, 8)
    assert plan.deepspeed["gradient_clipping"] == 0.0  # without ZeRO the engine clips
    potential = make_potential(plan)
    assert torch.isfinite(potential.e0_FZ).all()
    assert float(potential.scale) == plan.scale > 0


def test_plan_refuses_what_the_datasets_lack(config_words: list[str], dataset: Path) -> None:
    def plan(*words: str) -> None:
        make_plan(read_config(PretrainConfig, None, [*config_words, "output=out", *words]), size=1)

    with pytest.raises(ValueError, match="unknown fidelity 'lwo'.*did you mean 'low'"):
        plan(f"tasks=[{{dataset: {dataset}, fidelity: lwo}}]")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan("tasks=[{dataset: nowhere, fidelity: low}]")
    with pytest.raises(ValueError, match=r"model.elements: the datasets have atomic numbers \[7, 8\] too"):
        plan("model.elements=[1, 6]")
    with pytest.raises(ValueError, match="model.fidelities: expected those of the tasks"):
        plan("model.fidelities=[low, high, other]")
    with pytest.raises(ValueError, match="did you mean 'channels'"):
        plan("model.chanels=3")


def test_reference_energies_are_the_fit_or_those_of_atoms(config_words: list[str], dataset: Path) -> None:
    def plan(*words: str) -> Plan:
        return make_plan(read_config(PretrainConfig, None, [*config_words, "output=out", *words]), size=1)

    assert plan().e0["low"] == read_manifest(dataset).entry("low").e0_fit
    with pytest.raises(ValueError, match="has no isolated-atom energies in its manifest"):
        plan("reference_energies=isolated_atoms")
    builtin = "tasks=[{dataset: builtin, fidelity: gfn2_xtb}]"
    assert plan(builtin, "reference_energies=isolated_atoms").e0 == {
        "gfn2_xtb": read_manifest("builtin").entry("gfn2_xtb").e0
    }


def test_learning_rate_warms_up_and_ends_at_its_fraction() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=9, final_lr_fraction=0.01)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(0.01)
    assert rates[50] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 50 / 99)) / 2)


def test_drawn_tasks_are_distinct_pure_and_follow_the_weights() -> None:
    draws = [draw_tasks(7, outer, [0.7, 0.2, 0.1], 1)[0] for outer in range(2000)]
    assert draws == [draw_tasks(7, outer, [0.7, 0.2, 0.1], 1)[0] for outer in range(2000)]
    counts = Counter(draws)
    assert [counts[task] / 2000 for task in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert sorted(draw_tasks(0, 3, [0.7, 0.2, 0.1], 3)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["builtin", "debug", "quickstart"])
def test_packaged_configs_fit_the_builtin_dataset(name: str) -> None:
    path = Path(str(resources.files("rung.pretrain.configs"))) / f"{name}.yaml"
    plan = make_plan(read_config(PretrainConfig, path), size=2)
    assert all(task.dataset == "builtin" for task in plan.tasks)


def test_muon_with_zero_wants_no_clipping() -> None:
    with pytest.raises(ValueError, match="ZeRO clips what has already been made orthogonal"):
        OptimizerConfig(name="muon", zero_stage=1)
    assert OptimizerConfig(name="muon", zero_stage=1, gradient_clipping=0.0).name == "muon"
