"""Publishing: the folder says what is in it, shows no secrets, and a fresh process reproduces its predictions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import yaml
from ase.build import molecule

from rung.data.fidelity import Fidelity
from rung.data.read import read_any
from rung.data.structure import Structure
from rung.finetune.config import FinetuneConfig
from rung.launch.cli import run_module
from rung.model import publish as publish_module
from rung.model.card import data_licences, without_secrets
from rung.model.checkpoint import load_checkpoint, save_checkpoint, write_checkpoint
from rung.model.config import ModelConfig, to_mapping
from rung.model.potential import Potential
from rung.model.predict import predict
from rung.model.publish import publish, verify
from rung.model.reference import Comparison, compare, make_reference

SAMPLE = Path(__file__).parent / "checkpoints" / "v2" / "film"  # has a reference.json: of water and of hydrogen
FIDELITIES = {"low": Fidelity("low", "GFN2-xTB", code="tblite 0.4"), "high": Fidelity("high", "MP2", "cc-pVDZ")}
DATA = [
    {"name": "builtin", "licence": "CC0-1.0", "manifest_sha256": "ab" * 32},
    {"name": "builtin", "fidelity": "high", "sha256": "ab" * 32},
]


def save(folder: Path, potential: Potential, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "fidelities": FIDELITIES,
        "training_config": {"output": "/scratch/me/run", "tasks": [{"dataset": "builtin"}]},
        "datasets": DATA,
        "evaluation": {"high": {"num_energies": 3, "energy_mae_mev_per_atom": 1.5}},
    }
    return save_checkpoint(folder, potential, **(arguments | changes))


@pytest.fixture
def source(tmp_path: Path, make_potential: Callable[..., Potential]) -> Path:
    return save(tmp_path / "trained", make_potential())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a file of water and methanol with energies."""
    generator = np.random.default_rng(0)
    frames = []
    for name in ("H2O", "CH3OH"):
        atoms = molecule(name)
        atoms.positions += generator.normal(scale=0.02, size=atoms.positions.shape)
        atoms.info["REF_energy"] = -500.0 * len(atoms)
        frames.append(atoms)
    ase.io.write(tmp_path / "my.extxyz", frames)
    return tmp_path / "my.extxyz"


def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process, where a test is about something else: a new one takes seconds."""
    monkeypatch.setattr(publish_module, "verify_in_fresh_process", verify)


def rung_publish(*arguments: object) -> int:
    return run_module("rung.model.publish", "rung publish", [str(argument) for argument in arguments])


def front_matter(folder: Path) -> dict[str, Any]:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    return values


@pytest.mark.slow
def test_a_fresh_process_reproduces_or_publishing_fails(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "yaml.py").write_text("raise SystemExit('imported from the current directory')")
    monkeypatch.chdir(tmp_path / "here")
    assert rung_publish(source, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for words in ("low: 3 structures, energies within", "high: 3 structures", "(allowed 2.0e-05)", "wrote"):
        assert words in printed
    assert "absolute paths of the machine that trained: training.output\n" in printed
    # The weights that were written are not those that the predictions are of.
    honest = write_checkpoint

    def write_others(folder: Path, checkpoint: Any) -> Path:
        checkpoint.potential.set_scale(5.1)
        return honest(folder, checkpoint)

    monkeypatch.setattr(publish_module, "write_checkpoint", write_others)
    before = (tmp_path / "out" / "SHA256SUMS").read_bytes()
    assert rung_publish(source, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    for words in (
        "in a fresh process",
        "does not reproduce",
        "low: 3 structures, energies within",
        "(allowed 2.0e-05)",
    ):
        assert words in error
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == before  # the good one stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out", "trained"]  # nothing is left beside


def test_what_is_published_is_the_checkpoint(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_process(monkeypatch)
    publish(source, tmp_path / "out", name="A ladder", repository="lab/ladder")
    before, after = load_checkpoint(source), load_checkpoint(tmp_path / "out")
    for name, value in before.potential.state_dict().items():
        np.testing.assert_array_equal(after.potential.state_dict()[name], value)
    publication = {"name": "A ladder", "licence": "CC0-1.0", "repository": "lab/ladder"}
    assert after.info == before.info | {"publication": publication}
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("# A ladder", 'rung.model.load("lab/ladder@COMMIT")', "| high | MP2 | cc-pVDZ |", "## Limits"):
        assert words in card
    assert front_matter(tmp_path / "out")["license"] == "cc0-1.0"
    assert front_matter(tmp_path / "out")["library_name"] == "rung"
    assert {"low", "high"} < set(front_matter(tmp_path / "out")["tags"])


def test_publishing_what_was_published_changes_only_what_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_process(monkeypatch)
    publish(SAMPLE, tmp_path / "a", name="A ladder", licence="MIT", repository="lab/ladder")
    publish(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()
    publish(tmp_path / "a", tmp_path / "c", licence="CC-BY-4.0")
    publication = {"name": "A ladder", "licence": "CC-BY-4.0", "repository": "lab/ladder"}
    assert load_checkpoint(tmp_path / "c").info["publication"] == publication


def test_stored_predictions_are_kept_when_reproduced_and_no_other_data_are_given(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_process(monkeypatch)
    sample = load_checkpoint(SAMPLE)
    publish(SAMPLE, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").reference == sample.reference
    (water,) = ase.io.read(data, ":1")
    ase.io.write(tmp_path / "water.extxyz", water)
    publish(SAMPLE, tmp_path / "new", data=[f"{tmp_path / 'water.extxyz'}:low"])
    new = load_checkpoint(tmp_path / "new").reference
    assert new is not None
    stored = [entry["positions"] for entry in new["predictions"] if entry["fidelity"] == "low"]
    np.testing.assert_allclose(stored, [water.positions], atol=1e-6)
    sample.potential.set_scale(5.1)
    other = write_checkpoint(tmp_path / "other", sample)
    with pytest.raises(ValueError, match="other does not reproduce its stored predictions: low: 2 structures, energ"):
        publish(other, tmp_path / "not")


def test_stored_predictions_are_those_of_the_potential(
    make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    potential = make_potential()
    reference = json.loads(json.dumps(make_reference(potential, molecules)))
    stored = {(entry["fidelity"], entry["key"]): entry for entry in reference["predictions"]}
    # Ethanol has oxygen, which "high" was not trained on.
    assert stored.keys() == {("low", "H2O"), ("low", "CH4"), ("low", "CH3CH2OH"), ("high", "CH4")}
    for (fidelity, key), entry in stored.items():
        [structure] = [structure for structure in molecules if structure.key == key]
        [expected] = predict(potential, [structure], fidelity)
        assert entry["energy"] == pytest.approx(expected.energy, abs=1e-4)
        np.testing.assert_allclose(entry["forces"], expected.forces, atol=1e-4)
        np.testing.assert_array_equal(np.array(entry["positions"], np.float32), structure.positions)


def test_a_shift_beyond_the_tolerance_is_found(
    make_potential: Callable[..., Potential], molecules: list[Structure]
) -> None:
    potential = make_potential()
    reference = make_reference(potential, molecules)
    allowed = reference["tolerance"]["energy_ev_per_atom"]
    for factor, good in ((0.5, True), (2.0, False)):
        shifted = make_potential()
        shifted.e0_FZ += factor * allowed  # moves every energy by so much per atom
        low, high = compare(shifted, reference)
        assert low.energy == pytest.approx(factor * allowed, rel=0.2)
        assert low.is_within is high.is_within is good
    entry = reference["predictions"][0]
    entry["forces"][0][0] += 2 * reference["tolerance"]["force_ev_per_angstrom"]
    assert [one.is_within for one in compare(potential, reference)] == [False, True]


@pytest.mark.parametrize("changes", [{"energy": math.nan}, {"force": math.nan}, {"structures": 0}, {"energy": 1.1}])
def test_a_comparison_that_says_nothing_is_not_good(changes: dict[str, float]) -> None:
    good = Comparison("low", 3, 1.0, 1.0, 1.0, 1.0)
    assert good.is_within
    assert not dataclasses.replace(good, **changes).is_within


def test_errors_on_given_data_go_into_the_card(
    tmp_path: Path, source: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_process(monkeypatch)
    publish(source, tmp_path / "out", data=[f"{data}:low"])
    published = load_checkpoint(tmp_path / "out")
    frames = ase.io.read(data, ":")
    errors = [
        predict(published.potential, [structure_of(atoms)], "low")[0].energy / len(atoms) + 500.0 for atoms in frames
    ]
    metrics = published.evaluation["my/low"]
    assert metrics["energy_mae_mev_per_atom"] == pytest.approx(1000 * np.abs(errors).mean(), rel=1e-5)
    assert published.evaluation["high"] == {"num_energies": 3, "energy_mae_mev_per_atom": 1.5}  # as it was
    assert f"| my/low | 2 | {metrics['energy_mae_mev_per_atom']:.4g} | - |" in (tmp_path / "out/README.md").read_text()
    assert published.reference is not None
    stored = [len(entry["numbers"]) for entry in published.reference["predictions"] if entry["fidelity"] == "low"]
    assert stored == [3, 6]  # water and methanol; "high" knows no oxygen and takes built-in structures


def listed(data: Path, **entry: str) -> dict[str, str]:
    return {"name": str(data), "fidelity": "low", "sha256": hashlib.sha256(data.read_bytes()).hexdigest()} | entry


def test_errors_on_training_data_are_no_errors_on_held_out_structures(
    tmp_path: Path, data: Path, make_potential: Callable[..., Potential], monkeypatch: pytest.MonkeyPatch
) -> None:
    same_process(monkeypatch)
    runs = {  # what a fine-tuning run says of itself, and whether it trained on the file
        "data": ({"data": str(data), "test": ""}, True),
        "also": ({"data": "x", "test": str(data), "also": [f"{data}:high"]}, True),
        "test": ({"data": "x", "test": str(data)}, False),
    }
    for name, (run, trained) in runs.items():
        # The run of which this one went on has nothing to do with the file.
        config = {"finetune": {"data": "y", "test": "z"}, "source": {"training": {"finetune": run}}}
        datasets = [*DATA, listed(data, licence="CC0-1.0")]
        source = save(tmp_path / name, make_potential(), training_config=config, datasets=datasets)
        if trained:
            with pytest.raises(ValueError, match="my.extxyz: the checkpoint was trained on it .SHA-256 .* no split"):
                publish(source, tmp_path / "out", data=[f"{data}:low"])
        else:
            publish(source, tmp_path / "out", data=[f"{data}:low"])
            assert load_checkpoint(tmp_path / "out").evaluation["my/low"]["num_energies"] == 2


def test_two_sets_of_one_name_do_not_replace_each_other(
    tmp_path: Path, source: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_process(monkeypatch)
    (tmp_path / "b").mkdir()
    other = shutil.copy(data, tmp_path / "b")
    with pytest.raises(ValueError, match=r"my.extxyz and on .*b/my.extxyz would both be 'my/low' in evaluation.json"):
        publish(source, tmp_path / "out", data=[f"{data}:low", f"{other}:low"])
    publish(source, tmp_path / "out", data=[f"{data}:low"])
    publish(tmp_path / "out", tmp_path / "again", data=[f"{other}:low"])  # the same bytes
    metrics = load_checkpoint(tmp_path / "out").evaluation["my/low"]
    assert load_checkpoint(tmp_path / "again").evaluation["my/low"] == pytest.approx(metrics)
    ase.io.write(other, ase.io.read(other, ":1"))
    with pytest.raises(ValueError, match=rf"already has 'my/low', on other data .SHA-256 {metrics['sha256'][:12]}"):
        publish(tmp_path / "out", tmp_path / "third", data=[f"{other}:low"])


def structure_of(atoms: Any) -> Structure:
    return Structure("x", "x", atoms.numbers.astype(np.uint8), atoms.positions.astype(np.float32))


def test_of_a_dataset_the_test_split_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_process(monkeypatch)
    config = ModelConfig((1, 6, 7, 8), ("mp2_ccpvdz", "other"), channels=4, num_radial=4, readout_hidden=4)
    potential = Potential(config).eval()
    for fidelity in potential.config.fidelities:
        potential.set_reference(fidelity, {1: -16.0, 6: -1033.0, 7: -1485.0, 8: -2041.0})
    described = {name: Fidelity(name, "MP2") for name in potential.config.fidelities}
    watched = {"builtin/mp2_ccpvdz": {"num_energies": 7}}  # of the validation split, as pretraining writes it
    folder = save(tmp_path / "trained", potential, fidelities=described, evaluation=watched)
    publish(folder, tmp_path / "out", data=["builtin"])
    evaluation = load_checkpoint(tmp_path / "out").evaluation
    labelled = len(read_any("builtin", "mp2_ccpvdz", "test"))
    assert evaluation["builtin/test/mp2_ccpvdz"]["num_energies"] == labelled
    assert evaluation.keys() == {"builtin/test/mp2_ccpvdz", *watched}
    assert evaluation["builtin/mp2_ccpvdz"] == {"num_energies": 7}


def test_no_secret_is_published_and_a_licence_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_process(monkeypatch)
    urls = ["https://me:hunter2@host/set/{file}", "https://host/{file}?X-Sig=hunter2", "pipe:KEY=hunter2 aws s3 cp -"]
    config = {"tasks": [{"dataset": f"set{i}", "shard_url": url} for i, url in enumerate(urls)], "text": "a@b: c?"}
    sample = load_checkpoint(SAMPLE)
    trained = dataclasses.replace(sample, info=sample.info | {"training": config})
    publish(write_checkpoint(tmp_path / "trained", trained), tmp_path / "out", licence="ASL 1.0")
    values = front_matter(tmp_path / "out")
    assert (values["license"], values["license_name"]) == ("other", "asl-1.0")
    training = load_checkpoint(tmp_path / "out").info["training"]
    shown = [task["shard_url"] for task in training["tasks"]]
    assert shown == ["https://host/set/{file}", "https://host/{file}", "pipe:(withheld)"]
    assert training["text"] == "a@b: c?"
    assert not any(b"hunter2" in path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:p@hunter2@host/x", "https://host/x"),
        ("https://me:p/hunter2?@host/x", "https://host/x"),
        ("https://host:80/pkg@1.0/x", "https://host:80/pkg@1.0/x"),
        ("s3://bucket/{file}?X-Amz-Signature=hunter2", "s3://bucket/{file}"),
        ("gs+v1://bucket/x#hunter2 then 2", "gs+v1://bucket/x then 2"),
        ("curl -H 'Authorization: Bearer hunter2' x", "curl -H 'Authorization: (withheld)' x"),
        ("authorization=Basic hunter2", "authorization=(withheld)"),
        ("Bearer hunter2", "Bearer (withheld)"),
        ("AWS_SECRET_ACCESS_KEY=hunter2 aws s3 cp", "AWS_SECRET_ACCESS_KEY=(withheld) aws s3 cp"),
        ('{"api-key": "hunter2"}', '{"api-key": "(withheld)"}'),
        ("fetch --hub-token hunter2 x", "fetch --hub-token (withheld) x"),
        ("rung data generate --count a=1 b=2; see 10.1021/acs.jctc.7b00118", None),
        ("monkey=1, tokens: 5, max_tokens=3", None),
    ],
)
def test_secrets_in_texts(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (text if shown is None else shown)
    assert without_secrets(without_secrets(text)) == without_secrets(text)


def test_secrets_by_the_name_of_a_key() -> None:
    names = ["token", "HF_TOKEN", "key", "api-key", "secretKey", "aws_secret_access_key", "Password", "Authorization"]
    assert without_secrets([{name: "hunter2"} for name in names]) == [{name: "(withheld)"} for name in names]
    assert without_secrets({"auth": {"secret": ["hunter2"]}}) == {"auth": {"secret": "(withheld)"}}
    harmless = {"token": "", "max_tokens": 5, "keep_states": 2, "monkey": "x", "manifest_sha256": "ab"}
    assert without_secrets(harmless) == harmless
    configs = [to_mapping(FinetuneConfig("a", "b", "c")), load_checkpoint(SAMPLE).info]
    assert without_secrets(configs) == configs  # none of Rung's own names looks like one


def test_licences_belong_to_data_not_to_names() -> None:
    datasets = [
        {"name": "set", "licence": "CC0-1.0", "manifest_sha256": "a"},
        {"name": "copy/of/set", "sha256": "a"},  # the same data
        {"name": "set", "licence": "GPL-3.0", "sha256": "b"},
        {"name": "mine", "licence": "MIT"},
        {"name": "yours"},  # like `mine` without a digest, and nothing else in common
        {"name": "mine"},
    ]
    expected = [("set", "CC0-1.0"), ("copy/of/set", "CC0-1.0"), ("set", "GPL-3.0")]
    assert data_licences({"datasets": datasets}) == [*expected, ("mine", "MIT"), ("yours", ""), ("mine", "")]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "no data"),
        ([{"name": "mine"}], "mine: not stated"),
        ([*DATA, {"name": "spice", "licence": "CC-BY-4.0"}], "builtin: CC0-1.0, spice: CC-BY-4.0"),
    ],
)
def test_a_licence_that_the_data_do_not_decide_must_be_named(
    tmp_path: Path, make_potential: Callable[..., Potential], datasets: list[dict[str, str]], message: str
) -> None:
    source = save(tmp_path / "trained", make_potential(), datasets=datasets)
    with pytest.raises(ValueError, match=rf"--licence: name the checkpoint's; .*\({message}\)"):
        publish(source, tmp_path / "out")


def test_verifying_needs_stored_predictions(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="expected reference.json, found none; only what `rung publish` wrote"):
        verify(source)
    shutil.copytree(SAMPLE, tmp_path / "out")
    (tmp_path / "out" / "reference.json").write_text('{"predictions": []}')
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (tmp_path / "out" / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(ValueError, match="reference.json: KeyError.'tolerance'.; it was not written by"):
        verify(tmp_path / "out")


def test_elements_that_no_data_have_need_data_of_ones_own(make_potential: Callable[..., Potential]) -> None:
    potential = make_potential(elements=(10, 18), fidelities=("low",))
    potential.set_reference("low", {10: -1.0, 18: -2.0})
    with pytest.raises(ValueError, match="fidelity 'low': no structure to store predictions of: .* --evaluate DATA"):
        make_reference(potential)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected CHECKPOINT and --out FOLDER, or --verify CHECKPOINT"),
        (["{source}"], "expected CHECKPOINT and --out FOLDER"),
        (["{source}", "--verify", "{source}"], "--verify only checks what is there: leave out CHECKPOINT"),
        (["--verify", "{source}", "--licence", "MIT", "--name", "x", "--private"], "out --licence, --name, --private"),
        (["{source}", "--out", "{tmp}/out", "--revision", "next"], "add --to USER/REPOSITORY"),
        (["{source}", "--out", "{tmp}/out", "--to", "ladder"], "--to: expected user/repository, found 'ladder'"),
        (["{source}", "--out", "{tmp}", "--licence", "MIT"], "exists and is not a checkpoint"),
        (["{tmp}/none", "--out", "{tmp}/out"], "does not exist"),
        (["{source}", "--out", "{tmp}/out", "--evaluate", "{tmp}/no.xyz:low"], "no.xyz: no such file or dataset"),
        (
            ["{source}", "--out", "{tmp}/out", "--evaluate", "{data}:middle"],
            "unknown fidelity 'middle'",
        ),
        (["{source}", "--out", "{tmp}/out", "--evaluate", "{data}"], "does not say at which fidelity"),
        (
            ["{source}", "--out", "{tmp}/out", "--evaluate", "builtin"],
            "expected labels at low, high, found",
        ),
        (["{source}", "--out", "{tmp}/out", "--evaluate", "{data}:high"], "'high' was not trained on O"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, source: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [word.format(source=source, tmp=tmp_path, data=data) for word in arguments]
    assert rung_publish(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
