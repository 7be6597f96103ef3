"""Descriptions of clusters for `rung plan`: how many GPUs, how they are joined, and how fast a step is on one.

A rank is one GPU, or one core of a cluster without any. Each file says which of its numbers were measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from rung.model.config import read_config

Origin = Literal["measured", "assumed"]


@dataclass(frozen=True)
class Link:
    """What joins ranks: a collective of n ranks takes bytes / bandwidth + latency * log2(n) (see predict.py)."""

    bandwidth_gb_s: float  # 1e9 bytes per second: of one rank within a node, of a whole node between nodes
    latency_us: float

    def __post_init__(self) -> None:
        _require(self.bandwidth_gb_s > 0, "bandwidth_gb_s", "a positive number", self.bandwidth_gb_s)
        _require(self.latency_us >= 0, "latency_us", "a number >= 0", self.latency_us)


@dataclass(frozen=True)
class Step:
    """Time and memory of one step of one rank for one model; other models are scaled (see predict.py).

    Forward, forces and backward take fixed_ms + atom_us * atoms + edge_us * edges.
    """

    origin: Origin
    source: str  # command, machine and date; or the reasoning
    channels: int
    num_layers: int
    parameters: int
    optimizer: str
    fixed_ms: float
    atom_us: float
    edge_us: float
    optimizer_ms: float  # a step of the optimizer, the mean over a period of its eigenbases
    bases_ms: float = 0.0  # the eigenbases' part of optimizer_ms, which the data ranks share
    bytes_fixed: float = 0.0
    bytes_per_atom: float = 0.0
    bytes_per_edge: float = 0.0
    structures_per_s: float = 0.0  # what one loader process makes into batches; 0: never waited for

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "parameters"):
            _require(getattr(self, name) >= 1, f"step.{name}", "a number >= 1", getattr(self, name))
        for name in ("fixed_ms", "atom_us", "edge_us", "optimizer_ms", "bases_ms", "structures_per_s"):
            _require(getattr(self, name) >= 0, f"step.{name}", "a number >= 0", getattr(self, name))


@dataclass(frozen=True)
class Cluster:
    """One cluster of equal nodes."""

    name: str
    description: str
    nodes: int
    gpus_per_node: int  # ranks of a node
    gpu_memory_gb: float  # 1e9 bytes of one rank
    intra_node: Link
    inter_node: Link
    network_origin: Origin
    network_source: str
    step: Step
    price_per_gpu_hour: float = 0.0  # 0: not known
    currency: str = "USD"
    price_source: str = ""
    runtime_gb: float = 0.0  # of a rank's memory, taken by the runtime: CUDA context, NCCL buffers
    sizes: tuple[int, ...] = field(default=(8, 64, 512, 4096))  # numbers of ranks to predict

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            _require(getattr(self, name) >= 1, name, "a number >= 1", getattr(self, name))
        _require(self.gpu_memory_gb > 0, "gpu_memory_gb", "a positive number", self.gpu_memory_gb)

    @property
    def size(self) -> int:
        """Ranks of the whole cluster."""
        return self.nodes * self.gpus_per_node


def names() -> list[str]:
    """Return the names of the clusters that come with the package."""
    files = (item.name for item in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def read_cluster(name: str) -> Cluster:
    """Read a cluster by its name here, or from a YAML file; raise ValueError or FileNotFoundError for a wrong one."""
    if name in names():
        return read_config(Cluster, Path(str(resources.files(__name__))) / f"{name}.yaml")
    if not Path(name).is_file():
        raise FileNotFoundError(f"--cluster: no file '{name}', and ours are {', '.join(names())}")
    return read_config(Cluster, name)


def _require(true: bool, name: str, expected: str, found: object) -> None:
    if not true:
        raise ValueError(f"cluster: {name}: expected {expected}, found {found}")
