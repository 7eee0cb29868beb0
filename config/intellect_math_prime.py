# INTELLECT-MATH, stage 3: PRIME.
#     torchrun --nproc_per_node 8 prime.py config/intellect_math_prime.py
#
# Source: github.com/PrimeIntellect-ai/INTELLECT-MATH,
# rl-and-evals/training/intellect-math-scripts/train_intellect_math_7b.sh, which is line for line
# PRIME's own run script with another initial model. It does not state whether the data is maths
# only or includes code (data is "path/to/data"). One difference: the PRM's master weights are fp32
# here, bf16 there. We have not run it at this size.

data = "PRIME-RL/Eurus-2-RL-Data"
# Or the published one: "PrimeIntellect/INTELLECT-MATH-SFT". PRM and reference start from it, too.
model = "out/intellect_math_sft/model"
# None: the rows' own prompt with the actions, as in the published command, although SFT and the
# model card use the prompt of config/eval_intellect_math.py.
system_prompt = None
# Published checkpoints: 48 iterations (as good as Eurus-2 after 592) and 256 (the best).
max_steps = 256
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
weight_decay = 0.01  # the default of the code (workers/fsdp_workers.py)
batch_rows = 256
prm_batch_rows = 256
beta = 0.05
clip = 0.2
prm_update = "after"
normalize_chunks = 8  # each of 8 GPUs computes the divisor from its own rows
gpu_memory = 0.5  # 0.7 in the published run, which offloads to the host: --offload=True
save_interval = 16
out_dir = "out/intellect_math"
