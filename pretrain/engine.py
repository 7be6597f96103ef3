"""DeepSpeed: the only file that imports it.

It rests on DeepSpeed 0.19.8; tests/pretrain/test_engine.py holds each of the remedies below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning and a search at import

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator

from rung.data.batch import Batch
from rung.pretrain.config import OptimizerConfig
from rung.pretrain.launcher import free_port
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.ranks import Ranks
from rung.pretrain.step import StepModule, StepTotals, read_common

LAUNCHER_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def connect(timeout: timedelta) -> Ranks:
    """Join the ranks of this run, whatever launched them: deepspeed, torchrun, mpirun, or nothing (one process)."""
    # DeepSpeed asks this table which of its ops it may compile. On the CPU it would compile deepspeed_shm_comm here,
    # which only its inference uses: that needs a compiler, and a job killed meanwhile leaves a lock on which every
    # later run hangs. Setting the table also spares filling it, which tries the compiler on every op.
    deepspeed.ops.__compatible_ops__ = {}
    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        port = str(free_port())
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_ranks()))
    else:
        device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
        accelerator.set_device(device.index)
    return Ranks(device, timeout)


def disconnect() -> None:
    """Leave the ranks; without it a process may hang or complain at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _local_ranks() -> int:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in os.environ:
            return int(os.environ[name])
    return torch.distributed.get_world_size()


class Engine:
    """A `StepModule` with its optimizer, stepped by DeepSpeed over all ranks."""

    def __init__(self, module: StepModule, config: OptimizerConfig, settings: Mapping[str, Any], ranks: Ranks) -> None:
        """Wrap the module; `settings` is DeepSpeed's dictionary (plan.deepspeed_settings)."""
        self.ranks = ranks
        self._config = config
        unshared = [parameter for _, parameter in module.potential.fidelity_parameters()]
        self._optimizer = make_optimizer(module, unshared, config)
        self._module = module
        self._dtype = next(module.parameters()).dtype
        self._engine, self._wrapper, _, _ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=dict(settings), mpu=ranks
        )

    def step(self, batch: Batch, learning_rate: float, *, stop: bool = False) -> StepTotals:
        """Take one optimizer step on this rank's batch together with the other ranks' and return their common totals.

        When the loss or the gradient is not finite, no rank changes its weights and the step counts as skipped.
        `stop` tells the other ranks, through the totals, that this one was asked to stop.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss, common = self._engine(batch.to(self.ranks.device, self._dtype), stop)
        totals = read_common(common, self._module.loss)
        if not math.isfinite(totals.loss):
            return _skipped(totals)
        self._engine.backward(loss)
        if self._config.zero_stage > 0:
            self._engine.step()  # ZeRO's optimizer finds a gradient that is not finite by itself, and skips
            norm = float(self._engine.get_global_grad_norm())
        else:
            norm = float(
                torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
            )
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
        return replace(totals, grad_norm=norm, steps=1) if math.isfinite(norm) else _skipped(totals)

    def owned(self) -> list[bool]:
        """Return, for each of `parameters()`, whether it is stacked: one row per fidelity."""
        stacked = {id(parameter) for _, parameter in self._module.potential.fidelity_parameters()}
        return [id(parameter) in stacked for parameter in self._module.parameters()]

    def parameters(self) -> list[Tensor]:
        """Return the parameters, whole on every rank in every ZeRO stage; float32 masters and these are equal."""
        return [parameter.data for parameter in self._module.parameters()]

    @torch.no_grad()
    def write_parameters(self, values: list[Tensor]) -> None:
        """Overwrite the parameters, the same on every rank, and the partitioned masters that ZeRO steps from."""
        for parameter, value in zip(self._module.parameters(), values, strict=True):
            parameter.copy_(value)
        if self._config.zero_stage > 0:
            self._wrapper.refresh_fp32_params()  # without it the next step silently starts from the old weights

    @property
    def optimizer_part(self) -> int:
        """The number of the part of the optimizer state that this rank has: its own partition, or the one whole."""
        return self.ranks.rank if self._config.zero_stage > 0 else 0

    def optimizer_state(self) -> dict[str, Any]:
        """Return this rank's optimizer state: with ZeRO its partition, otherwise the whole."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what `optimizer_state` returned on the same rank of an equally large world."""
        self._optimizer.load_state_dict(state)


def _skipped(totals: StepTotals) -> StepTotals:
    """Return the totals of a step that changed nothing: its loss is left out of the means."""
    return replace(totals, loss=0.0, energy_loss=0.0, forces_loss=0.0, grad_norm=0.0, steps=0, skipped=1)
