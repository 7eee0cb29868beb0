#!/usr/bin/env bash
# NuminaMath-7B-CoT and NuminaMath-7B-TIR on one node of 8 GPUs with 80 GB each.
#     pip install -r requirements-gpu.txt && bash runs/numina.sh
#
# Published: about 10 hours on 8 x H100, and these results (model card; greedy answers; solved
# problems of 40 for AMC 2023 and of 30 for AIME 2024). We have not run it.
#            GSM8K  MATH  AMC  AIME  AMC maj@64  AIME maj@64
#     CoT     76.3  55.8   11     0          18            1
#     TIR     84.6  68.1   20     5          31           10
#
# The model's programs run in a sandbox: install bubblewrap first (Debian: apt install bubblewrap).
set -euo pipefail
cd "$(dirname "$0")/.."

# When torchrun is told to stop, it kills its processes after 30 s. Let it wait for the current step
# and its checkpoint instead.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600

# 0. The hub has no safetensors of the base model: convert it once. (transformers by itself would
# open its tokenizer as Llama's, which loses blanks and new lines.)
[ -d out/deepseek_math_7b ] || python - <<'PY'
import os

from transformers import AutoModelForCausalLM

from lib.pretrained import open_tokenizer, save_tokenizer

name = 'deepseek-ai/deepseek-math-7b-base'
folder = 'out/deepseek_math_7b'
model = AutoModelForCausalLM.from_pretrained(name, dtype='bfloat16')
model.save_pretrained(folder + '.tmp')
save_tokenizer(open_tokenizer(name), folder + '.tmp')
os.rename(folder + '.tmp', folder)
PY

# 1. Chain of thought: 3 epochs over 859 k solutions.
torchrun --nproc_per_node 8 sft.py config/numina_cot.py

# 2. Tool-integrated reasoning: 4 epochs over 72 k traces of text, Python, its output and more text.
torchrun --nproc_per_node 8 sft.py config/numina_tir.py

# 3. The model card's table: without the tool, then with it.
torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py --models='["out/numina_cot/model"]' --out_dir=out/eval_numina_cot
torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py config/eval_numina_tir.py --models='["out/numina_tir/model"]'
