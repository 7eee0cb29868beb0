# The built-in world with programs: the base model continues with text that is half sums and half
# programs, both with bad habits.
#     torchrun --nproc_per_node 2 sft.py config/toy_code_sft.py

data = "data/arithmetic/world/code_web.jsonl"
model = "out/toy_base/model"
tokenizer = None
max_length = 256
max_steps = 400
batch_size = 32
learning_rate = 2e-3
schedule = "linear"
warmup = 0.1
beta2 = 0.98
val_rows = 100
checkpointing = False
device = "cpu"  # also where there is a GPU: it would have little to do
seed = 1337
log_interval = 50
val_interval = 100
save_interval = 100
out_dir = "out/toy_code_sft"
