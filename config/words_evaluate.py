# Word problems, stage 6: the table. `test` has the sentences of the training data with other
# numbers, `test_unseen` has other sentences.
#     torchrun --nproc_per_node 2 evaluate.py config/words_evaluate.py

models = ["out/words_sft/model", "out/words_rft/model", "out/words_prime/policy"]
benchmarks = ["data/words/world/test.jsonl", "data/words/world/test_unseen.jsonl"]
max_problems = 200
samples = 2  # avg@2 at temperature 1: how often is a sample right?
temperature = 1.0
top_p = 1.0
max_prompt_tokens = 128
max_tokens = 80
device = "cpu"  # also where there is a GPU; --device=cuda uses it
dtype = "bfloat16"
out_dir = "out/words_evaluate"
