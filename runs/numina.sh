#!/usr/bin/env bash
# NuminaMath-7B-CoT and -TIR on one node of 8 x 80 GB; published: about 10 hours on 8 x H100. We have not run it.
# Published (model card; greedy, of 40 and 30 problems for AMC 2023 and AIME 2024):  GSM8K  MATH  AMC  AIME  AMC maj@64  AIME maj@64
#                                                                              CoT    76.3  55.8   11     0          18            1
#                                                                              TIR    84.6  68.1   20     5          31           10
#     pip install -r requirements-gpu.txt && bash runs/numina.sh
# Programs of the model run in a sandbox: install bubblewrap first (Debian: apt install bubblewrap).
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600      # told to stop, torchrun waits for the step in hand and its checkpoint, not 30 s

# 0. The base model has no safetensors on the hub: convert it once.
[ -d out/deepseek_math_7b ] || python - <<'PY'
from transformers import AutoModelForCausalLM, AutoTokenizer
name, folder = 'deepseek-ai/deepseek-math-7b-base', 'out/deepseek_math_7b'
AutoTokenizer.from_pretrained(name).save_pretrained(folder)
AutoModelForCausalLM.from_pretrained(name, dtype='bfloat16').save_pretrained(folder)
PY

# 1. Chain of thought: 3 epochs over 859 k solutions.
torchrun --nproc_per_node 8 sft.py config/numina_cot.py

# 2. Tool-integrated reasoning: 4 epochs over 72 k traces of text, Python, its output, text.
torchrun --nproc_per_node 8 sft.py config/numina_tir.py

# 3. The card's table: without the tool, then with it.
torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py --models='["out/numina_cot/model"]' --out_dir=out/eval_numina_cot
torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py config/eval_numina_tir.py --models='["out/numina_tir/model"]'
