"""Pretrain one potential on many fidelities: `rung pretrain CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rung.model.config import read_config, to_yaml
from rung.pretrain.config import PretrainConfig
from rung.pretrain.exit_status import BAD_INPUT, DIVERGED, FAILED, FINISHED, STOPPED, RunFailed, leave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `rung pretrain`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "exit status: 0 finished, 1 failed (a rank is lost, a disk is full: try again with --resume), 2 bad input, "
        f"3 diverged, {STOPPED} stopped by a signal or stop_at with the state saved (run again with --resume)\n"
        "ranks: --ranks N starts N of them on this machine; deepspeed, torchrun, mpirun and srun may start\n"
        "       `python -m rung.pretrain` themselves, on any number of machines (launch/templates)"
    )
    parser.add_argument("config", help=f"YAML file, or one of ours by name: {', '.join(packaged_configs())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, such as optimizer.lr=1e-3")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print what would run, and leave")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in the output folder")
    parser.add_argument("--ranks", type=int, default=None, help="start this many ranks here, by DeepSpeed's launcher")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it


def run(args: argparse.Namespace) -> int:
    """Run `rung pretrain` and return its exit status; bad input raises ValueError or an OSError."""
    path = find_config(args.config)
    config = read_config(PretrainConfig, path, args.overrides)
    if args.dry_run:
        _dry_run(config, args.ranks or int(os.environ.get("WORLD_SIZE", "1")))
        return 0
    if args.ranks is not None:
        from rung.pretrain.launcher import launch

        return launch(args.ranks, config, [args.config, *args.overrides, *(["--resume"] if args.resume else [])])
    from rung.pretrain.loop import pretrain  # imports deepspeed, which takes seconds

    try:
        return FINISHED if pretrain(config, resume=args.resume) else STOPPED
    except FloatingPointError as error:
        return _failed(error, DIVERGED)
    except (ConnectionError, TimeoutError, RunFailed) as error:
        return _failed(error, FAILED)


def _failed(error: Exception, status: int) -> int:
    print(f"rung pretrain: error: {error}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m rung.pretrain`, which is what launchers start."""
    parser = argparse.ArgumentParser(prog="rung pretrain", description=__doc__)
    add_arguments(parser)
    try:
        status = run(parser.parse_intermixed_args(argv))
    except (ValueError, OSError) as error:  # an OSError of a run that was going on is handled there
        status = _failed(error, BAD_INPUT)
    leave(status)
    return status


def packaged_configs() -> list[str]:
    """Return the names of the configs that come with Rung."""
    names = [item.name for item in resources.files("rung.pretrain.configs").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_config(name: str) -> Path:
    """Return the path of a config file, or of one of ours given by its bare name."""
    if name in packaged_configs():
        return Path(str(resources.files("rung.pretrain.configs"))) / f"{name}.yaml"
    return Path(name)


def _dry_run(config: PretrainConfig, world: int) -> None:
    """Build the model, read the first structure of every task, and print what a run on `world` ranks would do."""
    from rung.data.stream import epoch_structures
    from rung.pretrain.plan import describe, make_plan, make_potential

    print(to_yaml(config), end="")
    plan = make_plan(config, world)
    print(describe(plan, config))
    potential = make_potential(plan)
    print(f"kernels {potential.kernels()}")
    for name, task in zip(plan.task_names, plan.tasks, strict=True):
        split = epoch_structures(task.dataset, task.fidelity, "train", shard_url=task.shard_url, remote=task.remote)
        structure = next(split)
        potential.check_domain(structure.numbers.tolist(), task.fidelity, structure.charge, structure.multiplicity)
        print(f"first structure of {name}: '{structure.key}', {structure.num_atoms} atoms")
