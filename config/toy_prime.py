# The built-in world, stage 3: PRIME.
#     torchrun --nproc_per_node 2 prime.py config/toy_prime.py

data = "data/arithmetic/world/rl.jsonl"
eval_data = "data/arithmetic/world/test.jsonl"
model = "out/toy_sft/model"
prompts_per_step = 32
samples_per_prompt = 8
max_prompt_tokens = 64
max_tokens = 80
# The published 0.05 is meant for answers of 1,400 tokens: with 35, the logit would stay near 0.
beta = 1.0
# A model of 0.3 M parameters tolerates two hundred times the rate of a 7B model.
learning_rate = 1e-4
prm_learning_rate = 3e-4
# Train, then score: a run of a few steps cannot afford a PRM that is one step behind.
prm_update = "before"
batch_rows = 64  # 4 updates per step, as published
prm_batch_rows = 64
checkpointing = False
max_steps = 16  # an upper bound: the run ends when it finds no more prompts with contrast
# That is 640 prompts: if fewer than 32 of them pass the filter, there is nothing left to learn.
max_draws = 20
eval_problems = 200
eval_samples = 4
eval_interval = 2
save_interval = 4
device = "cpu"  # also where there is a GPU: it would have little to do
seed = 1337
out_dir = "out/toy_prime"
