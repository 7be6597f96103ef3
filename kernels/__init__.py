"""The operations that carry the time of a training step: edge basis, convolution, invariants.

In: edge vectors in angstrom, node features and weights as tensors, the neighbour graph as `Edges`. Out: tensors that
can be differentiated twice. The plain PyTorch definitions in `*/reference.py` run in any dtype on any device. Kernels
own no parameters and know nothing about models, fidelities or files.

Shape legend: E directed edges i <- j, N atoms, C channels, R radial functions, L = (l_max + 1)^2 harmonics (e3nn's
order), l = l_max + 1 degrees, K invariants.

    edges.py        Edges, the neighbour graph that the convolution reads
    memory.py       keep_freed_memory, for the large temporaries of the plain definitions on the CPU
    harmonics.py    the real harmonics as Cartesian tensors, from which the constant tables are made
    edge_basis/     edge vectors -> radial functions and harmonics
    convolution/    edge-aligned convolution of scalars and vectors
    invariants/     the table of rotation-invariant polynomials, and their evaluation
"""

from rung.kernels.convolution.reference import VectorMessage, convolve
from rung.kernels.edge_basis.reference import edge_basis
from rung.kernels.edges import Edges
from rung.kernels.invariants.reference import invariants
from rung.kernels.invariants.table import NUM_INVARIANTS

__all__ = ["NUM_INVARIANTS", "Edges", "VectorMessage", "convolve", "edge_basis", "invariants"]
