# Eurus-2-7B-PRIME.
#     torchrun --nproc_per_node 8 prime.py config/eurus2_prime.py
#
# Source: github.com/PRIME-RL/PRIME, training/examples/run_prime_main.sh and ppo_trainer.yaml;
# paper arXiv 2502.01456, appendix B. Published: 592 iterations of 680 s each on 8 x A800 (paper,
# Table 2). We have not run it at this size.

# 455 k maths and 27 k code prompts. The rows include the system prompt with the actions.
data = "PRIME-RL/Eurus-2-RL-Data"
eval_data = "PRIME-RL/Eurus-2-RL-Data"
eval_split = "validation"
# The whole split, half of it code. Published: greedy answers only; eval_samples are in addition.
eval_problems = 2048
model = "out/eurus2_sft/model"  # or the published one: "PRIME-RL/Eurus-2-7B-SFT"
max_steps = 592
prompts_per_step = 256
samples_per_prompt = 4
max_prompt_tokens = 1024
max_tokens = 3072
learning_rate = 5e-7
prm_learning_rate = 1e-6
beta = 0.05
prm_update = "after"
normalize_chunks = 8  # each of 8 GPUs computes the divisor from its own rows
eval_interval = 16
save_interval = 16
out_dir = "out/eurus2"
