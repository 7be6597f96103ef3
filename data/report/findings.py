"""What in a report needs a decision, one sentence each: problems first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rung.data.reference_energy import EXTREME_DEVIATION, SUSPICIOUS_Z
from rung.data.report.result import (
    Conflict,
    Consistency,
    DatasetReport,
    Duplicates,
    ElementCounts,
    FidelityReport,
    Finding,
    Shared,
)
from rung.data.units import BOHR, HARTREE, HARTREE_BOHR, KCAL_MOL, KJ_MOL

FEW_STRUCTURES = 10  # with an element; fewer teach a model nothing about it
FEW_PAIRS = 20  # of close geometries; fewer do not tell
_MATCH = 0.06  # relative; how well a slope must agree with a unit's
_FIT = 0.9  # correlation from which the slope has a meaning
_FORCE_RMS = (0.03, 10.0)  # eV/angstrom; beyond it forces may be in another unit

# slope of dE against -F.dR -> what that unit would be
_SLOPES: dict[float, str] = {
    HARTREE: "forces look like Hartree/angstrom; multiply them by 27.2114",
    1 / HARTREE: "energies look like Hartree; multiply them by 27.2114",
    HARTREE_BOHR: "forces look like Hartree/bohr; multiply them by 51.4221",
    1 / HARTREE_BOHR: "forces look converted from Hartree/bohr twice; divide them by 51.4221",
    1 / KCAL_MOL: "energies look like kcal/mol; multiply them by 0.043364",
    KCAL_MOL: "forces look like kcal/(mol angstrom); multiply them by 0.043364",
    1 / KJ_MOL: "energies look like kJ/mol; multiply them by 0.010364",
    KJ_MOL: "forces look like kJ/(mol angstrom); multiply them by 0.010364",
    1 / BOHR: "forces look like eV/bohr; multiply them by 1.8897",
    BOHR: "positions look like bohr, or forces were divided by bohr twice",
    0.5: "energies look halved (Hartree converted as Rydberg), or forces doubled (Rydberg converted as Hartree)",
    2.0: "forces look halved (Hartree converted as Rydberg), or energies doubled (Rydberg converted as Hartree)",
}
# Atoms without relativity, Hartree (S. J. Chakravorty et al., Phys. Rev. A 47, 3649 (1993)): all-electron energies per
# element lie within a few per cent of them, whatever the method.
_HYDROGEN = -0.5  # of which energies per element in molecules are a fifth off
_HEAVY_ATOMS = {
    "C": -37.845,
    "N": -54.589,
    "O": -75.067,
    "F": -99.734,
    "Si": -289.359,
    "P": -341.259,
    "S": -398.110,
    "Cl": -460.148,
}
_ENERGY_UNITS = {"Hartree": HARTREE, "kcal/mol": KCAL_MOL, "kJ/mol": KJ_MOL}  # eV


def findings(datasets: Sequence[DatasetReport], duplicates: Duplicates) -> list[Finding]:
    """Return what is wrong or worth a look: problems first, and of these units first, which can cause the others."""
    levels = [
        (dataset, f"{dataset.name}, {name}", fidelity)
        for dataset in datasets
        for name, fidelity in dataset.fidelities.items()
    ]
    found = [finding for dataset, place, level in levels for finding in _unit_findings(place, level, dataset.elements)]
    found += [_shared_finding(shared) for shared in duplicates.shared]
    found += [_conflict_finding(conflict) for conflict in duplicates.conflicts]
    found += [finding for _, place, level in levels for finding in _outlier_findings(place, level)]
    found += [_repeats_finding(duplicates.repeats)] if duplicates.repeats else []
    found += [finding for _, place, level in levels for finding in _label_findings(place, level)]
    return sorted(found, key=lambda finding: finding.level != "problem")


def _repeats_finding(repeats: Mapping[str, int]) -> Finding:
    counts = _list([f"{count} in {place}" for place, count in repeats.items()])
    return Finding(
        "note",
        f"structures that repeat a geometry which their split already has: {counts}; each of them counts anew, drop "
        "them if that is not wanted.",
    )


def _shared_finding(shared: Shared) -> Finding:
    a, b = f"{shared.dataset_a}/{shared.split_a}", f"{shared.dataset_b}/{shared.split_b}"
    example = f"such as '{shared.examples[0][0]}' = '{shared.examples[0][1]}'"
    what = f"{a} and {b} share {_geometries(shared.geometries)} ({example})"
    if shared.split_a == shared.split_b == "train":
        return Finding("note", f"{what}: training on both counts them twice; drop one copy if that is not wanted.")
    if shared.leaks and "train" in (shared.split_a, shared.split_b):
        return Finding(
            "problem",
            f"{what}: what the one trains on, the other measures on; give equal molecules one group and split again, "
            "or drop them from train.",
        )
    return Finding("note", f"{what}: scores on the two are not independent; do not average them as if they were.")


def _conflict_finding(conflict: Conflict) -> Finding:
    a, b = conflict.examples[0]
    return Finding(
        "problem",
        f"{conflict.fidelity}: energies of {_geometries(conflict.geometries)} disagree between copies, by up to "
        f"{1000 * conflict.largest:.4g} meV/atom ({a} against {b}); if the settings differ, give the levels two names, "
        "else find out which labels are wrong.",
    )


def _label_findings(place: str, fidelity: FidelityReport) -> Iterator[Finding]:
    for kind, counts in fidelity.labels.items():
        if kind in ("energy", "forces") and (empty := [split for split, count in counts.items() if not count]):
            yield Finding("note", f"{place}: no {kind} in {_list(empty)}; nothing can be trained or measured there.")
    for kind in ("energies", "forces"):
        counts = {symbol: getattr(labels, kind) for symbol, labels in fidelity.elements.items()}
        rare = [f"{symbol} in {count}" for symbol, count in counts.items() if 0 < count < FEW_STRUCTURES]
        absent = [symbol for symbol, count in counts.items() if not count]
        if rare:
            yield Finding(
                "note",
                f"{place}: few structures with {kind} hold {_list(rare)}; expect nothing of the model for these "
                "elements, add structures or leave them out.",
            )
        if absent and len(absent) < len(counts):
            yield Finding(
                "note",
                f"{place}: no structure with {kind} holds {_list(absent)}, which other structures do; the model must "
                "take these elements from other levels.",
            )
    with_energy = [symbol for symbol, labels in fidelity.elements.items() if labels.energies]
    if without := [symbol for symbol in with_energy if symbol not in fidelity.e0]:
        yield Finding(
            "note",
            f"{place}: no E0 for {_list(without)}, which train does not have; give isolated-atom energies or move "
            "such structures to train.",
        )
    if fidelity.e0_note:
        yield Finding("note", f"{place}: {fidelity.e0_note}.")


def _outlier_findings(place: str, fidelity: FidelityReport) -> Iterator[Finding]:
    if not fidelity.num_outliers:
        return
    worst = fidelity.outliers[0]
    yield Finding(
        "problem" if abs(worst.deviation) > EXTREME_DEVIATION else "note",
        f"{place}: {_structures(fidelity.num_outliers)} {_verb(fidelity.num_outliers, 'has', 'have')} an energy that "
        f"composition does not explain (robust z over {SUSPICIOUS_Z:g}), the worst '{worst.key}' by "
        f"{worst.deviation:+.3f} eV/atom; look at its calculation.",
    )


def _unit_findings(place: str, fidelity: FidelityReport, elements: Mapping[str, ElementCounts]) -> Iterator[Finding]:
    atoms = {symbol: counts.atoms for symbol, counts in elements.items()}
    unit = energy_unit(fidelity.e0_fit, atoms, fidelity.e0_note)
    if unit:
        yield Finding(
            "problem",
            f"{place}: energies look like {unit}, not eV, from the energies per element; multiply them by "
            f"{_ENERGY_UNITS[unit]:.6g}.",
        )
    fit, rms = fidelity.consistency, fidelity.force_rms
    wrong = None if fit.slope is None or fit.pairs < FEW_PAIRS else _slope_finding(place, fit, unit)
    if wrong:
        yield wrong
    elif rms is not None and not _FORCE_RMS[0] < rms < _FORCE_RMS[1]:
        guess = "Hartree/bohr, or of relaxed structures" if rms < 1 else "kcal/(mol angstrom)"
        yield Finding("note", f"{place}: forces of {rms:.3g} eV/angstrom RMS are unusual; are they {guess}?")


def _slope_finding(place: str, fit: Consistency, unit: str) -> Finding | None:
    """Return what is wrong with the forces, once the energies are converted from `unit` ("" when they are in eV)."""
    slope, correlation = (fit.slope or 0.0) * _ENERGY_UNITS.get(unit, 1.0), fit.correlation or 0.0
    if abs(correlation) < _FIT:
        wrong = "forces are not the gradient of the energy; are both of one level and one order of atoms?"
    elif abs(slope - 1) > _MATCH:
        wrong = slope_meaning(slope) + "."
    else:
        return None
    converted = f", once converted from {unit}" if unit else ""
    return Finding(
        "problem",
        f"{place}: over {fit.pairs} pairs of close geometries the energy changes by {slope:.4g} times -F.dR"
        f"{converted} (correlation {correlation:.3f}): {wrong}",
    )


def slope_meaning(slope: float) -> str:
    """Return which wrong unit or sign gives this slope of energy differences against the work of the forces."""
    if abs(slope + 1) < _MATCH:
        return "the sign of the forces is flipped (they look like gradients); negate them"
    nearest = min(_SLOPES, key=lambda value: abs(abs(slope) / value - 1))
    if abs(abs(slope) / nearest - 1) < _MATCH:
        return _SLOPES[nearest] + (", and the sign of the forces is flipped" if slope < 0 else "")
    return f"energies and forces differ by a factor of {slope:.4g} that is no unit's; look for it in the conversion"


def energy_unit(energies: Mapping[str, float], atoms: Mapping[str, int], note: str = "") -> str:
    """Return the unit other than eV in which energies per element look like all-electron energies, or "".

    `atoms` counts the atoms of each element, and `note` says that the single energies are not determined: then their
    sum over all atoms is looked at, which is.
    """
    groups = [list(energies)] if note else [[symbol] for symbol in energies if symbol in _HEAVY_ATOMS]
    known = {"H": _HYDROGEN, **_HEAVY_ATOMS}
    if not any(symbol in _HEAVY_ATOMS for symbol in energies) or any(s not in known for group in groups for s in group):
        return ""
    ratios = [
        sum(atoms[s] * energies[s] for s in group) / sum(atoms[s] * known[s] * HARTREE for s in group)
        for group in groups
    ]
    for unit, size in _ENERGY_UNITS.items():
        if all(abs(ratio * size - 1) < _MATCH for ratio in ratios):
            return unit
    return ""


def _list(texts: Sequence[str], shown: int = 12) -> str:
    rest = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + rest


def _structures(count: int) -> str:
    return f"{count} {_verb(count, 'structure', 'structures')}"


def _geometries(count: int) -> str:
    return f"{count} {_verb(count, 'geometry', 'geometries')}"


def _verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
