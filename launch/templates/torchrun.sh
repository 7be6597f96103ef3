#!/usr/bin/env bash
# Pretraining by torchrun: on one machine as it is; on several, the same command on every one of them, with their number.
#
#   torchrun.sh CONFIG [key=value ...]                                                          one machine
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 torchrun.sh CONFIG [key=value ...]  the first of two
#
# Copy this file and edit what is above the line. OUTPUT must be on a file system that all machines share. The same
# command goes on from the last state after a stop. Exit status: 0 finished, 75 stopped with the state saved.
set -euo pipefail
CONFIG=${1:?usage: torchrun.sh CONFIG [key=value ...]}
OUTPUT=${OUTPUT:-runs/pretrain}
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
RANKS_PER_NODE=${RANKS_PER_NODE:-2} # one for each GPU
PYTHON=${PYTHON:-python}
# ----------------------------------------------------------------------------------------------------------------------
. "$("$PYTHON" -c 'from importlib.resources import files; print(files("rung.launch"))')/env.sh"

words=("$CONFIG" "output=$OUTPUT" "world.size=$((NODES * RANKS_PER_NODE))" "${@:2}")
launcher=("$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$RANKS_PER_NODE")
if [ "$NODES" -gt 1 ]; then
  launcher+=(--node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?the host of NODE_RANK 0}")
  launcher+=(--master_port "${MASTER_PORT:-29500}")
else
  launcher+=(--standalone)
fi

"${launcher[@]}" -m rung.launch check "${words[@]}"
# torchrun's own restarts are left off: with Gloo, restarted ranks read the addresses of the dead ones.
exec "$PYTHON" -m rung.launch.supervise --output "$OUTPUT" -- "${launcher[@]}" -m rung.pretrain "${words[@]}"
