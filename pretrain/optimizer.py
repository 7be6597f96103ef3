"""The optimizers, with the parameter groups that stacked fidelity tensors need."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from rung.pretrain.config import OptimizerConfig
from rung.pretrain.muon import Muon, is_hidden, step_scale
from rung.pretrain.soap import Exchange, Soap


def make_optimizer(
    module: nn.Module,
    unshared: Collection[nn.Parameter],
    config: OptimizerConfig,
    *,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange | None = None,
    zero_muon: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over the module's parameters.

    Weight decay applies to matrices only, and never to `unshared` parameters (stacked, one row per fidelity): a row
    whose fidelity is rare would decay between its visits. `rank`, `world` and `exchange` are the data ranks', between
    which SOAP shares out its work (soap.py). Except with ZeRO, which does so itself, the optimizer skips a step on the
    device when its `found_inf` is 1. `zero_muon` is DeepSpeed's Muon, whose matrices only its own ZeRO puts together.
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
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.name == "muon":
        groups = _split_for_muon(groups, decayed)
        if config.zero_stage == 0:
            return Muon(groups, config.lr, betas, config.eps)
        if zero_muon is None:
            raise ValueError(f"optimizer.name: muon with optimizer.zero_stage={config.zero_stage} needs DeepSpeed's")
        return _make_zero_muon(zero_muon, groups, config)
    return Soap(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        precondition_frequency=config.precondition_frequency,
        rank=rank,
        world=world,
        exchange=exchange,
    )


def _split_for_muon(groups: list[dict[str, Any]], matrices: Collection[nn.Parameter]) -> list[dict[str, Any]]:
    """Return groups with `use_muon`, those with it of one matrix size each."""
    hidden = {id(parameter) for parameter in matrices if is_hidden(parameter)}
    split: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            use = id(parameter) in hidden
            key = use, group["weight_decay"], parameter.shape[-1] if use else 0
            split.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "use_muon": use, "weight_decay": decay} for (use, decay, _), parameters in split.items()
    ]


def _make_zero_muon(
    base: type[torch.optim.Optimizer], groups: list[dict[str, Any]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon with the scale of our own steps.

    ZeRO 1 and 2 know it by its class and by the mark on the parameters. They take the gradient's norm, and clip, after
    the matrices have become orthogonal: gradient_clipping must be 0.
    """

    class ZeroMuon(base):  # type: ignore[misc,valid-type]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] *= group["scale"]
            result = super().step(*args, **kwargs)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            return result

    for group in groups:
        group["scale"] = step_scale(group["params"][0].shape) if group["use_muon"] else 1.0
        group["lr"] = config.lr
        group["weight_decay"] /= group["scale"]
        if group["use_muon"]:
            group |= {"momentum": 0.95, "ns_method": "standard"}
        else:
            group |= {"betas": config.betas, "eps": config.eps}
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    adamw = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    return ZeroMuon(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adamw)
