# The built-in world with a tool, stage 2 of NuminaMath's recipe: large sums by programs, on top of
# the base model, which has learned to add three-digit numbers in its head.
#     torchrun --nproc_per_node 2 sft.py config/toy_tir_sft.py

data = "data/arithmetic/world/tools.jsonl"
model = "out/toy_base/model"
tokenizer = None
max_length = 256
overlong = "drop"  # a trace is never cut in the middle
max_steps = 300
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
out_dir = "out/toy_tir_sft"
