"""The potential: from a batch of structures to energies, forces and stress at any of its levels of theory.

In: `rung.data`'s Structure and Batch. Out: predictions, checkpoints, an ASE calculator. Calls `rung.kernels` for the
operations that cost the time.

    config          shape of a potential; YAML files into frozen dataclasses
    layers          the trunk: embeddings, message passing
    fidelity        how the level of theory enters: film or heads
    potential       energies, forces and stress; growing by a fidelity
    geometry        edge vectors; forces and stress from the gradient with respect to them
    direct          energies, forces and stress without autograd, for inference; direct_layers: its layers
    loss            sums and counts, exact over a data-parallel group
    predict         predictions and error metrics for structures
    checkpoint      the published format; card: its README; provenance: which code wrote it
    ase_calculator  a checkpoint in ASE
    cli             `rung evaluate`
    bench           times of the whole model, for rung.kernels.bench
"""

from rung.model.checkpoint import Checkpoint
from rung.model.checkpoint import load_checkpoint as load

__all__ = ["Checkpoint", "load"]
