#!/usr/bin/env bash
# Everything measured on one GPU in one call of under 10 minutes, from a bare machine that has
# PyTorch, transformers and peft, and where they are there bitsandbytes (nf4) and vLLM, for which
# this package has to be installed (pip install .). Writes eval/results/gpu/<gpu>/report.md and JSON.
#   scripts/speed/gpu_bench.sh                     the GPU; further options go to gpu_bench.py
#   DEVICE=cpu scripts/speed/gpu_bench.sh          the same on tiny shapes, to see that it works
# OUT: another folder. PYTHON: another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
"$python" -c 'import bitsandbytes' 2>/dev/null || echo "bitsandbytes is missing: nf4 is left out"
if [ "${DEVICE:-cuda}" = cpu ]; then
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" # two servers share the memory
  exec "$python" -m scripts.speed.gpu_bench --device cpu --dtype float32 --shapes tiny,tiny-qwen2.5-vl \
    --tokens 72,36 --batches 1,2 --repeats 2 --attention sdpa,eager --kernels eager --served demo \
    --requests 4 --vllm="--dtype float32 --max-model-len 400 --block-size 32 --enforce-eager" \
    --out "${OUT:-/tmp/pitome_gpu_bench}" "$@"
fi
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
exec "$python" -m scripts.speed.gpu_bench --out "${OUT:-eval/results/gpu/$name}" "$@"
