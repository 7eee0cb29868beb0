# Word problems, stage 1: SmolLM2-135M-Instruct learns the form of an answer from solved problems.
#     torchrun --nproc_per_node 2 sft.py config/words_sft.py

data = "data/words/world/sft.jsonl"
model = "data/words/world/model"
tokenizer = None  # the model's own
# ChatML without the model's default system message, which would make a prompt half as long again.
chat_template = "config/words.jinja"
max_length = 256
epochs = 1
batch_size = 16
learning_rate = 1e-4
schedule = "linear"
warmup = 0.1
beta2 = 0.95  # a short run needs a shorter average of squared gradients
val_rows = 0
checkpointing = False  # memory is no issue
device = "cpu"  # also where there is a GPU; --device=cuda uses it
dtype = "bfloat16"
seed = 1337
log_interval = 5
save_interval = 25
keep_checkpoints = 1
out_dir = "out/words_sft"
