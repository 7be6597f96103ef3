"""What an inspection finds, as frozen dataclasses of plain types: `dataclasses.asdict` gives the JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One sentence: what, where, and what to do. A problem spoils training or its evaluation, a note may not."""

    level: Literal["problem", "note"]
    text: str


@dataclass(frozen=True)
class Histogram:
    """Counts between consecutive edges; what lies outside is counted apart."""

    edges: list[float]
    counts: list[int]
    below: int = 0
    above: int = 0


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds."""

    structures: int
    atoms: int
    edges: int  # directed, at the manifest's cut-off
    packs: int
    shards: int


@dataclass(frozen=True)
class ElementCounts:
    """How often one element occurs."""

    structures: int
    atoms: int


@dataclass(frozen=True)
class ElementLabels:
    """How many structures with one element are labelled at one fidelity."""

    energies: int
    forces: int


@dataclass(frozen=True)
class EnergyOutlier:
    """A structure whose energy composition does not explain."""

    key: str
    deviation: float  # eV/atom
    z: float  # in robust standard deviations


@dataclass(frozen=True)
class Consistency:
    """Energy differences of close geometries against -(F1 + F2)/2 . (R2 - R1), a line through the origin."""

    pairs: int
    slope: float | None  # 1 when forces are the negative gradient of the energy, in the same units; None without pairs
    correlation: float | None
    displacement: float | None  # angstrom, largest of any atom in any pair


@dataclass(frozen=True)
class FidelityReport:
    """Labels of one dataset at one fidelity; energies in eV, forces in eV/angstrom."""

    level: str  # method/basis
    labels: dict[str, dict[str, int]]  # kind of label -> split -> structures
    elements: dict[str, ElementLabels]
    e0: dict[str, float]
    e0_source: str
    e0_residual: float | None  # eV/atom
    e0_fit: dict[str, float]
    e0_note: str
    energy_mean: float | None  # eV/atom, of E - sum E0
    energy_std: float | None
    force_rms: float | None
    force_max: float | None
    energies: Histogram | None  # eV/atom, of E - sum E0
    components: Histogram | None  # eV/angstrom
    norms: Histogram | None  # eV/angstrom, edges in equal ratios
    num_outliers: int
    outliers: list[EnergyOutlier]  # the worst of them
    consistency: Consistency


@dataclass(frozen=True)
class Offset:
    """Differences of energies per atom, eV, on the same geometries at two levels: b minus a, each without its E0s."""

    dataset_a: str
    fidelity_a: str
    dataset_b: str
    fidelity_b: str
    structures: int
    mean: float
    std: float
    fitted_std: float  # of what one energy per element more leaves


@dataclass(frozen=True)
class DatasetReport:
    """One dataset on its own."""

    name: str
    version: str
    source: str
    licence: str
    cutoff: float  # angstrom, of the edges
    splits: dict[str, SplitCounts]
    elements: dict[str, ElementCounts]
    sizes: Histogram  # atoms per structure
    fidelities: dict[str, FidelityReport]

    @property
    def size_range(self) -> tuple[int, int]:
        """Atoms of the smallest and the largest structure, the latter rounded up to the end of its bin."""
        return int(self.sizes.edges[0] + 0.5), int(self.sizes.edges[-1] - 0.5)

    @property
    def summary(self) -> str:
        """What the dataset is, in one line."""
        structures = sum(split.structures for split in self.splits.values())
        low, high = self.size_range
        return (
            f"{structures:,} structures of {low} to {high} atoms; elements {', '.join(self.elements)}; "
            f"level{'s' * (len(self.fidelities) != 1)} of theory {', '.join(self.fidelities)}"
        )


@dataclass(frozen=True)
class Shared:
    """Geometries that two places (a dataset's split) have in common."""

    dataset_a: str
    split_a: str
    dataset_b: str
    split_b: str
    geometries: int
    examples: list[tuple[str, str]]  # keys in a and b

    @property
    def leaks(self) -> bool:
        """Whether what one split is measured on, another has seen."""
        return self.split_a != self.split_b


@dataclass(frozen=True)
class Conflict:
    """Energies of the same geometries under the same name of a fidelity that differ."""

    fidelity: str
    geometries: int
    largest: float  # eV/atom
    examples: list[tuple[str, str]]  # "dataset/split key" of the two extremes


@dataclass(frozen=True)
class Duplicates:
    """Structures equal up to rotation, reflection, translation and the order of like atoms."""

    geometries: int  # that occur more than once
    across: int  # of these, in more than one split or dataset
    repeats: dict[str, int]  # "dataset/split" -> structures beyond the first of their geometry in that place
    shared: list[Shared] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What `inspect` returns."""

    findings: list[Finding]
    datasets: list[DatasetReport]
    duplicates: Duplicates
    offsets: list[Offset]

    @property
    def tally(self) -> str:
        """How many problems and notes there are."""
        problems = sum(finding.level == "problem" for finding in self.findings)
        notes = len(self.findings) - problems
        return f"{problems} problem{'s' * (problems != 1)}, {notes} note{'s' * (notes != 1)}"
