"""MatPES: static calculations of the Materials Project at PBE and r2SCAN, a list of entries in JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rung.data.fidelity import Fidelity, unknown_fidelity
from rung.data.sources.common import formula
from rung.data.sources.json_stream import JsonStream, open_text
from rung.data.sources.records import array, crystal, full_stress, number, tables
from rung.data.sources.source import LevelsSource, Part, SourceInfo, existing, whole
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable
from rung.data.units import KBAR

_LEVELS = {
    "pbe": Fidelity("pbe", "PBE", code="VASP", description="MatPESStaticSet, no U"),
    "r2scan": Fidelity("r2scan", "r2SCAN", code="VASP", description="MatPESStaticSet, no U"),
}
_KEYS = ("structure", "energy", "forces", "stress", "functional")


@dataclass(frozen=True)
class MatPES(LevelsSource):
    """Entries of the chosen functionals, grouped by the Materials Project's id of the crystal they started from."""

    levels: tuple[str, ...] = ("pbe", "r2scan")

    info: ClassVar[SourceInfo] = SourceInfo(
        name="matpes",
        title="MatPES (Materials Potential Energy Surface)",
        files="MatPES-PBE-2025.1.json.gz, MatPES-R2SCAN-2025.1.json.gz (or 2025.2)",
        layout=(
            "a list of {matpes_id, structure (pymatgen), energy in eV, forces in eV/A, stress in kbar with VASP's sign "
            "and in Voigt's order xx yy zz yz xz xy, functional, provenance: {original_mp_id}}; magnetic "
            "moments and other properties are not read"
        ),
        url="https://matpes.ai",
        doi="10.48550/arXiv.2503.04070",
        citation="A. D. Kaplan et al., arXiv:2503.04070 (2025)",
        fidelities=tuple(_LEVELS.values()),
        structures=434_712 + 387_897,  # of 2025.1, PBE and r2SCAN
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return one part per file: a compressed list cannot be entered in the middle."""
        for path in existing(paths, self.info):
            with open_text(path) as file:
                JsonStream(file, path).take("[")
        return [whole(path) for path in paths]

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the entries of a file; keys are the file's name and the place in the list, as in its split files."""
        with open_text(part.path) as file:
            yield from tables(self._structures(JsonStream(file, part.path), part.path))

    def _structures(self, stream: JsonStream, path: Path) -> Iterator[Structure]:
        stem = path.name.removesuffix(".gz").removesuffix(".json")
        for index, entry in enumerate(stream.elements()):
            try:
                structure = _structure(f"{stem}-{index:06d}", entry)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: entry {index}: {error}") from error
            if structure.labels.keys() <= set(self.levels):
                yield structure


def _structure(key: str, entry: Any) -> Structure:
    if missing := [name for name in _KEYS if name not in entry]:
        raise ValueError(f"expected {', '.join(missing)}, found {', '.join(entry)}")
    level = str(entry["functional"]).lower()
    if level not in _LEVELS:
        raise ValueError(f"functional: {unknown_fidelity(level, _LEVELS)}")
    atoms = crystal(entry["structure"])
    forces, stress = entry["forces"], entry["stress"]
    labels = Labels(
        energy=number(entry["energy"], "energy"),
        forces=None if forces is None else array(forces, (len(atoms["numbers"]), 3), "forces"),
        stress=None if stress is None else array(full_stress(stress), (3, 3), "stress") * np.float32(-KBAR),
    )
    group = (entry.get("provenance") or {}).get("original_mp_id") or formula(atoms["numbers"])
    return Structure(key=key, group=str(group), labels={level: labels}, **atoms)
