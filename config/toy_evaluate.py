# The built-in world, stage 4: the base, SFT and PRIME models on 500 held-out problems.
#     python evaluate.py config/toy_evaluate.py

models = ["out/toy_base/model", "out/toy_sft/model", "out/toy_prime/policy"]
benchmarks = ["data/arithmetic/world/test.jsonl"]
samples = 8  # avg@8 at temperature 1: how often is a sample right?
temperature = 1.0
top_p = 1.0
max_prompt_tokens = 64
max_tokens = 80
device = "cpu"  # also where there is a GPU: it would have little to do
out_dir = "out/toy_evaluate"
