#!/usr/bin/env bash
# Train under Slurm on any number of nodes and GPUs. Stops with a checkpoint before the time limit, requeues itself, and continues.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 launch/multinode.sh CONFIG.yaml [--key value ...]
#
# Submit it from the project's folder. launch/site.env, if it exists, has the settings of the cluster (site.env.example lists the
# variables). A run writes everything into its folder. launch/README.md explains signals, requeueing and faults.
#
#SBATCH --job-name=crescendo
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.out
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
need() { [ -n "${!1:-}" ] || fail "$1: not set; $2"; }  # NAME REMEDY
say() { printf '%s job %s, try %s: %s\n' "$(date +%FT%T)" "${job:-}" "${restarts:-0}" "$*"; }
patiently() { for _ in 1 2 3 4 5; do "$@" && return; sleep 10; done; return 1; }  # Slurm may be busy or restarting

# -- signals -----------------------------------------------------------------------------------------------------------

# USR1 is the warning of --signal before the time limit (and at preemption, if the cluster sends it). Slurm sends TERM to end the
# job, also to its steps; a job that a user ended with scancel must not start again. The launchers handle only TERM.
asked='' told_them='' late='' srun=''
on_warning() {
  [ -z "$asked" ] || return 0  # a second SIGTERM makes the processes end at once, without a checkpoint
  asked=USR1
  say "SIGUSR1: asking the processes to write a checkpoint and stop"
  [ -z "$srun" ] || stop_processes
}
stop_processes() {
  [ -z "$told_them" ] || return 0
  told_them=yes
  touch "$LOG_DIR/stop"  # for a node whose launcher has not started yet
  patiently scancel --signal=TERM "$job" &
  { sleep "$STOP_SECONDS"; kill -ALRM $$; } &
}
on_end() { asked=TERM; say "SIGTERM: Slurm ends this job"; }
trap on_warning USR1
trap on_end TERM
trap 'late=yes' ALRM

# -- project, site settings, arguments, nodes --------------------------------------------------------------------------

need SLURM_JOB_ID "start this script with sbatch"
need SLURM_SUBMIT_DIR "start this script with sbatch"
# Slurm runs a copy of this script from its own spool folder, so $0 does not lead to the other scripts.
project=${CRESCENDO_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$project/launch/node.sh" ] ||
  fail "SLURM_SUBMIT_DIR: there is no launch/node.sh in $project; submit from the project's folder or export CRESCENDO_HOME"
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}  # use this checkout, not an installed package
site=${SITE_ENV:-$project/launch/site.env}
if [ -f "$site" ]; then
  echo "settings of the site: $site"
  set -a +eu; . "$site"; set +a -eu  # the scripts of `module load` fail under -e and -u
elif [ -n "${SITE_ENV:-}" ]; then
  fail "SITE_ENV: there is no file $SITE_ENV"
fi

if [ "${1:-}" = --elements ]; then  # launch/array.sh wrote a file for each element, with one word of its command per line
  need SLURM_ARRAY_TASK_ID "--elements goes with sbatch --array, as launch/array.sh does it"
  [ -f "${2:-}/$SLURM_ARRAY_TASK_ID" ] || fail "--elements: there is no ${2:-}/$SLURM_ARRAY_TASK_ID"
  mapfile -t element < "$2/$SLURM_ARRAY_TASK_ID"
  set -- "${element[@]}"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  fail "SLURM_ARRAY_TASK_ID: all elements of this array would train the same run; use launch/array.sh"
fi
[ $# -gt 0 ] || fail "no config; sbatch ... launch/multinode.sh CONFIG.yaml [--key value ...]"

# The last element of an array has the same job number as the array, and requeueing this number would requeue all elements.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

need SLURM_JOB_NUM_NODES "start this script with sbatch"
need SLURM_JOB_CPUS_PER_NODE "start this script with sbatch"
cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)  # "16(x2),8": the CPUs of the smallest machine
NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
need NPROC_PER_NODE "ask for GPUs with --gpus-per-node, or export NPROC_PER_NODE, the processes per node"
LAUNCHER=${LAUNCHER:-torchrun}
PYTHON=${PYTHON:-python}
STOP_SECONDS=${STOP_SECONDS:-150}  # time for a checkpoint after the warning; less than the 180 of --signal
MAX_REQUEUES=${MAX_REQUEUES:-50}

# SLURM_RESTART_COUNT is not set in the first try, and can come from a job that submitted this one.
restarts=$(patiently scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') || true
need restarts "scontrol show job $job does not show the number of restarts"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#hosts[@]}" = "$SLURM_JOB_NUM_NODES" ] || fail "SLURM_JOB_NODELIST: $SLURM_JOB_NODELIST is ${#hosts[@]} names for $SLURM_JOB_NUM_NODES nodes"
NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=${hosts[0]}
# A different port for every job, because jobs can share a machine, and for every try, because processes of the last try can
# remain on a lost machine. It is below the ports that systems assign automatically.
MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 7 + restarts * 1009) % 20000))}
RENDEZVOUS=$job-$restarts
CRESCENDO_RENDEZVOUS=$RENDEZVOUS-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')  # a rank of another run must not count as ours
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))}
# Compiler workers of torch.compile; the default is up to 32 in each process.
TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$OMP_NUM_THREADS}

# The words before every command on a node: srun with the container's options, and the container's command line.
inside=()
if [ -n "${SRUN_ARGS:-}${CONTAINER:-}" ]; then inside=(srun --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="$cpus" ${SRUN_ARGS:-} ${CONTAINER:-}); fi
RUN_DIR=$("${inside[@]}" "$PYTHON" -m trainer train "$@" --print_run_dir) || {
  status=$?
  [ "$status" = 2 ] || fail "PYTHON: $PYTHON -m trainer ended with $status on $MASTER_ADDR; see what it printed"
  exit 2  # the command has printed why
}
job_logs=$RUN_DIR/logs/$job
LOG_DIR=$job_logs/try-$restarts
CRESCENDO_OUTCOME=$LOG_DIR/outcome  # trainer/runtime/exit_status.py writes it, because launchers do not pass on exit codes
mkdir -p "$LOG_DIR"
rm -f "$CRESCENDO_OUTCOME" "$LOG_DIR/stop"
unset NODE_RANK  # only torchrun.sh uses it; here Slurm sets the node's rank
export NNODES NPROC_PER_NODE MASTER_ADDR MASTER_PORT RENDEZVOUS CRESCENDO_RENDEZVOUS LAUNCHER PYTHON LOG_DIR CRESCENDO_OUTCOME OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS
export SLURM_RESTART_COUNT=$restarts PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# By default torchrun and accelerate send SIGKILL 30 s after SIGTERM, which is too early for a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$STOP_SECONDS

# job.txt shows only these environment variables, because any other variable may hold a secret.
told='(SLURM_(JOB_(ID|NAME|PARTITION|NODELIST|NUM_NODES|CPUS_PER_NODE|GPUS)|ARRAY_(JOB|TASK)_ID|CLUSTER_NAME|SUBMIT_(DIR|HOST))'
told+='|SLURM_(GPUS_(ON|PER)_NODE|CPUS_(ON_NODE|PER_TASK)|MEM_PER_(NODE|CPU|GPU)|NTASKS|N?TASKS_PER_NODE|RESTART_COUNT)'
told+='|CUDA_(HOME|VISIBLE_DEVICES)|NCCL_[A-Z0-9_]+|(GLOO|TP)_SOCKET_IFNAME|OMP_NUM_THREADS|TORCHINDUCTOR_(CACHE_DIR|COMPILE_THREADS)'
told+='|TORCH_(ELASTIC_SHUTDOWN_TIMEOUT|NCCL_[A-Z_]+)|MASTER_(ADDR|PORT)|PYTHON(PATH)?|PATH|LD_LIBRARY_PATH|LAUNCHER|NNODES|NPROC_PER_NODE)'
{
  patiently scontrol show job "$job" || true
  env | grep -E "^$told=" | sort
} > "$LOG_DIR/job.txt"
say "$LAUNCHER on $NNODES x $NPROC_PER_NODE processes, meeting at $MASTER_ADDR:$MASTER_PORT: ${hosts[*]}"
say "run $RUN_DIR, log of every process in $LOG_DIR"
[ "$cpus" -ge "$NPROC_PER_NODE" ] ||
  say "warning: SLURM_JOB_CPUS_PER_NODE is $SLURM_JOB_CPUS_PER_NODE for $NPROC_PER_NODE processes; ask for --cpus-per-task or --exclusive"

# -- train, until the end or a signal ----------------------------------------------------------------------------------

newest_checkpoint() {  # prints its name; a checkpoint is complete when it has a manifest, which is written last
  local manifest newest=''
  for manifest in "$RUN_DIR"/checkpoints/step-*/manifest.json; do [ ! -f "$manifest" ] || newest=${manifest%/*}; done
  echo "${newest##*/}"
}

before=$(newest_checkpoint)
status=0
if [ -z "$asked" ]; then
  srun --export=ALL --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 --wait=60 --label ${SRUN_ARGS:-} ${CONTAINER:-} bash "$project/launch/node.sh" "$@" &
  srun=$!
  [ -z "$asked" ] || stop_processes  # the signal came after the test above and before srun started
  # srun runs in the background, because bash runs traps only after a foreground command has ended. A trapped signal also ends `wait`.
  while [ -z "$late" ]; do
    wait "$srun" && status=0 || status=$?
    kill -0 "$srun" 2>/dev/null || break
  done
fi

# -- after training: end or requeue ------------------------------------------------------------------------------------

requeue() {  # REASON
  [ "$restarts" -lt "$MAX_REQUEUES" ] || { say "$1; not started again: MAX_REQUEUES is $MAX_REQUEUES"; exit 1; }
  # Do not requeue a job that Slurm has begun to end (scancel, a lost node) or to run elsewhere, although Slurm would allow it.
  local facts
  facts=$(patiently scontrol --oneliner show job "$job") || true
  [ "$asked" != TERM ] && [[ $facts = *"JobState=RUNNING "*"Restarts=$restarts "* ]] || { say "$1; ended by Slurm"; exit 143; }
  say "$1; starting again"
  trap 'exit 143' TERM  # Slurm now ends this script
  patiently scontrol requeue "$job" || { say "Slurm refuses to requeue"; exit 1; }
  sleep 300 & wait $!
  exit 1
}

stop_if_in_vain() {  # NAME LIMIT: ends the job at the LIMIT-th try in a row of this kind without a new checkpoint
  local count=0
  [ -z "$progress" ] || return 0
  [ ! -s "$job_logs/$1" ] || read -r count < "$job_logs/$1"
  count=$((count + 1))
  echo "$count" > "$job_logs/$1"
  [ "$count" -lt "$2" ] || { say "$1 $2 times in a row before a new checkpoint: not started again; see $LOG_DIR"; exit 1; }
}

outcome='' progress=''
[ ! -s "$CRESCENDO_OUTCOME" ] || read -r outcome < "$CRESCENDO_OUTCOME"
after=$(newest_checkpoint)
if [ "$after" != "$before" ]; then progress="newest checkpoint $after"; rm -f "$job_logs"/{failed,warned}; fi

case $outcome in
  finished*) say "finished"; exit 0 ;;
  refused*) say "$outcome; not started again"; exit 2 ;;
esac
[ "$asked" != TERM ] || { say "ended by Slurm; ${progress:-no new checkpoint}"; exit 143; }
if [ "$asked" = USR1 ]; then
  stop_if_in_vain warned 5
  requeue "${late:+not all processes stopped within $STOP_SECONDS s; }${progress:-no new checkpoint}"
fi
# In the grace time of a preemption, the signal may reach only the processes, not this script.
[[ $outcome != stopped* ]] || requeue "$outcome; ${progress:-no new checkpoint}"

say "failed (srun: $status); ${progress:-no new checkpoint}"
grep -rhE 'error: |Error: ' "$LOG_DIR" --include='*.log' | sort -u | head -n 5 || true
silent=$(patiently sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format='%N %T' |
  awk '$2 ~ /[*]|down|fail/ {print $1}' | sort -u | tr '\n' ' ') || true
[ -z "$silent" ] || requeue "not answering: $silent"
stop_if_in_vain failed 2
if [ -n "$progress" ]; then requeue "the run made progress"; else requeue "once more"; fi
