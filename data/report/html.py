"""A Report as report.json and one self-contained report.html: inline style and plots, no script, light and dark."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rung.data.report.plot import STYLE, histogram_svg
from rung.data.report.result import DatasetReport, Duplicates, FidelityReport, Finding, Histogram, Offset, Report
from rung.data.shard import write_beside

JSON_FILE, HTML_FILE = "report.json", "report.html"

_STYLE = (
    """
:root { color-scheme: light dark; --text: #1d232b; --quiet: #67707c; --page: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; --bar: #3a78b5; --problem: #b3261e; --note: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ed; --quiet: #98a2ae; --page: #14181d; --card: #1d232a;
  --line: #343c46; --bar: #6aa8e0; --problem: #ff8a80; --note: #e6b450; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-top: 2rem; }
p.quiet, figcaption { color: var(--quiet); font-size: .85rem; }
ul.findings { list-style: none; padding: 0; }
ul.findings li { background: var(--card); border-left: 4px solid var(--note); margin: .4rem 0; padding: .5rem .8rem; }
ul.findings li.problem { border-color: var(--problem); }
ul.findings b { color: var(--note); } ul.findings li.problem b { color: var(--problem); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; margin: .5rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; } th.words, td.words { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); padding: .5rem; border-radius: .4rem; max-width: 30rem; }
"""
    + STYLE
)


def write_report(report: Report, folder: str | Path) -> None:
    """Write report.json and report.html into `folder`, which is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(report), indent=1, allow_nan=False, ensure_ascii=False)
    write_beside(folder / JSON_FILE, text.encode())
    write_beside(folder / HTML_FILE, to_html(report).encode())


def to_html(report: Report) -> str:
    """Return the whole page."""
    title = "Dataset report: " + ", ".join(dataset.name for dataset in report.datasets)
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<p><b>{escape(dataset.name)}</b>: {escape(dataset.summary)}</p>" for dataset in report.datasets]
    parts += [f"<h2>Findings: {report.tally}</h2>", _findings(report.findings)]
    for dataset in report.datasets:
        parts += _dataset(dataset)
        for name, fidelity in dataset.fidelities.items():
            parts += _fidelity(name, fidelity)
    parts += [*_duplicates(report.duplicates), *_offsets(report.offsets)]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>Nothing that needs a decision was found.</p>"
    items = (f'<li class="{f.level}"><b>{f.level}</b> {escape(f.text)}</li>' for f in findings)
    return f'<ul class="findings">{"".join(items)}</ul>'


def _dataset(dataset: DatasetReport) -> Iterable[str]:
    yield f"<h2>{escape(dataset.name)}</h2>"
    licence = dataset.licence or "not stated"
    yield _quiet(f"version {dataset.version}, licence {licence}, source: {dataset.source or 'not stated'}")
    header = ["split", "structures", "atoms", f"edges ({dataset.cutoff:g} Å)", "packs", "shards"]
    rows = [[n, s.structures, s.atoms, s.edges, s.packs, s.shards] for n, s in dataset.splits.items()]
    yield _table(header, rows)
    names = list(dataset.fidelities)
    elements = [
        [symbol, counts.structures, counts.atoms]
        + [f"{(e := dataset.fidelities[n].elements[symbol]).energies} / {e.forces}" for n in names]
        for symbol, counts in dataset.elements.items()
    ]
    yield _table(["element", "structures", "atoms", *names], elements)
    yield _quiet("Under each level of theory: structures with energies / with forces that hold the element.")
    yield _plots([(dataset.sizes, "atoms per structure", "structures", False)])


def _fidelity(name: str, fidelity: FidelityReport) -> Iterable[str]:
    yield f"<h3>{escape(name)} <small>({escape(fidelity.level or 'method not stated')})</small></h3>"
    splits = list(next(iter(fidelity.labels.values()), {}))
    yield _table(["label", *splits], [[kind, *counts.values()] for kind, counts in fidelity.labels.items()])
    if fidelity.e0:
        energies = {f"E0, eV ({fidelity.e0_source.replace('_', ' ')})": fidelity.e0}
        if fidelity.e0_fit != fidelity.e0:
            energies["least squares, eV"] = fidelity.e0_fit
        rows = [[symbol, *(_number(column.get(symbol)) for column in energies.values())] for symbol in fidelity.e0]
        yield _table(["element", *energies], rows)
        yield _quiet(
            f"E − ΣE0: mean {_number(fidelity.energy_mean)}, standard deviation {_number(fidelity.energy_std)}, "
            f"RMS {_number(fidelity.e0_residual)} eV/atom."
        )
    fit = fidelity.consistency
    if fit.slope is not None:
        yield _quiet(
            f"Energy differences against the work of the forces over {fit.pairs} pairs of close geometries: slope "
            f"{fit.slope:.4f}, correlation {_number(fit.correlation)}."
        )
    yield _plots(
        [
            (fidelity.energies, "E − ΣE0 (eV/atom)", "structures", False),
            (fidelity.components, "force component (eV/Å)", "components", False),
            (fidelity.norms, "force on an atom (eV/Å)", "atoms", True),
        ]
    )
    if fidelity.outliers:
        yield _quiet(f"Energies that composition does not explain: {fidelity.num_outliers}, the worst of them:")
        rows = [[o.key, f"{o.deviation:+.3f}", f"{o.z:.0f}"] for o in fidelity.outliers]
        yield _table(["structure", "deviation, eV/atom", "robust z"], rows)


def _duplicates(duplicates: Duplicates) -> Iterable[str]:
    yield "<h2>Duplicates</h2>"
    yield (
        f"<p>{duplicates.geometries:,} geometries occur more than once, {duplicates.across:,} of them in more than one "
        "split or dataset.</p>"
    )
    yield _quiet(
        "Equal up to rotation, reflection, translation and the order of like atoms, to 0.001 Å of each atom, with the "
        "same charge and multiplicity; a supercell equals its cell."
    )
    shared = [
        [f"{s.dataset_a}/{s.split_a}", f"{s.dataset_b}/{s.split_b}", s.geometries, " = ".join(s.examples[0])]
        for s in duplicates.shared
    ]
    yield _table(["in", "and in", "geometries", "such as"], shared)
    conflicts = [
        [c.fidelity, c.geometries, f"{1000 * c.largest:.4g}", " against ".join(c.examples[0])]
        for c in duplicates.conflicts
    ]
    yield _table(["unlike energies at", "geometries", "largest, meV/atom", "such as"], conflicts)


def _offsets(offsets: Sequence[Offset]) -> Iterable[str]:
    if not offsets:
        return
    yield "<h2>Differences between levels</h2>"
    yield _quiet("E − ΣE0 on the same geometries, meV/atom; after fit: of what one more energy per element leaves.")
    rows = [
        [
            f"{o.fidelity_b} − {o.fidelity_a}",
            o.dataset_a if o.dataset_a == o.dataset_b else f"{o.dataset_b} − {o.dataset_a}",
            o.structures,
            *(f"{1000 * value:.2f}" for value in (o.mean, o.std, o.fitted_std)),
        ]
        for o in offsets
    ]
    yield _table(["levels", "dataset", "structures", "mean", "standard deviation", "after fit"], rows)


def _plots(plots: Sequence[tuple[Histogram | None, str, str, bool]]) -> str:
    figures = [
        f"<figure>{histogram_svg(histogram, x, y, log=log)}{_outside(histogram)}</figure>"
        for histogram, x, y, log in plots
        if histogram
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _outside(histogram: Histogram) -> str:
    if not histogram.below + histogram.above:
        return ""
    return f"<figcaption>not shown: {histogram.below:,} below, {histogram.above:,} above</figcaption>"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose columns of words are set to the left, of numbers to the right."""
    if not rows:
        return ""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    kinds = [' class="words"' if any(map(str.isalpha, text)) else "" for text in texts[0]]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, header, strict=True))
    lines = ("".join(f"<td{k}>{escape(text)}</td>" for k, text in zip(kinds, row, strict=True)) for row in texts)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
