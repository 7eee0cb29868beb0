# The built-in world in a classroom: PRIME on sums of two digits, after docs/prime_by_hand.ipynb has
# made the problems and the base model. Half a minute on one quiet core.
#     python prime.py config/class_prime.py

data = "out/notebook/world/rl.jsonl"
eval_data = "out/notebook/world/test.jsonl"
model = "out/notebook/base/model"
prompts_per_step = 16
samples_per_prompt = 8
max_prompt_tokens = 64
max_tokens = 80
# These are explained in toy_prime.py.
beta = 1.0
learning_rate = 1e-4
prm_learning_rate = 3e-4
prm_update = "before"
batch_rows = 32
prm_batch_rows = 32
checkpointing = False
max_steps = 6
max_draws = 20
eval_problems = 100
eval_samples = 2
eval_interval = 1
save_interval = 0  # the run takes seconds: there is nothing to resume
device = "cpu"
seed = 1337
out_dir = "out/class_prime"
