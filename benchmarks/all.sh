#!/usr/bin/env bash
# Everything that a GPU has to measure, within ten minutes, in one command:
#
#     benchmarks/all.sh [FOLDER]              # results: benchmarks/results unless FOLDER is given
#     benchmarks/all.sh --cpu [FOLDER]        # the same steps on a quiet CPU, at its sizes
#     benchmarks/all.sh --rehearse [FOLDER]   # likewise, at sizes that only show it works
#
# The most wanted comes first, and no step can eat another's time: each has a box of seconds and is
# stopped at its end, or at the end of the ten minutes (SECONDS_IN_ALL). What a stopped step has
# measured is kept: results are written as they come, with "complete": false. The figures show what
# there is.
#
# Needs torch 2.11 or newer with CUDA; what else is missing (transformers, FlashAttention,
# FlashInfer, sglang) is named and left out. PYTHON=... names the interpreter. Ends with 1 if a part
# failed or was stopped; the other parts still run.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=gpu
case "${1:-}" in
--cpu | --rehearse)
  mode=${1#--}
  shift
  ;;
esac
to=${1:-benchmarks/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$to"
failed=0
SECONDS=0
stretch=1
[ "$mode" = gpu ] || stretch=10 # two cores take their time
in_all=${SECONDS_IN_ALL:-$((570 * stretch))}

# step NAME BOX COMMAND...: at most BOX seconds, of those that are left. The interrupt lets pytest
# and Python say how far they came, and servers be stopped.
step() {
  local name=$1 box=$2 left=$((in_all - SECONDS)) started=$SECONDS code=0
  shift 2
  box=$((box * stretch))
  [ "$box" -gt "$left" ] && box=$left
  echo "== $name: at most $box s, $SECONDS s in"
  if [ "$box" -lt 5 ]; then
    echo "== $name: left out, the time is up"
    failed=1
    return
  fi
  timeout --signal=INT --kill-after=20 "$box" "$@" || code=$?
  [ "$code" -eq 124 ] && echo "== $name: stopped, its time was up"
  echo "== $name: $((SECONDS - started)) s, status $code"
  [ "$code" -eq 0 ] || failed=1
}

attention=() huggingface=() sglang=() serving=() # what a CPU measures by default
case $mode in
gpu)
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "all.sh: expected a CUDA GPU that torch can use; --cpu does without" >&2
    exit 1
  }
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
  attention=(--budget 160)
  huggingface=(--lengths 100000 2048 8192 32768 --repeats 1)
  sglang=(--frames 56 220 668 --repeats 1)
  serving=(--seconds 56 --repeats 1)
  ;;
cpu)
  export CUDA_VISIBLE_DEVICES=
  name=cpu
  ;;
rehearse)
  export CUDA_VISIBLE_DEVICES=
  name=rehearsal
  attention=(--quick)
  huggingface=(--lengths 512 1024 2048 --repeats 1)
  sglang=(--frames 16 64 --repeats 1)
  serving=(--seconds 40 --repeats 1)
  ;;
esac
bench="$python benchmarks"

# These cover every implementation.
step "tests of packed sequences" 60 "$python" -m pytest -q -m gpu tests/kernel/test_packed.py
step "one attention layer" 185 $bench/bench_attention.py "${attention[@]}" \
  --output "$to/attention-$name.json"
step "a language model, Hugging Face" 70 $bench/bench_llm_prefill.py "${huggingface[@]}" \
  --output "$to/llm_prefill-$name.json"
step "a server: language model, serving" 190 $bench/serving.py -- sh -c "
  $bench/bench_llm_prefill.py --path sglang ${sglang[*]:-} \
    --output '$to/llm_prefill_sglang-$name.json'
  first=\$?
  $bench/bench_serving.py ${serving[*]:-} --output '$to/serving-$name.json' || exit
  exit \$first"
step "plans" 35 $bench/bench_plan.py --output "$to/plan-$name.json"
in_all=$((in_all + 20)) # the figures are not to be lost
results=()
for result in "$to"/*-"$name".json; do
  [ -e "$result" ] && results+=("$result")
done
step "figures" 20 "$python" benchmarks/plot.py "${results[@]}" --to "$to"
in_all=$((in_all - 20))
step "tests of batches" 300 "$python" -m pytest -q -m gpu tests/kernel/test_implementations.py
echo "== $SECONDS s in all, status $failed"
exit $failed
