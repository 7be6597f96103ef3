"""The outer step of Reptile (arXiv:1803.02999) over fidelities and groups of ranks, as mathematics on one flat vector.

    d   <- sum_t w_t (phi_t - phi) / sum_t w_t          over the tasks t of all groups
    phi <- phi + epsilon * outer_optimizer(d)

phi_t are the weights after the inner steps on task t, all started from phi. The outer optimizer is SGD: plain, with
momentum, or with Nesterov's momentum (DiLoCo, arXiv:2311.08105). Some elements are owned: they belong to one fidelity's
row of a stacked parameter. An owned element takes the mean of the results of its fidelity's tasks in full, and a task's
result never touches another fidelity's (the inner optimizer's momentum moves those, too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import Work

from rung.pretrain.config import ReptileConfig

SHARED = -1  # the row of an element that is not owned

Exchange = Callable[[Tensor], Work | None]  # begins to add a tensor up over the groups, in place; None: done already
Task = tuple[int, float]  # fidelity (row) and outer weight of one task of an outer step


class Outer:
    """The shared weights `phi` [P] of one rank (all of them, or its partition), and the outer optimizer's state."""

    def __init__(self, phi: Tensor, rows: Tensor, config: ReptileConfig, exchange: Exchange, groups: int) -> None:
        """`rows` [P] has each element's fidelity, or `SHARED`; `exchange` adds up over `groups` groups."""
        self.config = config
        self.phi = phi.detach().clone()
        self._exchange = exchange
        self._groups = groups
        self._owned = (rows != SHARED).nonzero().squeeze(1)
        self._owner = rows[self._owned].long()
        self._num_rows = 1 + (int(self._owner.max()) if len(self._owner) else 0)
        self._sum = torch.zeros_like(self.phi)
        self._residual = torch.zeros_like(self.phi) if groups > 1 and config.exchange == "bfloat16" else None
        self._momentum = torch.zeros_like(self.phi) if config.outer_optimizer != "sgd" else None
        self._pending: tuple[Work | None, Tensor, tuple[Task, ...]] | None = None  # exchange that is not applied yet

    def add(self, end: Tensor, task: Task) -> None:
        """Add the weights [P] that a task of this group ended at."""
        fidelity, weight = task
        difference = end.detach() - self.phi
        difference[self._owned] *= self._owner == fidelity
        self._sum.add_(difference, alpha=weight)

    def finish(self, tasks: Sequence[Task], *, last: bool = False) -> None:
        """End an outer step: exchange what was added and update `phi`; `tasks` are those of all groups together.

        With `overlap` the update is that of the outer step before, whose exchange ran meanwhile; `last` applies both.
        """
        if not tasks:
            raise ValueError("outer step: expected at least one task, found none")
        before = self._pending
        self._pending = self._begin(tuple(tasks))
        if before is not None:
            self._apply(*before)
        if last or not self.config.overlap:
            self._apply(*self._pending)
            self._pending = None

    def state(self) -> dict[str, Tensor]:
        """Return what the next outer step needs beside `phi`; waits for an exchange that is under way."""
        state = {name: tensor for name, tensor in self._named() if tensor is not None}
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
        for name, tensor in self._named():
            if tensor is not None:
                tensor.copy_(state[name])
        if "pending" in state:
            tasks = tuple((int(fidelity), weight) for fidelity, weight in state["pending_tasks"].tolist())
            self._pending = None, state["pending"].to(self.phi.device), tasks

    def _named(self) -> tuple[tuple[str, Tensor | None], ...]:
        return ("momentum", self._momentum), ("residual", self._residual)

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
        owned = self._owned_means(total[self._owned].to(self.phi.dtype), tasks)
        mean[self._owned] = 0  # owned elements know no rate and no momentum
        if self._momentum is not None:
            self._momentum.mul_(self.config.outer_momentum).add_(mean)
            nesterov = self.config.outer_optimizer == "nesterov"
            mean = mean.add_(self._momentum, alpha=self.config.outer_momentum) if nesterov else self._momentum
        self.phi.add_(mean, alpha=self.config.outer_rate)
        self.phi[self._owned] += owned

    def _owned_means(self, totals: Tensor, tasks: tuple[Task, ...]) -> Tensor:
        """Return the means of owned elements over the tasks of their fidelity; 0 where there was none."""
        weights = [0.0] * self._num_rows
        for fidelity, weight in tasks:
            if fidelity < self._num_rows:
                weights[fidelity] += weight
        divisors = totals.new_tensor([weight or 1.0 for weight in weights])
        return totals / divisors[self._owner]
