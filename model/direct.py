"""Energy, forces and stress without autograd, for inference: on a small molecule it costs more than the arithmetic.

What `Potential.forward` computes in evaluation mode is computed here from the same native operations and their
backward passes, with the backward pass of the whole potential written out (shape legend: model/direct_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rung.data.batch import Batch
from rung.kernels import Edges
from rung.kernels.explicit import Operations, native_operations
from rung.model.direct_layers import DirectLayer, DirectReadout, Geometry, Groups, Rows, Sent, Trace, direct_readouts
from rung.model.geometry import edge_vectors, forces_from, stress_from
from rung.model.layers import Interaction
from rung.model.potential import CHARGE_OFFSET, Potential, Prediction


def operations_of(potential: Potential) -> Operations | None:
    """Return the native operations for a potential, None where it runs on the reference (see `use_backend`)."""
    config, weight = potential.config, potential.embedding.element_SC
    return native_operations(weight, channels=config.channels, num_radial=config.num_radial, l_max=config.l_max)


def evaluator(potential: Potential) -> Callable[..., Prediction]:
    """Return the fastest way to evaluate batches with a potential in evaluation mode and its weights as they are now.

    To be called as `Potential.forward` is.
    """
    operations = operations_of(potential)
    return potential if operations is None else DirectPotential(potential, operations)


class Composition(NamedTuple):
    """What an evaluation needs to know of the atoms of a batch, wherever they are."""

    elements: Groups
    fidelities: Groups
    h_NC: Tensor  # the first layer's scalars
    sent: Sent  # by the first layer
    readouts: list[Rows]  # of each layer
    reference_N: Tensor  # float64, eV

    def masked(self, owned_N: Tensor) -> Composition:
        """Return the composition in which only the owned atoms (bool [N]) have energies.

        The energies are linear in the read-outs' last row, and the backward pass starts from it.
        """
        readouts = [rows._replace(energy_NX=rows.energy_NX * owned_N[:, None]) for rows in self.readouts]
        return self._replace(readouts=readouts, reference_N=torch.where(owned_N, self.reference_N, 0.0))


class DirectPotential:
    """`Potential.forward` in evaluation mode, without autograd.

    A snapshot: when it is made the weights are copied, transposed, and combined where that saves work. What happens to
    the potential afterwards (training, a new fidelity, another dtype or device) does not change it: make a new one.
    """

    @torch.no_grad()
    def __init__(self, potential: Potential, operations: Operations) -> None:
        """Prepare the weights; `operations` are those for the potential's dtype and device (`operations_of`)."""
        self.config = config = potential.config
        self._operations = operations
        embedding = potential.embedding
        self._element_SC = embedding.element_SC.clone()
        self._charge_QC = embedding.charge_QC.clone()
        self._multiplicity_PC = embedding.multiplicity_PC.clone()
        self._layers = [
            DirectLayer(cast(Interaction, layer), operations, vectors_in=config.l_hidden == 1 and t > 0)
            for t, layer in enumerate(potential.layers)
        ]
        biases = [layer.update_bias_C for layer in self._layers]
        self._readouts: Sequence[DirectReadout] = direct_readouts(potential.conditioning, biases)
        self._e0_FZ, self._scale = potential.e0_FZ.clone(), potential.scale.clone()
        self._element_row = potential.element_row
        self._charge_row, self._multiplicity_row = potential.charge_row, potential.multiplicity_row

    @torch.no_grad()
    def composition(self, batch: Batch) -> Composition:
        """Return all that does not depend on the geometry: for structures that only move it is needed once."""
        element_N = self._element_row[batch.numbers]
        charge_M = self._charge_row[batch.charge + CHARGE_OFFSET]
        multiplicity_M = self._multiplicity_row[batch.multiplicity]
        state_MC = self._charge_QC.index_select(0, charge_M) + self._multiplicity_PC.index_select(0, multiplicity_M)
        h_NC = self._element_SC.index_select(0, element_N) + state_MC.index_select(0, batch.structure)
        elements = Groups.of(element_N, len(self.config.elements))
        fidelity_N = batch.fidelity[batch.structure]
        return Composition(
            elements=elements,
            fidelities=Groups.of(fidelity_N, len(self.config.fidelities)),
            h_NC=h_NC,
            sent=self._layers[0].sent(h_NC, elements),
            readouts=[readout.rows(fidelity_N) for readout in self._readouts],
            reference_N=self._e0_FZ[fidelity_N, element_N],
        )

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        composition: Composition | None = None,
        *,
        forces: bool = True,
        stress: bool = False,
        owned_N: Tensor | None = None,
    ) -> Prediction:
        """Return energies and, as asked, forces and stress.

        The batch's floating-point dtype must be the network's. `composition` is that of a batch with the same atoms,
        charges, multiplicities and fidelities; without it, it is made. `owned_N` as in `Potential.forward` (a
        composition that is `masked` already needs none).
        """
        atoms = self.composition(batch) if composition is None else composition
        if owned_N is not None:
            atoms = atoms.masked(owned_N)
        config = self.config
        cutoff, num_radial, l_max = config.cutoff, config.num_radial, config.l_max
        vectors_E3 = edge_vectors(batch)
        radial_ER, harmonics_EL = self._operations.edge_basis(vectors_E3, cutoff, num_radial, l_max)
        edges = Edges(batch.receivers, batch.senders, batch.row_ptr, batch.reverse)
        geometry = Geometry(radial_ER, harmonics_EL, edges)
        energy_N, traces = self._forward(atoms, geometry)
        energy_N = torch.addcmul(atoms.reference_N, energy_N, self._scale)
        energy_M = energy_N.new_zeros(batch.num_structures).index_add_(0, batch.structure, energy_N)
        if not (forces or stress):
            return Prediction(energy_M, None, None, energy_N)
        gradient_E3 = self._operations.edge_basis_backward(
            vectors_E3, *self._backward(atoms, geometry, traces), cutoff, num_radial, l_max
        ).mul_(self._scale)
        forces_N3 = forces_from(batch, gradient_E3) if forces else None
        stress_M33 = stress_from(batch, vectors_E3, gradient_E3) if stress else None
        return Prediction(energy_M, forces_N3, stress_M33, energy_N)

    def _forward(self, atoms: Composition, geometry: Geometry) -> tuple[Tensor, list[tuple[Trace, Tensor | None]]]:
        """Return the energies [N] in units of the scale, in float64, and what the backward pass needs of each layer."""
        h_NC, v_N3C, energy_N = atoms.h_NC, None, torch.zeros_like(atoms.reference_N)
        traces = []
        for t, (layer, readout) in enumerate(zip(self._layers, self._readouts, strict=True)):
            sent = layer.sent(h_NC, atoms.elements) if t else atoms.sent
            h_NC, v_N3C, trace = layer.forward(h_NC, sent, v_N3C, geometry)
            h_NC, layer_energy_N, hidden_NH = readout.forward(h_NC, atoms.readouts[t], atoms.fidelities)
            energy_N += layer_energy_N
            traces.append((trace, hidden_NH))
        return energy_N, traces

    def _backward(
        self, atoms: Composition, geometry: Geometry, traces: list[tuple[Trace, Tensor | None]]
    ) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the sum of all energies with respect to the radial functions and harmonics."""
        totals: tuple[Tensor, Tensor] | None = None
        g_h_NC = g_v_N3C = None
        for t in reversed(range(len(traces))):
            trace, hidden_NH = traces[t]
            g_h_NC = self._readouts[t].backward(g_h_NC, hidden_NH, atoms.readouts[t], atoms.fidelities)
            g_radial_ER, g_harmonics_EL, g_h_NC, g_v_N3C = self._layers[t].backward(
                g_h_NC, g_v_N3C, trace, geometry, atoms.elements if t else None
            )
            if totals is not None:
                g_radial_ER, g_harmonics_EL = g_radial_ER.add_(totals[0]), g_harmonics_EL.add_(totals[1])
            totals = (g_radial_ER, g_harmonics_EL)
        assert totals is not None
        return totals
