#!/usr/bin/env bash
# Pretraining on several machines by DeepSpeed's launcher, started on one of them:
#
#   deepspeed.sh CONFIG [key=value ...]
#
# Needs pdsh here, ssh without a password to every host of the hostfile, and the same paths on all of them. Copy this
# file and edit what is above the line. OUTPUT must be on a file system that all machines share. The same command goes
# on from the last state after a stop. Exit status: 0 finished, 75 stopped with the state saved.
#
# To stop such a run with its state saved, send SIGTERM to the ranks of one machine: pdsh passes no signals on.
set -euo pipefail
CONFIG=${1:?usage: deepspeed.sh CONFIG [key=value ...]}
OUTPUT=${OUTPUT:-runs/pretrain}
HOSTFILE=${HOSTFILE:-hostfile}     # lines such as: node0 slots=8
MASTER_PORT=${MASTER_PORT:-29500}  # another one for every job on the same machines
RANKS=${RANKS:-$(awk -F 'slots=' '!/^#/ && NF > 1 {sum += $2} END {print sum}' "$HOSTFILE")}
PYTHON=${PYTHON:-python}
LAUNCHER_OPTIONS=${LAUNCHER_OPTIONS:-} # such as --ssh_port 2222
# ----------------------------------------------------------------------------------------------------------------------
. "$("$PYTHON" -c 'from importlib.resources import files; print(files("rung.launch"))')/env.sh"

# DeepSpeed hands on variables that begin with PYTHON, and those of this file.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(OMP_|GLOO_|NCCL_|RUNG_|CUDA_VISIBLE_DEVICES=)' >"$DS_ENV_FILE" || true

words=("$CONFIG" "output=$OUTPUT" "world.size=$RANKS" "${@:2}")
launcher=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" --force_multi)
read -ra options <<<"$LAUNCHER_OPTIONS"
launcher+=("${options[@]}" --no_local_rank --module)

"${launcher[@]}" rung.launch check "${words[@]}"
"$PYTHON" -m rung.launch.supervise --output "$OUTPUT" -- "${launcher[@]}" rung.pretrain "${words[@]}"
