"""Muon: momentum whose matrices are made orthogonal, for stacks of matrices; AdamW for all else.

Jordan et al., https://kellerjordan.github.io/posts/muon; the step's scale is that of arXiv:2502.16982, with which
AdamW's learning rate and weight decay fit. torch.optim.Muon takes single matrices only, and neither it nor DeepSpeed's
can skip a step on the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the polynomial a x + b x^3 + c x^5, which takes singular values in (0, 1] to near one in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon for groups with `use_muon`, AdamW for the others, with one learning rate.

    The last two axes of a Muon parameter are its matrices', those before number them. `found_inf` (float32 scalar; 1:
    skip) skips a step on the device, as in torch's fused optimizers: parameters and state stay as they were. All
    state is in `state`, which may be replaced between two steps.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95
    ) -> None:
        """`params` are groups with `use_muon` and `weight_decay`; raises ValueError for a Muon vector."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.found_inf: Tensor | None = None
        for parameter in (parameter for group in self._groups(True) for parameter in group["params"]):
            if parameter.dim() < 2:
                raise ValueError(f"muon: expected matrices or stacks of them, found shape {tuple(parameter.shape)}")
        others = self._groups(False)  # the very dictionaries, so both optimizers see one learning rate
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None

    def _groups(self, use_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["use_muon"] == use_muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._groups(True):
            self._step_matrices(group)
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = self._groups(False), self.state  # loading replaces both
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            self._step_stack(parameters, shape, group)

    def _step_stack(self, parameters: list[Tensor], shape: Sequence[int], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        momenta = torch.stack(buffers)
        changes = gradients.new_ones(())
        if self.found_inf is not None:
            keep = self.found_inf == 0
            changes = keep.to(gradients)
            gradients = torch.where(keep, gradients, 0.0)
        momenta.lerp_(gradients, changes * (1 - group["momentum"]))
        torch._foreach_copy_(buffers, list(momenta.unbind()))
        update = orthogonal(gradients.lerp(momenta, group["momentum"]))  # Nesterov's look ahead
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - changes * group["lr"] * group["weight_decay"])
        update *= changes * (group["lr"] * step_scale(shape))
        torch._foreach_sub_(parameters, list(update.unbind()))


def is_hidden(parameter: nn.Parameter) -> bool:
    """Return whether Muon is for this weight: one between hidden channels, whose matrices are square.

    Embeddings, radial weights, read-outs and vectors are AdamW's, as Muon's author advises for first and last layers.
    """
    return parameter.dim() >= 2 and parameter.shape[-1] == parameter.shape[-2] > 1


def step_scale(shape: Sequence[int]) -> float:
    """Return the factor on the learning rate that gives a step the root mean square of AdamW's (arXiv:2502.16982)."""
    return 0.2 * math.sqrt(max(shape[-2:]))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return U V^T, roughly, of the singular value decompositions U S V^T of matrices [..., rows, columns].

    Newton-Schulz rounds; singular values end between about 0.7 and 1.2. In bfloat16 on a GPU, as is usual.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: Tensor = matrices if wide else matrices.mT
    if x.is_cuda:
        x = x.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
