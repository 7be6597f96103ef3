"""Reports of datasets on disk, made so that the right answers are known: against plain numpy on the structures."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.report import Report, inspect, to_text, write_report
from rung.data.report.result import Histogram
from rung.data.structure import Labels, Structure
from rung.data.units import HARTREE, HARTREE_BOHR, KCAL_MOL

E0 = {1: -13.6, 6: -1029.0, 8: -2041.0}
SYMBOLS = {1: "H", 6: "C", 8: "O"}
SHIFT = {1: 0.2, 6: -0.5, 8: 1.0}  # eV per atom of an element that the second level adds


def clusters(count: int = 60, seed: int = 0) -> list[Structure]:
    """Random clusters of two levels: 'low' has energies and forces, 'high' an energy on every third."""
    rng = np.random.default_rng(seed)
    structures = []
    for i in range(count):
        n = int(rng.integers(4, 9))
        numbers = rng.choice(list(E0), n).astype(np.uint8)
        energy = sum(E0[z] for z in numbers.tolist()) + 0.1 * n * rng.normal()
        labels = {"low": Labels(energy, rng.normal(size=(n, 3)).astype(np.float32))}
        if i % 3 == 0:
            labels["high"] = Labels(energy + sum(SHIFT[z] for z in numbers.tolist()) - 0.3 * n)
        positions = (rng.normal(size=(n, 3)) * 2).astype(np.float32)
        structures.append(Structure(f"s{i:03d}", f"{split_of(i)}{i}", numbers, positions, labels=labels))
    return structures


def split_of(index: int) -> str:
    return ("train", "train", "train", "val", "test")[index % 5]


def posed(structure: Structure, key: str, group: str, rng: np.random.Generator) -> Structure:
    """Return a structure rotated, moved, with its atoms in another order and rounded to float32."""
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(structure.num_atoms)
    positions = (structure.positions.astype(np.float64) @ rotation.T + 5 * rng.normal(size=3))[order]
    labels = {
        name: replace(found, forces=None if found.forces is None else (found.forces @ rotation.T)[order].astype("f4"))
        for name, found in structure.labels.items()
    }
    return Structure(key, group, structure.numbers[order], positions.astype(np.float32), labels=labels)


def write(folder: Path, structures: Sequence[Structure], name: str = "clusters") -> Path:
    """Write a dataset; a group's name begins with its split."""
    levels = {level: Fidelity(level, level.upper()) for level in sorted({n for s in structures for n in s.labels})}
    build_dataset(structures, folder, name=name, fidelities=levels, split=split_by_name, pack_atoms=100)
    return folder


def split_by_name(group: str) -> str:
    return group.rstrip("0123456789")


def texts(report: Report, level: str) -> list[str]:
    return [finding.text for finding in report.findings if finding.level == level]


def total(histogram: Histogram | None) -> int:
    assert histogram is not None
    return sum(histogram.counts) + histogram.below + histogram.above


def test_counts_elements_and_histograms(tmp_path: Path) -> None:
    structures = clusters()
    (dataset,) = inspect([write(tmp_path, structures)]).datasets
    low, high = dataset.fidelities["low"], dataset.fidelities["high"]
    assert low.labels == {split: {"train": 36, "val": 12, "test": 12} for split in ("energy", "forces")}
    assert list(high.labels) == ["energy"] and sum(high.labels["energy"].values()) == 20
    for z, symbol in SYMBOLS.items():
        assert dataset.elements[symbol].atoms == sum(int((s.numbers == z).sum()) for s in structures)
        holding = [s for s in structures if z in s.numbers]
        assert dataset.elements[symbol].structures == len(holding)
        assert (low.elements[symbol].energies, low.elements[symbol].forces) == (len(holding), len(holding))
        assert high.elements[symbol].energies == sum("high" in s.labels for s in holding)
    atoms = sum(s.num_atoms for s in structures)
    assert (total(low.energies), total(low.components), total(low.norms)) == (60, 3 * atoms, atoms)
    assert high.components is None and total(high.energies) == 20
    assert dataset.sizes.counts == np.bincount([s.num_atoms for s in structures])[4:].tolist()
    assert dataset.splits["train"].structures == 36


def test_histogram_is_that_of_numpy(tmp_path: Path) -> None:
    structures = clusters()
    (dataset,) = inspect([write(tmp_path, structures)]).datasets
    low = dataset.fidelities["low"]
    e0 = {z: low.e0[symbol] for z, symbol in SYMBOLS.items()}
    left = [(s.labels["low"].energy or 0) - sum(e0[z] for z in s.numbers.tolist()) for s in structures]
    per_atom = np.array(left) / [s.num_atoms for s in structures]
    assert low.energies is not None and low.energy_std is not None
    half = 5 * low.energy_std
    np.testing.assert_allclose(low.energies.edges[0], (low.energy_mean or 0) - half)
    assert low.energies.counts == np.histogram(per_atom, low.energies.edges)[0].tolist()


def test_offsets_between_levels_have_their_closed_form(tmp_path: Path) -> None:
    (offset,) = inspect([write(tmp_path, clusters())]).offsets
    assert (offset.fidelity_a, offset.fidelity_b, offset.structures) == ("high", "low", 20)
    assert offset.fitted_std == pytest.approx(0, abs=1e-6) and abs(offset.mean) < 0.2


def test_leaks_within_and_across_datasets(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, other = clusters(), clusters(30, seed=5)
    trained, tested = a[0], a[4]
    a.append(posed(trained, "leak", "test99", rng))
    b = [replace(s, key=f"b{s.key}") for s in other] + [posed(tested, "copied", "train98", rng)]
    report = inspect([write(tmp_path / "a", a, "first"), write(tmp_path / "b", b, "second")])
    found = {(s.dataset_a, s.split_a, s.dataset_b, s.split_b): s for s in report.duplicates.shared}
    assert set(found) == {("first", "train", "first", "test"), ("first", "test", "second", "train")}
    assert found["first", "train", "first", "test"].examples == [("s000", "leak")]
    assert found["first", "test", "second", "train"].examples == [("s004", "copied")]
    assert (report.duplicates.geometries, report.duplicates.across, report.duplicates.conflicts) == (2, 2, [])
    problems = texts(report, "problem")
    assert len(problems) == 2 and all("what the one trains on, the other measures on" in text for text in problems)
    assert "duplicate geometries: 2, of which across splits or datasets: 2" in to_text(report)


def test_offsets_between_datasets_and_conflicts(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    a = clusters()
    b = []
    for i, s in enumerate(a[:40]):
        twin = posed(s, s.key, s.group, rng)
        energy = twin.labels["low"].energy or 0.0
        off = 0.05 * twin.num_atoms if i == 7 else 0.0
        moved = energy - 0.4 * twin.num_atoms + SHIFT[6] * int((twin.numbers == 6).sum())
        labels = {"low": Labels(energy + off, twin.labels["low"].forces), "other": Labels(moved)}
        b.append(replace(twin, labels=labels))
    report = inspect([write(tmp_path / "a", a, "first"), write(tmp_path / "b", b, "second")])
    (conflict,) = report.duplicates.conflicts
    assert (conflict.fidelity, conflict.geometries) == ("low", 1)
    assert conflict.largest == pytest.approx(0.05, abs=1e-6)
    assert set(conflict.examples[0]) == {"first/val s007".replace("val", split_of(7)), f"second/{split_of(7)} s007"}
    between = {(o.fidelity_a, o.fidelity_b): o for o in report.offsets if o.dataset_a != o.dataset_b}
    assert set(between) == {(x, y) for x in ("low", "high") for y in ("low", "other")}
    assert between["low", "other"].structures == 40 and between["high", "other"].structures == 14
    assert between["low", "other"].fitted_std == pytest.approx(0, abs=1e-6)
    assert between["low", "low"].fitted_std == pytest.approx(0.05 * np.sqrt(39) / 40, rel=0.1)
    assert all(not shared.leaks for shared in report.duplicates.shared)


def test_repeats_within_a_split_are_a_note(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a = clusters()
    report = inspect([write(tmp_path, [*a, posed(a[0], "again", "train97", rng), posed(a[0], "more", "train96", rng)])])
    assert report.duplicates.repeats == {"clusters/train": 2} and report.duplicates.across == 0
    assert any(
        "repeat a geometry which their split already has: 2 in clusters/train" in n for n in texts(report, "note")
    )
    assert not texts(report, "problem")


def test_outliers_and_rare_elements_are_named(tmp_path: Path) -> None:
    a = clusters()
    wrong = a[11].labels["low"]
    a[11] = replace(a[11], labels={"low": replace(wrong, energy=(wrong.energy or 0) + 5 * a[11].num_atoms)})
    fluorine = np.array([9, 1, 1, 1], np.uint8)
    a.append(replace(a[0], key="f", group="train95", numbers=fluorine, positions=a[0].positions[:4], labels={}))
    energy = -2700.0 + 3 * E0[1]
    a[-1] = replace(a[-1], labels={"low": Labels(energy, np.ones((4, 3), np.float32))})
    report = inspect([write(tmp_path, a)])
    low = report.datasets[0].fidelities["low"]
    assert low.num_outliers == 1 and low.outliers[0].key == "s011"
    assert low.outliers[0].deviation == pytest.approx(5, abs=0.6)
    notes = "\n".join(texts(report, "note"))
    assert "clusters, low: few structures with forces hold F in 1" in notes
    assert "clusters, high: no structure with energies holds F" in notes
    assert "clusters, high: no E0" not in notes
    assert re.search(r"1 structure has an energy that composition does not explain .* 's011' by \+", notes)


def carbon_monoxide(energy: float, force: float) -> list[Structure]:
    """CO on a spring at many distances, with energies and forces multiplied by these factors."""
    structures = []
    for i, distance in enumerate(np.linspace(0.9, 1.5, 60)):
        positions = np.array([[0, 0, 0], [distance, 0, 0]], np.float32)
        pull = 20 * (distance - 1.1)
        forces = np.array([[pull, 0, 0], [-pull, 0, 0]]) * force
        total = (10 * (distance - 1.1) ** 2 + E0[6] + E0[8]) * energy
        labels = {"low": Labels(float(total), forces.astype(np.float32))}
        structures.append(Structure(f"co{i}", "train0", np.array([6, 8], np.uint8), positions, labels=labels))
    return structures


@pytest.mark.parametrize(
    ("energy", "force", "messages"),
    [
        (1.0, 1.0, []),
        (1.0, -1.0, ["the sign of the forces is flipped"]),
        (1 / HARTREE, 1 / HARTREE_BOHR, ["energies look like Hartree", "forces look like Hartree/bohr"]),
        (1 / KCAL_MOL, 1 / KCAL_MOL, ["energies look like kcal/mol", "forces look like kcal/(mol angstrom)"]),
        (1 / KCAL_MOL, -1.0, ["energies look like kcal/mol", "the sign of the forces is flipped"]),
    ],
)
def test_wrong_units_and_signs_are_problems(tmp_path: Path, energy: float, force: float, messages: list[str]) -> None:
    problems = texts(inspect([write(tmp_path, carbon_monoxide(energy, force))]), "problem")
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert problem.startswith("clusters, low: ") and message in problem


def test_refuses_nothing_twice_and_damage(tmp_path: Path) -> None:
    write(tmp_path, clusters(20))
    with pytest.raises(ValueError, match="expected at least one dataset, found none"):
        inspect([])
    with pytest.raises(ValueError, match="is named twice"):
        inspect([tmp_path, tmp_path / "dataset.yaml"])
    with pytest.raises(FileNotFoundError, match="no dataset.yaml"):
        inspect([tmp_path / "nothing"])
    shard = next(tmp_path.glob("train*.tar"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(shard.name)):
        inspect([tmp_path])


def test_two_datasets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, clusters(20, seed)) for seed, name in enumerate("ab")]
    assert [d.name for d in inspect(folders).datasets] == [f"clusters ({folder})" for folder in folders]


class Page(HTMLParser):
    """The tags that are open, those seen, and the addresses that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_writes_json_and_one_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    a = clusters()
    script = posed(a[0], "<script>alert(1)</script>", "test94", rng)
    report = inspect([write(tmp_path / "a", [*a, script])])
    write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    document = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert document == json.loads(json.dumps(dataclasses.asdict(report)))
    assert document["datasets"][0]["fidelities"]["low"]["labels"]["energy"]["train"] == 36
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not page.open and not page.fetched and "script" not in page.seen
    assert page.seen.count("svg") == 5  # sizes; energies, components and norms of one level, energies of the other


def test_text_fits_a_terminal(tmp_path: Path) -> None:
    lines = to_text(inspect([write(tmp_path, clusters())])).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[:3] == [
        "clusters: 60 structures of 4 to 8 atoms; elements H, C, O; levels of theory high, low",
        "",
        "findings: 0 problems, 0 notes",
    ]
