"""The layers and read-outs of a potential as copied weights, with forward and backward pass written out.

Shape legend: N atoms, E edges, F fidelities, S elements, C channels, H hidden units of the read-out, L harmonics,
l = l_max + 1 degrees, R radial functions, K invariants. `g_x` is the derivative of the energy with respect to x, in
units of the potential's scale, and `weight_T` the transpose by which it is propagated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from rung.kernels import Edges
from rung.kernels.explicit import Operations
from rung.model.fidelity import Film, FilmConditioning, FilmReadout, HeadsConditioning
from rung.model.layers import Interaction

_silu_backward = torch.ops.aten.silu_backward
_tanh_backward = torch.ops.aten.tanh_backward


class Geometry(NamedTuple):
    """The edges of a batch as a layer reads them."""

    radial_ER: Tensor
    harmonics_EL: Tensor
    edges: Edges


class Groups(NamedTuple):
    """Atoms grouped by a row of a table, their element's or their fidelity's, for products with that row's matrix."""

    order_N: Tensor | None  # int64 [N], the atoms sorted by row; None where they already are
    inverse_N: Tensor | None
    rows: list[int]  # that occur
    counts: list[int]  # atoms of each of them

    @classmethod
    def of(cls, row_N: Tensor, num_rows: int) -> Groups:
        """Group atoms by row. The counts are read back from the device."""
        all_counts = torch.bincount(row_N, minlength=num_rows).tolist()
        rows = [row for row, count in enumerate(all_counts) if count]
        counts = [all_counts[row] for row in rows]
        if len(rows) <= 1 or bool((row_N[1:] >= row_N[:-1]).all()):
            return cls(None, None, rows, counts)
        order_N = row_N.argsort(stable=True)
        return cls(order_N, order_N.argsort(), rows, counts)

    def linear(self, x_NA: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return x @ weights of each atom's row [N, B]."""
        if len(self.rows) == 1:
            return x_NA @ weights[self.rows[0]]
        if self.order_N is not None:
            x_NA = x_NA.index_select(0, self.order_N)
        product_NB = x_NA.new_empty(x_NA.shape[0], weights[0].shape[1])
        parts = zip(
            self.rows, x_NA.split_with_sizes(self.counts), product_NB.split_with_sizes(self.counts), strict=True
        )
        for row, x_nA, product_nB in parts:
            torch.mm(x_nA, weights[row], out=product_nB)
        return product_NB if self.inverse_N is None else product_NB.index_select(0, self.inverse_N)


class Sent(NamedTuple):
    """The products with a layer's scalars."""

    x_NC: Tensor  # what its neighbours receive of an atom
    species_NC: Tensor  # the message's term by element


class Trace(NamedTuple):
    """What the backward pass of a layer needs of its forward pass."""

    x_NC: Tensor
    w_N3C: Tensor | None
    A_NLC: Tensor
    hidden_NC: Tensor  # before the activation
    gate_NC: Tensor | None
    vector_N3C: Tensor | None  # before the gate


class DirectLayer:
    """The weights of an `Interaction`."""

    def __init__(self, layer: Interaction, operations: Operations, *, vectors_in: bool) -> None:
        self._operations = operations
        scale = layer.neighbour_scale
        self._radial_RlC = layer.radial_RlC * scale
        self._axial_RlC = self._identity_RC = None
        if vectors_in:
            self._axial_RlC, self._identity_RC = layer.axial_RlC * scale, layer.identity_RC * scale
            self._vector_sender_CC, self._vector_sender_T_CC = _both(layer.vector_sender.weight)
        self._sender_CC, self._sender_T_CC = _both(layer.sender.weight)
        self._mixing_lCC, self._mixing_T_lCC = _both(layer.mixing_lCC)
        self._message_XC, self._message_T_CX = _both(layer.message_KCC.flatten(0, 1))  # X = K * C
        species_SCC, species_T_SCC = _both(layer.species_SCC)
        self._species, self._species_T = species_SCC.unbind(), species_T_SCC.unbind()
        self._hidden_CC, self._hidden_T_CC = _both(layer.hidden.weight)
        self._hidden_bias_C = _copy(layer.hidden.bias)
        self._update_CC, self._update_T_CC = _both(layer.update.weight)
        self.update_bias_C = _copy(layer.update.bias)
        self._vectors_out = layer.vectors_out
        if layer.vectors_out:
            self._gate_CC, self._gate_T_CC = _both(layer.gate.weight)
            self._gate_bias_C = _copy(layer.gate.bias) + self.update_bias_C @ self._gate_CC
            self._vector_CC, self._vector_T_CC = _both(layer.vector.weight)

    def sent(self, h_NC: Tensor, elements: Groups) -> Sent:
        """Return the two products with the layer's scalars, which do not depend on the geometry in the first layer."""
        return Sent(h_NC @ self._sender_CC, elements.linear(h_NC, self._species))

    def forward(
        self, h_NC: Tensor, sent: Sent, v_N3C: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor | None, Trace]:
        """Return the new scalars less `update_bias_C` (the read-out adds it), the new vectors, and a trace."""
        w_N3C = None if v_N3C is None else v_N3C @ self._vector_sender_CC
        radial_ER, harmonics_EL, edges = geometry
        weights = (self._radial_RlC, w_N3C, self._axial_RlC, self._identity_RC)
        A_NLC = self._operations.convolve(radial_ER, harmonics_EL, sent.x_NC, *weights, edges)
        A_NLC = self._operations.mix(A_NLC, self._mixing_lCC)
        invariants_NX = self._operations.invariants(A_NLC).flatten(1)
        message_NC = self._operations.matmul(invariants_NX, self._message_XC).add_(sent.species_NC)
        hidden_NC = torch.addmm(self._hidden_bias_C, message_NC, self._hidden_CC)
        h_NC = torch.addmm(message_NC.add_(h_NC), silu(hidden_NC), self._update_CC)
        if not self._vectors_out:
            return h_NC, None, Trace(sent.x_NC, w_N3C, A_NLC, hidden_NC, None, None)
        gate_NC = torch.addmm(self._gate_bias_C, h_NC, self._gate_CC).tanh_()
        vector_N3C = A_NLC[:, 1:4].contiguous() @ self._vector_CC
        return h_NC, vector_N3C * gate_NC[:, None], Trace(sent.x_NC, w_N3C, A_NLC, hidden_NC, gate_NC, vector_N3C)

    def backward(
        self,
        g_h_NC: Tensor,
        g_v_N3C: Tensor | None,
        trace: Trace,
        geometry: Geometry,
        elements: Groups | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the derivatives with respect to the radial functions, the harmonics, h and v.

        Without `elements` those of h and v are not wanted (the first layer): None.
        """
        g_gated_N3C = None
        if g_v_N3C is not None:
            assert trace.gate_NC is not None and trace.vector_N3C is not None
            g_gate_NC = _tanh_backward((g_v_N3C * trace.vector_N3C).sum(1), trace.gate_NC)
            g_h_NC = torch.addmm(g_h_NC, g_gate_NC, self._gate_T_CC)
            g_gated_N3C = g_v_N3C * trace.gate_NC[:, None]
        g_hidden_NC = _silu_backward(g_h_NC @ self._update_T_CC, trace.hidden_NC)
        g_message_NC = torch.addmm(g_h_NC, g_hidden_NC, self._hidden_T_CC)
        g_invariants_NX = self._operations.matmul(g_message_NC, self._message_T_CX)
        g_invariants_NKC = g_invariants_NX.view(g_h_NC.shape[0], -1, g_h_NC.shape[1])
        g_A_NLC = self._operations.invariants_backward(trace.A_NLC, g_invariants_NKC)
        if g_gated_N3C is not None:
            g_A_NLC[:, 1:4].add_(g_gated_N3C @ self._vector_T_CC)
        g_A_NLC = self._operations.mix(g_A_NLC, self._mixing_T_lCC)
        radial_ER, harmonics_EL, edges = geometry
        need = (True, True, elements is not None, False, trace.w_N3C is not None, False, False)
        weights = (self._radial_RlC, trace.w_N3C, self._axial_RlC, self._identity_RC)
        g_radial_ER, g_harmonics_EL, g_x_NC, _, g_w_N3C, _, _ = self._operations.convolve_backward(
            g_A_NLC, radial_ER, harmonics_EL, trace.x_NC, *weights, edges, need
        )
        assert g_radial_ER is not None and g_harmonics_EL is not None
        if elements is None:
            return g_radial_ER, g_harmonics_EL, None, None
        assert g_x_NC is not None
        g_h_NC = torch.addmm(g_h_NC, g_x_NC, self._sender_T_CC).add_(elements.linear(g_message_NC, self._species_T))
        g_v_N3C = None if g_w_N3C is None else g_w_N3C @ self._vector_sender_T_CC
        return g_radial_ER, g_harmonics_EL, g_h_NC, g_v_N3C


class Rows(NamedTuple):
    """A read-out's rows of its tables by fidelity, one for each atom."""

    factor_NC: Tensor | None  # of the scalars
    shift_NC: Tensor  # heads: [C]
    energy_NX: Tensor  # X: hidden units (film) or channels (heads)


class DirectReadout(Protocol):
    """A layer's conditioning and read-out."""

    def rows(self, fidelity_N: Tensor) -> Rows:
        """Return what belongs to each atom's fidelity."""

    def forward(self, h_NC: Tensor, rows: Rows, fidelities: Groups) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the conditioned scalars [N, C], their energies [N], and what `backward` needs."""

    def backward(self, g_h_NC: Tensor | None, hidden_NH: Tensor | None, rows: Rows, fidelities: Groups) -> Tensor:
        """Return the derivative with respect to the layer's scalars, from that of the conditioned ones (None: zero)."""


class DirectFilm:
    """A layer's `Film`, with the bias of the layer's update, and its `FilmReadout`, as one matrix for each fidelity."""

    def __init__(self, conditioning: FilmConditioning, layer: int, update_bias_C: Tensor) -> None:
        vector_FD = conditioning.vector_FD
        film, readout = cast(Film, conditioning.films[layer]), cast(FilmReadout, conditioning.readouts[layer])
        self._factor_FC = 1 + vector_FD @ film.scale_DC
        self._shift_FC = torch.addcmul(vector_FD @ film.shift_DC, update_bias_C, self._factor_FC)
        change_FCH = (readout.down.weight * vector_FD[:, None]) @ readout.up_DH
        hidden_FCH, hidden_T_FHC = _both(readout.hidden.weight + change_FCH)
        self._hidden, self._hidden_T = hidden_FCH.unbind(), hidden_T_FHC.unbind()
        self._bias_H = _copy(readout.hidden.bias)
        self._energy_FH = readout.energy_H + readout.change_FH

    def rows(self, fidelity_N: Tensor) -> Rows:
        tables = (self._factor_FC, self._shift_FC, self._energy_FH)
        return Rows(*(table.index_select(0, fidelity_N) for table in tables))

    def forward(self, h_NC: Tensor, rows: Rows, fidelities: Groups) -> tuple[Tensor, Tensor, Tensor | None]:
        assert rows.factor_NC is not None
        h_NC = torch.addcmul(rows.shift_NC, h_NC, rows.factor_NC)
        hidden_NH = fidelities.linear(h_NC, self._hidden).add_(self._bias_H)
        return h_NC, (silu(hidden_NH) * rows.energy_NX).sum(1), hidden_NH

    def backward(self, g_h_NC: Tensor | None, hidden_NH: Tensor | None, rows: Rows, fidelities: Groups) -> Tensor:
        assert rows.factor_NC is not None
        g_read_NC = fidelities.linear(_silu_backward(rows.energy_NX, hidden_NH), self._hidden_T)
        return (g_read_NC if g_h_NC is None else g_read_NC.add_(g_h_NC)).mul_(rows.factor_NC)


class DirectHead:
    """A layer's linear read-outs, and the bias of the layer's update."""

    def __init__(self, conditioning: HeadsConditioning, layer: int, update_bias_C: Tensor) -> None:
        self._energy_FC = conditioning.energy_FTC[:, layer].clone()
        self._shift_C = update_bias_C

    def rows(self, fidelity_N: Tensor) -> Rows:
        return Rows(None, self._shift_C, self._energy_FC.index_select(0, fidelity_N))

    def forward(self, h_NC: Tensor, rows: Rows, fidelities: Groups) -> tuple[Tensor, Tensor, Tensor | None]:
        h_NC = h_NC + rows.shift_NC
        return h_NC, (h_NC * rows.energy_NX).sum(1), None

    def backward(self, g_h_NC: Tensor | None, hidden_NH: Tensor | None, rows: Rows, fidelities: Groups) -> Tensor:
        return rows.energy_NX if g_h_NC is None else rows.energy_NX + g_h_NC


def direct_readouts(conditioning: torch.nn.Module, biases: Sequence[Tensor]) -> Sequence[DirectReadout]:
    """Return the conditioning and read-out of each layer, given the biases of the layers' updates."""
    if isinstance(conditioning, FilmConditioning):
        return [DirectFilm(conditioning, t, bias_C) for t, bias_C in enumerate(biases)]
    if isinstance(conditioning, HeadsConditioning):
        return [DirectHead(conditioning, t, bias_C) for t, bias_C in enumerate(biases)]
    raise TypeError(f"conditioning: expected film or heads, found {type(conditioning).__name__}")


def _both(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of a weight and of its transpose, both contiguous."""
    return weight.detach().clone(), weight.detach().mT.clone(memory_format=torch.contiguous_format)


def _copy(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.detach().clone()
