# The built-in world, stage 2: fine-tune on the right answers. Few answers and few steps on purpose:
# in a world this small, enough rejection sampling unlearns a bad habit by itself and leaves PRIME
# nothing to show.
#     torchrun --nproc_per_node 2 sft.py config/toy_sft.py

data = "out/toy_generate/sft.jsonl"
model = "out/toy_base/model"
tokenizer = None
max_length = 256
epochs = 2
batch_size = 32
learning_rate = 1.5e-4
schedule = "linear"
warmup = 0.1
beta2 = 0.95
val_rows = 32
checkpointing = False
device = "cpu"  # also where there is a GPU: it would have little to do
seed = 1337
save_interval = 0  # the run takes seconds: there is nothing to resume
out_dir = "out/toy_sft"
