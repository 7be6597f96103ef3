"""Config files: what is read equals what was written, and every mistake is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rung.model.config import ModelConfig, config_from_mapping, read_config, to_mapping, to_yaml

REQUIRED: dict[str, Any] = {"elements": (1, 6), "fidelities": ("gfn2",)}
MINIMAL = "elements: [1, 6]\nfidelities: [gfn2]\n"


@dataclass(frozen=True)
class Run:
    """A nested config such as pretrain's."""

    model: ModelConfig
    weights: dict[str, float] = field(default_factory=dict)
    tasks: list[ModelConfig] = field(default_factory=list)
    out: Path = Path("runs")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "channels: 16\nnum_layers: 3\n")
    config = read_config(ModelConfig, path, ["channels=8", "cutoff=4.5", "charges=[-1,0]"])
    assert config == ModelConfig((1, 6), ("gfn2",), channels=8, num_layers=3, cutoff=4.5, charges=(-1, 0))
    assert isinstance(config.elements, tuple)


def test_overrides_alone_are_enough() -> None:
    assert read_config(ModelConfig, None, ["elements=[1]", "fidelities=[a]"]) == ModelConfig((1,), ("a",))


def test_nested_configs_round_trip(tmp_path: Path) -> None:
    model = ModelConfig(**REQUIRED, conditioning="heads", l_hidden=0)
    run = Run(model, weights={"a": 1e-3}, tasks=[model], out=Path("some/where"))
    assert read_config(Run, write(tmp_path, to_yaml(run))) == run
    assert config_from_mapping(Run, to_mapping(run), "here") == run
    changed = read_config(Run, tmp_path / "config.yaml", ["model.channels=4", "weights.b=2"])
    assert changed.model.channels == 4
    assert changed.weights == {"a": 1e-3, "b": 2.0}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "chanels: 3", [], "unknown key 'chanels'; did you mean 'channels'"),
        (MINIMAL, ["cutof=3"], "override 'cutof=3': unknown key 'cutof'; did you mean 'cutoff'"),
        (MINIMAL, ["channels"], "override 'channels': expected key=value"),
        (MINIMAL, ["channels=[1"], r"override 'channels=\[1'"),
        (MINIMAL + "channels: 2.5", [], "channels: Value '2.5'.*Integer"),
        (MINIMAL + "cutoff: far", [], "cutoff: Value 'far'.*Float"),
        ("elements: [C]", [], "elements: an entry could not be converted to Integer"),
        ("elements: 6", [], "elements: .*int is not a"),
        ("elements: [1]", [], "fidelities: required, but no value was given"),
        (MINIMAL + "elements: [1]", [], "not valid YAML.*duplicate key elements"),
        ("elements: [1", [], "not valid YAML"),
        ("- 1", [], "expected a mapping of names to values"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        read_config(ModelConfig, path, overrides)
    assert str(path) in str(caught.value) or "override" in str(caught.value)


def test_a_mistake_in_a_nested_config_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'model.chanels'; did you mean 'channels'"):
        read_config(Run, write(tmp_path, "model:\n  chanels: 3\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        read_config(ModelConfig, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elements": ()}, "elements: expected at least one entry, found none"),
        ({"elements": (6, 1)}, "elements: expected ascending atomic numbers"),
        ({"elements": (1, 1)}, "elements: expected distinct entries"),
        ({"elements": (0, 1)}, "elements: expected atomic numbers 1..118"),
        ({"fidelities": ("GFN2",)}, "'GFN2'"),
        ({"fidelities": ("a", "a")}, "fidelities: expected distinct entries"),
        ({"multiplicities": (0,)}, "multiplicities: expected 2S"),
        ({"multiplicities": (256,)}, "multiplicities: expected 2S . 1 in 1..255"),
        ({"charges": (0, -129)}, "charges: expected -128..127 elementary charges"),
        ({"cutoff": float("nan")}, "cutoff: expected a positive number, found nan"),
        ({"channels": 0}, "channels: expected a positive number, found 0"),
        ({"cutoff": -1.0}, "cutoff: expected a positive number"),
        ({"average_neighbours": 0.0}, "average_neighbours: expected a positive number"),
        ({"l_max": 4}, "l_max: expected 1, 2 or 3, found 4"),
        ({"l_hidden": 2}, "l_hidden: expected 0 or 1, found 2"),
        ({"conditioning": "none"}, "conditioning: expected film or heads"),
    ],
)
def test_a_model_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(REQUIRED | change))
