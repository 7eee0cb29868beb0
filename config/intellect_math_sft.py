# INTELLECT-MATH-SFT.
#     torchrun --nproc_per_node 8 sft.py config/intellect_math_sft.py
#
# Source: github.com/PrimeIntellect-ai/INTELLECT-MATH,
# sft/intellect-math-scripts/train_intellect_math_7b_sft.sh (open-instruct). Two differences: rows
# are packed (the same gradient, without padding), and the loss of a step is the mean over its
# tokens, where open-instruct averages each row first and then the rows. We have not run it at this
# size.

# Or the published set: "PrimeIntellect/INTELLECT-MATH-SFT-Data".
data = "out/intellect_math_generate/sft.jsonl"
model = "Qwen/Qwen2.5-Math-7B"
tokenizer = "Qwen/Qwen2.5-Math-7B-Instruct"
# None: the Instruct model's ChatML. The published script does not set a template either, but then
# open-instruct saves a default of its own: config/tulu.jinja.
chat_template = None
epochs = 5  # about 28.6 k steps on 733 k rows
batch_size = 128  # 1 per GPU x 16 accumulation steps x 8 GPUs
learning_rate = 5e-6
schedule = "linear"
warmup = 0.03
weight_decay = 0.0
max_length = 5000  # beyond the 4,096 positions of the base model, as published
overlong = "truncate"
seed = 42
save_interval = 300
out_dir = "out/intellect_math_sft"
