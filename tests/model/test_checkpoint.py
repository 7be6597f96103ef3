"""Checkpoints: what is loaded is what was saved, damage is named, and old ones stay readable."""

from __future__ import annotations

import hashlib
import json
import math
import os
import runpy
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from rung.data.fidelity import Fidelity
from rung.data.structure import Structure
from rung.model import checkpoint as checkpoint_module
from rung.model import load
from rung.model.card import model_card
from rung.model.checkpoint import FORMAT_VERSION, Stored, load_checkpoint, pack_checkpoint, save_checkpoint
from rung.model.checkpoint_files import replace_folder
from rung.model.potential import Potential
from rung.model.predict import predict
from rung.model.reference import compare
from rung.model.uncertainty import Ensemble, LastLayer

SAMPLES = Path(__file__).parent / "checkpoints"
FIDELITIES = {"low": Fidelity("low", "GFN2-xTB", code="tblite 0.4"), "high": Fidelity("high", "MP2", "cc-pVDZ")}
FILES = {"model.safetensors", "raw.safetensors", "rung.yaml", "evaluation.json", "README.md", "SHA256SUMS"}


def save(folder: Path, potential: Potential, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "fidelities": FIDELITIES,
        "training_config": {"optimizer": {"name": "soap", "lr": 3e-3}},
        "datasets": [{"name": "builtin", "licence": "CC0-1.0", "sha256": "ab" * 32}],
        "evaluation": {"builtin/low": {"num_energies": 3, "energy_mae_mev_per_atom": 1.5}},
    }
    return save_checkpoint(folder, potential, **(arguments | changes))


@pytest.fixture
def potential(make_potential: Callable[..., Potential]) -> Potential:
    return make_potential()


def sign_again(folder: Path) -> None:
    """Write the digests of the files as they are: what an editor who knows the format would do."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def edit_info(folder: Path, **changes: Any) -> None:
    info = yaml.safe_load((folder / "rung.yaml").read_text())
    (folder / "rung.yaml").write_text(yaml.safe_dump(info | changes))
    sign_again(folder)


@pytest.mark.parametrize("conditioning", ["film", "heads"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_round_trip_keeps_everything(
    tmp_path: Path,
    make_potential: Callable[..., Potential],
    molecules: list[Structure],
    conditioning: str,
    packed: bool,
) -> None:
    potential = make_potential(conditioning=conditioning)
    raw_state = {name: value + 1 for name, value in potential.state_dict().items()}
    path = save(tmp_path / "model", potential, raw_state=raw_state)
    assert {file.name for file in path.iterdir()} == FILES
    loaded = load(pack_checkpoint(path) if packed else path)
    assert loaded.potential.config == potential.config
    assert not loaded.potential.training
    for name, value in potential.state_dict().items():
        torch.testing.assert_close(loaded.potential.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    before, after = (predict(model, molecules, "low") for model in (potential, loaded.potential))
    assert [one.energy for one in before] == [one.energy for one in after]
    assert loaded.raw_state is not None
    torch.testing.assert_close(loaded.raw_state, raw_state, rtol=0, atol=0, equal_nan=True)
    assert loaded.fidelities == FIDELITIES
    assert loaded.info["training"] == {"optimizer": {"name": "soap", "lr": 3e-3}}
    assert loaded.evaluation == {"builtin/low": {"num_energies": 3, "energy_mae_mev_per_atom": 1.5}}


def test_what_people_read(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    info = yaml.safe_load((folder / "rung.yaml").read_text())
    assert info["format_version"] == FORMAT_VERSION
    assert info["fidelities"]["high"]["e0"] == {1: -13.7, 6: -1029.5}  # no oxygen: not trained there
    assert info["datasets"][0]["sha256"] == "ab" * 32
    assert set(info["versions"]) == {"python", "rung", "torch", "numpy", "vesin"}
    card = (folder / "README.md").read_text()
    for words in ("H, C, O", "GFN2-xTB", "licence: CC0-1.0", "| builtin/low | 3 | 1.5 | - |"):
        assert words in card
    assert model_card(info, {"b": {}, "a": {}}) == model_card(info, {"a": {}, "b": {}})  # as after a round trip
    assert (save(tmp_path / "other", potential, card="# Mine\n") / "README.md").read_text() == "# Mine\n"


def test_error_bars_come_back(tmp_path: Path, potential: Potential) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = dict(potential.named_parameters())
    bars = {
        "high": LastLayer(torch.randn(5, 5, dtype=torch.float64, generator=generator), noise=0.003, factor=1.25),
        "low": Ensemble([weights, weights | {"e0_FZ": potential.e0_FZ}], factor=2.0),  # members share memory
    }
    folder = save(tmp_path / "model", potential, uncertainty=bars)
    assert {file.name for file in folder.iterdir()} == FILES - {"raw.safetensors"} | {"uncertainty.safetensors"}
    loaded = load_checkpoint(pack_checkpoint(folder)).uncertainty
    assert loaded.keys() == bars.keys()
    last, ensemble = loaded["high"], loaded["low"]
    assert isinstance(last, LastLayer) and (last.noise, last.factor) == (0.003, 1.25)
    torch.testing.assert_close(last.covariance_KK, bars["high"].covariance_KK, rtol=0, atol=0)
    assert isinstance(ensemble, Ensemble) and ensemble.factor == 2.0
    assert [member.keys() for member in ensemble.members] == [member.keys() for member in bars["low"].members]
    for member in ensemble.members:
        for name, value in weights.items():
            torch.testing.assert_close(member[name], value.detach(), rtol=0, atol=0)
    assert "error bars of energies at: high (last_layer), low (ensemble)" in (folder / "README.md").read_text()


def test_bad_error_bars_are_named(tmp_path: Path, potential: Potential) -> None:
    bar = LastLayer(torch.eye(2, dtype=torch.float64), noise=0.003)
    with pytest.raises(ValueError, match="unknown fidelity 'middle'; known: low, high"):
        save(tmp_path / "model", potential, uncertainty={"middle": bar})
    assert not any(tmp_path.iterdir())
    folder = save(tmp_path / "model", potential, uncertainty={"low": bar})
    (folder / "uncertainty.safetensors").unlink()
    with pytest.raises(ValueError, match="uncertainty.safetensors is missing"):
        load_checkpoint(folder)
    sign_again(folder)
    with pytest.raises(ValueError, match="uncertainty.safetensors: uncertainty of 'low': 'covariance' is missing"):
        load_checkpoint(folder)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path, potential: Potential) -> None:
    mask = os.umask(0o027)
    try:
        folder = save(tmp_path / "model", potential, raw_state=potential.state_dict())
        tar = pack_checkpoint(folder)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [*folder.iterdir(), tar]}
    assert set(modes.values()) == {0o640}, modes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_float64_weights_are_not_rounded(tmp_path: Path, potential: Potential) -> None:
    potential.double()
    with torch.no_grad():
        next(potential.parameters()).add_(1e-12)
    loaded = load_checkpoint(save(tmp_path / "model", potential)).potential
    for name, value in potential.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_the_same_potential_gives_the_same_bytes(tmp_path: Path, potential: Potential) -> None:
    tars = [pack_checkpoint(save(tmp_path / name / "model", potential)).read_bytes() for name in "ab"]
    assert tars[0] == tars[1]


def test_saving_replaces_an_older_checkpoint_and_nothing_else(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    potential.set_scale(9.0)
    save(folder, potential)
    assert load_checkpoint(folder).potential.scale == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing is left beside
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    with pytest.raises(FileExistsError, match="thesis exists and is not a checkpoint"):
        save(tmp_path / "thesis", potential)


def test_a_checkpoint_with_other_things_in_its_folder_is_not_replaced(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    (folder / "charges.safetensors").write_bytes(b"...")  # of a newer Rung: listed, so it is the checkpoint's
    sign_again(folder)
    save(folder, potential)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"no part of a checkpoint: .git, a.txt, b.txt and 1 more; choose"):
        save(folder, potential)
    with pytest.raises(FileExistsError, match=r"no part of a checkpoint"):
        replace_folder(tmp_path / "model", folder)
    assert (folder / ".git" / "HEAD").is_file() and (folder / "c.txt").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path: Path, potential: Potential) -> None:
    with pytest.raises(ValueError, match="fidelity 'high' of the model has no description; given: low"):
        save(tmp_path / "model", potential, fidelities={"low": FIDELITIES["low"]})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "model", potential, evaluation={"low": {"energy_mae_mev_per_atom": math.nan}})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(FILES - {"SHA256SUMS"}))
def test_a_changed_or_missing_file_is_named(tmp_path: Path, potential: Potential, name: str) -> None:
    folder = save(tmp_path / "model", potential, raw_state=potential.state_dict())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name}: expected SHA-256 .* found .*damaged or was edited"):
        load_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_checkpoint(folder)


def test_what_is_no_checkpoint_is_named(tmp_path: Path, potential: Potential) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a file SHA256SUMS, found none"):
        load_checkpoint(tmp_path)
    text = tmp_path / "text"
    text.write_text("no tar")
    with pytest.raises(ValueError, match="not a whole tar file"):
        load_checkpoint(text)
    folder = save(tmp_path / "model", potential)
    tar = pack_checkpoint(folder)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    with pytest.raises(ValueError, match="model.tar: not a whole tar file"):
        load_checkpoint(tar)
    (folder / "SHA256SUMS").write_text("no digests")
    with pytest.raises(ValueError, match="is missing|expected lines"):
        load_checkpoint(folder)


def test_truncated_weights_are_named(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    sign_again(folder)
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        load_checkpoint(folder)


def test_weights_of_another_model_are_named(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    edit_info(folder, model=yaml.safe_load((folder / "rung.yaml").read_text())["model"] | {"channels": 8})
    with pytest.raises(ValueError, match=r"(?s)the weights do not fit the model config in rung.yaml.*size mismatch"):
        load_checkpoint(folder)


def test_what_is_missing_inside_a_file_is_named(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["embedding.element_SC"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    sign_again(folder)
    with pytest.raises(ValueError, match=r"(?s)do not fit the model config.*embedding.element_SC"):
        load_checkpoint(folder)
    (folder / "evaluation.json").write_text("{")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(potential.state_dict()))
    sign_again(folder)
    with pytest.raises(ValueError, match="evaluation.json: not valid JSON"):
        load_checkpoint(folder)
    (folder / "rung.yaml").write_text("format_version: 1\n")
    sign_again(folder)
    with pytest.raises(ValueError, match="rung.yaml: key 'model' is missing"):
        load_checkpoint(folder)


def test_unlisted_weights_are_refused(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    (folder / "raw.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="raw.safetensors has no digest"):
        load_checkpoint(folder)


def test_no_file_can_execute_code(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    (folder / "rung.yaml").write_text("format_version: !!python/object/apply:os.getpid []\n")
    sign_again(folder)
    with pytest.raises(ValueError, match="rung.yaml: not valid YAML"):
        load_checkpoint(folder)


def test_files_of_a_newer_rung_do_not_hide_that_it_is_newer(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    (folder / "charges.safetensors").write_bytes(b"...")
    edit_info(folder, format_version=FORMAT_VERSION + 1)
    for path in (folder, pack_checkpoint(folder)):
        with pytest.raises(ValueError, match="is newer than this Rung reads"):
            load_checkpoint(path)
    (folder / "charges.safetensors").write_bytes(b"?..")
    with pytest.raises(ValueError, match="charges.safetensors: expected SHA-256"):
        load_checkpoint(folder)


def test_a_list_of_digests_names_plain_files_only(tmp_path: Path, potential: Potential) -> None:
    folder = save(tmp_path / "model", potential)
    (tmp_path / "secret").write_bytes(b"...")
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{hashlib.sha256(b'...').hexdigest()}  ../secret\n")
    with pytest.raises(ValueError, match="expected plain file names, found '../secret'"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT_VERSION + 1, f"format_version {FORMAT_VERSION + 1} is newer than this Rung reads"),
        ("one", "format_version: expected a whole number >= 1, found 'one'"),
    ],
)
def test_a_foreign_format_version_is_refused(
    tmp_path: Path, potential: Potential, version: object, message: str
) -> None:
    folder = save(tmp_path / "model", potential)
    edit_info(folder, format_version=version)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_old_versions_are_upgraded_step_by_step(
    tmp_path: Path, potential: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", potential)

    def upgrade(mark: str) -> Callable[[Stored], Stored]:
        return lambda old: Stored({**old.info, "steps": [*old.info.get("steps", []), mark]}, old.weights, None, {})

    monkeypatch.setattr(checkpoint_module, "FORMAT_VERSION", FORMAT_VERSION + 2)
    steps = {FORMAT_VERSION: upgrade("first"), FORMAT_VERSION + 1: upgrade("second")}
    monkeypatch.setattr(checkpoint_module, "UPGRADES", checkpoint_module.UPGRADES | steps)
    assert load_checkpoint(folder).info["steps"] == ["first", "second"]


@pytest.mark.parametrize("sample", sorted(path.parent for path in SAMPLES.glob("v*/*/rung.yaml")), ids=str)
def test_every_published_version_still_predicts_the_same(sample: Path) -> None:
    water = runpy.run_path(str(SAMPLES / "make_samples.py"))["WATER"]
    loaded = load_checkpoint(sample)
    [prediction] = predict(loaded.potential, [water], "low")
    expected = loaded.evaluation["water"]
    assert prediction.energy == pytest.approx(expected["energy_ev"], abs=1e-4)
    np.testing.assert_allclose(prediction.forces, expected["forces_ev_per_angstrom"], rtol=1e-3, atol=1e-4)
    assert loaded.info["format_version"] == FORMAT_VERSION
    first = sample.parent.name == "v1"
    assert loaded.uncertainty.keys() == (set() if first else {"low", "high"})
    if loaded.reference is not None:
        assert all(comparison.is_within for comparison in compare(loaded.potential, loaded.reference))
    assert (loaded.reference is None) is first


@pytest.mark.parametrize("conditioning", ["film", "heads"])
def test_the_format_changes_only_with_its_version(tmp_path: Path, conditioning: str) -> None:
    stored = SAMPLES / f"v{FORMAT_VERSION}" / conditioning
    assert stored.is_dir(), "run tests/model/checkpoints/make_samples.py for the new format version"
    runpy.run_path(str(SAMPLES / "make_samples.py"))["make_sample"](tmp_path / "now", conditioning)
    assert outline(tmp_path / "now") == outline(stored), "the format changed: raise FORMAT_VERSION, add an upgrade"


def outline(folder: Path) -> dict[str, Any]:
    """Return what a reader of the format relies on: files, keys, and names, shapes and dtypes of tensors."""
    tensors = {path.name: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "info": keys(yaml.safe_load((folder / "rung.yaml").read_text())),
        "evaluation": keys(json.loads((folder / "evaluation.json").read_text())),
        "reference": keys(json.loads((folder / "reference.json").read_text())["predictions"][0]),
        "tensors": {
            file: {name: (str(value.dtype), tuple(value.shape)) for name, value in state.items()}
            for file, state in tensors.items()
        },
    }


def keys(value: Any) -> Any:
    return {key: keys(item) for key, item in value.items()} if isinstance(value, dict) else None
