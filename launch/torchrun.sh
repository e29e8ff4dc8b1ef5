#!/usr/bin/env bash
# Train without Slurm, on one machine, or on several machines where each starts this script.
#
#   launch/torchrun.sh CONFIG.yaml [--key value ...]                                    # one machine, all its GPUs
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=alpha launch/torchrun.sh CONFIG.yaml [...]         # on alpha
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=alpha launch/torchrun.sh CONFIG.yaml [...]         # on the other
#
# Variables, with their defaults: NPROC_PER_NODE (the number of GPUs that nvidia-smi lists), MASTER_PORT (29500), PYTHON (python),
# OMP_NUM_THREADS (each process's share of the CPUs; torchrun alone would set 1).
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ $# -gt 0 ] || fail "no config; launch/torchrun.sh CONFIG.yaml [--key value ...]"

NNODES=${NNODES:-1}
if [ "$NNODES" = 1 ]; then NODE_RANK=0 MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}; fi
[ -n "${NODE_RANK:-}" ] || fail "NODE_RANK: not set; 0 on the first of the $NNODES machines, 1 on the next"
[ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR: not set; the name of the machine with NODE_RANK 0"
if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  [ "$NPROC_PER_NODE" -gt 0 ] || fail "NPROC_PER_NODE: not set, and nvidia-smi lists no GPU; export the number of processes per machine"
fi
cpus=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))}
PYTHON=${PYTHON:-python}
launch=$(cd -- "$(dirname -- "$0")" && pwd)
export PYTHONPATH=${launch%/launch}${PYTHONPATH:+:$PYTHONPATH}  # use this checkout, not an installed package
RUN_DIR=$("$PYTHON" -m trainer train "$@" --print_run_dir) || exit 2  # the command has printed why
export NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} PYTHON LAUNCHER=torchrun
export RENDEZVOUS=torchrun.sh LOG_DIR=$RUN_DIR/logs/$(date +%Y%m%dT%H%M%S) PYTHONUNBUFFERED=1
exec bash "$launch/node.sh" "$@"
