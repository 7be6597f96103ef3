"""How sure a potential is of an energy at a fidelity: from its last layer, or from an ensemble.

`LastLayer`: the energy is linear in the numbers of the read-outs that belong to one fidelity. Given the training rows,
these have a Gaussian posterior, in closed form (last-layer prediction rigidity, arXiv:2403.02251): the variance of a
new energy is phi^T C phi + (n s)^2, with phi the derivatives of the energy with respect to those numbers and to the
reference energies, C their posterior covariance, n the number of atoms and s the noise per atom.

`Ensemble`: potentials trained on different folds; the variance is that of their energies.

Both are multiplied by a factor that was chosen on structures not trained on.

M structures, K derivatives (read-outs, then elements), P members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rung.data.batch import Batch
from rung.model.potential import Potential


@dataclass(frozen=True)
class LastLayer:
    """Posterior of the read-outs of one fidelity and of its reference energies."""

    covariance_KK: Tensor  # float64, of weights in units of the model and of reference energies in eV
    noise: float  # eV per atom, of one label
    factor: float = 1.0  # of the standard deviation, by calibration

    kind = "last_layer"

    def variance(self, potential: Potential, batch: Batch) -> Tensor:
        """Return the variance of the energy of every structure, float64 [M] in eV^2."""
        atoms_M = torch.bincount(batch.structure, minlength=batch.num_structures)
        return self.variance_of(potential.readout_derivatives(batch), atoms_M)

    def variance_of(self, phi_MK: Tensor, atoms_M: Tensor) -> Tensor:
        """Return the variance, float64 [M] in eV^2, of energies with these derivatives and of so many atoms."""
        covariance_KK = self.covariance_KK.to(phi_MK.device)
        explained_M = torch.einsum("mk,kl,ml->m", phi_MK, covariance_KK, phi_MK)
        return self.factor**2 * (explained_M.clamp(min=0) + (self.noise * atoms_M) ** 2)

    def encode(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain values for YAML and tensors by name."""
        entry = {"kind": self.kind, "noise_ev_per_atom": self.noise, "factor": self.factor}
        return entry, {"covariance": self.covariance_KK}

    @classmethod
    def decode(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LastLayer:
        """Return what `encode` wrote; raises KeyError for something missing."""
        return cls(tensors["covariance"], float(entry["noise_ev_per_atom"]), float(entry["factor"]))


@dataclass(frozen=True)
class Ensemble:
    """The parameters that differ between the potentials of an ensemble."""

    members: Sequence[Mapping[str, Tensor]]  # of each member: parameter's name -> values
    factor: float = 1.0  # of the standard deviation, by calibration

    kind = "ensemble"

    def energies(self, potential: Potential, batch: Batch) -> Tensor:
        """Return the energies by every member, float64 [P, M] in eV."""
        like = next(potential.parameters())
        energies = []
        with torch.no_grad():
            for member in self.members:
                weights = {name: value.to(like.device, like.dtype) for name, value in member.items()}
                weights |= {name: weights[name].double() for name in ("e0_FZ",) if name in weights}
                prediction = torch.func.functional_call(potential, weights, (batch,), {"forces": False})
                energies.append(prediction.energy)
        return torch.stack(energies)

    def variance(self, potential: Potential, batch: Batch) -> Tensor:
        """Return the variance of the energy of every structure, float64 [M] in eV^2."""
        return self.factor**2 * self.energies(potential, batch).var(0, unbiased=True)

    def encode(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain values for YAML and tensors by name."""
        tensors = {f"{i}.{name}": value for i, member in enumerate(self.members) for name, value in member.items()}
        return {"kind": self.kind, "members": len(self.members), "factor": self.factor}, tensors

    @classmethod
    def decode(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ensemble:
        """Return what `encode` wrote; raises KeyError for something missing."""
        members: list[dict[str, Tensor]] = [{} for _ in range(int(entry["members"]))]
        for path, value in tensors.items():
            index, _, name = path.partition(".")
            members[int(index)][name] = value
        return cls(members, float(entry["factor"]))


Uncertainty = LastLayer | Ensemble
_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Uncertainty]] = {
    LastLayer.kind: LastLayer.decode,
    Ensemble.kind: Ensemble.decode,
}


def encode(uncertainty: Mapping[str, Uncertainty]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (fidelity -> plain values, "fidelity/name" -> tensor) of uncertainties by fidelity."""
    entries: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for fidelity, one in uncertainty.items():
        entries[fidelity], own = one.encode()
        tensors |= {f"{fidelity}/{name}": value for name, value in own.items()}
    return entries, tensors


def decode(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Uncertainty]:
    """Return what `encode` wrote; raises ValueError for an unknown kind and for something missing."""
    decoded: dict[str, Uncertainty] = {}
    for fidelity, entry in entries.items():
        if entry.get("kind") not in _KINDS:
            known = ", ".join(_KINDS)
            raise ValueError(f"uncertainty of '{fidelity}': expected kind {known}, found {entry.get('kind')!r}")
        prefix = f"{fidelity}/"
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            decoded[fidelity] = _KINDS[entry["kind"]](entry, own)
        except (KeyError, IndexError) as error:
            raise ValueError(f"uncertainty of '{fidelity}': {error} is missing; copy the checkpoint again") from error
    return decoded
