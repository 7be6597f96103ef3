"""Fine-tune a checkpoint to a new level of theory with a small set of energies."""

from __future__ import annotations

import argparse
import json
import logging
from typing import get_args

from rung.finetune.config import FinetuneConfig, Strategy
from rung.finetune.pipeline import finetune
from rung.model.config import read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rung finetune`; every field of the configuration is also a key=value word."""
    parser.add_argument("--from", dest="checkpoint", metavar="CHECKPOINT", help="pretrained checkpoint")
    parser.add_argument("--data", help="extxyz (or what ASE reads), dataset folder, or `builtin`")
    parser.add_argument("--fidelity", help="name of the new level of theory, such as ccsdt_ccpvdz")
    parser.add_argument("--parent", help="fidelity to start from (default: the one that fits the labels best)")
    parser.add_argument("--strategy", choices=get_args(Strategy), help="what is trained (default: full)")
    parser.add_argument("--relative", action="append", metavar="FILE", help="relative energies to train on, too")
    parser.add_argument("--also", action="append", metavar="DATASET:FIDELITY", help="another new fidelity to learn")
    parser.add_argument(
        "--new-elements", action="store_const", const=True, help="accept elements that the checkpoint does not know"
    )
    parser.add_argument("--test", help="file or dataset with test structures")
    parser.add_argument("--replay", action="append", metavar="DATASET:FIDELITY", help="pretraining data to mix in")
    parser.add_argument("--baseline", choices=["none", "scratch"], help="also train from random weights")
    parser.add_argument("--use-forces", action="store_const", const=True, help="train on the forces in the data, too")
    parser.add_argument("--out", help="folder of the results (default: runs/finetune)")
    parser.add_argument("--config", help="YAML file with any of these settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, such as training.steps=500")


def run(args: argparse.Namespace) -> int:
    """Run a parsed command line and print the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = ["checkpoint", "data", "fidelity", "parent", "strategy", "test", "replay", "baseline", "use_forces", "out"]
    names += ["relative", "also", "new_elements"]
    # As JSON, which is YAML, so that no character of a path is taken for syntax.
    options = [f"{name}={json.dumps(value)}" for name in names if (value := getattr(args, name)) is not None]
    config = read_config(FinetuneConfig, args.config, [*options, *args.overrides])
    print((finetune(config).folder / "report.txt").read_text(), end="")
    return 0
