"""The optimizers, with the parameter groups that stacked fidelity tensors need."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from rung.pretrain.config import OptimizerConfig


def make_optimizer(
    module: nn.Module, unshared: Collection[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over the module's parameters.

    Weight decay applies to matrices only, and never to `unshared` parameters (stacked, one row per fidelity): a row
    whose fidelity is rare would decay between its visits.
    """
    kept = {id(parameter) for parameter in unshared}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        (free if id(parameter) in kept or parameter.dim() < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    from pytorch_optimizer import SOAP

    frequency = config.precondition_frequency
    return SOAP(groups, lr=config.lr, betas=betas, eps=config.eps, precondition_frequency=frequency)
