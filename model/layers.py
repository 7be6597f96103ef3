"""The trunk of the potential: what turns elements and a neighbour graph into scalars (and vectors) on each atom.

Shape legend: N atoms, M structures, E edges, C channels, L harmonics, l = l_max + 1 degrees, R radial functions,
K invariants, S elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import silu

from rung.kernels import NUM_INVARIANTS, Edges, VectorMessage, convolve, invariants, matmul, mix, use_backend
from rung.model.config import ModelConfig

# The radial functions are about 1/3 in RMS at bond lengths; this brings the convolution's output near 1.
RADIAL_GAIN = 3.0


def normal_parameter(*shape: int, std: float, generator: Generator) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution of width `std`, zeros when it is 0."""
    if std == 0:
        return nn.Parameter(torch.zeros(shape))
    return nn.Parameter(torch.randn(shape, generator=generator) * std)


class ElementGroups(NamedTuple):
    """The atoms of a batch grouped by element."""

    order_N: Tensor  # int64 [N], the atoms sorted by element
    counts: list[int]  # atoms of each of the S elements

    @classmethod
    def of(cls, element_N: Tensor, counts: Sequence[int]) -> ElementGroups:
        """Group atoms by their element's row; `counts` are the atoms of each row, which the host knows beforehand."""
        return cls(element_N.argsort(stable=True), list(counts))

    def linear(self, x_NC: Tensor, weight_SCC: Tensor) -> Tensor:
        """Return x @ weight of each atom's element [N, C]; an element without atoms costs nothing."""
        groups = x_NC.index_select(0, self.order_N).split_with_sizes(self.counts)
        pairs = zip(groups, weight_SCC.unbind(), strict=True)
        product_NC = torch.cat([group_nC @ weight_CC for group_nC, weight_CC in pairs if len(group_nC)])
        return torch.empty_like(product_NC).index_copy(0, self.order_N, product_NC)


class Dense(nn.Module):
    """x @ weight + bias, with the initial variance of torch.nn.Linear, 1/(3 fan_in), and a generator of our own."""

    def __init__(self, num_in: int, num_out: int, generator: Generator, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = normal_parameter(num_in, num_out, std=1 / math.sqrt(3 * num_in), generator=generator)
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        num_in, num_out = self.weight.shape
        product = matmul(x.reshape(-1, num_in), self.weight).reshape(*x.shape[:-1], num_out)
        return product if self.bias is None else product + self.bias


class Embedding(nn.Module):
    """The first scalars of each atom: its element, and the charge and the multiplicity of its structure."""

    by_element = ("element_SC",)

    def __init__(self, config: ModelConfig, generator: Generator) -> None:
        super().__init__()
        channels = config.channels
        self.element_SC = normal_parameter(len(config.elements), channels, std=1.0, generator=generator)
        self.charge_QC = nn.Parameter(torch.zeros(len(config.charges), channels))
        self.multiplicity_PC = nn.Parameter(torch.zeros(len(config.multiplicities), channels))

    def forward(self, element_N: Tensor, charge_M: Tensor, multiplicity_M: Tensor, structure_N: Tensor) -> Tensor:
        """Return h [N, C] of rows: of the element, of the structure's charge and of its multiplicity."""
        charge_MC = self.charge_QC.index_select(0, charge_M)
        multiplicity_MC = self.multiplicity_PC.index_select(0, multiplicity_M)
        return self.element_SC.index_select(0, element_N) + (charge_MC + multiplicity_MC).index_select(0, structure_N)


class Interaction(nn.Module):
    """One round of message passing: convolution, channel mixing, invariants, update of scalars and vectors."""

    by_element = ("species_SCC",)

    def __init__(self, config: ModelConfig, generator: Generator, *, vectors_in: bool, vectors_out: bool) -> None:
        """Make the weights; a layer whose input or output vectors do not exist has none for them."""
        super().__init__()
        C, R, num_degrees = config.channels, config.num_radial, config.l_max + 1
        num_invariants = NUM_INVARIANTS[config.l_max]
        self.neighbour_scale = config.average_neighbours**-0.5
        self.sender = Dense(C, C, generator, bias=False)
        self.radial_RlC = normal_parameter(R, num_degrees, C, std=RADIAL_GAIN * R**-0.5, generator=generator)
        self.mixing_lCC = normal_parameter(num_degrees, C, C, std=C**-0.5, generator=generator)
        std_K = _invariant_rms(config.l_max, generator).mul(math.sqrt(3 * num_invariants * C)).reciprocal()
        message_KCC = torch.randn(num_invariants, C, C, generator=generator)
        self.message_KCC = nn.Parameter(message_KCC * std_K[:, None, None])
        self.species_SCC = normal_parameter(len(config.elements), C, C, std=C**-0.5, generator=generator)
        self.hidden = Dense(C, C, generator)
        self.update = Dense(C, C, generator)
        self.vectors_out = vectors_out
        if vectors_in:
            self.vector_sender = Dense(C, C, generator, bias=False)
            self.axial_RlC = normal_parameter(R, num_degrees, C, std=R**-0.5, generator=generator)
            self.identity_RC = normal_parameter(R, C, std=R**-0.5, generator=generator)
        if vectors_out:
            self.gate = Dense(C, C, generator)
            self.vector = Dense(C, C, generator, bias=False)

    def forward(
        self,
        h_NC: Tensor,
        v_N3C: Tensor | None,
        elements: ElementGroups,
        radial_ER: Tensor,
        harmonics_EL: Tensor,
        edges: Edges,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new scalars [N, C] and vectors [N, 3, C] (None from a layer without them)."""
        message: VectorMessage | None = None
        if v_N3C is not None:
            scale = self.neighbour_scale
            message = VectorMessage(self.vector_sender(v_N3C), self.axial_RlC * scale, self.identity_RC * scale)
        weights_RlC = self.radial_RlC * self.neighbour_scale
        A_NLC = convolve(radial_ER, harmonics_EL, self.sender(h_NC), weights_RlC, edges, message)
        A_NLC = mix(A_NLC, self.mixing_lCC)
        h_NC = self._update_scalars(h_NC, invariants(A_NLC), elements)
        if not self.vectors_out:
            return h_NC, None
        return h_NC, torch.tanh(self.gate(h_NC))[:, None] * self.vector(A_NLC[:, 1:4].contiguous())

    def _update_scalars(self, h_NC: Tensor, invariants_NKC: Tensor, elements: ElementGroups) -> Tensor:
        """Return h + m + MLP(m), where m is linear in the invariants and, by element, in h."""
        message_NC = matmul(invariants_NKC.flatten(1), self.message_KCC.flatten(0, 1))
        message_NC = message_NC + elements.linear(h_NC, self.species_SCC)
        change_NC: Tensor = self.update(silu(self.hidden(message_NC)))
        return h_NC + message_NC + change_NC


def _invariant_rms(l_max: int, generator: Generator) -> Tensor:
    """Return the RMS [K] of each invariant for normally distributed tensors: all start with an equal say."""
    components = torch.randn(4096, (l_max + 1) ** 2, 1, generator=generator)
    with use_backend("reference"):  # one channel, and the same initial weights whatever runs afterwards
        return invariants(components).square().mean((0, 2)).sqrt()
