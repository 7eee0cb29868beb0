# Eurus-2-7B-PRIME.   torchrun --nproc_per_node 8 prime.py config/eurus2_prime.py
# Source: github.com/PRIME-RL/PRIME, training/examples/run_prime_main.sh and ppo_trainer.yaml; paper arXiv 2502.01456 App. B.
# Published: 592 iterations, 680 s each on 8 x A800 (paper Table 2). Not run by us at this size.
data = 'PRIME-RL/Eurus-2-RL-Data'   # 455 k maths and 27 k code prompts; the rows bring the action system prompt
eval_data = 'PRIME-RL/Eurus-2-RL-Data'
eval_split = 'validation'
eval_problems = 2048                # the whole split, half of it code (published: greedy only; eval_samples come on top)
model = 'out/eurus2_sft/model'      # or the published one: 'PRIME-RL/Eurus-2-7B-SFT'
max_steps = 592
prompts_per_step = 256
samples_per_prompt = 4
max_prompt_tokens = 1024
max_tokens = 3072
learning_rate = 5e-7
prm_learning_rate = 1e-6
beta = 0.05
prm_update = 'after'
normalize_chunks = 8                # the divisor is taken on each of 8 GPUs' rows
eval_interval = 16
save_interval = 16
out_dir = 'out/eurus2'
