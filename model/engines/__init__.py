"""Programs that move atoms with a checkpoint: relaxation and molecular dynamics, LAMMPS, torch-sim, i-PI.

In: a checkpoint and a fidelity. Out: trajectories and final structures, or forces for another program. Each program
that is not ASE is an extra, imported only where it is used.

start.py          what the commands have in common: options, the structure, the calculator
trajectory.py     frames on disk
progress.py       a bar or lines; Ctrl-C finishes the step
freedom.py        degrees of freedom, and the temperature of those that move
restart.py        what a frame must share with the run that continues it
relax.py          `rung relax`: ASE's optimizers
md.py             `rung md`: ASE's integrators
lammps.py         LAMMPS by `fix external`, on any number of MPI ranks
lammps_domain.py  what one rank computes: its own atoms in their surroundings
lammps_types.py   which elements the atom types are
lammps_script.py  `rung lammps`: an input script before and after the fix
torchsim.py       model wrapper for torch-sim's batched integrators
ipi.py            `rung ipi`: client of an i-PI server
"""
