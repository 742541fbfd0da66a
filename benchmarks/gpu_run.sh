#!/usr/bin/env bash
# Verify, then time everything on a CUDA machine, in under 25 minutes; prints a table last.
#   bash benchmarks/gpu_run.sh [RESULTS.jsonl]
# Needs torch, Triton, pytest, pytest-benchmark and hypothesis; the package is taken from this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
results=${1:-benchmarks/results/$gpu-$(date +%F).jsonl}

timeout 720 python3 -m pytest tests/kernels tests/models -q --ignore tests/kernels/test_compile_gate.py
timeout 720 python3 -m pytest benchmarks -q --benchmark-only --benchmark-disable-gc --results "$results"
python3 benchmarks/table.py "$results"
