# Qwen2.5-1.5B-Instruct on GSM8K's test problems, before and after PRIME:
#     python evaluate.py config/gsm8k_evaluate.py config/gsm8k_1.5b_evaluate.py

models = ["Qwen/Qwen2.5-1.5B-Instruct", "out/gsm8k_1.5b_prime/policy"]
published = {}  # for this size there is a number of GRPO with LoRA only: 77.9 (see gsm8k_1.5b.py)
out_dir = "out/gsm8k_1.5b_evaluate"
