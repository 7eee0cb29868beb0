# GSM8K's 1,319 test problems before and after PRIME:
#     python evaluate.py config/gsm8k_evaluate.py

models = ["Qwen/Qwen2.5-0.5B-Instruct", "out/gsm8k_prime/policy"]
benchmarks = ["gsm8k"]
system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
samples = 4  # avg@4 at temperature 1, that of the rollouts
temperature = 1.0
top_p = 1.0
max_tokens = 512
# Percent, from docs/algo/baseline.md of github.com/volcengine/verl, whose answers follow "####" and
# may take more tokens.
published = {
    "Qwen2.5-0.5B-Instruct": {"gsm8k": 36.4},
    "verl, PRIME": {"gsm8k": 58.7},
}
out_dir = "out/gsm8k_evaluate"
