"""Programs that move atoms with a checkpoint: relaxation and molecular dynamics, LAMMPS, torch-sim, i-PI.

In: a checkpoint and a fidelity. Out: trajectories and final structures, or forces for another program. Each program that
is not ASE is an extra, imported only where it is used.

relax.py     `rung relax`: ASE's optimizers
md.py        `rung md`: ASE's integrators
lammps.py    LAMMPS, by `fix external`, on any number of MPI ranks; `rung lammps`
torchsim.py  model wrapper for torch-sim's batched integrators
ipi.py       `rung ipi`: client of an i-PI server
"""
