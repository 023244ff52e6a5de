#!/usr/bin/env bash
# Everything measured on one GPU in one call of under 10 minutes, from a bare machine that has
# PyTorch, transformers and peft. Writes eval/results/gpu/<gpu>/report.md and JSON.
#   scripts/speed/gpu_bench.sh                     the GPU; further options go to gpu_bench.py
#   DEVICE=cpu scripts/speed/gpu_bench.sh          the same on tiny shapes, to see that it works
# OUT: another folder. PYTHON: another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
"$python" -c 'import bitsandbytes' 2>/dev/null || echo "bitsandbytes is missing: nf4 is left out"
if [ "${DEVICE:-cuda}" = cpu ]; then
  exec "$python" -m scripts.speed.gpu_bench --device cpu --dtype float32 --shapes tiny --tokens 72,36 \
    --batches 1,2 --repeats 2 --attention sdpa,eager --kernels eager --out "${OUT:-/tmp/pitome_gpu_bench}" "$@"
fi
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
exec "$python" -m scripts.speed.gpu_bench --out "${OUT:-eval/results/gpu/$name}" "$@"
