#!/usr/bin/env bash
# INTELLECT-MATH on one node of 8 GPUs with 80 GB each and 900 GB of disk, stage by stage.
#     pip install -r requirements-gpu.txt && bash runs/intellect_math.sh
#
# Published: MATH-500 82.0, OlympiadBench 49.5, AIME 2024 26.7, AMC 60.2, Minerva 39.7 after 256
# steps (model card of INTELLECT-MATH). We have not run it at this size.
#
# Some of the problems ask for programs, which run in a sandbox: install bubblewrap first
# (Debian: apt install bubblewrap).
set -euo pipefail
cd "$(dirname "$0")/.."

# When torchrun is told to stop, it kills its processes after 30 s. Let it wait for the current step
# and its checkpoint instead.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600

# 1. Two answers of QwQ-32B-Preview to every problem of NuminaMath; the right ones are kept. If this
#    is interrupted, the same command continues it.
python generate.py config/intellect_math_generate.py

# 2. Supervised fine-tuning of Qwen2.5-Math-7B: 5 epochs, about 28.6 k steps.
torchrun --nproc_per_node 8 sft.py config/intellect_math_sft.py

# 3. PRIME: 256 steps of 256 prompts x 4 samples.
torchrun --nproc_per_node 8 prime.py config/intellect_math_prime.py

# 4. The five benchmarks of the model card, with greedy answers, for PRIME and for SFT.
torchrun --nproc_per_node 8 evaluate.py config/eval_intellect_math.py
