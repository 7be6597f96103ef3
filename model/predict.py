"""Predictions for structures and reactions, and their errors against labels (`rung.model.errors`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from rung.data.batch import Batch, Batcher, Budget, Sample, Samples
from rung.data.fidelity import unknown_fidelity
from rung.data.graph import edge_counts
from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Structure
from rung.data.table import StructureTable
from rung.model.direct import evaluator
from rung.model.errors import MEV, Errors, ErrorSums, Metrics, StructurePrediction
from rung.model.potential import Potential, Prediction

DEFAULT_BUDGET = Budget(max_atoms=2048, max_edges=65536)  # a few hundred MB in float32
CHUNK = 256  # structures that are taken, and whose edges are counted, at a time

__all__ = [
    "DEFAULT_BUDGET",
    "MEV",
    "ErrorSums",
    "StructurePrediction",
    "check_structure",
    "choose_fidelity",
    "error_sums",
    "evaluate",
    "known_structures",
    "predict",
    "reaction_energies",
    "to_device",
    "widened",
]


def predict(
    potential: Potential,
    structures: Iterable[Structure],
    fidelity: str,
    *,
    forces: bool = True,
    stress: bool = False,
    budget: Budget | None = None,
) -> list[StructurePrediction]:
    """Return the prediction of each structure at `fidelity`, in order, on the potential's device and in its dtype.

    Batches are of DEFAULT_BUDGET, widened to the largest structure met so far. Raises ValueError for a fidelity,
    element, charge or multiplicity that the potential does not know and, where a `budget` is given, for a structure
    larger than that, naming it.
    """
    predictions: list[StructurePrediction] = []
    with _evaluation_mode(potential):
        evaluate = evaluator(potential)  # of the weights as they are now, so not to be kept
        for batch in _batches(potential, structures, fidelity, budget):
            predictions.extend(_of_structures(batch, evaluate(batch, forces=forces, stress=stress)))
    return predictions


def evaluate(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget | None = None
) -> Metrics:
    """Return the errors of the potential against the structures' labels at `fidelity`.

    Keys: num_energies, energy_mae_mev_per_atom, energy_rmse_mev_per_atom, num_forces, force_mae_mev_per_angstrom,
    force_rmse_mev_per_angstrom; an error is None where no structure has the label.
    """
    return error_sums(potential, structures, fidelity, budget=budget).metrics()


def error_sums(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget | None = None
) -> ErrorSums:
    """Return the sums behind `evaluate`, for a set of structures that is spread over ranks."""
    forces = any(
        (labels := structure.labels.get(fidelity)) is not None and labels.forces is not None for structure in structures
    )
    predictions = predict(potential, structures, fidelity, forces=forces, budget=budget)
    return Errors.of(structures, predictions, fidelity).sums()


def reaction_energies(
    potential: Potential, reactions: Sequence[Reaction], fidelity: str, *, budget: Budget | None = None
) -> NDArray[np.float64]:
    """Return the energies of reactions at `fidelity`, float64 [R] in eV: sums of coefficient x energy.

    Every structure is evaluated once, however many reactions share it. Raises what `predict` raises.
    """
    structures = structures_of(reactions)
    predictions = predict(potential, structures, fidelity, forces=False, budget=budget)
    energy = {id(structure): one.energy for structure, one in zip(structures, predictions, strict=True)}
    return np.array([reaction.combined(energy) for reaction in reactions], np.float64)


def widened(budget: Budget, structures: Sequence[Structure], cutoff: float) -> Budget:
    """Return a budget that the largest of the structures fits in by itself, for `cutoff` in angstrom.

    Edges are counted only where they could be too many.
    """
    max_atoms = max([budget.max_atoms, *(structure.num_atoms for structure in structures)])
    max_edges = budget.max_edges
    many = [structure for structure in structures if _most_edges(structure, cutoff) > budget.max_edges]
    for start in range(0, len(many), CHUNK):
        max_edges = max(max_edges, int(edge_counts(StructureTable.of(many[start : start + CHUNK]), cutoff).max()))
    return Budget(max_atoms, max_edges)


def _most_edges(structure: Structure, cutoff: float) -> float:
    """Return what the number of edges cannot exceed, at little cost.

    With the lattice planes of a periodic direction h apart, a pair of atoms has at most 2 x cutoff / h + 1 images
    along it that are closer than `cutoff`.
    """
    pairs = structure.num_atoms**2
    if not structure.pbc.any():
        return pairs
    dual_3p = np.linalg.pinv(structure.cell[structure.pbc].astype(np.float64))  # of lengths 1 / h
    return float(pairs * np.prod(np.floor(2 * cutoff * np.linalg.norm(dual_3p, axis=0)) + 1))


def to_device(potential: Potential, name: str = "auto") -> Potential:
    """Move the potential to a device (cpu, cuda, cuda:N; auto: cuda where there is one) and return it.

    Raises ValueError for an unknown name, and for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return potential.to(name)
    except (RuntimeError, AssertionError) as error:  # torch: an unknown word, or a GPU that is not there
        raise ValueError(f"device '{name}': {str(error).splitlines()[0]}") from error


def choose_fidelity(name: str | None, known: Sequence[str]) -> str:
    """Return `name`, or the only known fidelity when it is None; raise ValueError where that is not one of `known`."""
    if name is None:
        if len(known) > 1:
            raise ValueError(f"fidelity: this potential knows {len(known)}, so name one: {', '.join(known)}")
        return known[0]
    if name not in known:
        raise unknown_fidelity(name, known)
    return name


def check_structure(potential: Potential, structure: Structure, fidelity: str) -> None:
    """Raise ValueError naming the structure for what the potential was not trained on; see `check_domain`."""
    try:
        potential.check_domain(structure.numbers.tolist(), fidelity, structure.charge, structure.multiplicity)
    except ValueError as error:
        raise ValueError(f"structure '{structure.key}': {error}") from error


def known_structures(
    potential: Potential, structures: Sequence[Structure], fidelity: str
) -> tuple[list[Structure], list[str]]:
    """Return the structures that the potential can be asked about at `fidelity`, and why the others are not there.

    The reasons name the structures.
    """
    known, reasons = [], []
    for structure in structures:
        try:
            check_structure(potential, structure, fidelity)
        except ValueError as error:
            reasons.append(str(error))
        else:
            known.append(structure)
    return known, reasons


def _batches(
    potential: Potential, structures: Iterable[Structure], fidelity: str, budget: Budget | None
) -> Iterator[Batch]:
    known, cutoff = potential.config.fidelities, potential.config.cutoff
    choose_fidelity(fidelity, known)
    weight = next(potential.parameters())
    index = {name: row for row, name in enumerate(known)}
    now = budget or DEFAULT_BUDGET
    batcher = Batcher(index, cutoff, now)
    remaining = iter(structures)
    while some := list(islice(remaining, CHUNK)):
        for structure in some:
            check_structure(potential, structure, fidelity)
        if budget is None and (wider := widened(now, some, cutoff)) != now:
            yield from _moved(batcher.rest(), weight)
            now, batcher = wider, Batcher(index, cutoff, wider)
        for batch, _ in batcher.add(Samples.of([Sample(structure, fidelity) for structure in some], known)):
            yield from _moved(batch, weight)
    yield from _moved(batcher.rest(), weight)


def _moved(batch: Batch | None, weight: torch.Tensor) -> Iterator[Batch]:
    if batch is not None:
        yield batch.to(weight.device, weight.dtype)


def _of_structures(batch: Batch, prediction: Prediction) -> Iterator[StructurePrediction]:
    ends = torch.bincount(batch.structure, minlength=batch.num_structures).cumsum(0).tolist()
    energies = prediction.energy.tolist()
    atomic_energies_N = prediction.atomic_energy.detach().double().cpu().numpy()
    forces_N3 = None if prediction.forces is None else prediction.forces.detach().double().cpu().numpy()
    stress_M33 = None if prediction.stress is None else prediction.stress.detach().double().cpu().numpy()
    for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield StructurePrediction(
            key=batch.keys[index],
            energy=energies[index],
            atomic_energies=atomic_energies_N[start:end],
            forces=None if forces_N3 is None else forces_N3[start:end],
            stress=None if stress_M33 is None else stress_M33[index],
        )


@contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and back: forces then keep no graph of their own gradient."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
