#!/usr/bin/env bash
# All that needs a GPU, unattended, on a machine with one: the tests, hlb.yaml's time to step 500 with a cold and a warm cache of
# compiled code, benches beside plain loops, profiles; the most harmful first. Each step has its share of the time that is left.
# FOLDER/STEP.log holds what a step prints, as it comes. At the end, also when this is stopped, there is one table.
#
#   tests/gpu.sh --minutes N [--data TEXT] [--out FOLDER] [--dry-run] [--tiny]
#
# TEXT: a file or folder to train on (with GPT-2's tokenizer, if it can be fetched); without it the source of Python's standard
# library, as bytes. Losses say little then; times do not depend on the text. --dry-run prints the commands. --tiny tries this
# script on a CPU.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
minutes='' text='' out='' dry='' tiny=''
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2-}; shift 2 || fail "--minutes: no number" ;;
        --data) text=$(realpath "${2-}") || fail "--data: no such text"; shift 2 ;;
        --out) out=$(realpath -m "${2-}"); shift 2 || fail "--out: no folder" ;;
        --dry-run) dry=1; shift ;;
        --tiny) tiny=1; shift ;;
        *) fail "$1: unknown; tests/gpu.sh --minutes N [--data TEXT] [--out FOLDER] [--dry-run] [--tiny]" ;;
    esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes: needs a whole number above 0"
cd "$(dirname "$0")/.."
out=${out:-$PWD/runs/gpu-$(date +%Y%m%d-%H%M%S)}
[ ! -e "$out" ] || fail "--out: $out exists already"

end=$((SECONDS + 60 * minutes)) shares=100 child='' running=''
cores=$(nproc)
workers=$((cores >= 16 ? 4 : cores >= 4 ? cores / 4 : 1))
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS=$((cores / workers < 8 ? cores / workers : 8))

record() { printf '%s\t%s\t%s\n' "$@" >> "$out/steps.tsv"; }

# step NAME SHARE COMMAND...: run a command; SHARE: of the time left, in hundredths of the whole. Fails if the command does.
step() {
    local name=$1 share=$2 limit begin=$SECONDS status=0 result
    shift 2
    if [ -n "$dry" ]; then printf '%q ' "$@"; echo; return; fi
    limit=$(((end - SECONDS) * share / shares)) shares=$((shares - share))
    if [ "$limit" -lt 1 ]; then record "$name" "no time left" 0; return 1; fi
    running=$name
    echo "$name: at most $limit s, $out/$name.log" >&2
    timeout --kill-after=20 "$limit" "$@" > "$out/$name.log" 2>&1 &
    child=$!
    wait "$child" || status=$?
    case $status in 0) result=ok ;; 124 | 137) result="out of time" ;; *) result="failed ($status)" ;; esac
    running=''
    record "$name" "$result" $((SECONDS - begin))
    return $status
}

finish() {
    if [ -n "$running" ]; then
        kill "$child" 2> /dev/null || true
        wait "$child" || true
        record "$running" stopped "-"
    fi
    python tests/gpu_session.py table "$out"
    python tests/gpu_session.py packages
}

if [ -z "$dry" ]; then
    python tests/gpu_session.py packages
    [ -n "$tiny" ] || python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
        fail "torch is not installed or sees no GPU; --tiny tries this script on a CPU"
    mkdir -p "$out"
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
fi

mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu(' tests | sort)
step tests 40 python -m pytest --all -m gpu -vv -n "$workers" --dist loadgroup --no-loadscope-reorder \
    --failures "$out/failures.txt" --durations 20 -p no:cacheprovider "${files[@]}" || true

data() { step "data-$2" 3 python -m trainer prepare --source "$1" --tokenizer "$2" --out "$out/data"; }
if [ -n "$text" ]; then data "$text" gpt2 || data "$text" bytes || exit 1
else data builtin:python-stdlib bytes || exit 1; fi

model=(--data.path "$out/data" --model.vocab_size 50304) # GPT-2's, so that the head costs what it does there
quiet=(--evaluation.every 0 --evaluation.max_tokens 65536 --checkpoint.every 0 --log.demo_tokens 0 --log.sample_tokens 0)
long=(--batch.sequence_start 1024 --batch.sequence_double_every 0)
gpt2=(--batch.sequence_length 1024 --batch.tokens_per_step 65536 --batch.tokens_per_microbatch 32768)
kernels=(--sweep model.attention_kernel=auto,cudnn)
flash3='import importlib.util, sys; sys.exit(importlib.util.find_spec("flash_attn_interface") is None)'
if python -c "$flash3"; then kernels[1]+=,flash3; fi
profiled=(--profile --max_steps 12) headline=(--max_steps 500 --engine.compile true)
if [ -n "$tiny" ]; then
    model+=(--device cpu --precision fp32 --model.d_model 32 --model.n_layers 1)
    long=(--batch.tokens_per_step 1024 --batch.tokens_per_microbatch 1024 --batch.sequence_length 32 --batch.sequence_start 32)
    long+=(--batch.sequence_double_every 0)
    gpt2=("${long[@]}" --model.n_heads 2) kernels=() profiled=(--profile --max_steps 4) headline=("${long[@]}" --max_steps 3)
fi
for cache in cold warm; do
    step "hlb-$cache" 9 env TORCHINDUCTOR_CACHE_DIR="$out/compiled" python -m trainer train configs/hlb.yaml \
        "${model[@]}" "${quiet[@]}" "${headline[@]}" --run_dir "$out/hlb-$cache" || true
done
step hlb-eager 9 python -m trainer train configs/hlb.yaml "${model[@]}" "${quiet[@]}" "${headline[@]/true/false}" \
    --run_dir "$out/hlb-eager" || true
step hlb-bench 9 python -m trainer bench configs/hlb.yaml "${model[@]}" ${tiny:+"${long[@]}"} \
    --baselines bare --baselines eager --bench_dir "$out/hlb-bench" || true
step gpt2-bench 10 python -m trainer bench configs/gpt2-124m.yaml "${model[@]}" "${gpt2[@]}" "${kernels[@]}" \
    --baselines bare --baselines nanogpt --bench_dir "$out/gpt2-bench" || true
step hlb-profile 4 python -m trainer train configs/hlb.yaml "${model[@]}" "${quiet[@]}" "${long[@]}" "${profiled[@]}" \
    --run_dir "$out/hlb-profile" || true
step gpt2-profile 4 python -m trainer train configs/gpt2-124m.yaml "${model[@]}" "${quiet[@]}" "${gpt2[@]}" "${profiled[@]}" \
    --optim.warmup_steps 1 --run_dir "$out/gpt2-profile" || true
