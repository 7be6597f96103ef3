"""Errors of fine-tuning's strategies at equal labels: mean over seeds (labels drawn, folds, order of batches).

    python benchmarks/finetune_strategies.py CHECKPOINT --labels 200 50 --seeds 0 1 2

Each line is one setting: energy and force MAE on the built-in test molecules, drift of the parent's forces, seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rung.finetune.config import FinetuneConfig, SplitConfig, TrainingConfig
from rung.finetune.pipeline import finetune
from rung.pretrain.bench import machine

ENERGY, FORCE = "energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"
SETTINGS: dict[str, dict[str, Any]] = {
    "ridge": {"strategy": "ridge"},
    "embedding": {"strategy": "embedding"},
    "embedding from parent": {"strategy": "embedding", "start": "parent"},
    "embedding lbfgs": {"strategy": "embedding", "training": TrainingConfig(optimizer="lbfgs", steps=100)},
    "adapter": {"strategy": "adapter"},
    "full": {"strategy": "full"},
    "full from parent": {"strategy": "full", "start": "parent"},
    "full layer_decay 0.5": {"strategy": "full", "training": TrainingConfig(layer_decay=0.5)},
    "full l2_pull 1e-3": {"strategy": "full", "training": TrainingConfig(l2_pull=1e-3)},
    "full ensemble": {"strategy": "full", "uncertainty": "ensemble"},
    "ridge ensemble": {"strategy": "ridge", "uncertainty": "ensemble"},
    "full replay": {"strategy": "full", "replay": ("builtin:wb97x_631gd",)},
}


def measure(
    checkpoint: str, fidelity: str, labels: int, seeds: list[int], names: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield one line for each setting; the first also tells the errors of the parent with shifted energies."""
    for name in names:
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                config = FinetuneConfig(
                    checkpoint, "builtin", fidelity, out=folder, seed=seed, split=SplitConfig(max_train=labels)
                )
                runs.append(finetune(dataclasses.replace(config, **SETTINGS[name])).metrics)
        stages = {stage: _mean([run["target"][stage] for run in runs]) for stage in runs[0]["target"]}
        drift = float(np.mean([run["drift"][run["parent"]]["force_rms_mev_per_angstrom"] for run in runs]))
        forgotten = [row for run in runs for row in run["forgetting"] if row["fidelity"] == run["parent"]]
        yield {
            "setting": name,
            "labels": labels,
            "seeds": seeds,
            **stages,
            "parent_force_drift_mev_per_angstrom": drift,
            "parent_force_mae_after": _mean([row["after"] for row in forgotten])[FORCE] if forgotten else None,
            "uncertainty_test": _scores([run["uncertainty"]["test"] for run in runs if run["uncertainty"]]),
            "seconds": float(np.mean([run["seconds"] for run in runs])),
        }


def _mean(errors: list[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {
        key: None if any(e[key] is None for e in errors) else float(np.mean([e[key] for e in errors]))  # type: ignore[misc]
        for key in (ENERGY, FORCE)
    }


def _scores(scores: list[Mapping[str, float]]) -> dict[str, float]:
    names = ("within_one_std", "within_two_std", "rank_correlation")
    return {name: float(np.mean([score[name] for score in scores])) for name in names} if scores else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--fidelity", default="mp2_ccpvdz")
    parser.add_argument("--labels", type=int, nargs="+", default=[200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    print(json.dumps(machine(" ".join(["python", *sys.argv]))), flush=True)
    for labels in args.labels:
        for line in measure(args.checkpoint, args.fidelity, labels, args.seeds, args.settings):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
