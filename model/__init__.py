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
    predict         predictions for structures and reactions; prediction_file: as CSV or extxyz
    errors          error metrics, also by element and by size
    uncertainty     standard deviations of energies, from the last layer or an ensemble
    checkpoint      the published format; checkpoint_files: its bytes and digests; card: its README;
                    reference: predictions stored with it; provenance: which code wrote it
    hub             checkpoints by name; download: files over http
    publish         `rung publish`
    export          `rung export`
    neighbours      neighbour graphs of structures that move
    engines/        programs that move atoms: ASE, LAMMPS, torch-sim, i-PI
    ase_calculator  a checkpoint in ASE
    cli             `rung evaluate`
    bench           times of the whole model, for rung.kernels.bench
"""

from rung.model.checkpoint import Checkpoint
from rung.model.checkpoint import load_checkpoint as load

__all__ = ["Checkpoint", "load"]
