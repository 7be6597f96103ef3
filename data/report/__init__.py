"""The report of `rung data inspect`: what datasets hold, what they share, and what looks wrong.

result.py       Report and its parts: frozen dataclasses of plain types
inspection.py   `inspect`: datasets to a Report
measure.py      first reading: counts, histograms, outliers, sketches of all structures
consistency.py  energy differences of close geometries against forces
offset.py       differences of two levels on the same geometries
fingerprint.py  equal structures: invariants, and the search for them
duplicates.py   second reading: duplicates within and across datasets and splits, and their labels
findings.py     what needs a decision, in sentences
text.py         Report as text
html.py         `write_report`: report.json and report.html
plot.py         histograms as SVG
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rung.data.report.html import write_report
from rung.data.report.inspection import inspect
from rung.data.report.result import Report
from rung.data.report.text import to_text

__all__ = ["Report", "dataset_report", "inspect", "to_text", "write_report"]


def dataset_report(datasets: Sequence[str | Path]) -> str:
    """Return the report of one or several datasets as text."""
    return to_text(inspect(datasets))
