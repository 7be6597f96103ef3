"""Everything that follows from a config and the datasets it names: computed here once, and printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rung.data.fidelity import Fidelity
from rung.data.manifest import MANIFEST_FILE, FidelityEntry, Manifest, read_manifest, resolve_dataset
from rung.data.mixing import Task, label_counts, mixing_weights
from rung.data.shard import file_sha256
from rung.model.config import ModelConfig, config_from_mapping, to_mapping
from rung.model.potential import Potential
from rung.pretrain.config import OptimizerConfig, PretrainConfig
from rung.pretrain.schedule import assign_tasks
from rung.pretrain.world import World, choose_groups


@dataclass(frozen=True)
class Plan:
    """The derived numbers of one run."""

    world: World
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]  # dataset name/fidelity
    outer_weights: tuple[float, ...]
    counts: tuple[int, ...]  # labelled training structures of each task
    model: ModelConfig
    fidelities: dict[str, Fidelity]
    e0: dict[str, dict[int, float]]  # fidelity -> atomic number -> eV
    scale: float  # eV
    num_parameters: int
    steps_per_round: int  # optimizer steps between two points where state can be saved
    rounds: int
    datasets: tuple[dict[str, Any], ...]  # what the checkpoint says about its data
    deepspeed: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: the config's, rounded up to whole rounds."""
        return self.rounds * self.steps_per_round

    def assigned(self, config: PretrainConfig, outer: int) -> tuple[tuple[int, ...], ...]:
        """Return the tasks of each group in outer step `outer`."""
        weights = tuple(task.weight for task in self.tasks)
        return assign_tasks(config.seed, outer, weights, config.reptile.tasks_per_outer, self.world.groups)

    def readers(self, config: PretrainConfig, world: World, stream: int) -> range:
        """Return the ranks of a world that a stream's structures are dealt to: of all tasks (joint), or of one.

        Where every group has the same tasks in every outer step, a task's are dealt to its group; else to all ranks, of
        which those read that are in a group that has the task just then.
        """
        drawn = config.reptile.tasks_per_outer
        if config.mode == "joint" or drawn < len(self.tasks) or drawn % world.groups:
            return range(world.size)
        weights = tuple(task.weight for task in self.tasks)
        groups = assign_tasks(config.seed, 0, weights, drawn, world.groups)
        return world.group_ranks(next(group for group, tasks in enumerate(groups) if stream in tasks))

    def outer_task(self, task: int) -> tuple[int, float]:
        """Return a task's fidelity (row) and its weight in an outer step."""
        return self.fidelity_index[self.tasks[task].fidelity], self.outer_weights[task]

    @property
    def fidelity_index(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.model.fidelities)}


def task_groups(config: PretrainConfig, size: int) -> int:
    """Return the number of task groups of `size` ranks; raise ValueError when the config's does not fit."""
    if config.world.size not in (None, size):
        raise ValueError(
            f"world.size: expected {config.world.size} rank(s), found {size}; has every node started, and do the "
            "launcher and this Python use the same MPI?"
        )
    if config.mode == "joint":
        return 1
    groups = choose_groups(size, config.reptile.tasks_per_outer, config.world.groups)
    if config.reptile.overlap and groups == 1:
        raise ValueError("reptile.overlap: one task group exchanges nothing; set it to false, or use more ranks")
    return groups


def make_plan(config: PretrainConfig, size: int) -> Plan:
    """Derive the plan for `size` ranks from the config and the manifests.

    Raises ValueError for what the datasets do not have, and for ranks that cannot be arranged as asked.
    """
    names = [task.dataset for task in config.tasks]
    manifests = {name: read_manifest(name) for name in dict.fromkeys(names)}
    entries = [manifests[task.dataset].entry(task.fidelity) for task in config.tasks]
    remote = config.data.remote
    plain = [
        Task(task.dataset, task.fidelity, 1.0, task.energy_weight, task.forces_weight, task.shard_url, remote)
        for task in config.tasks
    ]
    counts = label_counts(plain)
    task_names = tuple(f"{manifests[task.dataset].name}/{task.fidelity}" for task in config.tasks)
    for name, entry, count in zip(task_names, entries, counts, strict=True):
        if count == 0:
            raise ValueError(f"task {name}: expected labels in split 'train', found none; leave the task out")
        if not entry.e0:
            raise ValueError(f"task {name}: the manifest has no reference energies (E0), so energies have no zero")
    given = [task.weight for task in config.tasks if task.weight is not None]
    weights = [weight / sum(given) for weight in given] or mixing_weights(counts, config.data.temperature)
    reptile = config.mode == "reptile"
    steps_per_round = config.reptile.inner_steps * config.reptile.tasks_per_outer if reptile else 1
    tasks = tuple(replace(task, weight=weight) for task, weight in zip(plain, weights, strict=True))
    model = _model_config(config, list(manifests.values()))
    num_parameters = sum(parameter.numel() for parameter in Potential(model).parameters())
    return Plan(
        world=World(size, task_groups(config, size)),
        tasks=tasks,
        task_names=task_names,
        outer_weights=tuple(task.outer_weight for task in config.tasks),
        counts=tuple(counts),
        model=model,
        fidelities={task.fidelity: entry.descriptor for task, entry in zip(tasks, entries, strict=True)},
        e0=_reference_energies(tasks, entries, config.reference_energies),
        scale=_scale(entries, counts),
        num_parameters=num_parameters,
        steps_per_round=steps_per_round,
        rounds=math.ceil(config.steps / steps_per_round),
        datasets=tuple(_describe_dataset(name, manifest) for name, manifest in manifests.items()),
        deepspeed=deepspeed_settings(config.optimizer, num_parameters, config.data.micro_batches),
    )


def deepspeed_settings(config: OptimizerConfig, num_parameters: int, micro_batches: int = 1) -> dict[str, Any]:
    """Return DeepSpeed's dictionary.

    Batches are ours, so the batch size is a formality. Clipping is always named, because DeepSpeed clips at 1.0
    without the key; without ZeRO the engine clips, so that the norm is computed once. overlap_comm would reduce
    gradients in the order of arrival, which may differ between ranks. ZeRO allocates its bucket in full at every step,
    5e8 elements unless it is told how many there are; reduce_scatter would send the same bytes in more pieces. The
    throughput timer waits for the device twice a step.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_scatter": False,
            "reduce_bucket_size": num_parameters,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def make_potential(plan: Plan) -> Potential:
    """Return the initial potential with its reference energies and scale."""
    potential = Potential(plan.model)
    for fidelity, e0 in plan.e0.items():
        potential.set_reference(fidelity, e0)
    potential.set_scale(plan.scale)
    return potential


def describe(plan: Plan, config: PretrainConfig) -> str:
    """Return the plan as the lines that a run prints first."""
    budget = config.data
    lines = [
        f"mode {config.mode}: {plan.steps} optimizer steps in {plan.rounds} rounds of {plan.steps_per_round}, "
        f"{plan.world.size} rank(s) in {plan.world.groups} task group(s) of {plan.world.data_ranks}, "
        f"{budget.micro_batches} batch(es) per rank and step of at most {budget.max_atoms} atoms and "
        f"{budget.max_edges} edges",
        *(
            f"task {name}: {count} labelled structures, {_share(config, task.weight)}"
            for name, count, task in zip(plan.task_names, plan.counts, plan.tasks, strict=True)
        ),
        f"scale {plan.scale:.4f} eV (RMS of the training forces in eV/angstrom)",
        *(
            f"E0 {name} ({config.reference_energies.replace('_', ' ')}): {_energies(e0)}"
            for name, e0 in plan.e0.items()
        ),
        f"model of {plan.num_parameters} parameters: {to_mapping(plan.model)}",
        f"deepspeed {plan.deepspeed}",
    ]
    return "\n".join(lines)


def _share(config: PretrainConfig, weight: float) -> str:
    """Return in words how often a task of this weight is trained on."""
    if config.mode == "joint":
        return f"share {weight:.3f}"
    if config.reptile.tasks_per_outer == len(config.tasks):
        return "in every outer step"
    return f"drawn with weight {weight:.3f} for an outer step"


def _energies(e0: Mapping[int, float]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(f"{chemical_symbols[number]} {energy:.3f} eV" for number, energy in sorted(e0.items()))


def _model_config(config: PretrainConfig, manifests: Sequence[Manifest]) -> ModelConfig:
    elements = sorted({number for manifest in manifests for number in manifest.elements})
    fidelities = list(dict.fromkeys(task.fidelity for task in config.tasks))
    derived = {"elements": elements, "fidelities": fidelities, "seed": config.seed}
    model = config_from_mapping(ModelConfig, {**derived, **config.model}, "model")
    missing = [number for number in elements if number not in model.elements]
    if missing:
        raise ValueError(
            f"model.elements: the datasets have atomic numbers {missing} too; leave the key out to derive it"
        )
    if set(model.fidelities) != set(fidelities):
        raise ValueError(f"model.fidelities: expected those of the tasks, {fidelities}, found {list(model.fidelities)}")
    return model


def _reference_energies(
    tasks: Sequence[Task], entries: Sequence[FidelityEntry], source: str
) -> dict[str, dict[int, float]]:
    """Return E0s per fidelity; where datasets overlap, those of the one with more energies win."""
    e0: dict[str, dict[int, float]] = {task.fidelity: {} for task in tasks}
    pairs = zip(tasks, entries, strict=True)
    for task, entry in sorted(pairs, key=lambda pair: sum(pair[1].num_energies.values())):
        if source == "isolated_atoms" and entry.e0_source != source:
            raise ValueError(
                f"reference_energies: {task.dataset}/{task.fidelity} has no isolated-atom energies in its manifest; "
                "use reference_energies=least_squares"
            )
        e0[task.fidelity].update(entry.e0 if source == "isolated_atoms" else entry.e0_fit)
    return e0


def _scale(entries: Sequence[FidelityEntry], counts: Sequence[int]) -> float:
    """Return the RMS of the training forces; without any forces that of the energies per atom around their mean."""
    for field in ("force_rms", "energy_std"):
        known = [(getattr(entry, field), n) for entry, n in zip(entries, counts, strict=True) if getattr(entry, field)]
        if known:
            return math.sqrt(sum(n * value**2 for value, n in known) / sum(n for _, n in known))
    raise ValueError("tasks: the manifests have neither forces nor spread of energies, so there is nothing to learn")


def _describe_dataset(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "source": manifest.source,
        "licence": manifest.licence,
        "manifest_sha256": file_sha256(resolve_dataset(name) / MANIFEST_FILE),
    }
