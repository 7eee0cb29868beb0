# Word problems, stage 3: fine-tuning on the right ones among the model's own answers (rejection
# sampling).
#     torchrun --nproc_per_node 2 sft.py config/words_rft.py

data = "out/words_generate/sft.jsonl"
model = "out/words_sft/model"
tokenizer = None  # the model's own, which has the template of words_sft.py
max_length = 256
epochs = 1
batch_size = 16
learning_rate = 2e-5  # what the model says already moves it little
schedule = "linear"
warmup = 0.1
beta2 = 0.95
val_rows = 0
checkpointing = False
device = "cpu"  # also where there is a GPU; --device=cuda uses it
dtype = "bfloat16"
seed = 1337
log_interval = 5
save_interval = 0  # the run takes two minutes: there is nothing to resume
out_dir = "out/words_rft"
