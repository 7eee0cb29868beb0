#!/usr/bin/env bash
# Tool-integrated reasoning on a laptop, after runs/toy.sh: the base model, which adds numbers of three digits in its head, learns
# to write one-line programs for numbers of five. Table: the base model, the same model with the tool.
#     bash runs/toy_tir.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

[ -d out/toy_base/model ] || { echo "error: there is no out/toy_base/model: run bash runs/toy.sh first" >&2; exit 2; }
SEED=$(cat out/toy_seed)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
large="--benchmarks=[\"data/arithmetic/world/large.jsonl\"] --max_tokens=160"

torchrun --standalone --nproc_per_node ${PROCESSES:-2} sft.py config/toy_tir_sft.py --seed=$SEED                       # 1 min
python evaluate.py config/toy_evaluate.py $large --models='["out/toy_base/model"]' --out_dir=out/toy_tir_without
python evaluate.py config/toy_evaluate.py $large --models='["out/toy_tir_sft/model"]' --tir=True --out_dir=out/toy_tir_with
