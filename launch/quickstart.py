"""Pretrain on the built-in low fidelities, fine-tune on a few energies of a high one, compare with scratch.

Every number is measured in this run. An interrupted run continues where its last saved state was.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rung.pretrain.exit_status import STOPPED
from rung.pretrain.interrupt import Interrupt

METRICS = ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom")
MAX_LABELS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rung quickstart`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the results; a finished quickstart in it is replaced",
    )
    parser.add_argument(
        "--fidelity", default="mp2_ccpvdz", help="level of theory to fine-tune to (default: mp2_ccpvdz)"
    )
    parser.add_argument(
        "--labels", type=int, default=MAX_LABELS, help="energies to fine-tune on (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="DeepSpeed ranks of the pretraining (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="pretraining settings, such as steps=100")


def run(args: argparse.Namespace) -> int:
    """Run pretraining and fine-tuning, print the table, and write summary.json."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the fine-tuning reports while it runs
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = pretrain(out / "pretrain", args.ranks, args.overrides)
    result = compare(checkpoint, out / "finetune", args.fidelity, args.labels)
    summary = summarise(result)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    print(f"numbers: {out / 'summary.json'}")
    for plot in result["plots"]:
        print(f"plot:    {plot}")
    return 0


def pretrain(folder: Path, ranks: int, overrides: list[str]) -> Path:
    """Pretrain with DeepSpeed on `ranks` local ranks, as a user would from the shell; return the checkpoint.

    An interrupted run goes on; a finished one is measured again from the start.
    Raises ValueError when the training process fails.
    """
    words = ["quickstart", "--ranks", str(ranks), f"output={folder}", *overrides]
    if (folder / "checkpoint").exists():
        shutil.rmtree(folder)
    elif (folder / "state" / "latest").exists():
        words.append("--resume")
    print("$ rung pretrain " + " ".join(words), flush=True)
    with Interrupt() as interrupt:  # Ctrl-C reaches the training process too, which saves its state and ends by itself
        status = subprocess.run([sys.executable, "-m", "rung.pretrain", *words], check=False).returncode
    if status == STOPPED or interrupt.requested:
        print("stopped: the same command goes on from the last saved state")
        raise KeyboardInterrupt
    if status != 0:
        raise ValueError(f"pretraining ended with status {status}; its messages are above")
    return folder / "checkpoint"


def compare(checkpoint: Path, folder: Path, fidelity: str, labels: int) -> Mapping[str, Any]:
    """Fine-tune the checkpoint on `labels` energies, train a scratch model on the same ones, return the metrics."""
    from rung.finetune.config import FinetuneConfig, SplitConfig
    from rung.finetune.pipeline import finetune

    config = FinetuneConfig(
        checkpoint=str(checkpoint),
        data="builtin",
        fidelity=fidelity,
        baseline="scratch",
        out=str(folder),
        split=SplitConfig(max_train=labels),
    )
    return finetune(config).metrics


def summarise(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json from the metrics of a fine-tuning run."""
    target = metrics["target"]
    return {
        "scratch": {name: target["scratch"][name] for name in METRICS},
        "finetuned": {name: target["after"][name] for name in METRICS},
        "labels": metrics["labels"],
        "fidelity": metrics["fidelity"],
        "test_structures": target["after"]["num_energies"],
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the comparison as a table for people."""
    rows = [("from scratch", summary["scratch"]), ("pretrained, then fine-tuned", summary["finetuned"])]
    lines = [
        "",
        f"{summary['fidelity']}: trained on {summary['labels']} energies (no forces), "
        f"tested on {summary['test_structures']} structures of molecules never seen",
        f"  {'':<30}{'energy MAE':>12}{'force MAE':>16}",
        f"  {'':<30}{'meV/atom':>12}{'meV/angstrom':>16}",
    ]
    for name, errors in rows:
        energy, force = (errors[metric] for metric in METRICS)
        lines.append(f"  {name:<30}{energy:>12.1f}{'no labels' if force is None else f'{force:.1f}':>16}")
    return "\n".join([*lines, ""])
