"""The ranks of a run as DeepSpeed and the loop see them: process groups whose collectives time out and are counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store, _get_default_store

from rung.pretrain.traffic import Pending, Traffic
from rung.pretrain.world import World

ROLL_CALL_SECONDS = 10.0


class Ranks:
    """This rank's place in the world and its process groups; also DeepSpeed's `mpu` (its description of the groups).

    The groups are our own because DeepSpeed clones the world without its time-out, and a stalled rank would then hold
    the others for torch's default of half an hour. DeepSpeed's data-parallel group is the task group; its
    model-parallel group is the rank alone, so that the norm of the gradient stays within the task.
    torch.distributed must be initialised; every rank must construct its `Ranks`.
    """

    def __init__(self, device: torch.device, timeout: timedelta, groups: int = 1) -> None:
        self.device = device
        self.timeout = timeout
        self.rank = torch.distributed.get_rank()
        self.world = World(torch.distributed.get_world_size(), groups)
        self.group = self.world.group(self.rank)
        self.data_rank = self.world.data_rank(self.rank)
        self.traffic = Traffic()
        self._made: dict[range, ProcessGroup] = {}
        self._all = self._make_group(range(self.world.size))
        self._task = self._make_group(self.world.group_ranks(self.group))
        self._exchange = self._make_group(self.world.exchange_ranks(self.data_rank))
        self._alone = self._make_group(range(self.rank, self.rank + 1))

    def _make_group(self, members: range) -> ProcessGroup:
        """Return the group of these ranks, of which this one is; two of the same ranks are one.

        Only its members make a group: with all of them taking part in all groups, the start would grow with the square
        of the number of ranks. Every rank makes as many groups in the same order, which NCCL needs when it splits them.
        """
        if members not in self._made:
            self._made[members] = torch.distributed.new_group(
                list(members), timeout=self.timeout, use_local_synchronization=True
            )
        return self._made[members]

    # Collectives

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up the tensor over the ranks of this task group, in place, and return it."""
        if self.world.data_ranks > 1:
            with self.traffic.collective("inner", tensor.nbytes):
                torch.distributed.all_reduce(tensor, group=self._task)
        return tensor

    def share_(self, buffers: Sequence[Tensor]) -> None:
        """Fill buffers[d] on every rank of this task group with what data rank d has in it."""
        pending = []
        for owner, buffer in zip(self.world.group_ranks(self.group), buffers, strict=True):
            if self.world.data_ranks > 1 and buffer.numel():
                with self.traffic.collective("inner", buffer.nbytes):
                    pending.append(torch.distributed.broadcast(buffer, owner, group=self._task, async_op=True))
        with self.traffic.waiting("inner"):
            for work in pending:
                work.wait()

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts [P] of all data ranks of this task group, one after the other; equally long ones."""
        if self.world.data_ranks == 1:
            return part
        whole = part.new_empty(self.world.data_ranks * len(part))
        with self.traffic.collective("outer", whole.nbytes):
            torch.distributed.all_gather_into_tensor(whole, part, group=self._task)
        return whole

    def sum_all_(self, tensor: Tensor) -> Tensor:
        """Add up the tensor over all ranks, in place, and return it: for logs and evaluation."""
        if self.world.size > 1:
            with self.traffic.collective("report", tensor.nbytes):
                torch.distributed.all_reduce(tensor, group=self._all)
        return tensor

    def max_all_(self, tensor: Tensor) -> Tensor:
        """Take the largest of the tensor's values over all ranks, in place, and return it: for logs."""
        if self.world.size > 1:
            with self.traffic.collective("report", tensor.nbytes):
                torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=self._all)
        return tensor

    def exchange_(self, tensor: Tensor) -> Pending | None:
        """Begin to add up the tensor over the task groups, in place; `wait()` on what is returned (None: it is done).

        Every rank exchanges with those that have the same data rank in the other groups.
        """
        if self.world.groups == 1:
            return None
        with self.traffic.collective("outer", tensor.nbytes):
            work = torch.distributed.all_reduce(tensor, group=self._exchange, async_op=True)
        return Pending(work, self.traffic)

    def barrier(self) -> None:
        """Wait for every rank.

        Not by adding up a tensor: one of Gloo's threads may let go of it only after the last barrier of a run, while
        the interpreter is being taken down, and then the process aborts.
        """
        devices = None if self.device.index is None else [self.device.index]
        torch.distributed.barrier(self._all, device_ids=devices)

    # What threads and failing ranks use instead of collectives

    def store(self) -> Store:
        """Return a connection of its own to the key-value store of the run, which another thread may wait on."""
        store: Store = _get_default_store().clone()  # type: ignore[attr-defined]
        return store

    def absent(self, call: str, store: Store, seconds: float = ROLL_CALL_SECONDS) -> list[int]:
        """Return the ranks that do not answer the roll call named `call` within `seconds`.

        Called by every rank on which a collective failed, so those that are left out stand still or are dead. `store`
        is a connection made while all was well; where it does not answer, that is rank 0, which serves it.
        """
        missing = [0]

        def ask() -> None:
            nonlocal missing
            with suppress(RuntimeError):
                missing = self._missing(call, store, seconds)

        # A connection waits for ever for a server that stands still, and nothing but the thread can be given up.
        thread = threading.Thread(target=ask, name="roll call", daemon=True)
        thread.start()
        thread.join(seconds + 1)
        return missing

    def _missing(self, call: str, store: Store, seconds: float) -> list[int]:
        store.set(f"{call}/{self.rank}", "here")
        end = time.monotonic() + seconds
        missing = []
        for rank in range(self.world.size):
            try:
                store.wait([f"{call}/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
            except torch.distributed.DistNetworkError:
                raise
            except RuntimeError:  # a time-out, of whatever kind of store
                missing.append(rank)
        return missing

    @contextmanager
    def naming_the_absent(self) -> Iterator[None]:
        """Turn the error of a collective within the block into a ConnectionError that names the ranks at fault."""
        store = self.store()
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            missing = self.absent("a collective failed", store)
            if not missing:
                raise ConnectionError(
                    f"a collective failed although all {self.world.size} ranks answer: {reason}"
                ) from error
            names = ", ".join(map(str, missing))
            raise ConnectionError(
                f"rank(s) {names} of {self.world.size} do not answer: dead, or standing still for more than "
                f"{self.timeout.total_seconds():g} s (world.timeout_minutes); rank {self.rank} saw: {reason}"
            ) from error

    # DeepSpeed's names for the groups

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._task

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.world.group_ranks(self.group))

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.world.data_ranks

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
