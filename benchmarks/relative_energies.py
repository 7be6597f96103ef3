"""Fine-tuning on relative energies of the built-in data: differences between geometries of a molecule.

    python benchmarks/relative_energies.py CHECKPOINT [--fidelity mp2_ccpvdz] [--strategy full] [--out FOLDER]

Trains on the differences alone, on as many total energies alone, and on both; each is tested on the differences and on
the total energies of the built-in test molecules. One JSON line each: MAE in kcal/mol (relative) and meV/atom (total).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rung.data.reaction import Reaction
from rung.data.reaction_file import write_reactions
from rung.data.read import read_any
from rung.finetune.config import FinetuneConfig, SplitConfig
from rung.finetune.dataset import absolute_rows, draw
from rung.finetune.measure import row_errors
from rung.finetune.pipeline import finetune
from rung.model.checkpoint import load_checkpoint
from rung.pretrain.bench import machine

KEYS = ("relative_mae_kcal_per_mol", "energy_mae_mev_per_atom")


def differences(rows: Sequence[Reaction]) -> list[Reaction]:
    """Return each molecule's energies less that of its first geometry."""
    first: dict[str, Reaction] = {}
    relative = []
    for row in rows:
        reference = first.setdefault(row.group, row)
        if reference is not row:
            structures = (row.structures[0], reference.structures[0])
            relative.append(Reaction(row.key, row.group, structures, (1.0, -1.0), row.energy - reference.energy))
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--fidelity", default="mp2_ccpvdz")
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder of the sets and results (default: a temporary one)")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (absolute_rows(read_any("builtin", args.fidelity, split=s), args.fidelity) for s in ("train", "test"))
    write_reactions(folder / "relative.yaml", draw(differences(train), args.labels, 0), unit="kcal/mol")
    write_reactions(folder / "test.yaml", differences(test), unit="kcal/mol")
    print(json.dumps(machine(" ".join(["python", *sys.argv]))), flush=True)
    relative, split = str(folder / "relative.yaml"), SplitConfig(max_train=args.labels)
    sets: dict[str, dict[str, Any]] = {
        "relative": {"data": relative, "test": str(folder / "test.yaml")},
        "total": {"data": "builtin", "split": split},
        "both": {"data": "builtin", "relative": (relative,), "split": split},
    }
    for name, settings in sets.items():
        out = str(folder / name)
        config = FinetuneConfig(
            checkpoint=args.checkpoint, fidelity=args.fidelity, strategy=args.strategy, out=out, **settings
        )
        result = finetune(config)
        tuned = load_checkpoint(result.checkpoint).potential
        errors = row_errors(tuned, [*differences(test), *test], args.fidelity).metrics()
        line = {"trained_on": name, "labels": result.metrics["labels"], "strategy": args.strategy}
        line |= {key: errors[key] for key in KEYS}
        if name == "relative":
            line["relative_mae_kcal_per_mol_before"] = result.metrics["target"]["before"]["relative_mae_kcal_per_mol"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
