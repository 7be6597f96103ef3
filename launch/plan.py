"""Predict memory, step time, communication and cost of a run on a cluster: `rung plan CONFIG --cluster NAME`.

Nothing is trained: shapes come from the config's model, structures from the datasets' manifests, speeds from the
cluster's description, which says what of it was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rung.data.manifest import read_manifest, resolve_dataset
from rung.launch.clusters import Cluster, names, read_cluster
from rung.launch.predict import (
    FORMS,
    Forecast,
    Workload,
    batch_size,
    diloco,
    forecast,
    is_measured,
)
from rung.model.config import read_config, to_yaml
from rung.pretrain.cli import find_config, packaged_configs
from rung.pretrain.config import PretrainConfig, WorldConfig
from rung.pretrain.costs import shapes_of
from rung.pretrain.plan import make_plan, make_potential

COLUMNS = ("ranks", "form", "groups", "GB", "step ms", "comm", "sent/structure", "structures/s", "epoch", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `rung plan`."""
    parser.add_argument("config", help=f"YAML file, or one of ours by name: {', '.join(packaged_configs())}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config values, such as reptile.inner_steps=50"
    )
    parser.add_argument("--cluster", help=f"YAML file, or one of ours by name: {', '.join(names())}")
    parser.add_argument("--gpus", help="numbers of ranks, such as 8,64,512,4096 (default: the cluster's `sizes`)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--measure", metavar="FILE", help="time the config's step on this machine and write it as a cluster file"
    )


def run(args: argparse.Namespace) -> int:
    """Run `rung plan` and return its exit status; bad input raises ValueError or an OSError."""
    config = read_config(PretrainConfig, find_config(args.config), args.overrides)
    if (args.cluster is None) == (args.measure is None):
        raise ValueError("expected either --cluster (to predict) or --measure (to write such a file)")
    if args.measure is not None:
        from rung.launch.measure import measure

        text = to_yaml(measure(config, Path(args.measure).stem))
        Path(args.measure).write_text(text)
        print(text, end="")
        return 0
    cluster = read_cluster(args.cluster)
    sizes = _sizes(args.gpus, cluster)
    load = workload(config)
    forecasts = [forecast(config, load, cluster, ranks, form) for ranks in sizes for form in FORMS]
    if args.json:
        print(json.dumps(as_json(config, load, cluster, forecasts), indent=1))
    else:
        print(describe(config, load, cluster, forecasts))
    return 0


def workload(config: PretrainConfig) -> Workload:
    """Return the sizes of the config's model and of its datasets' training shards, from the manifests."""
    plan = make_plan(dataclasses.replace(config, mode="joint", world=WorldConfig()), 1)
    potential = make_potential(plan)
    shards = {}
    for task in config.tasks:
        manifest = read_manifest(task.dataset)
        # Edges grow with the volume within the cut-off: exact in a crystal, too many for small molecules.
        growth = (plan.model.cutoff / manifest.cutoff) ** 3
        for shard in manifest.shards_of("train"):
            shards[resolve_dataset(task.dataset), shard.file] = shard, growth
    structures = sum(shard.structures for shard, _ in shards.values())
    return Workload(
        shapes=tuple(shapes_of(potential, [parameter for _, parameter in potential.fidelity_parameters()])),
        channels=plan.model.channels,
        num_layers=plan.model.num_layers,
        atoms_per_structure=sum(shard.atoms for shard, _ in shards.values()) / structures,
        edges_per_structure=sum(growth * shard.edges for shard, growth in shards.values()) / structures,
        structures=sum(plan.counts),
        shards=len(shards),
        packs=sum(shard.packs for shard, _ in shards.values()),
    )


def describe(config: PretrainConfig, load: Workload, cluster: Cluster, forecasts: Sequence[Forecast]) -> str:
    """Return the prediction as text: what it rests on, warnings, the table."""
    return "\n".join(
        [
            *_basis(config, load, cluster),
            "",
            *_table([_row(line, cluster) for line in forecasts]),
            "",
            *_memory(forecasts, cluster),
            *(f"warning: {text}" for text in warnings(config, load, cluster, forecasts)),
        ]
    )


def warnings(config: PretrainConfig, load: Workload, cluster: Cluster, forecasts: Sequence[Forecast]) -> list[str]:
    """Return what is wrong with a prediction or would go wrong with the run."""
    found = []
    consumers = max(1, config.data.num_workers)
    for ranks in dict.fromkeys(line.ranks for line in forecasts):
        readers = ranks * consumers
        if load.structures < readers:
            found.append(f"{ranks} ranks: {readers} readers for {load.structures} structures: some get none")
        elif load.packs < readers:
            found.append(
                f"{ranks} ranks: {load.packs} packs in {load.shards} shards for {readers} readers: each pack is read "
                f"and decoded by {readers / load.packs:.0f} of them; build the data with smaller packs and shards"
            )
        elif load.shards < ranks:
            found.append(f"{ranks} ranks: {load.shards} shards, so ranks read the same files at the same time")
        if ranks > cluster.size:
            found.append(f"{ranks} ranks: the cluster has {cluster.size}")
    wide = [f for f in forecasts if f.form == "reptile" and f.ranks // f.groups > cluster.gpus_per_node]
    if wide:
        ranks, groups = wide[0].ranks, wide[0].groups
        found.append(
            f"reptile on {ranks} ranks: {groups} task groups of {ranks // groups} ranks send gradients between nodes "
            "in every inner step; for groups within a node reptile.tasks_per_outer must be a multiple of "
            f"{ranks // cluster.gpus_per_node}"
        )
    if not all(line.fits for line in forecasts):
        found.append("a rank's memory does not suffice where GB is marked '!': lower data.max_atoms")
    full = [line for line in forecasts if line.memory["reduction_buffer"] > 4 * load.parameters]
    if full:
        size = full[0].memory["reduction_buffer"] / 1e9
        found.append(
            f"ZeRO allocates a reduction buffer of {size:.1f} GB, for gradients of {_bytes(4 * load.parameters)}"
        )
    return found


def as_json(config: PretrainConfig, load: Workload, cluster: Cluster, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """Return the prediction as plain values."""
    return {
        "cluster": dataclasses.asdict(cluster),
        "model": {"parameters": load.parameters, "channels": load.channels, "num_layers": load.num_layers},
        "step_measured_for_this_model": is_measured(cluster, config, load),
        "data": {
            "structures": load.structures,
            "shards": load.shards,
            "packs": load.packs,
            "atoms_per_structure": load.atoms_per_structure,
            "edges_per_structure": load.edges_per_structure,
        },
        "forecasts": [
            {
                **dataclasses.asdict(line),
                "communication": line.communication,
                "shards_per_rank": load.shards / line.ranks,
            }
            for line in forecasts
        ],
        "warnings": warnings(config, load, cluster, forecasts),
    }


def _basis(config: PretrainConfig, load: Workload, cluster: Cluster) -> list[str]:
    """Say what the numbers rest on."""
    step = cluster.step
    structures, atoms, edges = batch_size(config, load)
    if is_measured(cluster, config, load):
        origin = "measured for just this model and optimizer"
    else:
        scaled = f"scaled from {step.parameters} parameters, {step.channels} channels, {step.num_layers} layers"
        origin = f"{step.origin} ({step.optimizer}), {scaled}"
        if config.optimizer.name == "soap" != step.optimizer:
            origin += "; SOAP's eigenbases are not in it"
    price = f"{cluster.price_per_gpu_hour:g} {cluster.currency} per rank and hour, assumed: {cluster.price_source}"
    reptile, form = config.reptile, diloco(config.reptile)
    return [
        f"cluster {cluster.name}: {cluster.description}",
        f"step: {origin}",
        f"  {step.source}",
        f"network: {cluster.network_origin}: {cluster.network_source}",
        f"price: {price if cluster.price_per_gpu_hour else 'not known'}",
        "derived, not measured: batches (filled to the budget, equal on all ranks), collectives (rings)",
        f"model: {load.parameters} parameters, {config.optimizer.name}, ZeRO stage {config.optimizer.zero_stage}",
        f"data: {load.structures} labelled structures in {load.packs} packs and {load.shards} shards; a batch has "
        f"{structures:.0f} structures, {atoms:.0f} atoms and {edges:.0f} edges",
        f"reptile: {reptile.inner_steps} inner steps, {reptile.tasks_per_outer} tasks per outer step, as configured; "
        f"diloco: {form.outer_optimizer}, {form.exchange} exchange, overlapped",
    ]


def _row(line: Forecast, cluster: Cluster) -> tuple[str, ...]:
    total = sum(line.memory.values())
    cost = f"{line.epoch_cost:.3g} {cluster.currency}" if cluster.price_per_gpu_hour else "-"
    return (
        str(line.ranks),
        line.form,
        f"{line.groups} x {line.ranks // line.groups}",
        f"{total / 1e9:.2f}" + ("" if line.fits else "!"),
        f"{1e3 * line.step_s:.1f}",
        f"{line.communication:.1%}",
        _bytes(line.wire_per_structure),
        f"{line.structures_per_s:,.0f}",
        _time(3600 * line.epoch_h),
        cost,
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows under their names, right-aligned."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _memory(forecasts: Sequence[Forecast], cluster: Cluster) -> list[str]:
    """Return what one rank's memory goes to, for the fullest of each form."""
    lines = []
    for form in FORMS:
        fullest = max((f for f in forecasts if f.form == form), key=lambda f: sum(f.memory.values()))
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in fullest.memory.items() if size)
        lines.append(f"memory of a rank, {form} on {fullest.ranks}: {parts}; of {cluster.gpu_memory_gb:g} GB")
    return lines


def _sizes(words: str | None, cluster: Cluster) -> list[int]:
    if words is None:
        return list(cluster.sizes)
    parts = words.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--gpus: expected numbers of ranks separated by commas, such as 8,64, found '{words}'")
    return [int(part) for part in parts]


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
