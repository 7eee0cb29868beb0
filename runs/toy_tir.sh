#!/usr/bin/env bash
# Tool-integrated reasoning on a laptop, after runs/toy.sh. The base model, which adds three-digit
# numbers in its head, learns to write one-line programs for five-digit numbers.
#     bash runs/toy_tir.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

[ -d out/toy_base/model ] || { echo "error: there is no out/toy_base/model: run bash runs/toy.sh first" >&2; exit 2; }
SEED=$(cat out/toy_seed)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
large="--benchmarks=[\"data/arithmetic/world/large.jsonl\"] --max_tokens=160"

# Fine-tuning on sums by programs: 1 min.
torchrun --standalone --nproc_per_node ${PROCESSES:-2} sft.py config/toy_tir_sft.py --seed=$SEED

# One table for the base model without the tool, one for the fine-tuned model with it.
python evaluate.py config/toy_evaluate.py $large --models='["out/toy_base/model"]' --out_dir=out/toy_tir_without
python evaluate.py config/toy_evaluate.py $large --models='["out/toy_tir_sft/model"]' --tir=True --out_dir=out/toy_tir_with
