#!/usr/bin/env bash
# The whole recipe on a laptop: a world, a base model, teacher samples, SFT, PRIME, a table. Two CPU cores, no GPU.
#     bash runs/toy.sh            # SEED=1 bash runs/toy.sh: another world and run; --habits=facts: other mistakes to unlearn
# Killed? Start it again: every stage goes on where it was. To begin anew: rm -r out/toy_*
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

SEED=${SEED:-1337}
mkdir -p out
[ ! -f out/toy_seed ] || [ "$(cat out/toy_seed)" = "$SEED" ] || { echo "error: out/ holds a run of SEED=$(cat out/toy_seed): rm -r out/toy_*" >&2; exit 2; }
echo "$SEED" >out/toy_seed
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false   # one thread a process: two on two busy cores are ten times slower
train="torchrun --standalone --nproc_per_node ${PROCESSES:-2}"

python data/arithmetic/prepare.py --seed=$SEED "$@"                 # problems, tokenizer, untrained model: 10 s
$train sft.py config/toy_base.py --seed=$SEED                       # "pretraining" on text with bad habits: 2.5 min
python generate.py config/toy_generate.py --seed=$SEED              # two answers a problem, the right ones kept: 10 s
$train sft.py config/toy_sft.py --seed=$SEED                        # fine-tuning on them: 10 s
$train prime.py config/toy_prime.py --seed=$SEED                    # PRIME: 1 to 2 min
python evaluate.py config/toy_evaluate.py                           # the table: 20 s
