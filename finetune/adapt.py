"""Strategies of adaptation: which numbers of a pretrained potential are trained, and how they start.

The pretrained potential itself is never changed while training. Every trained parameter has an update, a small module
whose value equals the pretrained tensor at first, and `Adaptation` calls the potential with these values in place.
So the step-0 identity and "nothing else moves" hold by construction, and a new strategy is a new row of STRATEGIES.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rung.data.batch import Batch
from rung.model.potential import Potential, Prediction

# Strategies with gradient steps -> learning rate of SOAP and AdamW.
LEARNING_RATES = {"embedding": 1e-2, "adapter": 3e-3, "full": 5e-4}


class FreeUpdate(nn.Module):
    """Every entry is trained."""

    def __init__(self, pretrained: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(pretrained.detach().clone())

    def forward(self) -> Tensor:
        return self.value


class RowUpdate(nn.Module):
    """Only some rows of a stacked per-fidelity tensor are trained."""

    rest: Tensor
    rows: Tensor

    def __init__(self, pretrained: Tensor, rows: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("rest", pretrained.detach().clone())
        self.register_buffer("rows", torch.tensor(list(rows), dtype=torch.int64, device=pretrained.device))
        self.value = nn.Parameter(pretrained.detach()[list(rows)].clone())

    def forward(self) -> Tensor:
        return self.rest.index_copy(0, self.rows, self.value)


class LowRankUpdate(nn.Module):
    """The pretrained tensor plus a product of two thin matrices (LoRA, arXiv:2106.09685).

    Leading dimensions are flattened: a tensor [..., n] is a matrix [m, n], the update left [m, rank] @ right [rank, n].
    `left` starts at zero, and so does the update.
    """

    fixed: Tensor

    def __init__(self, pretrained: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("fixed", pretrained.detach().clone())
        columns = pretrained.shape[-1]
        rank = min(rank, columns, pretrained.numel() // columns)
        right = torch.randn(rank, columns, generator=generator, dtype=pretrained.dtype) / columns**0.5
        self.left = nn.Parameter(pretrained.new_zeros(pretrained.numel() // columns, rank))
        self.right = nn.Parameter(right.to(pretrained.device))

    def forward(self) -> Tensor:
        return self.fixed + (self.left @ self.right).view_as(self.fixed)


def full(weight: Tensor, rank: int, generator: torch.Generator) -> nn.Module | None:
    """Train every shared weight."""
    return FreeUpdate(weight)


def adapter(weight: Tensor, rank: int, generator: torch.Generator) -> nn.Module | None:
    """Train a low-rank change of every shared matrix; vectors stay."""
    return LowRankUpdate(weight, rank, generator) if weight.dim() >= 2 else None


def embedding(weight: Tensor, rank: int, generator: torch.Generator) -> nn.Module | None:
    """Train nothing that is shared."""
    return None


# Strategy -> update of a shared weight. The rows of the trained fidelities are trained by every strategy.
STRATEGIES: dict[str, Callable[[Tensor, int, torch.Generator], nn.Module | None]] = {
    "embedding": embedding,
    "adapter": adapter,
    "full": full,
}


class Adaptation(nn.Module):
    """A frozen potential with trainable updates of its weights; calling it is calling the adapted potential."""

    def __init__(
        self, potential: Potential, fidelities: Sequence[str], strategy: str, *, rank: int = 8, seed: int = 0
    ) -> None:
        """Start at the pretrained weights; `fidelities` are those whose own rows are trained.

        Raises ValueError for an unknown strategy.
        """
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, found '{strategy}'")
        generator = torch.Generator().manual_seed(seed)
        rows = [potential.config.fidelities.index(name) for name in fidelities]
        stacked = {name for name, _ in potential.fidelity_parameters()}
        # In a tuple, so that the frozen potential is not a sub-module: its parameters are not this module's.
        self._frozen = (copy.deepcopy(potential).requires_grad_(False).train(),)
        self.names: list[str] = []
        self.updates = nn.ModuleList()
        for name, weight in potential.named_parameters():
            update = RowUpdate(weight, rows) if name in stacked else STRATEGIES[strategy](weight, rank, generator)
            if update is not None:
                self.names.append(name)
                self.updates.append(update)

    @property
    def potential(self) -> Potential:
        """The potential with its pretrained weights."""
        return self._frozen[0]

    def parameters_by_depth(self) -> dict[int, list[nn.Parameter]]:
        """Return the trained parameters by how many layers lie between them and the energy."""
        last = self.potential.config.num_layers - 1
        depths: dict[int, list[nn.Parameter]] = {}
        for name, update in zip(self.names, self.updates, strict=True):
            head, _, rest = name.partition(".")
            depth = {"layers": last - int(rest.split(".")[0]) if head == "layers" else 0, "embedding": last + 1}
            depths.setdefault(depth.get(head, 0), []).extend(update.parameters())
        return depths

    @property
    def num_trained(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return the adapted value of every updated parameter of the potential, by its name there."""
        return {name: update() for name, update in zip(self.names, self.updates, strict=True)}

    def forward(self, weights: dict[str, Tensor], batch: Batch, forces: bool) -> Prediction:
        """Return the prediction of the potential with `weights` (from `weights()`) in place of its own."""
        prediction = torch.func.functional_call(self.potential, weights, (batch,), {"forces": forces})
        assert isinstance(prediction, Prediction)
        return prediction

    def pull(self, weights: dict[str, Tensor]) -> Tensor:
        """Return half the squared distance of `weights` from the pretrained ones, the penalty of L2-SP; scalar."""
        pretrained = dict(self.potential.named_parameters())
        return 0.5 * torch.stack([(value - pretrained[name]).square().sum() for name, value in weights.items()]).sum()
