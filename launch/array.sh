#!/usr/bin/env bash
# Many runs as a job array, each element with its own run folder in runs/NAME: a sweep, with one element per combination of
# values, or a comparison (trainer/commands/compare/README.md), whose next runs a small job submits when the first have ended.
#
#   launch/array.sh NAME [sbatch options] -- CONFIG.yaml[,CONFIG.yaml ...] [--key value[,value ...] ...]
#   launch/array.sh dial --nodes=1 --gpus-per-node=8 --time=8:00:00 -- configs/hlb.yaml --model_scale 0.5,1,2 --seed 0,1
#   launch/array.sh norms --nodes=1 --gpus-per-node=1 --time=1:00:00 -- compare norms.yaml
#
# AT_ONCE limits how many run at a time. The same command again continues the elements that are not finished.
# NEXT_OPTIONS: sbatch options of the small job of a comparison, such as --partition=cpu.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[ -f launch/multinode.sh ] || fail "there is no launch/multinode.sh here; start launch/array.sh in the project's folder"
name=${1:-}
case $name in '' | -* | */*) fail "no name; launch/array.sh NAME [sbatch options] -- CONFIG.yaml [--key value[,value ...] ...]" ;; esac
command=("$@")
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 1 ] || fail "no config; write -- and then CONFIG.yaml [--key value[,value ...] ...]"
shift

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python} elements=runs/$name/elements
if [ "$1" = compare ]; then
  [ $# -gt 1 ] || fail "no spec; write -- compare SPEC.yaml [--key value ...]"
  elements=$("$python" -m trainer "$@" --compare_dir "runs/$name" --elements "${COMPARE_ELEMENTS:-all}")
  [ -n "$elements" ] || exec "$python" -m trainer report "runs/$name"
else
  "$python" launch/sweep.py "runs/$name" "$@"
fi
last=$(($(find "$elements" -type f | wc -l) - 1))
submit=(sbatch --job-name="$name" --array="0-$last${AT_ONCE:+%$AT_ONCE}" --output="runs/$name/%A_%a.out" "${options[@]}"
  launch/multinode.sh --elements "$elements")
set -x
[ "$1" = compare ] || exec "${submit[@]}"
submitted=$("${submit[@]}")
echo "$submitted"
COMPARE_ELEMENTS=new sbatch --job-name="$name-next" --dependency="afterany:${submitted##* }" --output="runs/$name/next-%j.out" \
  ${NEXT_OPTIONS:---ntasks=1 --time=1:00:00} --wrap="$(printf '%q ' bash launch/array.sh "${command[@]}")"
