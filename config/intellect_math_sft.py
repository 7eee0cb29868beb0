# INTELLECT-MATH-SFT.   torchrun --nproc_per_node 8 sft.py config/intellect_math_sft.py
# Source: github.com/PrimeIntellect-ai/INTELLECT-MATH, sft/intellect-math-scripts/train_intellect_math_7b_sft.sh (open-instruct).
# Differences: rows are packed (same gradient, no padding), and a step's loss is the mean over its tokens, where open-instruct
# takes the mean over rows of the row's mean. Not run by us at this size.
data = 'out/intellect_math_generate/sft.jsonl'  # or the published set: 'PrimeIntellect/INTELLECT-MATH-SFT-Data'
model = 'Qwen/Qwen2.5-Math-7B'
tokenizer = 'Qwen/Qwen2.5-Math-7B-Instruct'
chat_template = None                # the Instruct model's ChatML. The published script passes none either, but open-instruct then
                                    # saves a default of its own: config/tulu.jinja
epochs = 5                          # about 28.6 k steps on 733 k rows
batch_size = 128                    # 1 a GPU x 16 accumulation x 8 GPUs
learning_rate = 5e-6
schedule = 'linear'
warmup = 0.03
weight_decay = 0.0
max_length = 5000                   # beyond the base's 4096 positions, as published
overlong = 'truncate'
seed = 42
save_interval = 300
out_dir = 'out/intellect_math_sft'
