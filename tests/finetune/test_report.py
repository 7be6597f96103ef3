"""The report: its numbers against plain numpy, its page against an HTML parser, and runs with parts missing."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Labels, Structure
from rung.finetune import plots, report
from rung.finetune.breakdown import equation, predict_rows
from rung.finetune.calibration import Scores
from rung.finetune.checks import Finding
from rung.finetune.config import FinetuneConfig, SplitConfig
from rung.finetune.dataset import absolute_rows
from rung.finetune.pipeline import finetune
from rung.finetune.recipe import Fit, Judged, Outcome
from rung.finetune.reference import choose_parent, with_new_fidelity
from rung.finetune.train import Trained
from rung.model.checkpoint import load_checkpoint
from rung.model.potential import Potential
from rung.model.predict import evaluate, predict
from rung.model.uncertainty import Ensemble, LastLayer

SCRIPT = "<script>alert(1)</script>"
VOID = ("meta", "br")  # elements without an end
HISTORY = [
    {"step": 0.0, "row_mae_mev_per_atom": 30.0, "low.energy_mae_mev_per_atom": 5.0},
    {"step": 20.0, "row_mae_mev_per_atom": 20.0, "low.energy_mae_mev_per_atom": 7.0, "loss": 1.0},
]


@pytest.fixture
def stages(potential: Potential, high: list[Reaction]) -> list[Potential]:
    """The potential before, and two that are a little different: after the ridge regression, and after training."""
    start = with_new_fidelity(potential, "high", choose_parent(potential, high, ["low"])[0])
    found = [start]
    for seed in (1, 2):
        changed = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        found.append(changed)
    return found


@pytest.fixture
def relative(harder: list[Structure]) -> list[Reaction]:
    """Three relative energies between structures without labels."""
    water, methane, *_, peroxide = [dataclasses.replace(s, labels={}) for s in harder[:6]]
    return [
        Reaction("r0", "g", (water, peroxide), (-2.0, 1.0), 0.5),
        Reaction("r1", "g", (water, methane), (-1.0, 1.0), -1000.0),
        Reaction("r2", "g", (peroxide,), (-0.5,), 2000.0),
    ]


def outcome(
    stages: Sequence[Potential], rows: list[Reaction], ridge: bool = True, scored: bool = True, steps: int = 20
) -> Outcome:
    start, regressed, after = stages
    fit = Fit(start, regressed if ridge else None, Trained(after, steps, HISTORY if steps else []), None)
    spread = np.linspace(0.1, 0.2, len(rows))
    scores = Scores(spread[::-1].copy(), spread, np.full(len(rows), 5.0)) if scored else None
    covariance = LastLayer(torch.eye(2), 0.1) if scored else None
    return Outcome(fit, [], [Judged(fit, rows)], covariance, scores, scores)


def measured(tuned: Outcome, parents: Sequence[Any], **changes: Any) -> report.Measured:
    values: dict[str, Any] = {
        "num_train": 32,
        "num_test": len(tuned.judged[0].rows),
        "num_folds": 0,
        "parents": parents,
        "findings": [],
        "notes": ["a note"],
        "errors": tuned.errors("high"),
        "forgetting": [],
        "drift": {"low": {"energy_rms_mev_per_atom": 1.0, "force_rms_mev_per_angstrom": 2.0}},
        "histories": {"fine-tuned": tuned.fit.trained.history},
        "uncertainty": tuned.uncertainty,
        "calibration": tuned.scores,
        "test_scores": tuned.test_scores,
        "predictions": predict_rows(tuned, "high"),
        "steps": tuned.fit.trained.step,
        "seconds": 1.0,
    }
    return report.Measured(**(values | changes))


Write = Callable[..., "tuple[dict[str, Any], Page]"]


@pytest.fixture
def write(potential: Potential, high: list[Reaction], tmp_path: Path) -> Write:
    """Return a function that writes the report of an outcome and returns what is in report.json and report.html."""

    def written(tuned: Outcome, **changes: Any) -> tuple[dict[str, Any], Page]:
        config = FinetuneConfig(f"from/{SCRIPT}", f"data & {SCRIPT}.extxyz", "high")
        some = measured(tuned, choose_parent(potential, high, ["low", "other"]), **changes)
        paths = report.write(config, some, report.metrics(config, some), tmp_path / "checkpoint", tmp_path)
        assert [path.name for path in paths[:3]] == ["report.json", "report.txt", "report.html"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])
        content = json.loads(paths[0].read_text())
        assert content["plots"] == [str(path) for path in paths[3:]]
        return content, Page(paths[2].read_text())

    return written


class Page(html.parser.HTMLParser):
    """A page that was read: it raises where an element is not closed, or where something outside is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.bold: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        assert "http" not in (self.get_starttag_text() or "")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith(("data:", "#"))
            if name == "id":
                self.ids.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data and "url(" not in data.replace("url(#", "")
        else:
            self.text += data
        if "b" in self.open:
            self.bold.append(data)


def test_the_rows_and_their_breakdown_are_what_plain_numpy_says(
    stages: list[Potential], harder: list[Structure], relative: list[Reaction], write: Write
) -> None:
    rows = [*absolute_rows(harder[:10], "high"), *relative]
    tuned = outcome(stages, rows)
    content, _ = write(tuned)

    energy: dict[str, list[float]] = {}
    for stage, potential in zip(("before", "ridge", "after"), stages, strict=True):
        energy[stage] = []
        for row in rows:
            singles = [predict(potential, [structure], "high")[0].energy for structure in row.structures]
            energy[stage].append(float(np.dot(row.coefficients, singles)))
        assert [row[f"{stage}_ev"] for row in content["rows"]] == pytest.approx(energy[stage], abs=1e-4)
    assert [row["label_ev"] for row in content["rows"]] == [row.energy for row in rows]
    assert [row["std_ev"] for row in content["rows"]] == pytest.approx(np.linspace(0.1, 0.2, 13).tolist())
    assert content["rows"][2]["formula"] == "CH4O"
    assert content["rows"][10]["reaction"] == f"2 {harder[0].key} -> {harder[5].key}"

    elements = [{int(z) for s in row.structures for z in s.numbers} for row in rows]
    sizes = [3, 5, 6, 8, 4, 4, 6, 5, 3, 5, 6, 5, 2]  # of H2O, CH4, ...; of the larger side of the three reactions
    assert [row["num_atoms"] for row in content["rows"]] == sizes
    for stage, predicted in energy.items():
        error = 1000 * np.abs([p - row.energy for p, row in zip(predicted, rows, strict=True)]) / sizes
        for symbol, number in (("H", 1), ("C", 6), ("O", 8)):
            expected = np.mean([e for e, some in zip(error, elements, strict=True) if number in some])
            assert content["by_element"][symbol][stage]["row_mae_mev_per_atom"] == pytest.approx(expected, rel=1e-3)
        for name, low, high in (("2", 2, 2), ("3-4", 3, 4), ("5-8", 5, 8)):
            expected = np.mean([e for e, size in zip(error, sizes, strict=True) if low <= size <= high])
            assert content["by_size"][name][stage]["row_mae_mev_per_atom"] == pytest.approx(expected, rel=1e-3)
    assert {name: some["num_rows"] for name, some in content["by_size"].items()} == {"2": 1, "3-4": 4, "5-8": 8}
    assert {name: some["num_rows"] for name, some in content["by_element"].items()} == {"H": 13, "C": 8, "O": 9}

    for stage, potential in zip(("before", "after"), (stages[0], stages[2]), strict=True):
        forces = [predict(potential, [s], "high")[0].forces - s.labels["high"].forces for s in harder[:10]]
        of = [(z, f) for s, some in zip(harder, forces, strict=False) for z, f in zip(s.numbers, some, strict=True)]
        for symbol, number in (("H", 1), ("C", 6), ("O", 8)):
            expected = 1000 * np.mean([np.abs(f) for z, f in of if z == number])
            found = content["by_element"][symbol][stage]["force_mae_mev_per_angstrom"]
            assert found == pytest.approx(expected, rel=1e-3)


def test_the_page_is_closed_and_refers_to_nothing_outside(
    stages: list[Potential], harder: list[Structure], relative: list[Reaction], write: Write
) -> None:
    errors = {"energy_mae_mev_per_atom": 40.0, "force_mae_mev_per_angstrom": None}
    changed = {"energy_mae_mev_per_atom": 50.0, "force_mae_mev_per_angstrom": None}
    tuned = outcome(stages, [*absolute_rows(harder[:10], "high"), *relative])
    content, page = write(
        tuned,
        findings=[Finding("leak", "this is in both")],
        forgetting=[{"fidelity": "low", "set": "target geometries", "before": errors, "after": changed}],
        errors=tuned.errors("high") | {"scratch": {"energy_mae_mev_per_atom": 0.001, "num_energies": 10}},
    )
    for words in ("Suspicious: this is in both", "a note", "from scratch, same labels", "low", "+25 %", "meV/atom"):
        assert words in page.text
    assert "0.00" in page.bold  # of the stages, scratch has the smallest energy error
    assert content["git_commit"] is None or content["git_commit"][:7] in page.text
    assert {Path(path).stem for path in content["plots"]} == {
        "parity_energy", "parity_relative", "parity_forces", "learning_curve", "calibration",
    }  # fmt: skip


def test_names_from_files_cannot_become_markup(
    stages: list[Potential], harder: list[Structure], relative: list[Reaction], write: Write
) -> None:
    keys = [SCRIPT, "$\\frac{$ \"&'", "\u6c34\n\u0007"]
    rows = [
        dataclasses.replace(row, key=key, structures=tuple(dataclasses.replace(s, key=SCRIPT) for s in row.structures))
        for some in (absolute_rows(harder[:3], "high"), relative)
        for key, row in zip(keys, some, strict=True)
    ]
    content, page = write(outcome(stages, rows), notes=[f"note {SCRIPT}"], findings=[Finding("unit", f"it {SCRIPT}")])
    assert [row["key"] for row in content["rows"]] == keys * 2
    assert "script" not in page.names
    for words in (f"note {SCRIPT}", f"it {SCRIPT}", f"from/{SCRIPT}", f"data & {SCRIPT}.extxyz", *keys):
        assert words in page.text


@pytest.mark.parametrize("missing", [("forces", "steps"), ("total energies", "test scores"), ("std", "ridge")])
def test_a_run_without_some_part_is_reported(
    stages: list[Potential],
    harder: list[Structure],
    relative: list[Reaction],
    write: Write,
    missing: tuple[str, str],
) -> None:
    if "forces" in missing:
        labels = [Labels(energy=s.labels["high"].energy) for s in harder]
        harder = [dataclasses.replace(s, labels={"high": one}) for s, one in zip(harder, labels, strict=True)]
    rows = relative if "total energies" in missing else absolute_rows(harder[:6], "high")
    steps = 0 if "steps" in missing else 20
    tuned = outcome(stages, rows, ridge="ridge" not in missing, scored="std" not in missing, steps=steps)
    if "test scores" in missing:
        tuned = dataclasses.replace(tuned, test_scores=None, uncertainty=Ensemble([{}, {}]))
    content, page = write(tuned)
    drawn = {Path(path).stem for path in content["plots"]}
    assert ("parity_forces" in drawn) == (missing == ("std", "ridge"))
    assert ("parity_energy" in drawn) == ("total energies" not in missing)
    assert ("parity_relative" in drawn) == ("total energies" in missing)
    assert ("calibration" in drawn) == ("Uncertainty" in page.text) == ("std" not in missing)
    assert ("learning_curve" in drawn) == ("steps" not in missing)
    assert ("ridge_ev" in content["rows"][0]) == (missing == ("total energies", "test scores"))
    # An ensemble is calibrated on rows of their own, which without a test set are not those that are judged.
    assert ("std_ev" in content["rows"][0]) == (missing == ("forces", "steps"))


def test_folds_are_judged_by_their_own_potentials(stages: list[Potential], harder: list[Structure]) -> None:
    rows = absolute_rows(harder[:6], "high")
    tuned = outcome(stages, rows)
    other = Fit(stages[0], None, Trained(stages[1], 10, HISTORY), None)
    fits = [dataclasses.replace(tuned.fit, regressed=None), other]
    folds = [Judged(fit, part) for fit, part in zip(fits, (rows[:4], rows[4:]), strict=True)]
    found = predict_rows(dataclasses.replace(tuned, judged=folds), "high")
    expected = [one.energy for one in predict(stages[2], structures_of(rows[:4]), "high")]
    expected += [one.energy for one in predict(stages[1], structures_of(rows[4:]), "high")]
    assert found.energy["after"] == pytest.approx(expected, abs=1e-4)
    assert found.label_forces.shape == found.forces()["after"].shape == (3 * sum(row.num_atoms for row in rows),)


def test_the_parity_plot_names_the_largest_errors(stages: list[Potential], harder: list[Structure]) -> None:
    found = predict_rows(outcome(stages, absolute_rows(harder[:16], "high")), "high")
    figure = plots.parity_energy(found, "high")
    assert figure is not None
    named = {text.get_text() for text in figure.axes[0].texts}
    errors = np.abs(found.per_atom("after"))
    assert named == {found.rows[i].key for i in np.argsort(errors)[-3:]}
    assert plots.short("a" * 14 + "b" * 60 + "c" * 13) == "a" * 13 + ".." + "c" * 13


def test_the_learning_curve_shows_replay_in_a_panel_of_its_own() -> None:
    figure = plots.learning_curve({"fine-tuned": HISTORY, "fold 1": HISTORY, "fold 2": HISTORY}, 20)
    assert figure is not None
    target, replayed = figure.axes
    assert [line.get_ydata().tolist() for line in replayed.lines] == [[5.0, 7.0]]
    assert [text.get_text() for text in target.get_legend().get_texts()] == ["fine-tuned", "2 folds", "kept: step 20"]
    without = plots.learning_curve({"fine-tuned": [{"step": 0.0}, {"step": 1.0, "loss": 2.0}]}, 1)
    assert without is not None and without.axes[0].get_ylabel() == "training loss"
    assert plots.learning_curve({"fine-tuned": [{"step": 0.0}]}, 0) is None


def test_an_equation_has_reactants_first(relative: list[Reaction]) -> None:
    one = dataclasses.replace(relative[0], coefficients=(1.5, -1.0))
    water, peroxide = (structure.key for structure in one.structures)
    assert equation(one) == f"{peroxide} -> 1.5 {water}"


def test_a_run_writes_it(checkpoint: str, harder: list[Structure], write_extxyz: Any, tmp_path: Path) -> None:
    train, test = write_extxyz(harder[:24], "train.extxyz"), write_extxyz(harder[24:], "test.extxyz", forces=True)
    out, split = tmp_path / "out", SplitConfig(folds=0)
    config = FinetuneConfig(checkpoint, train, "high", strategy="ridge", test=test, out=str(out), split=split)
    result = finetune(config)
    content = json.loads((out / "report.json").read_text())
    page = Page((out / "report.html").read_text())
    assert "RungCalculator" in page.text and str(out / "checkpoint") in page.text
    made = load_checkpoint(out / "checkpoint")
    found = [abs(row["after_ev"] - row["label_ev"]) / row["num_atoms"] for row in content["rows"]]
    expected = evaluate(made.potential, harder[24:], "high")["energy_mae_mev_per_atom"]
    assert 1000 * np.mean(found) == pytest.approx(expected, rel=1e-3)
    assert [row["std_ev"] > 0 for row in content["rows"]] == [True] * 8
    assert sorted(path.name for path in result.plots) == ["calibration.png", "parity_energy.png", "parity_forces.png"]
