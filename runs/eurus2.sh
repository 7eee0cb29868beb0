#!/usr/bin/env bash
# Eurus-2-7B-PRIME on one node of 8 GPUs with 80 GB each and 900 GB of disk.
#     pip install -r requirements-gpu.txt && bash runs/eurus2.sh
#
# Published: AIME 2024 26.7, MATH-500 79.2, AMC 57.8, Minerva 38.6, OlympiadBench 42.1 after 592
# steps of 680 s on 8 x A800 (model card of Eurus-2-7B-PRIME; paper arXiv 2502.01456, Table 2). We
# have not run it.
#
# Some of the problems ask for programs, which run in a sandbox: install bubblewrap first
# (Debian: apt install bubblewrap).
set -euo pipefail
cd "$(dirname "$0")/.."

# When torchrun is told to stop, it kills its processes after 30 s. Let it wait for the current step
# and its checkpoint instead.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600

# 1. Supervised fine-tuning of Qwen2.5-Math-7B on 230 k action-style answers: 3 epochs.
torchrun --nproc_per_node 8 sft.py config/eurus2_sft.py

# 2. PRIME on maths and code: 592 steps of 256 prompts x 4 samples.
torchrun --nproc_per_node 8 prime.py config/eurus2_prime.py

# 3. The five maths benchmarks of the model card, with greedy answers.
torchrun --nproc_per_node 8 evaluate.py config/eval_eurus2.py
