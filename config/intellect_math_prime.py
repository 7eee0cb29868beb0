# INTELLECT-MATH, PRIME.   torchrun --nproc_per_node 8 prime.py config/intellect_math_prime.py
# Source: github.com/PrimeIntellect-ai/INTELLECT-MATH, rl-and-evals/training/intellect-math-scripts/train_intellect_math_7b.sh:
# line for line PRIME's own run script with another start model. Not stated there: maths only or code too (data is "path/to/data").
# Differences: the PRM's master weights are fp32 here, bf16 there. Not run by us at this size.
data = 'PRIME-RL/Eurus-2-RL-Data'
model = 'out/intellect_math_sft/model'  # or the published one: 'PrimeIntellect/INTELLECT-MATH-SFT'; PRM and reference start there too
system_prompt = None                # the rows' own action prompt, as the published command has it, though SFT and the model card use
                                    # the prompt of config/eval_intellect_math.py
max_steps = 256                     # published checkpoints: 48 iterations (as good as Eurus-2's 592) and 256 (the best)
prompts_per_step = 256
samples_per_prompt = 4
max_prompt_tokens = 1024
max_tokens = 3072
temperature = 1.0
filter_low = 0.2
filter_high = 0.8
learning_rate = 5e-7
prm_learning_rate = 1e-6
prm_grad_clip = 10.0
grad_clip = 1.0
weight_decay = 0.01                 # the code's default (workers/fsdp_workers.py)
batch_rows = 256
prm_batch_rows = 256
beta = 0.05
clip = 0.2
prm_update = 'after'
normalize_chunks = 8                # the divisor is taken on each of 8 GPUs' rows
gpu_memory = 0.5                    # 0.7 in the published run, which offloads to the host: --offload=True
save_interval = 16
out_dir = 'out/intellect_math'
