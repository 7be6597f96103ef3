"""Times of the whole model as JSON lines: one process for one backend, as `python -m rung.kernels.bench` starts it.

    python -m rung.model.bench --backend native --channels 64

The workload is that of rung.kernels.bench: 64 molecules of 27 atoms; two layers, l_max = 3, R = 8, four fidelities.
`energy_forces` is inference as predict() does it, `train` one step: energies, forces, loss, its gradient and AdamW.
Peak memory is that of the process. Backend `compile` is torch.compile of the reference, in the form that suits it best
(see `compiled_network`); compiling takes minutes and is not part of the times.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rung.data.batch import Batch, count_elements
from rung.kernels import Edges, VectorMessage, use_backend
from rung.kernels.bench import ATOMS, CUTOFF, L_MAX, MOLECULES, NUM_RADIAL, molecules
from rung.kernels.measure import Timer
from rung.kernels.memory import keep_freed_memory
from rung.model import layers, potential
from rung.model.config import ModelConfig
from rung.model.direct import evaluator
from rung.model.geometry import edge_vectors, forces_from
from rung.model.potential import Potential

ELEMENTS = (1, 6, 7, 8)
FIDELITIES = ("a", "b", "c", "d")


def workload(device: str) -> Batch:
    """Return the molecules as a batch with random elements, labels and fidelities."""
    positions, edges = molecules(device)
    N, E, M = len(positions), len(edges.senders), MOLECULES
    generator = torch.Generator().manual_seed(0)
    elements = torch.tensor(ELEMENTS)[torch.randint(len(ELEMENTS), (N,), generator=generator)]
    batch = Batch(
        keys=tuple(map(str, range(M))),
        element_counts=count_elements(elements.numpy()),
        numbers=elements,
        positions=positions,
        structure=torch.arange(M).repeat_interleave(ATOMS),
        cell=torch.zeros(M, 3, 3),
        charge=torch.zeros(M, dtype=torch.int64),
        multiplicity=torch.ones(M, dtype=torch.int64),
        fidelity=torch.arange(M) % len(FIDELITIES),
        task=torch.zeros(M, dtype=torch.int64),
        receivers=edges.receivers,
        senders=edges.senders,
        row_ptr=edges.row_ptr,
        reverse=edges.reverse,
        shifts=torch.zeros(E, 3),
        energy=torch.randn(M, generator=generator, dtype=torch.float64),
        forces=torch.randn(N, 3, generator=generator),
        stress=torch.full((M, 3, 3), math.nan),
        energy_weight=torch.ones(M),
        forces_weight=torch.ones(M),
    )
    return batch.to(device)


def make_potential(channels: int, l_hidden: int, device: str) -> Potential:
    """Return the benchmark's potential."""
    made = Potential(
        ModelConfig(
            elements=ELEMENTS,
            fidelities=FIDELITIES,
            channels=channels,
            l_hidden=l_hidden,
            l_max=L_MAX,
            num_radial=NUM_RADIAL,
            cutoff=CUTOFF,
            average_neighbours=20.0,
        )
    )
    for fidelity in FIDELITIES:
        made.set_reference(fidelity, dict.fromkeys(ELEMENTS, 0.0))
    return made.to(device)


Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def compiled_network(model: Potential, batch: Batch) -> Network:
    """Return torch.compile of radial functions and harmonics -> energies and their gradients.

    torch.compile cannot differentiate its own result twice, so the gradient is inside what is compiled (the only way in
    torch 2.13: trace_autograd_ops). It fuses best what the reference avoids for the sake of eager memory: messages
    of size [E, L, C] and invariants written out term by term. Geometry, loss and optimizer stay outside: 3 % of a step.
    """
    import torch._dynamo

    torch._dynamo.config.trace_autograd_ops = True
    counts = [batch.element_counts.get(number, 0) for number in ELEMENTS]
    groups = layers.ElementGroups.of(model.element_row[batch.numbers], counts)
    vars(layers).update(convolve=_flat_convolve, invariants=_flat_invariants())
    vars(potential).update(ElementGroups=_Fixed(groups))

    def network(radial_ER: Tensor, harmonics_EL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, energy_M = model._energies(batch, radial_ER, harmonics_EL, owned_N=None)
        g_radial, g_harmonics = torch.autograd.grad(energy_M.sum(), (radial_ER, harmonics_EL), create_graph=True)
        return energy_M, g_radial, g_harmonics

    return torch.compile(network, fullgraph=True, dynamic=False)


class _Fixed:
    def __init__(self, groups: layers.ElementGroups) -> None:
        self._groups = groups

    def of(self, *_: Any) -> layers.ElementGroups:
        return self._groups


def _flat_convolve(
    radial_ER: Tensor,
    harmonics_EL: Tensor,
    x_NC: Tensor,
    weights_RlC: Tensor,
    edges: Edges,
    vectors: VectorMessage | None = None,
) -> Tensor:
    receivers, senders = edges.receivers.long(), edges.senders.long()
    R, num_degrees, C = weights_RlC.shape
    message_ElC = (radial_ER @ weights_RlC.flatten(1)).view(-1, num_degrees, C) * x_NC.index_select(0, senders)[:, None]
    if vectors is not None:
        w_E3C = vectors.w.index_select(0, senders)
        along_EC = (harmonics_EL[:, 1:4, None] * w_E3C).sum(1) / math.sqrt(3)
        axial_ElC = (radial_ER @ vectors.axial_weights.flatten(1)).view(-1, num_degrees, C)
        message_ElC = message_ElC + axial_ElC * along_EC[:, None]
    parts = [
        harmonics_EL[:, degree**2 : (degree + 1) ** 2, None] * message_ElC[:, degree : degree + 1]
        for degree in range(num_degrees)
    ]
    if vectors is not None:
        parts[1] = parts[1] + (radial_ER @ vectors.identity_weights)[:, None] * w_E3C
    message_ELC = torch.cat(parts, dim=1)
    return message_ELC.new_zeros(x_NC.shape[0], *message_ELC.shape[1:]).index_add(0, receivers, message_ELC)


def _flat_invariants() -> Callable[[Tensor], Tensor]:
    from rung.kernels.invariants import reference

    products, rows = reference._tables(L_MAX)

    def evaluate(A_NLC: Tensor) -> Tensor:
        factors = list(A_NLC.unbind(1))
        sums: list[Any] = [0.0] * products.num_rows
        for row, i, j, coefficient in products.terms:
            sums[row] = sums[row] + coefficient * (factors[i] * factors[j])
        factors += sums
        values: list[Any] = [0.0] * rows.num_rows
        for row, i, j, coefficient in rows.terms:
            values[row] = values[row] + coefficient * (factors[i] * factors[j])
        return torch.stack([factors[0], *values], dim=1)

    return evaluate


def train_step(model: Potential, batch: Batch, compiled: bool) -> Callable[[], object]:
    """Return one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    network = compiled_network(model, batch) if compiled else None

    def energy_and_forces() -> tuple[Tensor, Tensor]:
        if network is None:
            prediction = model(batch)
            return prediction.energy, prediction.forces
        vectors_E3 = edge_vectors(batch).detach().requires_grad_()
        basis = model._basis(vectors_E3)
        energy_M, *gradients = network(*[tensor.detach().requires_grad_() for tensor in basis])
        (gradient_E3,) = torch.autograd.grad(basis, vectors_E3, gradients, create_graph=True)
        return energy_M, forces_from(batch, gradient_E3)

    def step() -> float:
        model.train()
        energy, forces = energy_and_forces()
        loss = (energy - batch.energy).square().mean() + (forces - batch.forces).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def peak_memory_mb() -> float:
    """Return the peak of this process's resident memory; getrusage would count that of the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    """Print one line for each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("native", "reference", "compile"), required=True)
    parser.add_argument("--channels", type=int, required=True)
    parser.add_argument("--l-hidden", type=int, choices=(0, 1), default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    use_backend("native" if arguments.backend == "native" else "reference")
    model, batch = make_potential(arguments.channels, arguments.l_hidden, arguments.device), workload(arguments.device)
    timer = Timer(arguments.device, arguments.repeats)
    phases: dict[str, Callable[[], object]] = {}
    if arguments.backend != "compile":
        model.eval()
        phases["energy_forces"] = lambda: evaluator(model)(batch, forces=True)
    phases["train"] = train_step(model, batch, arguments.backend == "compile")
    for phase, function in phases.items():
        ms = timer({phase: function})[phase]
        peak_mb = peak_memory_mb() if arguments.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        line = {"phase": phase, "backend": arguments.backend, "ms": round(ms, 3), "peak_mb": round(peak_mb)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
