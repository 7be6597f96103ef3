"""A Report as text for a terminal: at most about 100 columns where names allow."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rung.data.reference_energy import SUSPICIOUS_Z
from rung.data.report.result import Conflict, DatasetReport, Duplicates, FidelityReport, Histogram, Offset, Report

WIDTH = 100
_LEVELS = " .:-=+*#%@"


def to_text(report: Report) -> str:
    """Return the whole report as lines of text: what the datasets are, the findings, then the details."""
    lines = [line for dataset in report.datasets for line in _paragraph(f"{dataset.name}: ", dataset.summary)]
    lines += ["", *_finding_lines(report)]
    for dataset in report.datasets:
        lines += ["", *_dataset_lines(dataset)]
        for name, fidelity in dataset.fidelities.items():
            lines += _fidelity_lines(name, fidelity)
    lines += ["", *_duplicate_lines(report.duplicates)]
    return "\n".join([*lines, *_offset_lines(report.offsets)])


def table(header: Sequence[str], rows: Sequence[Sequence[object]], indent: int = 4) -> list[str]:
    """Return aligned columns: the first to the left, the others, numbers, to the right."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    return [
        " " * indent
        + "  ".join(t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    ]


def _finding_lines(report: Report) -> list[str]:
    lines = [f"findings: {report.tally}"]
    for finding in report.findings:
        lines += _paragraph(f"  {finding.level:<8}", finding.text, 10)
    return lines


def _paragraph(head: str, text: str, indent: int = 4) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * indent)


def _dataset_lines(dataset: DatasetReport) -> list[str]:
    lines = [
        f"dataset {dataset.name}, version {dataset.version}, licence {dataset.licence or 'not stated'}",
        *_paragraph("  source: ", dataset.source or "not stated"),
    ]
    header = ["split", "structures", "atoms", f"edges({dataset.cutoff:g} A)", "packs", "shards"]
    rows = [[n, s.structures, s.atoms, s.edges, s.packs, s.shards] for n, s in dataset.splits.items()]
    lines += table(header, rows, 2)
    low, high = dataset.size_range
    lines.append(f"  atoms per structure: {low} |{spark(dataset.sizes)}| {high}")
    return lines + _element_lines(dataset)


def _element_lines(dataset: DatasetReport) -> list[str]:
    """Return one row per element: structures, atoms and, per fidelity, structures with energies/forces."""
    names = list(dataset.fidelities)
    lines: list[str] = []
    for start in range(0, max(1, len(names)), 4):  # four fidelities fit beside each other
        chosen = names[start : start + 4]
        rows = [
            [
                symbol,
                *((counts.structures, counts.atoms) if start == 0 else ()),
                *(f"{(e := dataset.fidelities[n].elements[symbol]).energies}/{e.forces}" for n in chosen),
            ]
            for symbol, counts in dataset.elements.items()
        ]
        lines += table(["element", *(("structures", "atoms") if start == 0 else ()), *chosen], rows, 2)
    return [*lines, "  (under a fidelity: structures with energies/forces that hold the element)"]


def _fidelity_lines(name: str, fidelity: FidelityReport) -> list[str]:
    lines = [f"  fidelity {name} ({fidelity.level or 'method not stated'})"]
    titles = {"energy": "energies"}
    for kind, counts in fidelity.labels.items():
        lines.append(f"    {titles.get(kind, kind)}: " + ", ".join(f"{s} {count:,}" for s, count in counts.items()))
    if fidelity.e0:
        lines += _e0_lines(fidelity)
    if fidelity.energies:
        lines.append(_histogram_line("E - sum E0, eV/atom", fidelity.energies))
    if fidelity.force_rms is not None:
        lines.append(f"    forces in eV/angstrom: RMS {fidelity.force_rms:.4f}, largest {fidelity.force_max or 0:.2f}")
    if fidelity.components:
        lines.append(_histogram_line("force component, eV/A", fidelity.components))
    if fidelity.norms:
        lines.append(_histogram_line("force norm, eV/A, log", fidelity.norms))
    fit = fidelity.consistency
    if fit.slope is not None and fit.correlation is not None:
        told = f"slope {fit.slope:.4f}, correlation {fit.correlation:.4f} over {fit.pairs} pairs of close geometries"
        lines.append(f"    energy differences against forces: {told}")
    if any(labels.energies for labels in fidelity.elements.values()):
        head = f"    energy outliers at {name} (robust z-score over {SUSPICIOUS_Z:g}): {fidelity.num_outliers}"
        lines.append(head)
    for outlier in fidelity.outliers:
        told = f"{outlier.deviation:+.3f} eV/atom from what composition explains, z {outlier.z:.0f}"
        lines.append(f"      {outlier.key}: {told}")
    return lines


def _e0_lines(fidelity: FidelityReport) -> list[str]:
    lines = _wrapped(f"E0 in eV ({fidelity.e0_source.replace('_', ' ')}): ", fidelity.e0)
    if fidelity.e0_fit and fidelity.e0_fit != fidelity.e0:
        lines += _wrapped("E0 by least squares: ", fidelity.e0_fit)
    if fidelity.energy_mean is not None and fidelity.energy_std is not None:
        spread = f"mean {fidelity.energy_mean:.4f}, standard deviation {fidelity.energy_std:.4f}"
        residual = "" if fidelity.e0_residual is None else f", RMS {fidelity.e0_residual:.4f}"
        lines.append(f"    E - sum E0 in eV/atom: {spread}{residual}")
    return lines


def _wrapped(head: str, energies: Mapping[str, float]) -> list[str]:
    return _paragraph(f"    {head}", ", ".join(f"{symbol} {value:.4f}" for symbol, value in energies.items()), 6)


def _histogram_line(title: str, histogram: Histogram) -> str:
    outside = histogram.below + histogram.above
    rest = f" ({outside:,} outside)" if outside else ""
    return f"    {title:<22}{histogram.edges[0]:>8.3g} |{spark(histogram)}| {histogram.edges[-1]:.3g}{rest}"


def spark(histogram: Histogram, columns: int = 30) -> str:
    """Return a histogram as one line of characters, darker for more."""
    width = -(-len(histogram.counts) // columns)
    counts = [sum(histogram.counts[i : i + width]) for i in range(0, len(histogram.counts), width)]
    most = max(max(counts), 1)
    return "".join(_LEVELS[-(-count * (len(_LEVELS) - 1) // most)] for count in counts)


def _duplicate_lines(duplicates: Duplicates) -> list[str]:
    lines = [
        f"duplicate geometries: {duplicates.geometries:,}, of which across splits or datasets: {duplicates.across:,}"
    ]
    if duplicates.geometries:
        lines.append("  (equal up to rotation, reflection, translation and the order of like atoms, to 0.001 angstrom)")
    for shared in duplicates.shared:
        a, b = f"{shared.dataset_a}/{shared.split_a}", f"{shared.dataset_b}/{shared.split_b}"
        lines.append(f"  {a} and {b}: {shared.geometries:,}")
        lines += [f"    {key_a} = {key_b}" for key_a, key_b in shared.examples]
    return [*lines, *(line for conflict in duplicates.conflicts for line in _conflict_lines(conflict))]


def _conflict_lines(conflict: Conflict) -> list[str]:
    largest = f"{1000 * conflict.largest:.4g} meV/atom"
    head = f"  unlike energies at {conflict.fidelity}: {conflict.geometries:,}, up to {largest}"
    return [head, *(f"    {a} against {b}" for a, b in conflict.examples)]


def _offset_lines(offsets: Sequence[Offset]) -> list[str]:
    if not offsets:
        return []
    rows = [
        [
            f"{o.fidelity_b} - {o.fidelity_a}",
            o.dataset_a if o.dataset_a == o.dataset_b else f"{o.dataset_b} - {o.dataset_a}",
            o.structures,
            *(f"{1000 * value:.2f}" for value in (o.mean, o.std, o.fitted_std)),
        ]
        for o in offsets
    ]
    header = ["levels", "dataset", "structures", "mean", "std", "after fit"]
    head = "energy differences on the same geometries, each without its E0s, meV/atom"
    legend = "  (after fit: standard deviation of what one more energy per element leaves)"
    return ["", head, *table(header, rows, 2), legend]
