#!/usr/bin/env bash
# The whole recipe on a laptop with two CPU cores: the built-in world, a base model, teacher samples,
# SFT, PRIME, and a table of results. It runs on the CPU also where there is a GPU.
#     bash runs/toy.sh
#     SEED=1 bash runs/toy.sh                # another world and another run
#     bash runs/toy.sh --habits=facts        # other mistakes to unlearn
#
# If it is interrupted, the same command continues every stage where it was. To start over:
#     rm -r out/toy_*
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

SEED=${SEED:-1337}
mkdir -p out
[ ! -f out/toy_seed ] || [ "$(cat out/toy_seed)" = "$SEED" ] || { echo "error: out/ holds a run of SEED=$(cat out/toy_seed): rm -r out/toy_*" >&2; exit 2; }
echo "$SEED" >out/toy_seed

# One thread per process: with two busy cores, two processes of two threads are ten times slower.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
train="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"

# The world: problems, a tokenizer and an untrained model: 10 s.
python data/arithmetic/prepare.py --seed=$SEED "$@"

# 0. "Pretraining" on text with bad habits: 2.5 min.
$train sft.py config/toy_base.py --seed=$SEED

# 1. Two answers per problem; the right ones are kept: 10 s.
python generate.py config/toy_generate.py --seed=$SEED

# 2. Fine-tuning on them: 10 s.
$train sft.py config/toy_sft.py --seed=$SEED

# 3. PRIME: 1 to 2 min.
$train prime.py config/toy_prime.py --seed=$SEED

# 4. The table: 20 s.
python evaluate.py config/toy_evaluate.py
