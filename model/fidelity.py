"""How the level of theory enters: by learned vectors (`film`) or by one read-out for each fidelity (`heads`).

Everything that belongs to one fidelity is a row of a stacked tensor, taken by index: every parameter takes part in
every step on every rank, and a new fidelity is a new row. A module names its stacked tensors in `stacked`.

An atom's energy is linear in the numbers of its fidelity's read-outs; `features` are what they multiply.

Shape legend: N atoms, M structures, F fidelities, D length of a fidelity's vector, C channels, H hidden units,
T layers, K features of a layer (H for `film`, C for `heads`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import silu

from rung.model.config import ModelConfig
from rung.model.layers import Dense, normal_parameter

INITIAL_ENERGY = 0.1  # of an atom, in units of the potential's scale: predictions start near the reference energies


class Film(nn.Module):
    """h <- h (1 + S e_f) + T e_f: feature-wise linear modulation (arXiv:1709.07871), no change at the start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale_DC = nn.Parameter(torch.zeros(config.fidelity_dim, config.channels))
        self.shift_DC = nn.Parameter(torch.zeros(config.fidelity_dim, config.channels))

    def forward(self, h_NC: Tensor, vector_MD: Tensor, structure_N: Tensor) -> Tensor:
        factor_MC, shift_MC = 1 + vector_MD @ self.scale_DC, vector_MD @ self.shift_DC
        return h_NC * factor_MC.index_select(0, structure_N) + shift_MC.index_select(0, structure_N)


class FilmReadout(nn.Module):
    """A small network from scalars to an atom's energy; a fidelity adds a low-rank term to its first matrix.

    The first matrix is W + U diag(e_f) P and the last one w + delta_f; P and delta_f are zero at the start.
    """

    stacked = ("change_FH",)

    def __init__(self, config: ModelConfig, generator: Generator) -> None:
        super().__init__()
        C, D, H = config.channels, config.fidelity_dim, config.readout_hidden
        self.hidden = Dense(C, H, generator)
        self.down = Dense(C, D, generator, bias=False)
        self.up_DH = nn.Parameter(torch.zeros(D, H))
        self.energy_H = normal_parameter(H, std=INITIAL_ENERGY * H**-0.5, generator=generator)
        self.change_FH = nn.Parameter(torch.zeros(len(config.fidelities), H))

    def features(self, h_NC: Tensor, vector_MD: Tensor, structure_N: Tensor) -> Tensor:
        """Return the hidden units [N, H], in which the energy is linear."""
        change_NH = (self.down(h_NC) * vector_MD.index_select(0, structure_N)) @ self.up_DH
        return silu(self.hidden(h_NC) + change_NH)

    def forward(self, h_NC: Tensor, vector_MD: Tensor, fidelity_M: Tensor, structure_N: Tensor) -> Tensor:
        energy_MH = self.energy_H + self.change_FH.index_select(0, fidelity_M)
        return (self.features(h_NC, vector_MD, structure_N) * energy_MH.index_select(0, structure_N)).sum(1)


class FilmConditioning(nn.Module):
    """One learned vector per fidelity, which modulates every layer's scalars and changes every layer's read-out."""

    stacked = ("vector_FD",)

    def __init__(self, config: ModelConfig, generator: Generator) -> None:
        super().__init__()
        dim = config.fidelity_dim
        self.vector_FD = normal_parameter(len(config.fidelities), dim, std=dim**-0.5, generator=generator)
        self.films = nn.ModuleList(Film(config) for _ in range(config.num_layers))
        self.readouts = nn.ModuleList(FilmReadout(config, generator) for _ in range(config.num_layers))

    def forward(self, layer: int, h_NC: Tensor, fidelity_M: Tensor, structure_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulated scalars [N, C] of a layer and their energies [N] in units of the potential's scale."""
        vector_MD = self.vector_FD.index_select(0, fidelity_M)
        h_NC = self.films[layer](h_NC, vector_MD, structure_N)
        return h_NC, self.readouts[layer](h_NC, vector_MD, fidelity_M, structure_N)

    def features(self, layer: int, h_NC: Tensor, fidelity_M: Tensor, structure_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulated scalars [N, C] of a layer and the features [N, K] of its energies."""
        vector_MD = self.vector_FD.index_select(0, fidelity_M)
        h_NC = self.films[layer](h_NC, vector_MD, structure_N)
        readout = cast(FilmReadout, self.readouts[layer])
        return h_NC, readout.features(h_NC, vector_MD, structure_N)

    def change_readouts(self, row: int, change_TK: Tensor) -> None:
        """Add to the read-outs of a fidelity."""
        for readout, change_K in zip(self.readouts, change_TK, strict=True):
            cast(FilmReadout, readout).change_FH[row] += change_K


class HeadsConditioning(nn.Module):
    """One linear read-out per fidelity and layer on a shared trunk (arXiv:2505.01590)."""

    stacked = ("energy_FTC",)

    def __init__(self, config: ModelConfig, generator: Generator) -> None:
        super().__init__()
        shape = (len(config.fidelities), config.num_layers, config.channels)
        self.energy_FTC = normal_parameter(*shape, std=INITIAL_ENERGY * config.channels**-0.5, generator=generator)

    def forward(self, layer: int, h_NC: Tensor, fidelity_M: Tensor, structure_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalars [N, C] as they are and their energies [N] in units of the potential's scale."""
        energy_MC = self.energy_FTC[:, layer].index_select(0, fidelity_M)
        return h_NC, (h_NC * energy_MC.index_select(0, structure_N)).sum(1)

    def features(self, layer: int, h_NC: Tensor, fidelity_M: Tensor, structure_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalars [N, C] of a layer, which are the features of its energies, too."""
        return h_NC, h_NC

    def change_readouts(self, row: int, change_TK: Tensor) -> None:
        """Add to the read-outs of a fidelity."""
        self.energy_FTC[row] += change_TK


CONDITIONING: dict[str, type[FilmConditioning] | type[HeadsConditioning]] = {
    "film": FilmConditioning,
    "heads": HeadsConditioning,
}
