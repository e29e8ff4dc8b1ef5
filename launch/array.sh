#!/usr/bin/env bash
# A sweep as a job array: one element per combination of values, each with its own run folder in runs/NAME.
#
#   launch/array.sh NAME [sbatch options] -- CONFIG.yaml[,CONFIG.yaml ...] [--key value[,value ...] ...]
#   launch/array.sh dial --nodes=1 --gpus-per-node=8 --time=8:00:00 -- configs/hlb.yaml --model_scale 0.5,1,2 --seed 0,1
#
# AT_ONCE limits how many run at a time. The same command again continues the elements that are not finished.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ -f launch/multinode.sh ] || fail "there is no launch/multinode.sh here; start launch/array.sh in the project's folder"
name=${1:-}
case $name in '' | -* | */*) fail "no name; launch/array.sh NAME [sbatch options] -- CONFIG.yaml [--key value[,value ...] ...]" ;; esac
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 1 ] || fail "no config; write -- and then CONFIG.yaml [--key value[,value ...] ...]"

PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "${PYTHON:-python}" launch/sweep.py "runs/$name" "${@:2}"
last=$(($(find "runs/$name/elements" -type f | wc -l) - 1))
set -x
exec sbatch --job-name="$name" --array="0-$last${AT_ONCE:+%$AT_ONCE}" --output="runs/$name/%A_%a.out" "${options[@]}" \
  launch/multinode.sh --elements "runs/$name/elements"
