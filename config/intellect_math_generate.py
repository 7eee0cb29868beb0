# INTELLECT-MATH, stage 1: samples of a teacher.   python generate.py config/intellect_math_generate.py
# Published: 733 k correct rows of 2 samples a question (model card of INTELLECT-MATH). Source of every value unless said
# otherwise: github.com/PrimeIntellect-ai/INTELLECT-MATH, synthetic-data/generate.py. Not run by us: it takes a GPU node.
data = 'PrimeIntellect/NuminaMath-groundtruth'
model = 'Qwen/QwQ-32B-Preview'
tensor_parallel = None              # all GPUs of the node, as published (8)
samples_per_problem = 2             # the README's; the script's own default is 1
temperature = 0.9
top_p = 1.0                         # the engine's default
max_tokens = 8192
sft_max_tokens = 4500               # the published limit is not known: the filter script's default of 512 would drop nearly
                                    # all. With prompts of some hundred tokens this stays under SFT's 5,000
out_dir = 'out/intellect_math_generate'
