"""The part of a box that one MPI rank evaluates: its own atoms and those around them that their energies depend on.

With T rounds of message passing an atom's energy depends on what is within T cut-offs of it, so a rank evaluates its
own atoms in a halo T cut-offs wide. Both are picked out of the periodic box as it is, without copies of atoms: a part
is never larger than the box, and for a single rank it is the box.

Shape legend: N atoms of the box, in the order of their tags; n atoms of the part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.data.batch import Batch, Batcher, Budget, Sample, Samples
from rung.data.graph import Graph, neighbour_graph
from rung.data.structure import Structure
from rung.model.direct import Composition, DirectPotential, evaluator
from rung.model.neighbours import SKIN, Candidates, reach
from rung.model.potential import Potential, Prediction


class Box(NamedTuple):
    """All atoms of a simulation, and its cell."""

    numbers: NDArray[np.uint8]  # [N]
    positions: NDArray[Any]  # float64 [N, 3], angstrom
    cell: NDArray[Any]  # float64 [3, 3], angstrom; rows are lattice vectors
    pbc: NDArray[np.bool_]  # [3]


class Share(NamedTuple):
    """What a rank's own atoms contribute."""

    energy: float  # eV, reference energies included
    atomic_energy: NDArray[np.float64]  # [N], eV; zero for the others' atoms
    forces: NDArray[np.float64]  # [N, 3], eV/angstrom: minus the gradient of `energy`
    virial: NDArray[np.float64]  # [3, 3], eV: minus the derivative of `energy` with respect to strain


@dataclass
class _Part:
    """A part of a box, valid as long as its candidates hold."""

    box: Box  # when it was made
    owned: NDArray[np.bool_]  # [N]
    members: NDArray[np.int64]  # [n]
    candidates: Candidates
    batch: Batch  # the members', without edges
    mask_n: Tensor
    composition: Composition | None = None


class Domain:
    """Evaluates a rank's own atoms in boxes that follow from one another, and keeps what does not change."""

    def __init__(
        self, potential: Potential, fidelity: str, *, charge: int = 0, multiplicity: int = 1, skin: float = SKIN
    ) -> None:
        """Take a potential in evaluation mode; charge and multiplicity are the whole box's."""
        self.potential = potential
        self.fidelity = fidelity
        self._charge, self._multiplicity = charge, multiplicity
        self._skin = skin
        self._evaluate = evaluator(potential)
        self._part: _Part | None = None

    @torch.inference_mode()
    def evaluate(self, box: Box, owned: NDArray[np.bool_]) -> Share:
        """Return what the owned atoms (bool [N]) contribute to energy, forces and virial.

        Raises ValueError for positions that are not finite, two atoms at one place, and what the potential was not
        trained on.
        """
        if not np.isfinite(box.positions).all():
            raise ValueError("positions: expected finite numbers; did the dynamics blow up?")
        if not owned.any():
            return Share(0.0, np.zeros(len(owned)), np.zeros((len(owned), 3)), np.zeros((3, 3)))
        part = self._part
        cutoff = self.potential.config.cutoff
        if part is not None and _same_atoms(part, box, owned):
            followed = box._replace(positions=_followed(part.box, box))
            structure = self._structure(followed, part.members)
            if reach(part.candidates.structure, structure, cutoff) <= cutoff + self._skin:
                return self._share(part, structure)
        part = self._part = self._make(box, owned)
        return self._share(part, part.candidates.structure)

    def _make(self, box: Box, owned: NDArray[np.bool_]) -> _Part:
        config = self.potential.config
        self.potential.check_domain(box.numbers.tolist(), self.fidelity, self._charge, self._multiplicity)
        members = np.arange(len(owned))
        if not owned.all():
            members = halo(box, owned, config.cutoff + self._skin, config.num_layers)
        structure = self._structure(box, members)
        weight = self.potential.embedding.element_SC
        names = list(config.fidelities)
        batcher = Batcher({name: row for row, name in enumerate(names)}, None, Budget(len(members), 1))
        list(batcher.add(Samples.of([Sample(structure, self.fidelity)], names)))
        batch = batcher.rest()
        assert batch is not None
        return _Part(
            box=box,
            owned=owned,
            members=members,
            candidates=Candidates.of(structure, config.cutoff, self._skin, weight.device),
            batch=batch.to(weight.device, weight.dtype),
            mask_n=torch.from_numpy(owned[members]).to(weight.device),
        )

    def _structure(self, box: Box, members: NDArray[np.int64]) -> Structure:
        return Structure(
            key="the box",
            group="",
            numbers=box.numbers[members],
            positions=box.positions[members],
            cell=box.cell,
            pbc=box.pbc,
            charge=self._charge,
            multiplicity=self._multiplicity,
        )

    def _share(self, part: _Part, structure: Structure) -> Share:
        like = part.batch.positions
        moved: dict[str, Any] = dict(part.candidates.within(structure, self.potential.config.cutoff))
        moved["shifts"] = moved["shifts"].to(like.dtype)
        moved["positions"] = torch.from_numpy(structure.positions).to(like)
        moved["cell"] = torch.from_numpy(structure.cell[None]).to(like)
        batch = replace(part.batch, **moved)
        prediction = self._predict(part, batch)
        assert prediction.forces is not None and prediction.stress is not None
        atomic_energy, forces = np.zeros(len(part.owned)), np.zeros((len(part.owned), 3))
        atomic_energy[part.members] = prediction.atomic_energy.cpu().numpy()
        forces[part.members] = prediction.forces.double().cpu().numpy()
        volume = abs(float(np.linalg.det(structure.cell)))
        virial = -volume * prediction.stress[0].double().cpu().numpy()
        return Share(prediction.energy.item(), atomic_energy, forces, virial)

    def _predict(self, part: _Part, batch: Batch) -> Prediction:
        if not isinstance(self._evaluate, DirectPotential):
            prediction: Prediction = self._evaluate(batch, stress=True, owned_N=part.mask_n)
            return prediction
        if part.composition is None:
            part.composition = self._evaluate.composition(batch).masked(part.mask_n)
        return self._evaluate(batch, part.composition, stress=True)


def halo(box: Box, owned: NDArray[np.bool_], step: float, rounds: int) -> NDArray[np.int64]:
    """Return the atoms that are owned or at most `rounds` steps of at most `step` angstrom away from an owned one."""
    near = np.flatnonzero(_around(box, owned, step * rounds))
    graph: Graph = neighbour_graph(box.positions[near], box.cell, box.pbc, step)
    reached = owned[near]
    for _ in range(rounds):
        senders = graph.senders[reached[graph.receivers]]
        reached[senders] = True
    return near[reached]


def _around(box: Box, owned: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Return which atoms are inside the owned ones' bounding parallelepiped widened by a distance, which is cheap."""
    inverse = np.linalg.inv(box.cell)
    fractions = box.positions @ inverse
    low, high = fractions[owned].min(axis=0), fractions[owned].max(axis=0)
    width = distance * np.linalg.norm(inverse, axis=0)  # the distance of two faces is 1 over the norm of a column
    above = fractions - (low - width)
    above = np.where(box.pbc, above % 1.0, above)
    inside: NDArray[np.bool_] = ((above >= 0) & (above <= high - low + 2 * width)).all(axis=1)
    return inside | owned


def _same_atoms(part: _Part, box: Box, owned: NDArray[np.bool_]) -> bool:
    return np.array_equal(part.owned, owned) and np.array_equal(part.box.numbers, box.numbers)


def _followed(old: Box, new: Box) -> NDArray[Any]:
    """Return the new positions [N, 3] without the jumps by lattice vectors that an engine makes as it wraps atoms."""
    fractions = new.positions @ np.linalg.inv(new.cell) - old.positions @ np.linalg.inv(old.cell)
    jumps = np.where(new.pbc, np.round(fractions), 0.0)
    followed: NDArray[Any] = new.positions - jumps @ new.cell
    return followed
