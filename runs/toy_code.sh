#!/usr/bin/env bash
# Maths and code in one PRIME run on a laptop, after runs/toy.sh. Sums are graded by their box,
# programs by running tests.
#     bash runs/toy_code.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

[ -d out/toy_base/model ] || { echo "error: there is no out/toy_base/model: run bash runs/toy.sh first" >&2; exit 2; }
SEED=$(cat out/toy_seed)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
train="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"

# The base model continues with sums and programs, both with bad habits: 1 min.
$train sft.py config/toy_code_sft.py --seed=$SEED

# PRIME on both.
$train prime.py config/toy_code_prime.py --seed=$SEED

# Both models on held-out programs and sums.
python evaluate.py config/toy_evaluate.py --benchmarks='["data/arithmetic/world/code_test.jsonl", "data/arithmetic/world/test.jsonl"]' \
    --models='["out/toy_code_sft/model", "out/toy_code_prime/policy"]' --out_dir=out/toy_code_evaluate
