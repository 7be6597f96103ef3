"""The label engine: samples every molecule, labels every structure at its planned levels, resumes where it stopped.

The plan is a pure function of the sampled structures and the seed. All structures are put in one random order, those
affordable for the costly levels first; each level labels a prefix of it, so higher fidelities nest in lower ones. The
costly levels advance together: a run cut short has labelled shorter prefixes of the same order.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from rung.data.generate.levels import ATOM_MULTIPLICITY, LEVELS, LabelError, compute_label
from rung.data.generate.sampling import SAMPLING_SETTINGS, Sampled, sample_molecule
from rung.data.generate.store import Geometry, LabelRow, LabelStore
from rung.data.generate.workers import Lost, run_parallel

# Default number of labels per level. None: every structure.
COUNTS: dict[str, int | None] = {
    "gfn1_xtb": 19_500,  # with the others about 9.8 MB of shards
    "gfn2_xtb": 19_500,
    "pbe_def2svp": 2000,
    "wb97x_631gd": 1500,
    "mp2_ccpvdz": 800,
    "ccsdt_ccpvdz": 800,
}
CHEAP = ("gfn1_xtb", "gfn2_xtb")
# When a level's prefix is complete, as a part of the run. The correlated levels come early: a run that is cut short
# needs them most.
_PACE = {"mp2_ccpvdz": 0.35, "ccsdt_ccpvdz": 0.35}
MAX_BASIS_FUNCTIONS = 72  # cc-pVDZ functions of an affordable molecule; ethanol has 72 and takes 4 s of CCSD(T)
_BASIS_FUNCTIONS = {1: 5, 6: 14, 7: 14, 8: 14}  # cc-pVDZ
STRUCTURES_PER_MODE = 12.0
MAX_STRUCTURES_PER_MOLECULE = 150
TASK_TIMEOUT = 900.0  # s; the longest planned calculation takes about 20 s


@dataclass(frozen=True)
class Plan:
    """What to generate: SMILES, labels per level (None: all), the seed, structures per vibrational mode."""

    smiles: Sequence[str]
    counts: Mapping[str, int | None]
    seed: int = 0
    structures_per_mode: float = STRUCTURES_PER_MODE


@dataclass(frozen=True)
class _Task:
    geometry: Geometry
    fidelity: str


@dataclass(frozen=True)
class _SampleTask:
    smiles: str
    count: int
    seed: int


def generate(plan: Plan, folder: Path, jobs: int) -> Counter[str]:
    """Run or continue `plan` in `folder` with `jobs` processes; returns this run's counts of "done" and each failure.

    Raises ValueError when the folder was started with another seed, other settings or other code versions.
    """
    with LabelStore(folder / "labels.sqlite") as store:
        store.check_meta(
            seed=plan.seed,
            structures_per_mode=plan.structures_per_mode,
            sampling=SAMPLING_SETTINGS,
            settings={name: dict(level.settings) for name, level in LEVELS.items()},
            versions=code_versions(),
        )
        _sample(plan, store, jobs)
        store.add_geometries(isolated_atoms())
        return _label(plan, store, jobs)


def code_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("ase", "pyscf", "rdkit", "tblite")}


def isolated_atoms() -> list[Geometry]:
    origin = np.zeros((1, 3), np.float32)
    return [Geometry(f"atom:{z}", "", spin, np.array([z], np.uint8), origin) for z, spin in ATOM_MULTIPLICITY.items()]


def label_order(geometries: Sequence[Geometry], seed: int) -> list[Geometry]:
    """Affordable structures first, each part in a random order that does not depend on which others exist."""

    def place(geometry: Geometry) -> tuple[bool, bytes]:
        return not is_affordable(geometry.numbers), hashlib.sha256(f"{seed}/{geometry.key}".encode()).digest()

    return sorted(geometries, key=place)


def is_affordable(numbers: NDArray[np.uint8]) -> bool:
    return sum(_BASIS_FUNCTIONS[int(number)] for number in numbers) <= MAX_BASIS_FUNCTIONS


def planned_labels(plan: Plan, geometries: Sequence[Geometry]) -> list[tuple[Geometry, str]]:
    """Every (structure, fidelity) of the plan in the order in which it is computed."""
    atoms = [geometry for geometry in geometries if not geometry.smiles]
    labels: list[tuple[float, Geometry, str]] = []
    for fidelity, prefix in prefixes(geometries, plan.counts, plan.seed).items():
        labels += [(-2.0, atom, fidelity) for atom in atoms]
        for rank, geometry in enumerate(prefix):
            progress = -1.0 if fidelity in CHEAP else _PACE.get(fidelity, 1.0) * rank / len(prefix)
            labels.append((progress, geometry, fidelity))
    labels.sort(key=lambda label: label[0])
    return [(geometry, fidelity) for _, geometry, fidelity in labels]


def prefixes(geometries: Sequence[Geometry], counts: Mapping[str, int | None], seed: int) -> dict[str, list[Geometry]]:
    """The structures that each level with a count above zero labels: prefixes of one order."""
    order = label_order([geometry for geometry in geometries if geometry.smiles], seed)
    affordable = [geometry for geometry in order if is_affordable(geometry.numbers)]
    return {
        fidelity: (order if fidelity in CHEAP else affordable)[:count]
        for fidelity, count in counts.items()
        if count != 0
    }


def _sample(plan: Plan, store: LabelStore, jobs: int) -> None:
    known = store.molecules()
    tasks = [
        _SampleTask(smiles, _num_structures(smiles, plan.structures_per_mode), plan.seed)
        for smiles in plan.smiles
        if smiles not in known
    ]
    results = run_parallel(_run_sample, tasks, jobs=jobs, timeout=TASK_TIMEOUT)
    for result in tqdm(results, "molecules sampled", total=len(tasks), mininterval=_progress_interval()):
        if isinstance(result, Lost):
            store.add_molecule(result.task.smiles, None, result.reason)
        else:
            store.add_molecule(*result)


def _num_structures(smiles: str, per_mode: float) -> int:
    """In proportion to the number of vibrational modes, with a cap so that no molecule dominates."""
    from rdkit import Chem

    num_atoms = Chem.AddHs(Chem.MolFromSmiles(smiles)).GetNumAtoms()
    return min(round(per_mode * max(3 * num_atoms - 6, 1)), MAX_STRUCTURES_PER_MOLECULE)


def _run_sample(task: _SampleTask) -> tuple[str, Sampled]:
    return task.smiles, sample_molecule(task.smiles, task.count, task.seed)


def _label(plan: Plan, store: LabelStore, jobs: int) -> Counter[str]:
    done = store.done()
    tasks = [
        _Task(geometry, fidelity)
        for geometry, fidelity in planned_labels(plan, list(store.geometries()))
        if (geometry.key, fidelity) not in done
    ]
    outcomes: Counter[str] = Counter()
    results = run_parallel(_run_label, tasks, jobs=jobs, timeout=TASK_TIMEOUT)
    for result in tqdm(results, "labels", total=len(tasks), smoothing=0.02, mininterval=_progress_interval()):
        row = _lost_row(result) if isinstance(result, Lost) else result
        store.add_label(row)
        outcomes["done" if row.failure is None else f"{row.fidelity}: {row.failure}"] += 1
    return outcomes


def _progress_interval() -> float:
    """Seconds between two updates: a bar on a terminal, a line now and then in a log."""
    return 0.1 if sys.stderr.isatty() else 30.0


def _run_label(task: _Task) -> LabelRow:
    geometry = task.geometry
    start = time.perf_counter()
    energy, forces, failure = None, None, None
    try:
        energy, forces = compute_label(
            LEVELS[task.fidelity], geometry.numbers, geometry.positions, geometry.multiplicity
        )
    except LabelError as error:
        failure = str(error)
    return LabelRow(geometry.key, task.fidelity, energy, forces, failure, time.perf_counter() - start)


def _lost_row(lost: Lost[_Task]) -> LabelRow:
    return LabelRow(lost.task.geometry.key, lost.task.fidelity, None, None, lost.reason, 0.0)
