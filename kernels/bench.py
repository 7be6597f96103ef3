"""Times of the native kernels beside the reference and torch.compile, as JSON lines.

    python -m rung.kernels.bench                                  # operations and the whole model, one thread
    python -m rung.kernels.bench --level op --channels 64 --out benchmarks/results/kernels.jsonl

The workload is 64 molecules of 27 atoms with about 20 neighbours within 5 angstrom, R = 8, l_max = 3, float32. Every
time is the best of several in turn, so that the ratios of a line come from the same minutes. `fraction_of_peak` is the
rate of multiplications and additions in the formulas over the rate of fused multiply-adds measured before and after.
The lines of level `model` come from `python -m rung.model.bench`, one process for each backend, which also reports peak
memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rung.kernels import Edges, VectorMessage, convolve, edge_basis, invariants, library, matmul, mix, use_backend
from rung.kernels.measure import Timer, copy_bandwidth, peak_flops, processor
from rung.kernels.memory import keep_freed_memory

MOLECULES, ATOMS, NEIGHBOURS, CUTOFF = 64, 27, 20.0, 5.0
NUM_RADIAL, L_MAX = 8, 3
PHASES = ("forward", "backward", "double_backward")
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An operation, its inputs, and which of them a training step differentiates with respect to.

    `forces` are the inputs that the force call needs gradients of, `weights` those that the last pass does. `flops`
    are the multiplications and additions of the formulas in each phase, None where nobody has counted.
    """

    op: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    forces: tuple[int, ...]
    weights: tuple[int, ...]
    flops: tuple[float | None, float | None, float | None]


def molecules(device: str = "cpu", seed: int = 0) -> tuple[Tensor, Edges]:
    """Return positions [N, 3] in angstrom and the graph of random elongated molecules, at least 1 angstrom apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.tensor([1.6, 1.0, 0.8], dtype=torch.float64)

    def blob(scale: float) -> Tensor:
        points = torch.zeros(0, 3, dtype=torch.float64)
        while len(points) < ATOMS:
            point = torch.randn(3, generator=generator, dtype=torch.float64) * shape * scale
            if not len(points) or (points - point).norm(dim=1).min() > 1.0:
                points = torch.cat([points, point[None]])
        return points

    def degree(positions: Tensor) -> float:
        return ((torch.cdist(positions, positions) < CUTOFF).sum().item() - ATOMS) / ATOMS

    low, high = 1.0, 6.0
    for _ in range(12):  # bisect the size for the number of neighbours
        middle = (low + high) / 2
        crowded = sum(degree(blob(middle)) for _ in range(4)) / 4 > NEIGHBOURS
        low, high = (middle, high) if crowded else (low, middle)
    positions = torch.stack([blob(low) for _ in range(MOLECULES)])
    linked = (torch.cdist(positions, positions) < CUTOFF) & ~torch.eye(ATOMS, dtype=torch.bool)
    molecule, i, j = linked.nonzero(as_tuple=True)
    receivers, senders = molecule * ATOMS + i, molecule * ATOMS + j
    num_atoms = MOLECULES * ATOMS
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(receivers, minlength=num_atoms).cumsum(0)])
    reverse = torch.argsort(senders * num_atoms + receivers)  # edges are sorted by receiver, then sender
    graph = Edges(*(tensor.to(device, torch.int32) for tensor in (receivers, senders, row_ptr, reverse)))
    return positions.flatten(0, 1).float().to(device), graph


def cases(channels: int, device: str) -> Iterator[Case]:
    """Yield the operations of one layer on the workload."""
    positions, edges = molecules(device)
    vectors = positions[edges.senders] - positions[edges.receivers]
    radial, harmonics = edge_basis(vectors, cutoff=CUTOFF, num_radial=NUM_RADIAL, l_max=L_MAX)
    E, N, C, R, L, degrees = len(vectors), len(positions), channels, NUM_RADIAL, (L_MAX + 1) ** 2, L_MAX + 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def scalars(radial: Tensor, harmonics: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        return convolve(radial, harmonics, x, weights, edges)

    def with_vectors(radial: Tensor, harmonics: Tensor, x: Tensor, weights: Tensor, *message: Tensor) -> Tensor:
        return convolve(radial, harmonics, x, weights, edges, VectorMessage(*message))

    def basis(vectors: Tensor) -> tuple[Tensor, Tensor]:
        return edge_basis(vectors, cutoff=CUTOFF, num_radial=NUM_RADIAL, l_max=L_MAX)

    yield Case("edge_basis", basis, [vectors], (0,), (), (None, None, None))
    inputs = [radial, harmonics, draw(N, C), draw(R, degrees, C)]
    counts = (
        E * C * (2 * R * degrees + degrees + 2 * L),
        E * C * (4 * R * degrees + 4 * L + 4 * degrees),
        E * C * (8 * R * degrees + 8 * L + 12 * degrees),
    )
    yield Case("convolution", scalars, inputs, (0, 1, 2), (2, 3), counts)
    vector_inputs = [*inputs, draw(N, 3, C), draw(R, degrees, C), draw(R, C)]
    yield Case(
        "convolution_vectors",
        with_vectors,
        vector_inputs,
        (0, 1, 2, 4),
        (2, 3, 4, 5, 6),
        vector_flops(E * C, R, degrees),
    )
    yield Case("invariants", invariants, [draw(N, L, C)], (0,), (0,), (None, None, None))
    product = 2.0 * N * L * C * C
    yield Case("mix", mix, [draw(N, L, C), draw(degrees, C, C)], (0,), (0, 1), (product, product, 2 * product))
    product = 2.0 * N * 14 * C * C
    yield Case("matmul", matmul, [draw(N, 14 * C), draw(14 * C, C)], (0,), (0, 1), (product, product, 2 * product))


def vector_flops(edge_channels: int, R: int, degrees: int) -> tuple[float, float, float]:
    """Return the operations of the convolution of scalars and vectors, per edge and channel as the formulas stand.

    Their terms: u, the radial functions P0, P1, P2 (`radial`) and, twice, their products with gradients or tangents.
    """
    radial, L = 2 * R * (2 * degrees + 1), degrees**2
    forward = 6 + radial + 3 * degrees + 2 * L + 6
    backward = forward + radial + 2 * L + 6 * degrees + 18
    double_backward = 60 + 4 * radial + 8 * L + 28 * degrees
    return edge_channels * forward, edge_channels * backward, edge_channels * double_backward


def phase_functions(case: Case, function: Callable[..., Any], *, twice: bool) -> dict[str, Callable[[], object]]:
    """Return what to time in each phase: the call, the gradients of the force call, and the gradients of those."""
    detached = [tensor.detach() for tensor in case.inputs]

    def forward() -> object:
        with torch.no_grad():
            return function(*detached)

    inputs = [tensor.detach().clone().requires_grad_() for tensor in case.inputs]
    results = function(*inputs)
    values = [results] if isinstance(results, Tensor) else list(results)
    cotangents = [torch.randn_like(value).requires_grad_() for value in values]
    forces = [inputs[k] for k in case.forces]

    def backward() -> object:
        return torch.autograd.grad(values, forces, cotangents, retain_graph=True)

    functions: dict[str, Callable[[], object]] = {"forward": forward, "backward": backward}
    if twice:
        first = torch.autograd.grad(values, forces, cotangents, create_graph=True)
        seeds = [torch.randn_like(gradient) for gradient in first]
        targets = [*cotangents, *(inputs[k] for k in case.weights)]
        functions["double_backward"] = lambda: torch.autograd.grad(
            first, targets, seeds, retain_graph=True, allow_unused=True
        )
    return functions


def op_lines(case: Case, channels: int, device: str, repeats: int, with_compile: bool) -> Iterator[Line]:
    """Yield a line for each phase of an operation: native, reference and compiled reference take turns."""
    with use_backend("native"):
        variants = {"native": phase_functions(case, case.function, twice=True)}
    with use_backend("reference"):
        variants["reference"] = phase_functions(case, case.function, twice=True)
        if with_compile:
            torch._dynamo.reset()
            compiled = torch.compile(case.function, dynamic=False)
            variants["compile"] = phase_functions(case, compiled, twice=False)  # torch cannot differentiate it twice
    before = peak_flops(device)
    timed: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        functions = {
            name: _under("native" if name == "native" else "reference", phases[phase])
            for name, phases in variants.items()
            if phase in phases
        }
        timed[phase] = Timer(device, repeats)(functions)
    peak = (before + peak_flops(device)) / 2
    for phase, flops in zip(PHASES, case.flops, strict=True):
        times = timed[phase]
        ms = times["native"]
        yield {
            "level": "op",
            "op": case.op,
            "phase": phase,
            "channels": channels,
            "ms": round(ms, 4),
            "gflops": None if flops is None else round(flops / ms / 1e6, 1),
            "fraction_of_peak": None if flops is None else round(flops / (ms * 1e-3) / peak, 3),
            "reference_ms": round(times["reference"], 3),
            "ratio_to_reference": round(times["reference"] / ms, 2),
            "compile_ms": round(times["compile"], 3) if "compile" in times else None,
            "ratio_to_compile": round(times["compile"] / ms, 2) if "compile" in times else None,
        }


def _under(backend: str, function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with use_backend(backend):
            return function()

    return call


def machine_line(device: str, command: Sequence[str]) -> Line:
    """Return what the figures depend on: commit, machine, measured roofs."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device != "cpu" else processor()
    return {
        "level": "machine",
        "command": " ".join(["python -m rung.kernels.bench", *command]),
        "commit": git.stdout.strip() or None,
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": library.instruction_set() if device == "cpu" else torch.cuda.get_device_capability(),
        "peak_gflops": round(peak_flops(device) / 1e9, 1),
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
    }


def model_lines(channels: int, l_hidden: int, arguments: argparse.Namespace) -> list[Line]:
    """Return the whole model's lines: every backend in processes of its own, in turn, the best time of each."""
    backends = ["native", "reference"] + (["compile"] if arguments.compile else [])
    best: dict[tuple[str, str], Line] = {}
    for turn in range(arguments.turns):
        for backend in backends:
            if backend == "compile" and turn > 0:
                continue  # minutes of compiling
            command = [sys.executable, "-m", "rung.model.bench", "--backend", backend, "--channels", str(channels)]
            command += ["--l-hidden", str(l_hidden), "--device", arguments.device, "--threads", str(arguments.threads)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for line in map(json.loads, output.splitlines()):
                key = (line["phase"], backend)
                if key not in best or line["ms"] < best[key]["ms"]:
                    best[key] = line
    lines = []
    for phase in ("energy_forces", "train"):
        found = {backend: best.get((phase, backend)) for backend in ("native", "reference", "compile")}
        native = found["native"]
        assert native is not None
        line = {"level": "model", "op": f"l_hidden={l_hidden}", "phase": phase, "channels": channels}
        line |= {"ms": native["ms"], "fraction_of_peak": None, "peak_mb": native["peak_mb"]}
        for backend in ("reference", "compile"):
            other = found[backend]
            line[f"{backend}_ms"] = other and other["ms"]
            line[f"{backend}_peak_mb"] = other and other["peak_mb"]
            line[f"ratio_to_{backend}"] = other and round(other["ms"] / native["ms"], 2)
        lines.append(line)
    return lines


def main() -> None:
    """Print the lines, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=("op", "model", "all"), default="all")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--l-hidden", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="of the model level")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="of each time at op level")
    parser.add_argument("--turns", type=int, default=2, help="processes of each backend at model level")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too (minutes)")
    parser.add_argument("--out", type=Path, help="file for the lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    out = arguments.out.open("w") if arguments.out else None

    def write(line: Line) -> None:
        print(json.dumps(line), flush=True)
        if out is not None:
            out.write(json.dumps(line) + "\n")
            out.flush()

    write(machine_line(arguments.device, sys.argv[1:]))
    for channels in arguments.channels:
        if arguments.level != "model":
            for case in cases(channels, arguments.device):
                for line in op_lines(case, channels, arguments.device, arguments.repeats, arguments.compile):
                    write(line)
        if arguments.level != "op":
            for l_hidden in arguments.l_hidden:
                for line in model_lines(channels, l_hidden, arguments):
                    write(line)
    if out is not None:
        out.close()


if __name__ == "__main__":
    main()
