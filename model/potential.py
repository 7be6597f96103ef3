"""The potential: energies, forces and stress of a batch of structures, each at its own fidelity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from rung.data.batch import Batch
from rung.data.fidelity import unknown_fidelity
from rung.data.structure import MAX_ATOMIC_NUMBER
from rung.kernels import Edges, backend, edge_basis
from rung.model.config import ModelConfig
from rung.model.fidelity import CONDITIONING
from rung.model.geometry import edge_vectors, forces_from, stress_from
from rung.model.layers import ElementGroups, Embedding, Interaction
from rung.model.recompute import recompute_layer

CHARGE_OFFSET = 128  # charges are int8 where they are stored


@dataclass(frozen=True)
class Prediction:
    """What the potential says about a batch of M structures with N atoms."""

    energy: Tensor  # float64 [M], eV, reference energies included
    forces: Tensor | None  # [N, 3], eV/angstrom
    stress: Tensor | None  # [M, 3, 3], eV/angstrom^3, ASE's sign; NaN for a structure without a cell
    atomic_energy: Tensor  # float64 [N], eV, reference energies included


class Potential(nn.Module):
    """An equivariant potential of several fidelities (DESIGN.md section 5).

    The network's energies are multiplied by `scale` (eV, the RMS of the training forces in eV/angstrom) and added to
    the reference energies `e0_FZ` (eV; NaN where a fidelity was not trained on an element). Both stay float64 whatever
    the network's dtype is.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Draw the initial weights from a generator of their own, seeded with `config.seed`."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.embedding = Embedding(config, generator)
        last = config.num_layers - 1
        with_vectors = config.l_hidden == 1
        self.layers = nn.ModuleList(
            Interaction(config, generator, vectors_in=with_vectors and t > 0, vectors_out=with_vectors and t < last)
            for t in range(config.num_layers)
        )
        self.conditioning = CONDITIONING[config.conditioning](config, generator)
        shape = (len(config.fidelities), len(config.elements))
        self.e0_FZ: Tensor
        self.register_buffer("e0_FZ", torch.full(shape, math.nan, dtype=torch.float64))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self._register_rows("element_row", config.elements, size=MAX_ATOMIC_NUMBER + 1)
        self._register_rows("charge_row", [charge + CHARGE_OFFSET for charge in config.charges], size=256)
        self._register_rows("multiplicity_row", config.multiplicities, size=256)

    # Whether the interaction layers' activations are computed again in backward passes instead of kept: a step with
    # forces takes about half as much time again, for a fraction of its memory. A choice of the run, not of the model.
    checkpoint_layers: bool = False

    element_row: Tensor  # int64 [119]: atomic number -> row
    charge_row: Tensor  # int64 [256]: charge + 128 -> row
    multiplicity_row: Tensor  # int64 [256]

    def _register_rows(self, name: str, values: Sequence[int], size: int) -> None:
        """Register the table value -> row. An unknown value gets a row past the end: indexing with it fails."""
        table = torch.full((size,), len(values))
        table[list(values)] = torch.arange(len(values))
        self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module; the energies' float64 buffers are moved but never rounded."""
        exact = {name: self._buffers[name] for name in ("e0_FZ", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers[name]
            assert value is not None and moved is not None
            self._buffers[name] = value.to(moved.device)
        return self

    # Reference energies and fidelities

    def fidelity_row(self, name: str) -> int:
        """Return the row of a fidelity; raise ValueError that lists the known ones."""
        if name not in self.config.fidelities:
            raise unknown_fidelity(name, self.config.fidelities)
        return self.config.fidelities.index(name)

    def set_reference(self, fidelity: str, e0: Mapping[int, float]) -> None:
        """Set the reference energies in eV by atomic number; elements left out count as not trained.

        Raises ValueError for a fidelity or an element that the model does not have.
        """
        row = torch.full((len(self.config.elements),), math.nan, dtype=torch.float64)
        for number, energy in e0.items():
            if number not in self.config.elements:
                raise ValueError(
                    f"reference energies of '{fidelity}': element {_symbols([number])} is not one of the model's: "
                    f"{_symbols(self.config.elements)}"
                )
            row[self.config.elements.index(number)] = energy
        self.e0_FZ[self.fidelity_row(fidelity)] = row

    def set_scale(self, value: float) -> None:
        """Set the unit of the network's energies in eV: the RMS of the training forces in eV/angstrom."""
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"scale: expected a positive number of eV, found {value}")
        self.scale.fill_(value)

    def fidelity_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the names and parameters whose first axis is the fidelity."""
        return self._parameters_listed("stacked")

    def element_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the names and parameters whose first axis is the element."""
        return self._parameters_listed("by_element")

    def _parameters_listed(self, attribute: str) -> list[tuple[str, nn.Parameter]]:
        """Return the names and parameters that the modules list in an attribute of theirs."""
        found = []
        for path, module in self.named_modules():
            for name in getattr(module, attribute, ()):
                found.append((f"{path}.{name}", module.get_parameter(name)))
        return found

    @torch.no_grad()
    def add_fidelity(self, name: str, parent: str, e0: Mapping[int, float] | None = None) -> None:
        """Add a fidelity that predicts what `parent` does, with its own reference energies in eV (default: parent's).

        Parameters are replaced: make the optimizer afterwards. Raises ValueError when `name` exists or `parent` does
        not.
        """
        row = self.fidelity_row(parent)
        if name in self.config.fidelities:
            raise ValueError(f"fidelity '{name}' exists already; known: {', '.join(self.config.fidelities)}")
        self.config = dataclasses.replace(self.config, fidelities=(*self.config.fidelities, name))
        for path, parameter in self.fidelity_parameters():
            module, _, leaf = path.rpartition(".")
            grown = nn.Parameter(torch.cat([parameter, parameter[row : row + 1]]), parameter.requires_grad)
            setattr(self.get_submodule(module), leaf, grown)
        self.e0_FZ = torch.cat([self.e0_FZ, self.e0_FZ[row : row + 1]])
        if e0 is not None:
            self.set_reference(name, e0)

    @torch.no_grad()
    def add_elements(self, relatives: Mapping[int, Sequence[int]]) -> None:
        """Add elements: each starts as the mean of its relatives, known elements (atomic numbers).

        No fidelity has a reference energy for a new element until `set_reference` gives it one. Parameters are
        replaced: make the optimizer afterwards. Raises ValueError for an element that the model has already, and for
        a relative that it does not have.
        """
        known = self.config.elements
        for number, others in relatives.items():
            if number in known or not others or not set(others) <= set(known):
                raise ValueError(
                    f"new element {_symbols([number])} like {_symbols(others)}: expected one that is not, like some "
                    f"that are among the model's: {_symbols(known)}"
                )
        elements = sorted((*known, *relatives))  # the order that a config has
        order = [(*known, *relatives).index(number) for number in elements]
        rows = [[known.index(other) for other in others] for others in relatives.values()]
        for path, parameter in self.element_parameters():
            module, _, leaf = path.rpartition(".")
            means = torch.stack([parameter[some].mean(0) for some in rows])
            grown = nn.Parameter(torch.cat([parameter, means])[order], parameter.requires_grad)
            setattr(self.get_submodule(module), leaf, grown)
        self.config = dataclasses.replace(self.config, elements=tuple(elements))
        self.e0_FZ = torch.nn.functional.pad(self.e0_FZ, (0, len(rows)), value=math.nan)[:, order]
        device = self.element_row.device
        self._register_rows("element_row", self.config.elements, size=MAX_ATOMIC_NUMBER + 1)
        self.element_row = self.element_row.to(device)

    def check_domain(self, numbers: Sequence[int], fidelity: str, charge: int = 0, multiplicity: int = 1) -> None:
        """Raise ValueError, listing the known ones, for an input that the potential was not trained on at `fidelity`.

        Call it where structures enter: `forward` itself checks nothing.
        """
        trained_Z = self.e0_FZ[self.fidelity_row(fidelity)].isfinite().tolist()
        known = [number for number, trained in zip(self.config.elements, trained_Z, strict=True) if trained]
        unknown = sorted({int(number) for number in numbers} - set(known))
        if unknown:
            raise ValueError(
                f"fidelity '{fidelity}' was not trained on {_symbols(unknown)}; known elements: {_symbols(known)}"
            )
        if charge not in self.config.charges:
            raise ValueError(f"charge {charge} is not known; known charges: {_words(self.config.charges)}")
        if multiplicity not in self.config.multiplicities:
            known_multiplicities = _words(self.config.multiplicities)
            raise ValueError(f"multiplicity {multiplicity} is not known; known: {known_multiplicities}")

    # Evaluation

    def kernels(self) -> str:
        """Return, for a log, which kernels this potential runs on and why; builds them where that is to be done."""
        config, like = self.config, self.embedding.element_SC
        return backend.description(like, channels=config.channels, num_radial=config.num_radial, l_max=config.l_max)

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = False, owned_N: Tensor | None = None
    ) -> Prediction:
        """Return energies and, as asked, forces and stress.

        The batch's floating-point dtype must be the network's. In training mode forces and stress can be differentiated
        with respect to the parameters. With `owned_N` (bool [N]) the energies of the other atoms are zero, in what they
        contribute to forces and stress too: predictions over masks that share out the atoms add up to the whole.
        """
        if not (forces or stress):
            energy_N, energy_M = self._energies(batch, *self._basis(edge_vectors(batch)), owned_N=owned_N)
            return Prediction(energy_M, None, None, energy_N)
        with torch.enable_grad():
            vectors_E3 = edge_vectors(batch).detach().requires_grad_()
            basis = self._basis(vectors_E3)
            # Leaves between the geometry and the network, whose gradients are switched off again below: a loss then
            # is never differentiated with respect to the geometry, which would cost a seventh of a training step.
            leaves = [tensor.detach().requires_grad_() for tensor in basis]
            energy_N, energy_M = self._energies(batch, *leaves, owned_N=owned_N)
            gradients = torch.autograd.grad(energy_M.sum(), leaves, create_graph=self.training)
            (gradient_E3,) = torch.autograd.grad(basis, vectors_E3, gradients, create_graph=self.training)
            for tensor in (vectors_E3, *leaves):
                tensor.requires_grad_(False)
        if not self.training:
            energy_N, energy_M = energy_N.detach(), energy_M.detach()
        forces_N3 = forces_from(batch, gradient_E3) if forces else None
        stress_M33 = stress_from(batch, vectors_E3, gradient_E3) if stress else None
        return Prediction(energy_M, forces_N3, stress_M33, energy_N)

    def features(self, batch: Batch) -> list[Tensor]:
        """Return the scalars [N, C] of every layer, as the read-outs see them."""
        return [h_NC for h_NC, _ in self._layers(batch, *self._basis(edge_vectors(batch)))]

    @torch.no_grad()
    def readout_derivatives(self, batch: Batch) -> Tensor:
        """Return the derivatives of each structure's energy with respect to its fidelity's own last numbers.

        Float64 [M, T K + S]: first with respect to the read-outs of the T layers (K features each, see
        rung.model.fidelity), in eV; then with respect to the S reference energies: how many atoms of each element.
        The energy is linear in all of them, so these are exact for any change.
        """
        layers = self._layers(batch, *self._basis(edge_vectors(batch)), read=self.conditioning.features)
        features_NX = torch.cat([features_NK.double() for _, features_NK in layers], dim=1) * self.scale
        elements_NS = torch.nn.functional.one_hot(self.element_row[batch.numbers], len(self.config.elements))
        rows_NX = torch.cat([features_NX, elements_NS.double()], dim=1)
        return rows_NX.new_zeros(batch.num_structures, rows_NX.shape[1]).index_add_(0, batch.structure, rows_NX)

    @torch.no_grad()
    def change_readouts(self, fidelity: str, change_X: Tensor) -> None:
        """Add to the read-outs and the reference energies of a fidelity, in the order of `readout_derivatives`."""
        row, layers = self.fidelity_row(fidelity), self.config.num_layers
        reference_S = change_X[-len(self.config.elements) :]
        readouts_TK = change_X[: -len(self.config.elements)].reshape(layers, -1)
        self.conditioning.change_readouts(row, readouts_TK.to(next(self.parameters())))
        self.e0_FZ[row] += reference_S.to(self.e0_FZ)

    def _basis(self, vectors_E3: Tensor) -> tuple[Tensor, Tensor]:
        """Return the radial functions [E, R] and harmonics [E, L] of edge vectors."""
        config = self.config
        return edge_basis(vectors_E3, cutoff=config.cutoff, num_radial=config.num_radial, l_max=config.l_max)

    def _energies(
        self, batch: Batch, radial_ER: Tensor, harmonics_EL: Tensor, *, owned_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the energies in eV of each atom [N] and of each structure [M], in float64."""
        energy_N = sum(energy_N.double() for _, energy_N in self._layers(batch, radial_ER, harmonics_EL))
        reference_N = self.e0_FZ[batch.fidelity[batch.structure], self.element_row[batch.numbers]]
        energy_N = reference_N + self.scale * energy_N
        if owned_N is not None:
            energy_N = torch.where(owned_N, energy_N, 0.0)
        energy_M = energy_N.new_zeros(batch.num_structures).index_add(0, batch.structure, energy_N)
        return energy_N, energy_M

    def _layers(
        self, batch: Batch, radial_ER: Tensor, harmonics_EL: Tensor, read: Callable[..., Any] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's scalars [N, C] and atomic energies [N] in units of the scale, or what else `read` gives.

        `read` is called as `self.conditioning`, which it takes the place of.
        """
        read = self.conditioning if read is None else read
        config = self.config
        edges = Edges(batch.receivers, batch.senders, batch.row_ptr, batch.reverse)
        element_N = self.element_row[batch.numbers]
        elements = ElementGroups.of(element_N, [batch.element_counts.get(number, 0) for number in config.elements])
        charge_M = self.charge_row[batch.charge + CHARGE_OFFSET]
        multiplicity_M = self.multiplicity_row[batch.multiplicity]
        h_NC = self.embedding(element_N, charge_M, multiplicity_M, batch.structure)
        v_N3C: Tensor | None = None
        outputs = []
        for t, layer in enumerate(self.layers):
            inputs = (h_NC, v_N3C, elements, radial_ER, harmonics_EL, edges)
            h_NC, v_N3C = recompute_layer(layer, *inputs) if self.checkpoint_layers else layer(*inputs)
            h_NC, read_out = read(t, h_NC, batch.fidelity, batch.structure)
            outputs.append((h_NC, read_out))
        return outputs


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in numbers) if numbers else "none"


def _words(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
