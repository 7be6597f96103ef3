"""The ranks of a run as DeepSpeed and the loop see them: one data-parallel group whose collectives time out."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor


class Ranks:
    """All ranks in one data-parallel group; also DeepSpeed's `mpu` (its description of the groups).

    The group is our own because DeepSpeed clones the world without its time-out, and a stalled rank would then hold
    the others for torch's default of half an hour. The model-parallel group is the rank alone.
    torch.distributed must be initialised; every rank must construct its `Ranks`.
    """

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self._all = list(range(self.world))
        self._data_parallel: torch.distributed.ProcessGroup = torch.distributed.new_group(self._all, timeout=timeout)
        for rank in self._all:  # every rank must take part in making every group
            group = torch.distributed.new_group([rank], timeout=timeout)
            if rank == self.rank:
                self._model_parallel: torch.distributed.ProcessGroup = group

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up the tensor over the ranks, in place, and return it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, group=self._data_parallel)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank.

        Not by adding up a tensor: one of Gloo's threads may let go of it only after the last barrier of a run, while
        the interpreter is being taken down, and then the process aborts.
        """
        devices = None if self.device.index is None else [self.device.index]
        torch.distributed.barrier(self._data_parallel, device_ids=devices)

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._data_parallel

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._all

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_data_parallel_world_size(self) -> int:
        return self.world

    def get_model_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._model_parallel

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
