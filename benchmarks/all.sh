#!/usr/bin/env bash
# Everything that a GPU has to measure, within ten minutes, in one command:
#
#     benchmarks/all.sh [FOLDER]        # results: benchmarks/results unless FOLDER is given
#
# First the GPU tests of the kernels, then one attention layer, then a whole language model, then the
# figures. Needs torch 2.11 or newer with CUDA; what else is missing (transformers, FlashAttention,
# FlashInfer, sglang) is named and left out. PYTHON=... names the interpreter. Ends with 1 if a part
# failed; the other parts still run.
set -uo pipefail
cd "$(dirname "$0")/.."
to=${1:-benchmarks/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$to"
failed=0

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "all.sh: expected a CUDA GPU that torch can use" >&2
  exit 1
}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')

timeout 120 "$python" -m pytest -q -m gpu tests/test_kernels.py tests/test_packed.py || failed=1
timeout 320 "$python" benchmarks/bench_attention.py --budget 250 \
  --output "$to/attention-$name.json" || failed=1
timeout 150 "$python" benchmarks/bench_llm_prefill.py --repeats 2 \
  --output "$to/llm_prefill-$name.json" || failed=1
"$python" benchmarks/plot.py "$to"/*-"$name".json --to "$to" || failed=1
exit $failed
