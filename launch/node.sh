#!/usr/bin/env bash
# The part of a run on one machine: this script becomes the launcher that starts the processes. multinode.sh and torchrun.sh
# start it and set NNODES NPROC_PER_NODE MASTER_ADDR MASTER_PORT RENDEZVOUS LAUNCHER PYTHON LOG_DIR; without Slurm also NODE_RANK.
set -euo pipefail
need() { [ -n "${!1:-}" ] || { echo "error: $1: not set; $2" >&2; exit 2; }; }  # NAME REMEDY

NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT RENDEZVOUS LAUNCHER PYTHON LOG_DIR; do
  need "$name" "start launch/multinode.sh or launch/torchrun.sh"
done
logs=$LOG_DIR/node-$NODE_RANK
[ ! -e "$LOG_DIR/stop" ] || exit 1  # multinode.sh got the signal to stop before this script began

# `exec`, because most clusters send a signal only to the first process of a task. The launchers do not restart processes: a new
# try of the whole job is cleaner, and a launcher's restart would begin while other machines still wait for the dead process.
case $LAUNCHER in
  torchrun)
    if [ "$NNODES" = 1 ]; then  # meet through a file of this user and rank 0's store, which only this machine can reach
      export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
      meeting=(--rdzv-backend=c10d --rdzv-conf=store_type=file)
    else
      meeting=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
    fi
    exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" "${meeting[@]}" \
      --rdzv-id="$RENDEZVOUS" --max-restarts=0 --log-dir="$logs" --tee=3 -m trainer train "$@" ;;
  accelerate)  # without a config file, accelerate would use the one in the user's cache
    need ACCELERATE_CONFIG "name a file of launch/accelerate"
    exec "$PYTHON" -m accelerate.commands.launch --config_file="$ACCELERATE_CONFIG" --num_machines="$NNODES" \
      --num_processes=$((NNODES * NPROC_PER_NODE)) --machine_rank="$NODE_RANK" --main_process_ip="$MASTER_ADDR" \
      --main_process_port="$MASTER_PORT" --log_dir="$logs" --tee=3 -m trainer train "$@" ;;
  deepspeed)  # its launcher for one machine, which needs no ssh, but needs the list of every machine's devices
    devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((NPROC_PER_NODE - 1)))}
    devices=$(cut -d, -f1-"$NPROC_PER_NODE" <<< "$devices")
    world=''
    for ((node = 0; node < NNODES; node++)); do world+="${world:+,}\"$node\":[\"${devices//,/\",\"}\"]"; done
    exec "$PYTHON" -m deepspeed.launcher.launch --world_info="$(base64 -w0 <<< "{$world}" | tr +/ -_)" \
      --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
      --enable_each_rank_log="$LOG_DIR" --no_local_rank --module trainer train "$@" ;;
  *) echo "error: LAUNCHER: $LAUNCHER is not one of torchrun, accelerate, deepspeed" >&2; exit 2 ;;
esac
