"""DeepSpeed: the only file that imports it.

It rests on DeepSpeed 0.19.8; tests/pretrain/test_engine.py holds each of the remedies below.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning and a search at import

import deepspeed
import deepspeed.comm
import deepspeed.ops
from deepspeed.accelerator import get_accelerator

from rung.data.batch import Batch
from rung.model.potential import Potential
from rung.pretrain.config import OptimizerConfig, PretrainConfig
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.partition import resplit
from rung.pretrain.plan import Plan
from rung.pretrain.ranks import Ranks
from rung.pretrain.rendezvous import join
from rung.pretrain.reptile import SHARED
from rung.pretrain.soap import Soap
from rung.pretrain.step import NAMES, TASK_NAMES, StepModule

_LOSS, _NORM, _STEPS, _SKIPPED = (NAMES.index(name) for name in ("loss", "grad_norm", "steps", "skipped"))


def connect(timeout: timedelta, groups: Callable[[int], int] = lambda size: 1) -> Ranks:
    """Join the ranks of this run, whatever launched them: deepspeed, torchrun, mpirun, srun, or nothing (one process).

    `groups` says into how many task groups so many ranks divide. Raises ValueError when the launcher's variables make
    no sense (see `rendezvous.find`).
    """
    # DeepSpeed asks this table which of its ops it may compile. On the CPU it would compile deepspeed_shm_comm here,
    # which only its inference uses: that needs a compiler, and a job killed meanwhile leaves a lock on which every
    # later run hangs. Setting the table also spares filling it, which tries the compiler on every op.
    deepspeed.ops.__compatible_ops__ = {}
    if not torch.distributed.is_initialized():
        join()
    deepspeed.init_distributed(timeout=timeout, verbose=False, auto_mpi_discovery=False)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"]) % accelerator.device_count()))
        accelerator.set_device(device.index)
    return Ranks(device, timeout, groups(torch.distributed.get_world_size()))


def disconnect() -> None:
    """Leave the ranks; without it a process may hang or complain at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _deepspeeds_muon() -> type[torch.optim.Optimizer]:
    """Return its Muon as it is written: it would be compiled at the first step, in 20 s, if torch's switch let it."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    muon: type[torch.optim.Optimizer] = MuonWithAuxAdam
    return muon


def make_module(potential: Potential, plan: Plan, config: PretrainConfig, ranks: Ranks) -> StepModule:
    """Return what a run trains: the potential and its loss over the labels of a task group."""
    potential.checkpoint_layers = config.activation_checkpointing
    return StepModule(potential.train(), config.loss, ranks.sum_, ranks.world.data_ranks, len(plan.tasks))


def make_engine(potential: Potential, plan: Plan, config: PretrainConfig, ranks: Ranks) -> Engine:
    """Return the engine that trains this potential in a run."""
    return Engine(make_module(potential, plan, config, ranks), config.optimizer, plan.deepspeed, ranks)


class Engine:
    """A `StepModule` with its optimizer, stepped by DeepSpeed over the ranks of a task group.

    For the outer step every data rank has one partition of the weights, its masters: with ZeRO the float32 ones that
    DeepSpeed steps, without it a slice of the parameters.
    """

    def __init__(self, module: StepModule, config: OptimizerConfig, settings: Mapping[str, Any], ranks: Ranks) -> None:
        """Wrap the module; `settings` is DeepSpeed's dictionary (plan.deepspeed_settings)."""
        self.ranks = ranks
        self._config = config
        self._zero = config.zero_stage > 0
        unshared = [parameter for _, parameter in module.potential.fidelity_parameters()]
        self._optimizer = make_optimizer(
            module,
            unshared,
            config,
            rank=ranks.data_rank,
            world=ranks.world.data_ranks,
            exchange=ranks.share_,
            zero_muon=_deepspeeds_muon() if config.name == "muon" and self._zero else None,
        )
        self._module = module
        self._dtype = next(module.parameters()).dtype
        self._num_elements = sum(parameter.numel() for parameter in module.parameters())
        self._slice_length = -(-self._num_elements // ranks.world.data_ranks)
        self._counted_always = torch.zeros_like(self.zero_totals(), dtype=torch.bool)
        self._counted_always[_SKIPPED + 1 : len(NAMES)] = True  # sizes, and whether to stop
        self._engine, self._wrapper, _, _ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=dict(settings), mpu=ranks
        )
        ranks.traffic.count_deepspeeds(deepspeed.comm.comm.cdb)
        self._inner_states: dict[str, Any] = {"": self._optimizer.state}
        self._inner_state = ""

    # Inner steps

    def zero_totals(self) -> Tensor:
        """Return a vector of totals of no steps."""
        size = len(NAMES) + len(TASK_NAMES) * self._module.num_tasks
        return torch.zeros(size, dtype=torch.float64, device=self.ranks.device)

    def step(self, batches: Sequence[Batch], learning_rate: float, *, stop: bool = False) -> Tensor:
        """Take one optimizer step on this rank's batches together with the group's; return the group's totals.

        The loss is the mean over the batches, each normalised by the labels of all the group's ranks. When a loss or
        the gradient is not finite, no rank of the group changes its weights and the step counts as skipped. `stop`
        tells the other ranks, through the totals, that this one was asked to stop.
        Except with ZeRO, whose own checks do, nothing waits for the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        totals = self.zero_totals()
        for number, batch in enumerate(batches):
            loss, common = self._engine(batch.to(self.ranks.device, self._dtype), stop)
            totals += common
            self._engine.backward(loss)
            if number + 1 < len(batches):
                self._engine.step()  # not at the end of an accumulation: DeepSpeed only counts
        totals[: _LOSS + 3] /= len(batches)
        totals[_NORM] = norm = self._update()
        done = norm.isfinite()
        totals = torch.where(done | self._counted_always, totals, torch.zeros_like(totals))
        totals[_STEPS], totals[_SKIPPED] = done, ~done
        return totals

    def _update(self) -> Tensor:
        """Clip the gradient and let DeepSpeed step; return the gradient's norm, a scalar that may not be finite."""
        if self._zero:
            self._engine.step()  # ZeRO's optimizer finds a gradient that is not finite by itself, and skips
            return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64, device=self.ranks.device)
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._config.gradient_clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self._module.parameters(), self._config.gradient_clipping, norm, foreach=True
            )
        self._optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._engine.step()
        return norm.double()

    # Weights

    def parameters(self) -> list[Tensor]:
        """Return the parameters, whole on every rank in every ZeRO stage; float32 masters and these are equal."""
        return [parameter.data for parameter in self._module.parameters()]

    @torch.no_grad()
    def write_parameters(self, values: Sequence[Tensor]) -> None:
        """Overwrite the parameters, the same on every rank, and the partitioned masters that ZeRO steps from."""
        for parameter, value in zip(self._module.parameters(), values, strict=True):
            parameter.copy_(value)
        if self._zero:
            self._wrapper.refresh_fp32_params()  # without it the next step silently starts from the old weights

    def masters(self) -> Tensor:
        """Return a flat copy of this data rank's partition of the weights [P]; the last one is padded with zeros."""
        if self._zero:
            return torch.cat(self._zero_masters())
        return self._slice(torch.cat([parameter.flatten() for parameter in self.parameters()]))

    @torch.no_grad()
    def write_masters(self, values: Tensor) -> None:
        """Overwrite the weights on all ranks of the group, each of which gives its partition of them."""
        if self._zero:
            for master, value in zip(self._zero_masters(), torch.split(values, self.partition_sizes()), strict=True):
                master.copy_(value)
            with self.ranks.traffic.deepspeeds_for("outer"):
                self._wrapper.update_lp_params()
            return
        whole, parameters = self.ranks.gather(values), self.parameters()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, value in zip(parameters, torch.split(whole[: self._num_elements], sizes), strict=True):
            parameter.copy_(value.view_as(parameter))

    def partition_sizes(self) -> list[int]:
        """Return the number of elements of each piece of this rank's masters: one, or one for each of ZeRO's groups."""
        return [master.numel() for master in self._zero_masters()] if self._zero else [self._slice_length]

    def repartition(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Return this rank's part of a vector like `masters()` that other ranks had in parts, by data rank.

        `sizes` are the `partition_sizes()` of each of them.
        """
        pieces = [torch.split(part, list(sizes)) for part in parts]
        if not self._zero:
            return self._slice(torch.cat([piece for (piece,) in pieces])[: self._num_elements])
        return torch.cat([self._resplit([piece[group] for piece in pieces], group) for group in range(len(sizes))])

    def master_rows(self) -> Tensor:
        """Return which fidelity's row each of `masters()` belongs to, or `SHARED`; int64 [P]."""
        stacked = {id(parameter) for _, parameter in self._module.potential.fidelity_parameters()}
        rows = []
        for parameter in self._module.parameters():
            if id(parameter) in stacked:
                numbers = torch.arange(len(parameter), device=parameter.device, dtype=parameter.dtype)
                rows.append(numbers.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter))
            else:
                rows.append(torch.full_like(parameter, SHARED))
        if not self._zero:
            return self._slice(torch.cat([row.flatten() for row in rows])).long()
        # How ZeRO orders, pads and cuts the parameters is its own business: send the rows the same way.
        weights = [parameter.clone() for parameter in self.parameters()]
        self.write_parameters(rows)
        found = self.masters().long()
        self.write_parameters(weights)
        return found

    def _slice(self, whole: Tensor) -> Tensor:
        """Return this data rank's partition of a vector with one element for each of the weights."""
        length = self._slice_length
        part = whole[self.ranks.data_rank * length : (self.ranks.data_rank + 1) * length]
        return torch.nn.functional.pad(part, (0, length - len(part))) if len(part) < length else part

    def _resplit(self, parts: Sequence[Tensor], group: int) -> Tensor:
        """Return this rank's partition of one of ZeRO's parameter groups from another world's partitions of it."""
        size = sum(parameter.numel() for parameter in self._wrapper.bit16_groups[group])
        length = self._zero_masters()[group].numel()
        return resplit(parts, size, self.ranks.data_rank, self.ranks.world.data_ranks, length)

    def _zero_masters(self) -> list[Tensor]:
        return [master.data for master in self._wrapper.single_partition_of_fp32_groups]

    # The inner optimizer's state

    def use_inner_state(self, name: str | None) -> None:
        """Go on with the optimizer state of this name, empty at first; None: with an empty one that has no name."""
        if name is None:
            self._inner_states, name = {}, ""
        elif name == self._inner_state:
            return
        self._inner_state = name
        self._optimizer.state = self._inner_states.setdefault(name, defaultdict(dict))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return this rank's share of the optimizer's state, named; the shares of a group's ranks are all of it."""
        state: dict[str, Tensor] = {}
        for name, tensors in self._each_inner_state():
            state |= {f"{name}/{key}": value for key, value in tensors.items()}
        return state

    def load_optimizer_state(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over a group's optimizer state: the shares of all its ranks, however many there were."""
        names = dict.fromkeys(key.split("/", 1)[0] for share in shares for key in share)
        for name in names:
            self.use_inner_state(name)
            self._load_shares(
                [{k.split("/", 1)[1]: v for k, v in share.items() if k.startswith(f"{name}/")} for share in shares]
            )

    def _each_inner_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        current = self._inner_state
        for name in list(self._inner_states):
            self.use_inner_state(name)
            yield name, self._share()
        self.use_inner_state(current)

    def _share(self) -> dict[str, Tensor]:
        if isinstance(self._optimizer, Soap):
            return self._optimizer.share()
        if not self._zero and self.ranks.data_rank > 0:
            return {}  # every rank has the same whole state
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, parameter in enumerate(self._stepped())
            for name, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _load_shares(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        if isinstance(self._optimizer, Soap):
            self._optimizer.load_shares(shares)
            return
        for index, parameter in enumerate(self._stepped()):
            for key in [key for key in shares[0] if key.split(".", 1)[0] == str(index)]:
                parts = [share[key] for share in shares if key in share]
                if self._zero and self._config.name == "muon" and key.endswith(".momentum_buffer"):
                    value = self._same_ranks(parts, key)
                else:
                    value = self._resplit(parts, index) if self._zero and parts[0].dim() > 0 else parts[0]
                self._optimizer.state[parameter][key.split(".", 1)[1]] = value.to(parameter.device)

    def _same_ranks(self, parts: Sequence[Tensor], key: str) -> Tensor:
        """Return this rank's part of what cannot be cut: ZeRO's Muon keeps whole matrices, some on two ranks."""
        if len(parts) != self.ranks.world.data_ranks:
            raise ValueError(
                f"optimizer state {key}: muon with ZeRO goes on with as many data ranks as before: expected "
                f"{len(parts)}, found {self.ranks.world.data_ranks}"
            )
        return parts[self.ranks.data_rank]

    def _stepped(self) -> list[Tensor]:
        """Return the tensors that the optimizer steps: parameters, or with ZeRO this rank's partitions of them."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
