"""The outer step of Reptile (arXiv:1803.02999) over fidelities and groups of ranks, as mathematics on one flat vector.

    d   <- sum_t w_t (phi_t - phi) / sum_t w_t          over the tasks t of all groups
    phi <- phi + epsilon * outer_optimizer(d)

phi_t are the weights after the inner steps on task t, all started from phi. The outer optimizer is SGD: plain, with
momentum, or with Nesterov's momentum (DiLoCo, arXiv:2311.08105). Some elements are owned: they belong to one fidelity's
row of a stacked parameter. An owned element takes the mean of the results of its fidelity's tasks in full, and a task's
result never touches another fidelity's (the inner optimizer's momentum moves those, too).

With `overlap` the sum over the groups is under way while the next inner steps run. A group then starts these from phi
and its own mean difference; the other groups' part reaches it one outer step later. (Starting from phi alone would
leave out the last outer step altogether, and cost as much as half of all steps.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rung.pretrain.config import ReptileConfig

SHARED = -1  # the row of an element that is not owned


class Work(Protocol):
    """A sum over the groups that is under way."""

    def wait(self) -> object:
        """Wait until the tensor holds the sum."""


Exchange = Callable[[Tensor], Work | None]  # begins to add a tensor up over the groups, in place; None: done already
Task = tuple[int, float]  # fidelity (row) and outer weight of one task of an outer step


class Outer:
    """The shared weights `phi` [P] of one rank (all of them, or its partition), and the outer optimizer's state."""

    def __init__(self, phi: Tensor, rows: Tensor, config: ReptileConfig, exchange: Exchange, groups: int) -> None:
        """`rows` [P] has each element's fidelity, or `SHARED`; `exchange` adds up over `groups` groups."""
        self.config = config
        self.phi = phi.detach().clone()
        self.start = self.phi  # where this group's inner steps begin
        self._exchange = exchange
        self._groups = groups
        self._owned = (rows != SHARED).nonzero().squeeze(1)
        self._owner = rows[self._owned].long()
        self._num_rows = 1 + (int(self._owner.max()) if len(self._owner) else 0)
        self._sum = torch.zeros_like(self.phi)
        self._own_tasks: list[Task] = []
        self._residual = torch.zeros_like(self.phi) if groups > 1 and config.exchange == "bfloat16" else None
        self._momentum = torch.zeros_like(self.phi) if config.outer_optimizer != "sgd" else None
        self._pending: tuple[Work | None, Tensor, tuple[Task, ...]] | None = None  # exchange that is not applied yet

    def add(self, end: Tensor, task: Task) -> None:
        """Add the weights [P] that a task of this group ended at."""
        fidelity, weight = task
        difference = end.detach() - self.start
        difference[self._owned] *= self._owner == fidelity
        self._sum.add_(difference, alpha=weight)
        self._own_tasks.append(task)

    def finish(self, tasks: Sequence[Task], *, last: bool = False) -> None:
        """End an outer step: exchange what was added and update `phi`; `tasks` are those of all groups together.

        With `overlap` the update is that of the outer step before, whose exchange ran meanwhile; `last` applies both.
        """
        if not tasks:
            raise ValueError("outer step: expected at least one task, found none")
        before = self._pending
        own = self._mean(self._sum, self._own_tasks) if self.config.overlap and not last else None
        self._own_tasks = []
        self._pending = self._begin(tuple(tasks))
        if before is not None:
            self._apply(*before)
        if last or not self.config.overlap:
            self._apply(*self._pending)
            self._pending = None
        self.start = self.phi if own is None else self.phi + own

    def state(self) -> dict[str, Tensor]:
        """Return what the next outer step needs beside `phi`; waits for an exchange that is under way."""
        named = {"momentum": self._momentum, "residual": self._residual}
        state = {name: tensor for name, tensor in named.items() if tensor is not None}
        if self.start is not self.phi:
            state["start"] = self.start
        if self._pending is not None:
            work, total, tasks = self._pending
            if work is not None:
                work.wait()
            self._pending = None, total, tasks
            state["pending"] = total
            state["pending_tasks"] = torch.tensor(tasks, dtype=torch.float64)
        return state

    def load_state(self, phi: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over the weights and what `state` returned."""
        self.phi.copy_(phi)
        if self._momentum is not None:
            self._momentum.copy_(state["momentum"])
        # With another number of groups there may have been no rounding before, or be none now.
        owed = state.get("residual", torch.zeros_like(self.phi)).to(self.phi.device)
        self._sum.zero_()
        (self._sum if self._residual is None else self._residual).copy_(owed)
        if "pending" in state:
            tasks = tuple((int(fidelity), weight) for fidelity, weight in state["pending_tasks"].tolist())
            self._pending = None, state["pending"].to(self.phi.device), tasks
        self.start = state["start"].to(self.phi.device) if "start" in state else self.phi

    def _begin(self, tasks: tuple[Task, ...]) -> tuple[Work | None, Tensor, tuple[Task, ...]]:
        total = self._sum
        if self._residual is not None:
            total += self._residual
            rounded = total.bfloat16()
            torch.sub(total, rounded, out=self._residual)
            total = rounded
        self._sum = torch.zeros_like(self.phi)
        return self._exchange(total), total, tasks

    def _apply(self, work: Work | None, total: Tensor, tasks: tuple[Task, ...]) -> None:
        if work is not None:
            work.wait()
        mean = total.to(self.phi.dtype) / sum(weight for _, weight in tasks)
        owned = self._owned_means(total.to(self.phi.dtype), tasks)
        mean[self._owned] = 0  # owned elements know no rate and no momentum
        if self._momentum is not None:
            self._momentum.mul_(self.config.outer_momentum).add_(mean)
            nesterov = self.config.outer_optimizer == "nesterov"
            mean = mean.add_(self._momentum, alpha=self.config.outer_momentum) if nesterov else self._momentum
        self.phi.add_(mean, alpha=self.config.outer_rate)
        self.phi[self._owned] += owned

    def _mean(self, total: Tensor, tasks: Sequence[Task]) -> Tensor:
        """Return the step of plain Reptile from the weighted differences of some tasks."""
        mean = total * (self.config.outer_rate / sum(weight for _, weight in tasks))
        mean[self._owned] = self._owned_means(total, tasks)
        return mean

    def _owned_means(self, total: Tensor, tasks: Sequence[Task]) -> Tensor:
        """Return the means of owned elements over the tasks of their fidelity; 0 where there was none."""
        weights = [0.0] * self._num_rows
        for fidelity, weight in tasks:
            if fidelity < self._num_rows:
                weights[fidelity] += weight
        divisors = torch.tensor([weight or 1.0 for weight in weights], dtype=total.dtype)
        divisors = divisors.to(total.device, non_blocking=True)
        return total[self._owned] / divisors[self._owner]
