# INTELLECT-MATH, stage 1: samples of a teacher.
#     python generate.py config/intellect_math_generate.py
#
# Published: 733 k correct rows from 2 samples per question (model card of INTELLECT-MATH). Source
# of every value unless stated otherwise: github.com/PrimeIntellect-ai/INTELLECT-MATH,
# synthetic-data/generate.py. We have not run it: it takes a node of GPUs.

data = "PrimeIntellect/NuminaMath-groundtruth"
model = "Qwen/QwQ-32B-Preview"
tensor_parallel = None  # all GPUs of the node, as published (8)
samples_per_problem = 2  # from the README there; the script's own default is 1
temperature = 0.9
top_p = 1.0  # the engine's default
max_tokens = 8192
# The published limit is not known: the 512 that is the filter script's default would drop nearly
# all answers. With prompts of a few hundred tokens this stays below the 5,000 of SFT.
sft_max_tokens = 4500
out_dir = "out/intellect_math_generate"
