"""What the optimizers cost in a step, and what they reach in equal time, as JSON lines: one thread, built-in data.

python -m rung.pretrain.bench_optimizer cost small base large
python -m rung.pretrain.bench_optimizer compare --seconds 180
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from time import process_time as now  # of one thread: other processes on the machine take little from it
from typing import Any

import torch
from torch import nn

from rung.data.batch import Batch, Budget
from rung.data.loader import BatchLoader
from rung.data.mixing import MixedStream, open_tasks
from rung.data.stream import epoch_structures
from rung.kernels.memory import keep_freed_memory
from rung.model.loss import LossConfig, loss_terms, total
from rung.model.potential import Potential
from rung.model.predict import error_sums
from rung.pretrain.bench import machine, read
from rung.pretrain.config import PretrainConfig
from rung.pretrain.optimizer import make_optimizer
from rung.pretrain.plan import Plan, make_plan, make_potential
from rung.pretrain.schedule import learning_rate
from rung.pretrain.soap import Soap

NAMES = ("soap", "adamw", "muon")
# Learning rates that are tried; each optimizer gets equally many, around what is usual for it.
RATES = {"soap": (3e-3, 6e-3, 1.2e-2), "adamw": (2e-3, 4e-3, 8e-3), "muon": (4e-3, 8e-3, 1.6e-2)}
# AdamW's own decay of the second moments; 0.95 was chosen for SOAP.
BETAS = {"soap": (0.95, 0.95), "adamw": (0.9, 0.99), "muon": (0.9, 0.99)}
TURN_SECONDS = 5.0  # the optimizers take turns, so that all meet the same load of the machine
PILOT_SHARE = 0.25  # of the seconds, for trying one rate
NUM_VALIDATION = 128  # structures per task


def batches(plan: Plan, config: PretrainConfig) -> BatchLoader:
    """Return the run's batches on one rank."""

    def make_stream(consumer: int, num_consumers: int) -> MixedStream:
        return open_tasks(plan.tasks, seed=config.seed, rank=consumer, world=num_consumers)

    budget = Budget(config.data.max_atoms, config.data.max_edges)
    return BatchLoader([make_stream], plan.fidelity_index, plan.model.cutoff, budget)


def optimizer_of(potential: Potential, config: PretrainConfig, **changes: Any) -> torch.optim.Optimizer:
    unshared = [parameter for _, parameter in potential.fidelity_parameters()]
    return make_optimizer(potential, unshared, replace(config.optimizer, **changes))


def backward(potential: Potential, batch: Batch, loss: LossConfig) -> torch.Tensor:
    """Put the gradients of one batch's loss into the parameters and return the loss."""
    for parameter in potential.parameters():
        parameter.grad = None
    terms = loss_terms(potential(batch, forces=True), batch, loss, potential.scale)
    value = total(terms, terms.statistics(), loss)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


# Costs


def optimizer_cost(config_name: str, steps: int = 20) -> dict[str, Any]:
    """Return seconds per step of the model and of each optimizer at one of our configs.

    All optimizers step the same parameters with the same gradients and a rate too small to matter, one after another in
    every step, so they meet the same load. The first step is left out; `steps` should be a multiple of SOAP's
    precondition_frequency, so that mean and worst step contain its decompositions. `share` is that of the optimizer
    in a step of model and optimizer; `operators` counts what is dispatched in a step, a bound on a GPU's launches.
    """
    config = read(config_name)
    plan = make_plan(config, 1)
    potential = make_potential(plan).train()
    optimizers = {name: optimizer_of(potential, config, name=name, lr=1e-9) for name in NAMES}
    optimizers |= _others(potential, config)
    times: dict[str, list[float]] = {name: [] for name in ("model", *optimizers)}
    loader = batches(plan, config)
    for batch in islice(loader, steps + 1):
        begin = now()
        backward(potential, batch, config.loss)
        times["model"].append(now() - begin)
        for name, optimizer in optimizers.items():
            begin = now()
            optimizer.step()
            times[name].append(now() - begin)
    loader.close()
    model = _statistics(times["model"][1:])
    result: dict[str, Any] = {
        "bench": "optimizer_cost",
        "config": config_name,
        "parameters": sum(parameter.numel() for parameter in potential.parameters()),
        "clock": "CPU seconds of one thread",
        "model": model,
    }
    for name, optimizer in optimizers.items():
        own = _statistics(times[name][1:])
        share = own["mean_s"] / (own["mean_s"] + model["mean_s"])
        result[name] = {**own, "share": round(share, 4), "operators": _operators(optimizer.step)}
    return result


def _others(potential: Potential, config: PretrainConfig) -> dict[str, torch.optim.Optimizer]:
    """Return SOAP in its other forms.

    Staggered; as the first of 8 data ranks, but without their communication; and pytorch_optimizer's where installed.
    """
    settings = config.optimizer
    common: dict[str, Any] = {"lr": 1e-9, "precondition_frequency": settings.precondition_frequency}
    others: dict[str, torch.optim.Optimizer] = {
        "soap_staggered": Soap(potential.parameters(), stagger=True, **common),
        "soap_of_8_ranks": Soap(potential.parameters(), rank=0, world=8, exchange=torch._foreach_zero_, **common),
    }
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        return others
    return others | {"pytorch_optimizer": SOAP(list(potential.parameters()), weight_decay=0.0, **common)}


def _statistics(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    values = {"mean_s": sum(times) / len(times), "median_s": ordered[len(times) // 2], "worst_s": ordered[-1]}
    return {name: round(value, 5) for name, value in values.items()}


def _operators(step: Callable[[], Any]) -> int:
    """Return how many operators one step dispatches, without those that only look at a tensor in another way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count: int = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    with Counting() as counting:  # type: ignore[no-untyped-call]
        step()
    return int(counting.count)


# Equal time


@dataclass
class Runner:
    """One optimizer on one copy of the potential, trained in turns for a given time of its own."""

    name: str
    rate: float
    seconds: float
    config: PretrainConfig
    plan: Plan

    def __post_init__(self) -> None:
        self.potential = make_potential(self.plan).train()
        changes: dict[str, Any] = {"name": self.name, "lr": self.rate, "betas": BETAS[self.name]}
        self._settings = replace(self.config.optimizer, **changes)
        self._optimizer = optimizer_of(self.potential, self.config, **changes)
        self._loader = batches(self.plan, self.config)
        self.used = 0.0
        self.steps = 0

    def turn(self, seconds: float) -> None:
        """Train until so many more seconds are used."""
        end = min(self.used + seconds, self.seconds)
        while self.used < end:
            batch = next(self._loader)  # not counted: it is the same for all
            begin = now()
            self._step(batch)
            self.used += now() - begin
            self.steps += 1

    def _step(self, batch: Batch) -> None:
        """The run's step: warm-up in steps, then a cosine over the time that is given; clipping."""
        warmup = min(1.0, (self.steps + 1) / (self._settings.warmup_steps + 1))
        settled = learning_rate(self.used / self.seconds, 2, replace(self._settings, warmup_steps=0))
        for group in self._optimizer.param_groups:
            group["lr"] = warmup * settled
        backward(self.potential, batch, self.config.loss)
        nn.utils.clip_grad_norm_(self.potential.parameters(), self._settings.gradient_clipping)
        self._optimizer.step()

    def errors(self, validation: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """Return the mean absolute errors over all tasks' labels."""
        sums = [error_sums(self.potential, structures, fidelity) for fidelity, structures in validation.items()]
        metrics = sum(sums[1:], sums[0]).metrics()
        names = ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom")
        return {name: round(metrics[name] or float("nan"), 3) for name in names}

    def close(self) -> None:
        self._loader.close()


def compare(config_name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the trials, then one record per optimizer: validation errors after `seconds` of steps at its best rate.

    The rates are tried for a quarter of the time each, with a whole schedule, and the smallest force error chooses.
    Evaluation and making batches are not counted.
    """
    config = read(config_name)
    plan = make_plan(config, 1)
    validation = {task.fidelity: _validation(task.dataset, task.fidelity) for task in plan.tasks}
    pilots = [Runner(name, rate, PILOT_SHARE * seconds, config, plan) for name in NAMES for rate in RATES[name]]
    tried = _train(pilots, validation)
    yield from ({"bench": "pilot", "config": config_name, **row} for row in tried)
    best = {name: min((row for row in tried if row["optimizer"] == name), key=_force_error) for name in NAMES}
    runners = [Runner(name, best[name]["rate"], seconds, config, plan) for name in NAMES]
    yield from ({"bench": "equal_time", "config": config_name, **row} for row in _train(runners, validation))


def _train(runners: Sequence[Runner], validation: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    while any(runner.used < runner.seconds for runner in runners):
        for runner in runners:
            runner.turn(TURN_SECONDS)
    rows = []
    for runner in runners:
        row = {"optimizer": runner.name, "rate": runner.rate, "seconds": round(runner.used, 1), "steps": runner.steps}
        rows.append(row | runner.errors(validation))
        runner.close()
    return rows


def _force_error(row: Mapping[str, Any]) -> float:
    error = float(row["force_mae_mev_per_angstrom"])
    return error if error == error else float("inf")


def _validation(dataset: str, fidelity: str) -> list[Any]:
    """Return structures spread over the validation split: neighbours are geometries of one molecule."""
    return list(islice(epoch_structures(dataset, fidelity, "val", every=10), NUM_VALIDATION))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rung.pretrain.bench_optimizer", description=__doc__)
    parser.add_argument("what", choices=("cost", "compare"))
    parser.add_argument("configs", nargs="*", default=["small"])
    parser.add_argument("--seconds", type=float, default=180.0, help="of training for each optimizer (compare)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (cost)")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    print(json.dumps(machine(" ".join([parser.prog, *sys.argv[1:]]))), flush=True)
    for name in arguments.configs:
        rows: Iterable[dict[str, Any]] = compare(name, arguments.seconds)
        if arguments.what == "cost":
            rows = [optimizer_cost(name, arguments.steps)]
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
