# Source this before starting Rung: `. launch/env.sh`. The Makefile and the templates do; other job scripts should too.

# The current directory stays off sys.path: from the repository's root `import data` would load a second copy of rung.data.
export PYTHONSAFEPATH=1

# Threads of a rank. Unset, Rung divides the machine's cores by its ranks; torchrun sets 1, whatever the machine.
if [ -n "${RANKS_PER_NODE:-}" ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
  export OMP_NUM_THREADS=$(( $(nproc) > RANKS_PER_NODE ? $(nproc) / RANKS_PER_NODE : 1 ))
fi

# Several machines: the network that ranks use. Rung chooses an interface for Gloo where a host name resolves to a
# loopback address; set these where it chooses the wrong one, or where NCCL does.
#   export GLOO_SOCKET_IFNAME=ib0
#   export NCCL_SOCKET_IFNAME=ib0
# Where NCCL hangs or is slow, this says what it does:
#   export NCCL_DEBUG=INFO
