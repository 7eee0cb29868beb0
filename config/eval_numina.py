# The table of the model card. With 8 GPUs, or with one:
#     torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py
#     python evaluate.py config/eval_numina.py
#
# Source: model card of AI-MO/NuminaMath-7B-TIR and its report. The script behind the table is not
# published. We have not run it. There is no system prompt and no suffix. For AMC and AIME the model
# card counts solved problems: 11, 18, 20, 31 of 40 and 0, 1, 5, 10 of 30.

# This model answers in prose. For the model with the tool, add config/eval_numina_tir.py.
models = ["AI-MO/NuminaMath-7B-CoT"]
benchmarks = ["gsm8k", "math", "amc23", "aime24"]
samples = 64  # maj@64
sampled_benchmarks = ["amc23", "aime24"]
temperature = 0.8  # from the competition notebook; the model card does not state its own
top_p = 1.0
# For all benchmarks: the model card states no limit, and the model's context is 4,096 tokens. The
# notebook allows 2,048 per round.
max_tokens = 3072
max_prompt_tokens = 1024
parity = True  # the second verdict also looks at closing phrases and the last number
published = {
    "NuminaMath-7B-CoT": {
        "gsm8k": 76.3,
        "math": 55.8,
        "amc23": 27.5,
        "aime24": 0.0,
        "amc23 maj@64": 45.0,
        "aime24 maj@64": 3.3,
    },
    "Qwen2-7B-Instruct": {
        "gsm8k": 82.3,
        "math": 49.6,
        "amc23": 25.0,
        "aime24": 3.3,
        "amc23 maj@64": 32.5,
        "aime24 maj@64": 13.3,
    },
    "Llama-3-8B-Instruct": {
        "gsm8k": 79.6,
        "math": 30.0,
        "amc23": 5.0,
        "aime24": 0.0,
        "amc23 maj@64": 22.5,
        "aime24 maj@64": 6.7,
    },
    "DeepSeekMath-7B-Instruct": {
        "gsm8k": 82.8,
        "math": 46.8,
        "amc23": 17.5,
        "aime24": 3.3,
        "amc23 maj@64": 32.5,
        "aime24 maj@64": 3.3,
    },
    "DeepSeekMath-7B-RL": {
        "gsm8k": 88.2,
        "math": 51.7,
        "amc23": 22.5,
        "aime24": 3.3,
        "amc23 maj@64": 35.0,
        "aime24 maj@64": 3.3,
    },
    "DART-Math-7B-CoT": {
        "gsm8k": 86.6,
        "math": 53.6,
        "amc23": 27.5,
        "aime24": 3.3,
        "amc23 maj@64": 40.0,
        "aime24 maj@64": 3.3,
    },
}
out_dir = "out/eval_numina"
