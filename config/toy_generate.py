# The built-in world, stage 1: the base model is its own teacher, and its right answers become the
# SFT set (rejection sampling).
#     python generate.py config/toy_generate.py

data = "data/arithmetic/world/train.jsonl"
model = "out/toy_base/model"
system_prompt = ""  # the base model has never seen one
sft_system_prompt = ""
samples_per_problem = 2  # as in INTELLECT-MATH
temperature = 1.0
max_prompt_tokens = 64
max_tokens = 80  # the longest right answer has 46
device = "cpu"  # also where there is a GPU: it would have little to do
out_dir = "out/toy_generate"
