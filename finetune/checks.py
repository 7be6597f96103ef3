"""What is suspicious in a target set, each fault named; nothing is ever dropped here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Structure
from rung.data.units import ENERGY_UNITS
from rung.finetune.config import ChecksConfig

# The number that 1 eV becomes in a unit that is often taken for it.
UNIT_FACTORS = {unit: 1 / in_ev for unit, in_ev in ENERGY_UNITS.items() if unit != "eV"}
UNIT_TOLERANCE = 0.2  # relative, of the factor between labels and predictions
MIN_STRUCTURES = 8  # below this a spread of residuals says nothing


@dataclass(frozen=True)
class Finding:
    """One suspicious thing: its kind, and a sentence that names the structures."""

    kind: str  # duplicate, leak, unit, outlier
    message: str


def duplicates(rows: Sequence[Reaction], config: ChecksConfig) -> list[Finding]:
    """Name the pairs of equal geometries, or of reactions between equal geometries, whose energies differ."""
    absolute = [row for row in rows if row.is_absolute]
    structures = [row.structures[0] for row in absolute]
    pairs = [(absolute[i], absolute[j]) for i, j in equal_geometries(structures, config.duplicate_tolerance)]
    pairs += equal_reactions([row for row in rows if not row.is_absolute], config.duplicate_tolerance)
    findings = []
    for a, b in pairs:
        if abs(a.energy - b.energy) > config.duplicate_energy:
            what = "one geometry" if a.is_absolute else "one reaction"
            message = f"'{a.key}' and '{b.key}' are {what} with two energies, {a.energy:.6f} and {b.energy:.6f} eV"
            findings.append(Finding("duplicate", message))
    return findings


def equal_reactions(rows: Sequence[Reaction], tolerance: float) -> list[tuple[Reaction, Reaction]]:
    """Return the pairs of rows with the same coefficients of the same geometries."""
    structures = structures_of(rows)
    first = list(range(len(structures)))  # the first structure of the same geometry
    for i, j in equal_geometries(structures, tolerance):
        first[j] = first[i]
    number = {id(structure): first[i] for i, structure in enumerate(structures)}
    seen: dict[tuple[tuple[int, float], ...], Reaction] = {}
    pairs = []
    for row in rows:
        terms = zip(row.structures, row.coefficients, strict=True)
        terms_by_geometry = tuple(sorted((number[id(s)], coefficient) for s, coefficient in terms))
        if terms_by_geometry in seen:
            pairs.append((seen[terms_by_geometry], row))
        seen.setdefault(terms_by_geometry, row)
    return pairs


def leaks(train_rows: Sequence[Reaction], test_rows: Sequence[Reaction], config: ChecksConfig) -> list[Finding]:
    """Name the test rows whose energies are also trained on: of the same geometry, of the same reaction."""
    train, test = ([row.structures[0] for row in rows if row.is_absolute] for rows in (train_rows, test_rows))
    pairs = equal_geometries([*train, *test], config.duplicate_tolerance)
    messages = [
        f"test structure '{test[j - len(train)].key}' is training structure '{train[i].key}'"
        for i, j in pairs
        if i < len(train) <= j
    ]
    tested = {id(row) for row in test_rows}
    relative = [row for row in [*train_rows, *test_rows] if not row.is_absolute]
    messages += [
        f"test reaction '{b.key}' is training reaction '{a.key}'"
        for a, b in equal_reactions(relative, config.duplicate_tolerance)
        if id(a) not in tested and id(b) in tested
    ]
    return [Finding("leak", message) for message in messages]


def equal_geometries(structures: Sequence[Structure], tolerance: float) -> list[tuple[int, int]]:
    """Return index pairs i < j of structures that are one geometry up to rotation, reflection and order of atoms.

    Geometries are compared by their sorted interatomic distances per pair of elements; periodic ones by cell and
    positions as they stand.
    """
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]

    alike: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for index, structure in enumerate(structures):
        charge_and_spin = bytes([structure.charge % 256, structure.multiplicity])
        alike[np.sort(structure.numbers).tobytes(), structure.pbc.tobytes(), charge_and_spin].append(index)
    pairs = []
    for members in alike.values():
        points = np.stack([_fingerprint(structures[i]) for i in members])
        # The largest coordinate difference decides, whatever the number of atoms.
        for a, b in cKDTree(points).query_pairs(tolerance, p=np.inf):
            pairs.append((members[a], members[b]))
    return sorted(pairs)


def _fingerprint(structure: Structure) -> NDArray[np.float64]:
    positions = structure.positions.astype(np.float64)
    if structure.pbc.any():
        return np.concatenate([positions.ravel(), structure.cell.astype(np.float64).ravel()])
    i, j = np.triu_indices(structure.num_atoms, 1)
    distances = np.linalg.norm(positions[i] - positions[j], axis=1)
    pair = np.sort(np.stack([structure.numbers[i], structure.numbers[j]]), axis=0)
    # One atom has no distances; a constant keeps the vector from being empty.
    return np.concatenate([[0.0], distances[np.lexsort([distances, pair[1], pair[0]])]])


def wrong_unit(
    labels: NDArray[np.float64], predicted: NDArray[np.float64], counts: NDArray[np.float64], source: str
) -> list[Finding]:
    """Name the unit that the labels seem to have, by comparison with predictions in eV; all arrays per structure [M].

    `counts` [M, elements] is the composition. Both energies lose their best fit by composition first, so that only
    differences between geometries and bonds are compared, which levels of theory share to a few per cent.
    """
    if len(labels) < MIN_STRUCTURES:
        return []
    y, p = (_without_composition(values, counts) for values in (labels, predicted))
    if not (p @ p > 0 and y @ y > 0):
        return []
    correlation = float(y @ p / np.sqrt((y @ y) * (p @ p)))
    slope = float(y @ p / (p @ p))
    for unit, factor in UNIT_FACTORS.items():
        if correlation > 0.8 and abs(slope / factor - 1) < UNIT_TOLERANCE:
            message = (
                f"the energies in {source} look like {unit}, expected eV: they vary {slope:.4g} times as much as "
                f"predicted (correlation {correlation:.2f}); divide them by {factor:.8g}"
            )
            return [Finding("unit", message)]
    return []


def _without_composition(values: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    coefficients = np.linalg.lstsq(counts, values, rcond=None)[0]
    residual: NDArray[np.float64] = values - counts @ coefficients
    return residual


def energy_outliers(
    rows: Sequence[Reaction], residual_per_atom: NDArray[np.float64], config: ChecksConfig
) -> list[Finding]:
    """Name the rows whose residual (label minus parent minus shift, eV/atom) is far from all others'."""
    if len(rows) < MIN_STRUCTURES:
        return []
    z = robust_z(residual_per_atom)
    outlying = (np.abs(z) > config.outlier_z) & (np.abs(residual_per_atom) > config.outlier_floor)
    return [
        Finding(
            "outlier",
            f"energy of '{rows[i].key}' is {residual_per_atom[i]:+.3f} eV/atom from what the parent fidelity and "
            f"the other labels say (robust z-score {z[i]:.0f}, limit {config.outlier_z:g})",
        )
        for i in np.flatnonzero(outlying).tolist()
    ]


def robust_z(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance from the median in units of the standard deviation estimated from the median deviation."""
    centred = values - np.median(values)
    # 1.4826: the normal distribution's standard deviation over its median absolute deviation.
    spread = 1.4826 * float(np.median(np.abs(centred)))
    return centred / max(spread, 1e-12)


def settle(findings: Sequence[Finding], config: ChecksConfig) -> None:
    """Raise ValueError with every finding, unless the configuration says to report only."""
    if findings and config.on_suspicion == "error":
        shown = "\n  ".join(finding.message for finding in findings[:20])
        more = f"\n  and {len(findings) - 20} more" if len(findings) > 20 else ""
        raise ValueError(
            f"the target set has {len(findings)} suspicious labels; correct them, or pass "
            f"checks.on_suspicion=report to train on them as they are:\n  {shown}{more}"
        )
