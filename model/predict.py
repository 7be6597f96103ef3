"""Predictions for structures and reactions, and their errors against labels (`rung.model.errors`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from rung.data.batch import Batch, Budget, Sample, batches
from rung.data.fidelity import unknown_fidelity
from rung.data.graph import table_graph
from rung.data.reaction import Reaction, structures_of
from rung.data.structure import Structure
from rung.data.table import StructureTable
from rung.model.direct import evaluator
from rung.model.errors import MEV, Errors, ErrorSums, Metrics, StructurePrediction
from rung.model.potential import Potential, Prediction

DEFAULT_BUDGET = Budget(max_atoms=2048, max_edges=65536)  # a few hundred MB in float32
CHUNK = 1024  # structures whose edges are counted at a time

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
    "widened",
]


def predict(
    potential: Potential,
    structures: Iterable[Structure],
    fidelity: str,
    *,
    forces: bool = True,
    stress: bool = False,
    budget: Budget = DEFAULT_BUDGET,
) -> list[StructurePrediction]:
    """Return the prediction of each structure at `fidelity`, in order, on the potential's device and in its dtype.

    Raises ValueError for a fidelity, element, charge or multiplicity that the potential does not know and for a
    structure larger than the budget, naming it.
    """
    predictions: list[StructurePrediction] = []
    with _evaluation_mode(potential):
        evaluate = evaluator(potential)  # of the weights as they are now, so not to be kept
        for batch in _batches(potential, structures, fidelity, budget):
            predictions.extend(_of_structures(batch, evaluate(batch, forces=forces, stress=stress)))
    return predictions


def evaluate(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget = DEFAULT_BUDGET
) -> Metrics:
    """Return the errors of the potential against the structures' labels at `fidelity`.

    Keys: num_energies, energy_mae_mev_per_atom, energy_rmse_mev_per_atom, num_forces, force_mae_mev_per_angstrom,
    force_rmse_mev_per_angstrom; an error is None where no structure has the label.
    """
    return error_sums(potential, structures, fidelity, budget=budget).metrics()


def error_sums(
    potential: Potential, structures: Sequence[Structure], fidelity: str, *, budget: Budget = DEFAULT_BUDGET
) -> ErrorSums:
    """Return the sums behind `evaluate`, for a set of structures that is spread over ranks."""
    forces = any(
        (labels := structure.labels.get(fidelity)) is not None and labels.forces is not None for structure in structures
    )
    predictions = predict(potential, structures, fidelity, forces=forces, budget=budget)
    return Errors.of(structures, predictions, fidelity).sums()


def reaction_energies(
    potential: Potential, reactions: Sequence[Reaction], fidelity: str, *, budget: Budget = DEFAULT_BUDGET
) -> NDArray[np.float64]:
    """Return the energies of reactions at `fidelity`, float64 [R] in eV: sums of coefficient x energy.

    Every structure is evaluated once, however many reactions share it. Raises what `predict` raises.
    """
    structures = structures_of(reactions)
    predictions = predict(potential, structures, fidelity, forces=False, budget=budget)
    energy = {id(structure): one.energy for structure, one in zip(structures, predictions, strict=True)}
    sums = [
        sum(
            coefficient * energy[id(structure)]
            for structure, coefficient in zip(r.structures, r.coefficients, strict=True)
        )
        for r in reactions
    ]
    return np.array(sums, np.float64)


def widened(budget: Budget, structures: Sequence[Structure], cutoff: float) -> Budget:
    """Return a budget that the largest of the structures fits in by itself, for `cutoff` in angstrom."""
    max_atoms, max_edges = budget.max_atoms, budget.max_edges
    for start in range(0, len(structures), CHUNK):
        table = StructureTable.of(structures[start : start + CHUNK])
        edges = np.diff(table_graph(table, cutoff).row_ptr[table.offsets])
        max_atoms, max_edges = max(max_atoms, int(table.num_atoms.max())), max(max_edges, int(edges.max()))
    return Budget(max_atoms, max_edges)


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


def _batches(potential: Potential, structures: Iterable[Structure], fidelity: str, budget: Budget) -> Iterator[Batch]:
    known = potential.config.fidelities
    choose_fidelity(fidelity, known)
    weight = next(potential.parameters())
    index = {name: row for row, name in enumerate(known)}
    samples = (Sample(_checked(potential, structure, fidelity), fidelity) for structure in structures)
    for batch in batches(samples, fidelity_index=index, cutoff=potential.config.cutoff, budget=budget):
        yield batch.to(weight.device, weight.dtype)


def _checked(potential: Potential, structure: Structure, fidelity: str) -> Structure:
    check_structure(potential, structure, fidelity)
    return structure


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
