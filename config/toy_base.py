# The built-in world, stage 0: pretrain the 0.3 M model on imperfect worked solutions ("the web").
#     torchrun --nproc_per_node 2 sft.py config/toy_base.py

data = "data/arithmetic/world/web.jsonl"
val_data = "data/arithmetic/world/web_val.jsonl"
model = "data/arithmetic/world/init"
tokenizer = None  # the model's own
max_length = 256
# 51,200 solutions. After fewer, the model still makes copying errors, and PRIME would have to
# correct those as well.
max_steps = 1600
batch_size = 32
# A model of 0.3 M parameters tolerates a rate hundreds of times that of a 7B model. Twice this rate
# fails for some seeds.
learning_rate = 3e-3
schedule = "linear"
warmup = 0.1
beta2 = 0.98  # a short run needs a shorter average of squared gradients
weight_decay = 0.1
checkpointing = False  # memory is no issue
device = "cpu"  # also where there is a GPU: it would have little to do
seed = 1337
log_interval = 50
val_interval = 400
save_interval = 400
out_dir = "out/toy_base"
