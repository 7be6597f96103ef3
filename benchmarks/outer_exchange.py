"""What the outer step's settings do to the result, and what joint training reaches in as many steps; as JSON lines.

    python benchmarks/outer_exchange.py [--steps 480] [--seeds 0 1] [--only STUDY ...] [--variants NAME ...] [--out F]

reference   joint training on one rank
groups      Reptile of two groups of one rank: exchange, overlap, outer optimizer, inner state, inner steps
serial      Reptile on one rank: tasks per outer step, inner steps, outer optimizer and rate, inner state

All runs have the same small model, see equally many structures of the built-in data, and take as many optimizer steps
(those of all groups together). `criterion` is that of the evaluation (error over the spread of the labels, mean over
tasks; lower is better), MAEs are in meV/atom and meV/angstrom, means over tasks; all on validation structures and with
the averaged weights, `raw_criterion` without averaging. A line has the mean over the seeds; `each_criterion` is theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from rung.model.config import read_config
from rung.pretrain.bench import machine
from rung.pretrain.bench_ranks import TIMEOUT, RankPool
from rung.pretrain.config import PretrainConfig
from rung.pretrain.engine import connect
from rung.pretrain.evaluation import Evaluated
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.loop import Run
from rung.pretrain.plan import task_groups

FIDELITIES = ("gfn1_xtb", "gfn2_xtb", "pbe_def2svp", "wb97x_631gd")
COMMON = [
    f"tasks=[{', '.join(f'{{dataset: builtin, fidelity: {name}}}' for name in FIDELITIES)}]",
    "model={channels: 32, num_layers: 2, l_max: 2}",
    "data={max_atoms: 128, max_edges: 4096}",
    "optimizer.warmup_steps=20",
    "evaluation={every: 1000000, max_structures: 120}",
    "save_every=1000000",
    "log_every=240",
]
REPTILE = ["mode=reptile", "reptile.tasks_per_outer=2", "reptile.inner_steps=8"]
LONG = ["reptile.inner_steps=20", "optimizer.lr=6e-3"]
ONE_TASK = ["reptile.tasks_per_outer=1"]
NESTEROV = ["reptile.outer_optimizer=nesterov", "reptile.outer_momentum=0.5"]
DILOCO = ["reptile.outer_optimizer=nesterov", "reptile.outer_momentum=0.9", "reptile.outer_rate=0.3"]
# study -> (variant, ranks, what it changes)
STUDIES: dict[str, list[tuple[str, int, list[str]]]] = {
    "reference": [("joint", 1, ["mode=joint"]), ("joint, lr 6e-3", 1, ["mode=joint", "optimizer.lr=6e-3"])],
    "groups": [
        ("float32", 2, REPTILE),
        ("bfloat16", 2, [*REPTILE, "reptile.exchange=bfloat16"]),
        ("overlap", 2, [*REPTILE, "reptile.overlap=true"]),
        ("overlap, rate 0.5", 2, [*REPTILE, "reptile.overlap=true", "reptile.outer_rate=0.5"]),
        ("overlap, lr 6e-3", 2, [*REPTILE, "reptile.overlap=true", "optimizer.lr=6e-3"]),
        ("overlap, 20 inner steps, lr 6e-3", 2, [*REPTILE, *LONG, "reptile.overlap=true"]),
        ("momentum 0.5", 2, [*REPTILE, "reptile.outer_optimizer=momentum", "reptile.outer_momentum=0.5"]),
        ("nesterov 0.5", 2, [*REPTILE, *NESTEROV]),
        ("nesterov 0.9, rate 0.3", 2, [*REPTILE, *DILOCO]),
        ("inner_state task", 2, [*REPTILE, "reptile.inner_state=task"]),
        ("inner_state reset", 2, [*REPTILE, "reptile.inner_state=reset"]),
        ("20 inner steps, nesterov 0.5", 2, [*REPTILE, *NESTEROV, "reptile.inner_steps=20"]),
        ("lr 6e-3", 2, [*REPTILE, "optimizer.lr=6e-3"]),
        ("20 inner steps, lr 6e-3", 2, [*REPTILE, *LONG]),
    ],
    "serial": [
        ("2 tasks, 8 steps", 1, REPTILE),
        ("1 task, 8 steps", 1, [*REPTILE, *ONE_TASK]),
        ("1 task, 2 steps", 1, [*REPTILE, *ONE_TASK, "reptile.inner_steps=2"]),
        ("4 tasks, 2 steps", 1, [*REPTILE, "reptile.tasks_per_outer=4", "reptile.inner_steps=2"]),
        ("2 tasks, 8 steps, nesterov 0.5", 1, [*REPTILE, *NESTEROV]),
        ("2 tasks, 8 steps, nesterov 0.9, rate 0.3", 1, [*REPTILE, *DILOCO]),
        ("1 task, 8 steps, rate 0.5", 1, [*REPTILE, *ONE_TASK, "reptile.outer_rate=0.5"]),
        ("1 task, 8 steps, inner_state task", 1, [*REPTILE, *ONE_TASK, "reptile.inner_state=task"]),
        ("2 tasks, 8 steps, lr 6e-3", 1, [*REPTILE, "optimizer.lr=6e-3"]),
        ("2 tasks, 8 steps, lr 1.2e-2", 1, [*REPTILE, "optimizer.lr=1.2e-2"]),
        ("2 tasks, 2 steps, lr 6e-3", 1, [*REPTILE, "reptile.inner_steps=2", "optimizer.lr=6e-3"]),
        ("1 task, 2 steps, lr 6e-3", 1, [*REPTILE, *ONE_TASK, "reptile.inner_steps=2", "optimizer.lr=6e-3"]),
        ("1 task, 1 step", 1, [*REPTILE, *ONE_TASK, "reptile.inner_steps=1"]),
    ],
}
Figures = dict[str, float]


def train(kept: dict[str, Any], words: list[str]) -> Figures:
    """Train a whole run on the ranks of a pool and return its errors, the same on every rank."""
    config = read_config(PretrainConfig, None, words)
    ranks = connect(TIMEOUT, lambda size: task_groups(config, size))
    with Run(config, ranks, False) as run, Interrupt() as interrupt:
        run.train(interrupt)
        raw = run.evaluation.run(run.potential)
        with run.ema.applied():
            averaged = run.evaluation.run(run.potential)
        run.store.wait()
    return {**errors(averaged), "raw_criterion": errors(raw)["criterion"]}


def errors(evaluated: Evaluated) -> Figures:
    """Return the criterion and the mean errors over the tasks."""
    tasks = evaluated.metrics.values()
    figures: Figures = {"criterion": evaluated.criterion or float("nan")}
    for name in ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"):
        figures[name] = mean(value for task in tasks if (value := task[name]) is not None)
    return figures


def variant(pools: Sequence[RankPool], words: Sequence[str], seeds: Sequence[int]) -> list[Figures]:
    """Return the figures of each seed; the pools take the seeds side by side."""
    found = []
    with TemporaryDirectory() as folder:
        runs = [[*COMMON, *words, f"seed={seed}", f"output={folder}/{seed}"] for seed in seeds]
        for start in range(0, len(runs), len(pools)):
            busy = list(zip(pools, runs[start:], strict=False))
            for pool, run in busy:
                pool.begin(train, run)
            found += [pool.results()[0] for pool, _ in busy]
    return found


def main() -> None:
    """Print the lines, and append them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=480, help="optimizer steps of a run; a multiple of 240 is best")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    arguments = parser.parse_args()

    def write(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as out:
                out.write(json.dumps(line) + "\n")

    write(machine(" ".join(["python benchmarks/outer_exchange.py", *sys.argv[1:]])))
    with ExitStack() as stack:
        pools = {
            1: [stack.enter_context(RankPool(1)) for _ in range(2)],
            2: [stack.enter_context(RankPool(2))],
        }
        for study in arguments.only:
            for name, ranks, words in STUDIES[study]:
                if arguments.variants and name not in arguments.variants:
                    continue
                found = variant(pools[ranks], [f"steps={arguments.steps}", *words], arguments.seeds)
                line: dict[str, Any] = {"name": "outer_exchange", "study": study, "variant": name, "ranks": ranks}
                line |= {"steps": arguments.steps, "seeds": arguments.seeds}
                line["changes"] = dict(word.split("=", 1) for word in words)
                means = {key: mean(figures[key] for figures in found) for key in found[0]}
                line |= {key: float(f"{value:.4g}") for key, value in means.items()}
                write(line | {"each_criterion": [round(figures["criterion"], 4) for figures in found]})


if __name__ == "__main__":
    main()
