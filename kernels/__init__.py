"""The operations that carry the time of a training step: edge basis, convolution, invariants.

In: edge vectors in angstrom, node features and weights as tensors, the neighbour graph as `Edges`. Out: tensors that
can be differentiated twice. Each operation is defined by plain PyTorch (`*/reference.py`: any dtype, any device, any
order of differentiation) and carried out by fused native kernels where they can be had. Kernels own no parameters and
know nothing about models, fidelities or files; importing them compiles nothing.

Shape legend: E directed edges i <- j, N atoms, C channels, R radial functions, L = (l_max + 1)^2 harmonics (e3nn's
order), l = l_max + 1 degrees, K invariants.

    backend.py          use_backend and RUNG_KERNELS: native kernels or the reference, and why
    library.py          builds and loads the CPU libraries
    nvrtc.py            compiles and launches the CUDA kernels
    registration.py     how an operation becomes a differentiable operation of torch
    explicit.py         the native operations and their backward passes as plain functions
    check.py            checks of arguments
    edges.py            Edges, the neighbour graph that the convolution reads
    memory.py           keep_freed_memory, for the large temporaries of the plain definitions on the CPU
    harmonics.py        the real harmonics as Cartesian tensors, from which the constant tables are made
    bench.py            times of everything beside the reference and torch.compile
    measure.py          times and the machine's measured limits
    codegen/            tape differentiation -> the generated.h of the operations
    roofs/              the processor's measured peak
    lanes.h             the lane pack on which the mathematics of the native kernels is written
    edge_basis/         edge vectors -> radial functions and harmonics
    convolution/        edge-aligned convolution of scalars and vectors
    mixing/             dense products over channels, by degree and plain
    invariants/         the table of rotation-invariant polynomials, and their evaluation

An operation's folder holds reference.py (the definition), op.py (checks, choice, differentiation), cpu.cpp with cpu.py
and cuda.cu with cuda.py (sources, and the calls into them).
"""

from rung.kernels.backend import ReferenceWarning, use_backend
from rung.kernels.convolution.op import convolve
from rung.kernels.convolution.reference import VectorMessage
from rung.kernels.edge_basis.op import edge_basis
from rung.kernels.edges import Edges
from rung.kernels.invariants.op import invariants
from rung.kernels.invariants.table import NUM_INVARIANTS
from rung.kernels.mixing.op import matmul, mix

__all__ = [
    "NUM_INVARIANTS",
    "Edges",
    "ReferenceWarning",
    "VectorMessage",
    "convolve",
    "edge_basis",
    "invariants",
    "matmul",
    "mix",
    "use_backend",
]
