#!/usr/bin/env bash
# PRIME on GSM8K, on one GPU of 80 GB: Qwen2.5-0.5B-Instruct, or with SIZE=1.5b the next size.
#     pip install -r requirements-gpu.txt && bash runs/gsm8k.sh
#     SIZE=1.5b bash runs/gsm8k.sh
#     bash runs/gsm8k.sh --checkpointing=True --gpu_memory=0.3    # 24 GB; only 0.5B
#
# Arguments go to prime.py. If it is interrupted, the same command continues where it was.
#
# Published: 58.7 for 0.5B (docs/algo/baseline.md of github.com/volcengine/verl). We have not run it.
# How long it takes is estimated in docs/speed.md.
set -euo pipefail
cd "$(dirname "$0")/.."

# When torchrun is told to stop, it kills its processes after 30 s. Let it wait for the current step
# and its checkpoint instead.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600

# 1. PRIME on the 7,473 training problems. 2. The 1,319 test problems, before and after.
if [ "${SIZE:-0.5b}" = 1.5b ]; then
    torchrun --standalone --nproc_per_node 1 prime.py config/gsm8k_prime.py config/gsm8k_1.5b.py "$@"
    python evaluate.py config/gsm8k_evaluate.py config/gsm8k_1.5b_evaluate.py
else
    torchrun --standalone --nproc_per_node 1 prime.py config/gsm8k_prime.py "$@"
    python evaluate.py config/gsm8k_evaluate.py
fi
