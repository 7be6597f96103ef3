"""`inspect`: one or several datasets to a Report, in two readings and bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rung.data.manifest import read_manifest, resolve_dataset
from rung.data.report.duplicates import find_duplicates
from rung.data.report.findings import findings
from rung.data.report.measure import measure
from rung.data.report.result import Report


def inspect(datasets: Sequence[str | Path]) -> Report:
    """Return what datasets (folders, manifests or 'builtin') hold, what they share and what looks wrong.

    Memory is that of a table, of some ten thousand molecules whose forces are checked, of 28 bytes for each structure,
    and of a kilobyte for each whose sketch another one shares. Raises ValueError for no dataset, one that is named
    twice and a shard that is not as its manifest says, and FileNotFoundError for a dataset that is not there.
    """
    measured = [measure(dataset, title) for dataset, title in zip(datasets, _titles(datasets), strict=True)]
    duplicates, shared = find_duplicates(measured)
    reports = [one.report for one in measured]
    offsets = [offset for one in measured for offset in one.offsets] + shared
    return Report(findings(reports, duplicates), reports, duplicates, offsets)


def _titles(datasets: Sequence[str | Path]) -> list[str]:
    """Return the name of each dataset, with its folder where two have one name."""
    if not datasets:
        raise ValueError("inspect: expected at least one dataset, found none; name a folder, a manifest or 'builtin'")
    folders = [resolve_dataset(dataset).resolve() for dataset in datasets]
    for folder, dataset in zip(folders, datasets, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"inspect: dataset '{dataset}' is named twice; every structure would be a duplicate")
    names = [read_manifest(folder).name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)
    ]
