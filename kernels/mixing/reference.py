"""Mixing of channels by degree in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(A_NLC: Tensor, weights_lCC: Tensor) -> Tensor:
    """Return A [N, L, C] with the channels of degree l multiplied by weights[l]: out[n,lm,:] = A[n,lm,:] @ weights[l].

    Any floating dtype and device, differentiable to any order; L = l * l. The result is contiguous.
    """
    num_degrees = weights_lCC.shape[0]
    orders = torch.arange(1, 2 * num_degrees, 2, device=A_NLC.device)
    # One batched product over the harmonics reads A where it lies; products by degree would copy their part of it.
    weights_LCC = weights_lCC.repeat_interleave(orders, dim=0, output_size=num_degrees**2)
    return torch.bmm(A_NLC.transpose(0, 1), weights_LCC).transpose(0, 1).contiguous()
