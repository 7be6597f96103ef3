"""The report of a run as one page, made from the content of report.json and the drawings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from rung.data.units import KCAL_MOL
from rung.finetune.html import Markup, change, document, figures, number, section, table

ENERGY, FORCE, RELATIVE = "energy_mae_mev_per_atom", "force_mae_mev_per_angstrom", "relative_mae_kcal_per_mol"
ROW = "row_mae_mev_per_atom"
COLUMNS = {
    ENERGY: ("energy MAE", "meV/atom"),
    "energy_rmse_mev_per_atom": ("energy RMSE", "meV/atom"),
    FORCE: ("force MAE", "meV/angstrom"),
    "force_rmse_mev_per_angstrom": ("force RMSE", "meV/angstrom"),
    RELATIVE: ("relative MAE", "kcal/mol"),
    "relative_rmse_kcal_per_mol": ("relative RMSE", "kcal/mol"),
}
CAPTIONS = {
    "parity_energy": "Total energies. The three largest errors are named.",
    "parity_relative": "Relative energies. The three largest errors are named.",
    "parity_forces": "Force components.",
    "learning_curve": "Errors of the averaged weights while training; those of replay fidelities on some structures.",
    "calibration": "How many errors lie inside the predicted intervals: below the diagonal, error bars are too small.",
}
WORST = 15  # rows that the page lists; report.json has all


def page(content: Mapping[str, Any], stages: Mapping[str, str], drawings: Mapping[str, str]) -> str:
    """Return the page; `content` is report.json's, `stages` the stages' names, `drawings` `<svg>` elements by name."""
    parity = {name: drawings[name] for name in drawings if name.startswith("parity")}
    body = [
        *_headline(content),
        *[f'<p class="finding">Suspicious: {escape(one["message"])}</p>' for one in content["findings"]],
        f"<h2>Errors at {escape(content['fidelity'])}</h2>",
        *_stages(content, stages),
        *figures(parity, CAPTIONS),
        *_breakdown(content),
        *_largest(content),
        *section("Uncertainty", [*_uncertainty(content), *figures(_only(drawings, "calibration"), CAPTIONS)]),
        *section("Learning curve", figures(_only(drawings, "learning_curve"), CAPTIONS)),
        *section("What changed at other fidelities", [*_forgetting(content), *_drift(content)]),
        *_start(content),
        *section("Notes", ["<ul>", *(f"<li>{escape(one)}</li>" for one in content["notes"]), "</ul>"]),
        *_use(content),
        *_made_with(content),
    ]
    return document(f"Fine-tuned to {content['fidelity']}", body)


def _only(drawings: Mapping[str, str], name: str) -> dict[str, str]:
    return {name: drawings[name]} if name in drawings else {}


def _headline(content: Mapping[str, Any]) -> Iterator[str]:
    settings, target = content["settings"], content["target"]
    data = [settings["data"], *settings["relative"]]
    yield (
        f"<p>The checkpoint <code>{escape(settings['checkpoint'])}</code> was adapted by strategy "
        f"<b>{escape(content['strategy'])}</b> from its fidelity <b>{escape(content['parent'])}</b> with "
        f"<b>{content['labels']}</b> labels of <code>{escape(', '.join(data))}</code>. "
        f"Errors are measured on: {escape(content['measured_on'])}.</p>"
    )
    tiles = []
    for key in (ENERGY, FORCE, RELATIVE):
        before, after = (target[stage].get(key) for stage in ("before", "after"))
        if after is not None:
            (name, unit), moved = COLUMNS[key], change(before, after)
            tiles.append(
                f'<div class="tile"><span class="soft">{name}</span><b>{number(after)} <span class="unit">{unit}</span>'
                f'</b><span class="soft">{moved} from {number(before)} before</span></div>'
            )
    yield f'<div class="tiles">{"".join(tiles)}</div>'


def _stages(content: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    errors = {stage: content["target"][stage] for stage in names if stage in content["target"]}
    shown = [key for key in COLUMNS if any(one.get(key) is not None for one in errors.values())]
    best = {key: min(one[key] for one in errors.values() if one.get(key) is not None) for key in shown}
    rows = []
    for stage, one in errors.items():
        values = [(key, one.get(key)) for key in shown]
        bold = [Markup(f"<b>{number(value)}</b>") if value == best[key] else value for key, value in values]
        rows.append([names[stage], *bold])
    after = errors["after"]
    counts = [
        ("num_energies", "total energies"),
        ("num_forces", "structures' forces"),
        ("num_relative", "relative energies"),
    ]
    of = ", ".join(f"{after[key]} {what}" for key, what in counts if after.get(key))
    yield table(["stage", *(COLUMNS[key] for key in shown)], rows, f"Errors of {of}. The smallest are bold.")


def _breakdown(content: Mapping[str, Any]) -> Iterator[str]:
    yield '<h2>Where the errors are</h2><div class="columns">'
    for title, key, first in (("By element", "by_element", "element"), ("By size", "by_size", "atoms")):
        some = content[key]
        forces = any(one["after"].get(FORCE) is not None for one in some.values())
        for column in [ROW, *([FORCE] if forces else [])]:
            what, unit = ("energy MAE", "meV/atom") if column == ROW else COLUMNS[FORCE]
            largest = max((one[s][column] or 0 for one in some.values() for s in ("before", "after")), default=0) or 1
            rows = []
            for name, one in some.items():
                before, after = one["before"][column], one["after"][column]
                bars = f'<i style="width:{100 * (before or 0) / largest:.0f}%"></i>'
                bars += f'<i class="after" style="width:{100 * (after or 0) / largest:.0f}%"></i>'
                bar = Markup(f'<span class="bar">{bars}</span>')
                rows.append([name, one["num_rows"], before, after, change(before, after), bar])
            heads = [first, "rows", ("before", unit), ("after", unit), "change", "<"]
            yield f"<div><h3>{title}: {what}</h3>{table(heads, rows)}</div>"
    yield (
        '</div><p class="soft">Grey: before, blue: after. An element has the energies of all rows with it, and '
        "the forces on its atoms. A relative energy counts per atom of its larger side.</p>"
    )


def _largest(content: Mapping[str, Any]) -> Iterator[str]:
    def error(row: Mapping[str, Any], stage: str) -> float:
        return float(row[f"{stage}_ev"] - row["label_ev"])

    order = sorted(content["rows"], key=lambda row: -abs(error(row, "after") / row["num_atoms"]))
    known = any("std_ev" in row for row in order)
    rows = []
    for row in order[:WORST]:
        meV = 1000 / row["num_atoms"]
        std = [row["std_ev"] * meV] if known else []
        errors = [error(row, "before") * meV, error(row, "after") * meV, *std, error(row, "after") / KCAL_MOL]
        rows.append([row["key"], row.get("formula") or row["reaction"], f"{row['num_atoms']:g}", *errors])
    heads = ["row", "<formula or reaction", "atoms", ("before", "meV/atom"), ("after", "meV/atom")]
    heads += [("predicted std", "meV/atom")] if known else []
    yield f"<h2>Largest errors</h2>{table([*heads, ('after', 'kcal/mol')], rows, 'Predicted less label.')}"
    yield f'<p class="soft">All {len(order)} rows are in report.json, under <code>rows</code>.</p>'


def _uncertainty(content: Mapping[str, Any]) -> list[str]:
    found = content["uncertainty"]
    if found is None:
        return []
    sets = [("rows it was calibrated on", found["calibration"]), ("test rows", found.get("test"))]
    rows = [
        [name, one["rows"], *(f"{100 * one[key]:.0f} %" for key in ("within_one_std", "within_two_std")),
         one["rms_error_over_std"], one["rank_correlation"]]
        for name, one in sets if one is not None
    ]  # fmt: skip
    heads = [found["kind"], "rows", ("within 1 std", "ideal 68 %"), ("within 2 std", "ideal 95 %")]
    return [table([*heads, ("RMS of error / std", "ideal 1"), "rank correlation with the error"], rows)]


def _forgetting(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for one in content["forgetting"]:
        pairs = [(one["before"][key], one["after"][key]) for key in (ENERGY, FORCE)]
        rows.append([one["fidelity"], one["set"], *(v for a, b in pairs for v in (a, b, change(a, b)))])
    heads = [(f"{what} {when}", unit) if when != "change" else when for what, unit in (COLUMNS[ENERGY], COLUMNS[FORCE])
             for when in ("before", "after", "change")]  # fmt: skip
    if not rows:
        return ['<p class="soft">Forgetting: no labels of other fidelities were at hand.</p>']
    return ["<h3>Forgetting: errors against their labels</h3>", table(["fidelity", "<measured on", *heads], rows)]


def _drift(content: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name + (" (new)" if name == content["fidelity"] else ""),
            one["energy_rms_mev_per_atom"],
            one["force_rms_mev_per_angstrom"],
        ]
        for name, one in content["drift"].items()
    ]
    heads = ["fidelity", ("energy", "meV/atom"), ("forces", "meV/angstrom")]
    return ["<h3>Drift: how far predictions moved (RMS, no labels needed)</h3>", table(heads, rows)] if rows else []


def _start(content: Mapping[str, Any]) -> Iterator[str]:
    parents = [
        [one["fidelity"] + (" (taken)" if i == 0 else ""), one["residual_rms_mev_per_atom"]]
        for i, one in enumerate(content["parent_candidates"])
    ]
    shifts = [[symbol, f"{shift:+.4f}"] for symbol, shift in content["e0_shift_ev"].items()]
    yield '<h2>Where it started</h2><div class="columns">'
    yield table(["parent fidelity", ("left of the labels", "RMS, meV/atom")], parents, "After the shift of E0.")
    yield table(["element", ("shift of E0", "eV")], shifts) + "</div>"


def _use(content: Mapping[str, Any]) -> Iterator[str]:
    checkpoint, fidelity = json.dumps(content["checkpoint"]), json.dumps(content["fidelity"])
    std = 'atoms.calc.get_property("energy_std", atoms)  # eV\n' if content["uncertainty"] else ""
    code = (
        "from ase.io import read\nfrom rung.model.ase_calculator import RungCalculator\n\n"
        f'atoms = read("molecule.xyz")\natoms.calc = RungCalculator({checkpoint}, fidelity={fidelity})\n'
        f"atoms.get_potential_energy()  # eV\natoms.get_forces()  # eV/angstrom\n{std}"
    )
    yield f"<h2>Use the checkpoint</h2><p><code>{escape(content['checkpoint'])}</code></p><pre>{escape(code)}</pre>"


def _made_with(content: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    yield f"<h2>Settings</h2>{table(['setting', '<value'], list(_flat(content['settings'])))}"
    yield (
        f'<p class="soft">{content["steps"]} steps, {content["seconds"]:.0f} s; {escape(versions)}; '
        f"commit {escape(content['git_commit'] or 'unknown')}.</p>"
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield [prefix + name, value if isinstance(value, str) else json.dumps(value)]
