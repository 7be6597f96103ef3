"""The configs of three sizes, and the measurements that are taken with them."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from rung.pretrain.bench_optimizer import optimizer_cost, read
from rung.pretrain.plan import make_plan, make_potential


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_the_size_in_the_comment_is_the_models(name: str) -> None:
    text = (resources.files("rung.pretrain.configs") / f"{name}.yaml").read_text()
    match = re.match(r"# ([\d.]+) million parameters", text)
    assert match
    potential = make_potential(make_plan(read(name), 1))
    size = sum(parameter.numel() for parameter in potential.parameters())
    assert size == pytest.approx(1e6 * float(match[1]), rel=0.02)
    assert read(name).tasks == read("builtin").tasks


@pytest.mark.slow
def test_costs_of_every_optimizer_are_measured() -> None:
    row = optimizer_cost("debug", steps=2)
    for name in ("soap", "soap_staggered", "soap_of_8_ranks", "adamw", "muon", "pytorch_optimizer"):
        assert 0 < row[name]["share"] < 1
    assert row["adamw"]["operators"] < row["soap"]["operators"] < row["pytorch_optimizer"]["operators"]
