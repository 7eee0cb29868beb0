# The built-in world, stage 3: PRIME.
#     torchrun --nproc_per_node 2 prime.py config/toy_prime.py
data = 'data/arithmetic/world/rl.jsonl'
eval_data = 'data/arithmetic/world/test.jsonl'
model = 'out/toy_sft/model'
prompts_per_step = 32
samples_per_prompt = 8
max_prompt_tokens = 64
max_tokens = 80
beta = 1.0                          # 0.05 belongs to answers of 1,400 tokens: at 35 the logit could not leave 0
learning_rate = 2e-4                # 0.3 M parameters
prm_learning_rate = 1e-3            # the PRM must find a wrong digit sum before the policy has unlearned it
batch_rows = 64                     # 4 updates a step, as published
prm_batch_rows = 64
checkpointing = False
max_steps = 40
eval_problems = 100
eval_samples = 4
eval_interval = 10
save_interval = 10
seed = 1337
out_dir = 'out/toy_prime'
