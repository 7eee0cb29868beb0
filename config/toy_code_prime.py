# The built-in world with programs: PRIME on a mixture of sums (graded by the box) and
# programs (graded by running tests).
#     torchrun --nproc_per_node 2 prime.py config/toy_code_prime.py

data = "data/arithmetic/world/code_rl.jsonl"
eval_data = "data/arithmetic/world/code_test.jsonl"  # programs only
model = "out/toy_code_sft/model"
prompts_per_step = 16
samples_per_prompt = 8
max_prompt_tokens = 64
max_tokens = 80
# beta and the learning rates are those of toy_prime.py.
beta = 1.0
learning_rate = 1e-4
prm_learning_rate = 3e-4
prm_update = "before"
batch_rows = 32
prm_batch_rows = 32
checkpointing = False
max_steps = 10
max_draws = 20
eval_problems = 40
eval_samples = 4
eval_interval = 2
save_interval = 2
device = "cpu"  # also where there is a GPU: it would have little to do
seed = 1337
out_dir = "out/toy_code_prime"
