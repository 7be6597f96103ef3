"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, with the linear algebra shared out over the data ranks.

Vyas et al., arXiv:2409.11321 (algorithm 3). Every axis of a weight has a covariance of its gradients (decayed with
beta2) and an orthogonal basis near its eigenvectors, refreshed every few steps by one power iteration and a QR
decomposition; Adam runs on the gradient turned into those bases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rung.pretrain.eigenbasis import (
    covariance,
    deal,
    eigenbasis,
    owner_cost,
    preconditioned_axes,
    refresh_cost,
    refreshed,
    turn,
)

Exchange = Callable[[list[Tensor]], None]


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stack:
    """Parameters of one group and one shape, stepped together; the order is that of their state's first dimension."""

    group: int
    shape: tuple[int, ...]
    numbers: tuple[int, ...]  # of the parameters, counted through all groups
    owners: tuple[int, ...]  # data ranks
    phases: tuple[int, ...]  # ascending; the basis is refreshed at steps that leave this remainder
    axes: tuple[int, ...]  # that have a basis

    @property
    def key(self) -> int:
        """Return the number of the parameter under which `Optimizer.state` holds this stack."""
        return min(self.numbers)

    def owned(self, rank: int) -> list[int]:
        return [place for place, owner in enumerate(self.owners) if owner == rank]

    def due(self, phase: int | None) -> slice:
        """Return the places whose bases are due in a phase, None: in any."""
        places = [place for place, own in enumerate(self.phases) if phase is None or own == phase]
        return slice(places[0], places[-1] + 1) if self.axes and places else slice(0, 0)


@dataclass(frozen=True)
class Factors:
    """Scalars of one step, on the device: zero (`shrink`: one) in a step that changes nothing."""

    first: Tensor  # weight of the new gradient in the first moments
    second: Tensor
    covariance: Tensor
    rate: Tensor
    shrink: Tensor | None  # weight decay
    eps: float


class Soap(torch.optim.Optimizer):
    """SOAP whose covariances and eigenbases are kept and computed by one data rank per parameter.

    All ranks must pass equal gradients; they then hold equal parameters, moments and bases, bit by bit. `state` has
    one entry per stack of equally shaped parameters (under the first of them), and all of it is there: `state` may be
    replaced by another run's or by an empty one between two steps. Vectors get plain Adam.

    As in the authors' code, the first step only starts the bases and changes no parameter. That step waits for the
    device (`torch.linalg.eigh` checks its result); no later one does.

    Set `found_inf` (float32 scalar; 1: skip, as for torch's fused optimizers) to skip a step without the host knowing:
    parameters and every tensor of the state stay as they were. The schedule of the bases counts calls, skipped or not,
    because only the device knows; bases that were due at a skipped call wait for their next turn, and after a skipped
    first call they are the identity until then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        *,
        stagger: bool = False,
        rank: int = 0,
        world: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        """`exchange(buffers)` gets one flat tensor per data rank, some empty, and must fill buffers[d] everywhere with
        what rank d has in it; it is called at the same steps on all ranks.

        `stagger` spreads the bases over the steps: with one rank the mean step costs the same and the worst half, and
        the loss curve does not care. Not the default, because ranks wait for the slowest of them at every step: with
        8 of them all bases together cost a fifth of one rank's time, staggered ones more than a third.

        Raises ValueError for parameters that are not float32 or float64, all alike, and for a world without exchange.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if world > 1 and exchange is None:
            raise ValueError(f"soap: expected an exchange between the {world} data ranks, found none")
        kinds = {(parameter.dtype, parameter.device) for parameter in self._parameters()}
        if len(kinds) != 1 or not {dtype for dtype, _ in kinds} <= {torch.float32, torch.float64}:
            raise ValueError(f"soap: expected parameters of float32 or float64, all on one device, found {kinds}")
        self.found_inf: Tensor | None = None
        self._frequency = precondition_frequency
        self._rank, self._world, self._exchange = rank, world, exchange
        self._stacks = self._make_stacks(stagger)

    def _parameters(self) -> list[Tensor]:
        """Return all parameters; looked up each time, because wrappers put their own copies into the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _make_stacks(self, stagger: bool) -> list[Stack]:
        owners, phases = self._deal(stagger)
        found: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        number = 0
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    found[index, tuple(parameter.shape)].append(number)
                number += 1
        stacks = []
        for (index, shape), members in found.items():
            members.sort(key=lambda number: (phases[number], owners[number], number))
            stacks.append(
                Stack(
                    index,
                    shape,
                    numbers=tuple(members),
                    owners=tuple(owners[number] for number in members),
                    phases=tuple(phases[number] for number in members),
                    axes=preconditioned_axes(shape),
                )
            )
        return stacks

    def _deal(self, stagger: bool) -> tuple[list[int], list[int]]:
        """Return the owner and the phase of every parameter; phases do not depend on the number of ranks."""
        shapes = [tuple(parameter.shape) for parameter in self._parameters()]
        owners = deal([owner_cost(shape, self._frequency) for shape in shapes], self._world)
        phases = deal([refresh_cost(shape) for shape in shapes], self._frequency) if stagger else [0] * len(shapes)
        return owners, phases

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; raises ValueError when a parameter has no gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        clock = self._clock(parameters)
        first = not clock
        if first:
            self._start(parameters)
        keep = None if self.found_inf is None else self.found_inf == 0
        factors = [self._factors(group, clock["step"], keep) for group in self.param_groups]
        for stack in self._stacks:
            gradients = _gradients(stack, parameters, keep)
            factor = factors[stack.group]
            if not first:
                self._move(stack, parameters, gradients, factor)
            self._accumulate(stack, parameters, gradients, factor.covariance)
        due = [(stack, stack.due(None if first else clock["calls"] % self._frequency)) for stack in self._stacks]
        due = [(stack, places) for stack, places in due if places.start < places.stop]
        if due:
            self._refresh(due, parameters, keep, first)
        clock["step"] += 1 if keep is None else keep
        clock["calls"] += 1
        return loss

    def _clock(self, parameters: list[Tensor]) -> dict[str, Any]:
        """Return where the state counts: steps taken, on the device, and calls."""
        clock: dict[str, Any] = self.state[parameters[self._stacks[0].key]]
        return clock

    def _start(self, parameters: list[Tensor]) -> None:
        for stack in self._stacks:
            like, count, own = parameters[stack.key], len(stack.numbers), len(stack.owned(self._rank))
            state = self.state[like]
            for name in MOMENTS:
                state[name] = like.new_zeros(count, *stack.shape)
            for axis in stack.axes:
                size = stack.shape[axis]
                state[f"basis{axis}"] = torch.eye(size, dtype=like.dtype, device=like.device).repeat(count, 1, 1)
                state[f"covariance{axis}"] = like.new_zeros(own, size, size)
        clock = self._clock(parameters)
        clock["step"] = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        clock["calls"] = 0

    def _factors(self, group: dict[str, Any], step: Tensor, keep: Tensor | None) -> Factors:
        """Return the scalars of this step, on the device; `step` counts those taken before it."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        changes = torch.ones_like(step) if keep is None else keep.to(step)
        moves = changes * (step > 0)
        count = step.clamp(min=1)
        correction = (1 - beta2**count).sqrt() / (1 - beta1**count)
        dtype = group["params"][0].dtype
        return Factors(
            first=(moves * (1 - beta1)).to(dtype),
            second=(moves * (1 - beta2)).to(dtype),
            covariance=(changes * (1 - beta2)).to(dtype),
            rate=(moves * correction * rate).to(dtype),
            shrink=(1 - moves * rate * group["weight_decay"]).to(dtype) if group["weight_decay"] else None,
            eps=group["eps"],
        )

    def _move(self, stack: Stack, parameters: list[Tensor], gradients: Tensor, factors: Factors) -> None:
        """Adam in the eigenbases."""
        state = self.state[parameters[stack.key]]
        bases = [(axis, state[f"basis{axis}"]) for axis in stack.axes]
        turned = turn(gradients, bases)
        state["exp_avg"].lerp_(turned, factors.first)
        state["exp_avg_sq"].lerp_(turned.square(), factors.second)
        update = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(factors.eps)
        update = turn(update.mul_(factors.rate), bases, back=True)
        moved = [parameters[number] for number in stack.numbers]
        torch._foreach_sub_(moved, list(update.unbind()))
        if factors.shrink is not None:
            torch._foreach_mul_(moved, factors.shrink)

    def _accumulate(self, stack: Stack, parameters: list[Tensor], gradients: Tensor, weight: Tensor) -> None:
        """Add the gradients to the covariances of the parameters that this rank owns."""
        own = stack.owned(self._rank)
        if not own or not stack.axes:
            return
        if len(own) < len(stack.numbers):
            gradients = torch.stack([gradients[place] for place in own])
        state = self.state[parameters[stack.key]]
        for axis in stack.axes:
            state[f"covariance{axis}"].lerp_(covariance(gradients, axis), weight)

    def _refresh(
        self, due: list[tuple[Stack, slice]], parameters: list[Tensor], keep: Tensor | None, first: bool
    ) -> None:
        """Replace the bases of the parameters that are due: their owners compute them, and all ranks turn to them."""
        pieces: list[list[Tensor]] = [[] for _ in range(self._world)]  # by owner
        for stack, places in due:
            state = self.state[parameters[stack.key]]
            own = stack.owned(self._rank)
            mine = [row for row, place in enumerate(own) if places.start <= place < places.stop]
            for axis in stack.axes:
                basis = state[f"basis{axis}"]
                if mine:
                    old = torch.stack([basis[own[row]] for row in mine])
                    rows = state[f"covariance{axis}"][mine[0] : mine[-1] + 1]
                    new = eigenbasis(rows) if first else refreshed(rows, old)
                    pieces[self._rank].extend(new if keep is None else torch.where(keep, new, old))
                for place in range(places.start, places.stop):
                    if stack.owners[place] != self._rank:
                        pieces[stack.owners[place]].append(torch.empty_like(basis[place]))
        bases = self._share_bases(pieces)
        for stack, places in due:
            state = self.state[parameters[stack.key]]
            old_bases = [(axis, state[f"basis{axis}"][places]) for axis in stack.axes]
            new_bases = [
                (axis, torch.stack([next(bases[owner]) for owner in stack.owners[places]])) for axis in stack.axes
            ]
            moments = state["exp_avg"][places]
            turned = turn(turn(moments, old_bases, back=True), new_bases)
            moments.copy_(turned if keep is None else torch.where(keep, turned, moments))
            for (_, old), (_, new) in zip(old_bases, new_bases, strict=True):
                old.copy_(new)

    def _share_bases(self, pieces: list[list[Tensor]]) -> list[Iterator[Tensor]]:
        """Return the pieces with the owners' values, which are right so far only on the owners themselves."""
        if self._exchange is None:
            return [iter(own) for own in pieces]
        buffers = [
            torch.cat([piece.flatten() for piece in own]) if own else self._parameters()[0].new_empty(0)
            for own in pieces
        ]
        self._exchange(buffers)
        return [
            iter([part.view_as(piece) for part, piece in zip(_split(buffer, own), own, strict=True)])
            for buffer, own in zip(buffers, pieces, strict=True)
        ]

    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the same rank of an equally large world, in which all parameters were the same."""
        super().load_state_dict(state_dict)
        parameters = self._parameters()
        if clock := self._clock(parameters):
            clock["step"] = clock["step"].to(parameters[0].device, torch.float64)

    def share(self) -> dict[str, Tensor]:
        """Return copies of the state of the parameters that this rank owns, as `<parameter number>.<name>`.

        The shares of all ranks together are the whole state, for `load_shares` in a world of any size. Empty before
        the first step. Waits for nothing.
        """
        parameters = self._parameters()
        clock = self._clock(parameters)
        shared: dict[str, Tensor] = {}
        for stack in self._stacks if clock else []:
            state = self.state[parameters[stack.key]]
            for row, place in enumerate(stack.owned(self._rank)):
                number = stack.numbers[place]
                for name in _names(stack):
                    shared[f"{number}.{name}"] = state[name][row if name.startswith("covariance") else place].clone()
                shared[f"{number}.step"] = clock["step"].clone()
                shared[f"{number}.calls"] = torch.tensor(clock["calls"])
        return shared

    def load_shares(self, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over the state from the shares of all ranks of a run, in any order, with any number of ranks.

        Raises ValueError when a value is missing or has another shape.
        """
        values = {name: tensor for share in shares for name, tensor in share.items()}
        self.state.clear()
        if not values:
            return
        parameters = self._parameters()
        self._start(parameters)
        for stack in self._stacks:
            state = self.state[parameters[stack.key]]
            for place, number in enumerate(stack.numbers):
                owned = stack.owned(self._rank)
                for name in _names(stack):
                    if not name.startswith("covariance"):
                        _fill(state[name][place], values, f"{number}.{name}")
                    elif place in owned:
                        _fill(state[name][owned.index(place)], values, f"{number}.{name}")
        clock = self._clock(parameters)
        key = self._stacks[0].key
        calls = torch.zeros((), dtype=torch.int64)
        _fill(calls, values, f"{key}.calls")
        _fill(clock["step"], values, f"{key}.step")
        clock["calls"] = int(calls)


def _gradients(stack: Stack, parameters: list[Tensor], keep: Tensor | None) -> Tensor:
    """Return the gradients as one tensor, zero where the step is skipped."""
    gradients = []
    for number in stack.numbers:
        gradient = parameters[number].grad
        if gradient is None:
            raise ValueError(
                f"soap: parameter {number} of shape {stack.shape} has no gradient; leave it out of the optimizer, or "
                "let the loss depend on it"
            )
        gradients.append(gradient)
    stacked = torch.stack(gradients)
    return stacked if keep is None else torch.where(keep, stacked, 0.0)


def _split(buffer: Tensor, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split_with_sizes(buffer, [piece.numel() for piece in pieces]) if pieces else ()


def _names(stack: Stack) -> list[str]:
    return [*MOMENTS, *(f"{kind}{axis}" for kind in ("basis", "covariance") for axis in stack.axes)]


def _fill(place: Tensor, values: Mapping[str, Tensor], name: str) -> None:
    if name not in values:
        raise ValueError(f"soap: the shares of the optimizer state lack {name}; load the shares of all ranks")
    if values[name].shape != place.shape:
        raise ValueError(
            f"soap: optimizer state {name}: expected shape {tuple(place.shape)}, found {tuple(values[name].shape)}; "
            "the state is of another model"
        )
    place.copy_(values[name])
