"""The pretraining configuration: every number that a user chooses, and nothing that can be derived from another.

`rung.model.config.read_config` fills these frozen dataclasses from YAML and `key=value` words; `plan.py` derives
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rung.data.fetch import RemoteConfig
from rung.data.fidelity import check_name
from rung.model.loss import LossConfig


@dataclass(frozen=True)
class TaskConfig:
    """One (dataset, fidelity) pair to train on."""

    dataset: str  # folder, path of a dataset.yaml, or `builtin`
    fidelity: str
    weight: float | None = None  # share of the structures; None: from label counts and data.temperature
    outer_weight: float = 1.0  # of this task's result in the mean of an outer step (reptile)
    energy_weight: float = 1.0  # multiplies loss.energy_weight for this task's structures
    forces_weight: float = 1.0
    shard_url: str = ""  # where the shards are, if not beside the manifest: 'https://host/{file}' or 'pipe:cmd {file}'

    def __post_init__(self) -> None:
        check_name(self.fidelity)
        where = f"tasks: {self.dataset}/{self.fidelity}"
        if self.weight is not None:
            _require(self.weight > 0, f"{where}: weight", "a positive number", self.weight)
        _require(self.outer_weight > 0, f"{where}: outer_weight", "a positive number", self.outer_weight)
        for name in ("energy_weight", "forces_weight"):
            _require(getattr(self, name) >= 0, f"{where}: {name}", "a number >= 0", getattr(self, name))


@dataclass(frozen=True)
class DataConfig:
    """How structures become batches; sizes are per rank."""

    max_atoms: int = 512  # atoms per batch
    max_edges: int = 8192  # directed edges per batch
    micro_batches: int = 1  # batches per rank and optimizer step, one after another: large steps in little memory
    temperature: float = 2.0  # a task's share is proportional to (its number of labels)^(1/temperature)
    num_workers: int = 0  # loader processes per stream; 0: batches are made in the training process
    prefetch: int = 2  # batches prepared ahead by each worker
    max_bad: int = 0  # corrupt packs tolerated before the run stops
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # cache, time-out and retries of a task's shard_url

    def __post_init__(self) -> None:
        for name in ("max_atoms", "max_edges", "micro_batches", "prefetch"):
            _require(getattr(self, name) >= 1, f"data.{name}", "a number >= 1", getattr(self, name))
        for name in ("num_workers", "max_bad"):
            _require(getattr(self, name) >= 0, f"data.{name}", "a number >= 0", getattr(self, name))
        _require(self.temperature >= 1, "data.temperature", "a number >= 1 (inf: all tasks alike)", self.temperature)


@dataclass(frozen=True)
class WorldConfig:
    """How the ranks are arranged and how long they wait for each other."""

    groups: int | None = None  # task groups (reptile); None: as many as ranks and tasks_per_outer have in common
    size: int | None = None  # ranks that must have come; None: as many as the launcher started
    timeout_minutes: float = 30.0  # a collective that waits longer fails on every rank

    def __post_init__(self) -> None:
        for name in ("groups", "size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"world.{name}", "a number >= 1", value)
        _require(self.timeout_minutes > 0, "world.timeout_minutes", "a positive number", self.timeout_minutes)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule and where its state lives (DESIGN.md section 8 has the measured reasons)."""

    name: Literal["soap", "adamw", "muon"] = "soap"
    lr: float = 3e-3  # at the end of the warm-up
    betas: tuple[float, ...] = (0.95, 0.95)
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 1e-6
    precondition_frequency: int = 10  # steps between two eigenbases (soap)
    warmup_steps: int = 100
    final_lr_fraction: float = 0.01  # of lr, at the end of the cosine
    gradient_clipping: float = 10.0  # largest gradient norm; 0: off
    zero_stage: int = 0  # 1, 2: optimizer state (and gradients) partitioned over the ranks
    max_skipped: int = 20  # steps that are not finite, in log intervals that all have some, before the run stops

    def __post_init__(self) -> None:
        _require(self.name in ("soap", "adamw", "muon"), "optimizer.name", "soap, adamw or muon", self.name)
        for name in ("lr", "eps"):
            _require(getattr(self, name) > 0, f"optimizer.{name}", "a positive number", getattr(self, name))
        betas_fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(betas_fit, "optimizer.betas", "two numbers in [0, 1)", self.betas)
        _require(
            self.precondition_frequency >= 1, "optimizer.precondition_frequency", ">= 1", self.precondition_frequency
        )
        _require(
            0 < self.final_lr_fraction <= 1, "optimizer.final_lr_fraction", "a number in (0, 1]", self.final_lr_fraction
        )
        for name in ("weight_decay", "warmup_steps", "gradient_clipping", "max_skipped"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", "a number >= 0", getattr(self, name))
        if self.zero_stage == 3:
            raise ValueError(
                "optimizer.zero_stage: 3 cannot differentiate forces (DeepSpeed's partitioned parameters fail in the "
                "double backward); use 0, 1 or 2"
            )
        _require(self.zero_stage in (0, 1, 2), "optimizer.zero_stage", "0, 1 or 2", self.zero_stage)
        if self.name == "muon" and self.zero_stage > 0 and self.gradient_clipping > 0:
            raise ValueError(
                "optimizer.gradient_clipping: with muon ZeRO clips what has already been made orthogonal, which only "
                "shrinks the step; set it to 0, or optimizer.zero_stage=0"
            )
        if self.name == "soap" and self.zero_stage > 0:
            raise ValueError(
                f"optimizer.name: soap needs matrix-shaped parameters and ZeRO stage {self.zero_stage} flattens them; "
                "set optimizer.zero_stage=0, or optimizer.name=adamw or muon"
            )


@dataclass(frozen=True)
class ReptileConfig:
    """The outer loop of `mode: reptile` (arXiv:1803.02999), whose momentum forms are those of DiLoCo (2311.08105)."""

    inner_steps: int = 8  # optimizer steps on one task, from the shared weights
    tasks_per_outer: int = 2  # tasks drawn for one outer step; the task groups share them
    outer_rate: float = 1.0  # epsilon in phi <- phi + epsilon * mean(phi_task - phi)
    outer_optimizer: Literal["sgd", "momentum", "nesterov"] = "sgd"  # what steps along the mean; sgd: plain Reptile
    outer_momentum: float = 0.9
    # The inner optimizer's moments: one set per group, one per group and task, or none that outlive a task (then soap,
    # whose first step only starts its bases, moves nothing in one of inner_steps steps).
    inner_state: Literal["group", "task", "reset"] = "group"
    exchange: Literal["float32", "bfloat16"] = "float32"  # what groups send; rounding errors go into the next exchange
    overlap: bool = False  # exchange while the next inner steps run: other groups' results come one outer step later

    def __post_init__(self) -> None:
        for name in ("inner_steps", "tasks_per_outer"):
            _require(getattr(self, name) >= 1, f"reptile.{name}", "a number >= 1", getattr(self, name))
        _require(0 < self.outer_rate <= 1, "reptile.outer_rate", "a number in (0, 1]", self.outer_rate)
        _require(0 <= self.outer_momentum < 1, "reptile.outer_momentum", "a number in [0, 1)", self.outer_momentum)
        for name, known in (
            ("outer_optimizer", ("sgd", "momentum", "nesterov")),
            ("inner_state", ("group", "task", "reset")),
            ("exchange", ("float32", "bfloat16")),
        ):
            _require(getattr(self, name) in known, f"reptile.{name}", ", ".join(known), getattr(self, name))
        if self.overlap and self.outer_optimizer == "momentum":
            raise ValueError(
                "reptile.outer_optimizer: momentum and results that come one outer step late swing ever further; with "
                "reptile.overlap=true use sgd or nesterov"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on unseen structures, with the averaged weights."""

    every: int = 1000  # steps; also measured at the end
    split: str = "val"
    max_structures: int = 256  # per task; 0: no evaluation

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluation.every", "a number >= 1", self.every)
        _require(self.max_structures >= 0, "evaluation.max_structures", "a number >= 0", self.max_structures)


@dataclass(frozen=True)
class WandbConfig:
    """Whether and where Weights & Biases gets the records; the environment's WANDB_MODE goes first."""

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "rung"

    def __post_init__(self) -> None:
        _require(self.mode in ("off", "offline", "online"), "wandb.mode", "off, offline or online", self.mode)


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run."""

    output: str  # folder of the run: state, metrics, checkpoint
    tasks: list[TaskConfig]
    steps: int  # optimizer steps, those of all task groups together
    mode: Literal["joint", "reptile"] = "joint"
    # The zero of each fidelity's energies: fitted to the labels, which leaves the network the least to learn (on the
    # built-in data 600 steps ended at 2 to 10 % smaller force errors), or those of isolated atoms.
    reference_energies: Literal["least_squares", "isolated_atoms"] = "least_squares"
    seed: int = 0
    # Fields of rung.model.config.ModelConfig; elements and fidelities come from the tasks' manifests.
    model: dict[str, Any] = field(default_factory=dict)
    activation_checkpointing: bool = False  # layers are computed again, not kept: less memory, 1.3-1.6 times the time
    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reptile: ReptileConfig = field(default_factory=ReptileConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # Per step (reptile: outer step), of the averaged weights, which are evaluated and served; 0: the raw weights.
    ema_decay: float = 0.995
    log_every: int = 50  # steps; ranks look for a stop signal as often
    save_every: int = 1000  # steps
    keep_states: int = 2
    stop_at: int | None = None  # save the state and leave at this step, for queues with short jobs; --resume goes on

    def __post_init__(self) -> None:
        _require(len(self.tasks) >= 1, "tasks", "at least one", "none")
        names = [(task.dataset, task.fidelity) for task in self.tasks]
        _require(len(set(names)) == len(names), "tasks", "distinct (dataset, fidelity) pairs", names)
        weighted = sum(task.weight is not None for task in self.tasks)
        _require(weighted in (0, len(names)), "tasks", "a weight for every task or for none", f"{weighted} weights")
        _require(self.mode in ("joint", "reptile"), "mode", "joint or reptile", self.mode)
        sources = ("least_squares", "isolated_atoms")
        _require(
            self.reference_energies in sources, "reference_energies", " or ".join(sources), self.reference_energies
        )
        for name in ("steps", "log_every", "save_every", "keep_states"):
            _require(getattr(self, name) >= 1, name, "a number >= 1", getattr(self, name))
        if self.mode == "joint":
            groups = self.world.groups
            _require(groups in (None, 1), "world.groups", "1 in mode joint, where every batch mixes the tasks", groups)
        if self.mode == "reptile":
            drawn = self.reptile.tasks_per_outer
            _require(
                drawn <= len(names), "reptile.tasks_per_outer", f"at most the number of tasks, {len(names)}", drawn
            )
            if drawn == len(names) and weighted:
                raise ValueError(
                    f"tasks: weight: every outer step trains on all {drawn} tasks (reptile.tasks_per_outer): weights "
                    "choose nothing; leave them out, draw fewer tasks, or set outer_weight"
                )
            if self.reptile.inner_state == "reset" and self.reptile.inner_steps == 1 and self.optimizer.name == "soap":
                raise ValueError(
                    "reptile.inner_steps: with inner_state=reset the first step on a task only starts soap's bases: "
                    "expected at least 2, found 1"
                )
        _require(0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)", self.ema_decay)


def _require(true: bool, name: str, expected: str, found: object) -> None:
    if not true:
        raise ValueError(f"{name}: expected {expected}, found {found}")
