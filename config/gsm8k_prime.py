# Qwen2.5-0.5B-Instruct on GSM8K, on one GPU:
#     torchrun --nproc_per_node 1 prime.py config/gsm8k_prime.py
#
# Source: verl's recipe (github.com/volcengine/verl, recipe/prime/run_prime_qwen.sh), which names
# this model as an alternative: 64 prompts x 4 answers per step, oversampling by 4, the filter, both
# learning rates, beta, the PRM trained before it scores. verl's documentation states 58.7 on the
# test set of GSM8K (docs/algo/baseline.md), and 36.4 for the model itself. That recipe trains on
# GSM8K and MATH together, wants the answer after "####" and adds a KL penalty of 0.001; here it is
# GSM8K alone, a box, and no penalty. We have not run it.
#
# Predicted by --dry_run=True: 39 GB in the updates, of which 21 are activations, so 80 GB will do.
# In 24 GB: --checkpointing=True --gpu_memory=0.3, which takes 19 GB.

data = "openai/gsm8k"
data_config = "main"
split = "train"  # 7,473 problems
# The prompt of Qwen2.5's math models. Without one, the template adds a prompt of its own.
system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
eval_data = "openai/gsm8k"
eval_split = "test"
eval_problems = 256
eval_samples = 1
model = "Qwen/Qwen2.5-0.5B-Instruct"
prompts_per_step = 64
samples_per_prompt = 4
oversample = 4.0
max_prompt_tokens = 512
max_tokens = 512  # what verl's PPO run of this model takes; its PRIME script is made for 7B: 3,072
learning_rate = 5e-7
prm_learning_rate = 1e-6
prm_update = "before"
prm_batch_rows = 64
# The script says 64 twice: for the policy it counts prompts, which makes one update per step.
batch_rows = 256
beta = 0.05  # made for answers of 1,400 tokens; these have some 200, for which more may be better
max_steps = 435  # 15 epochs, each of 29 steps of 256 prompts drawn
eval_interval = 29
save_interval = 29
checkpointing = False
dtype = "bfloat16"
seed = 0
out_dir = "out/gsm8k_prime"
