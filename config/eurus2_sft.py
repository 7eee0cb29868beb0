# Eurus-2-7B-SFT.
#     torchrun --nproc_per_node 8 sft.py config/eurus2_sft.py
#
# Source: model card of PRIME-RL/Eurus-2-7B-SFT: 229,763 action-style samples of
# Llama-3.1-70B-Instruct, learning rate 1e-5 with a cosine schedule, warm-up 0.1, batch size 96,
# 3 epochs, seed 42. The model card does not state the maximum length. We have not run it at this
# size.

data = "PRIME-RL/Eurus-2-SFT-Data"
model = "Qwen/Qwen2.5-Math-7B"
tokenizer = "Qwen/Qwen2.5-Math-7B-Instruct"
epochs = 3
batch_size = 96
learning_rate = 1e-5
schedule = "cosine"
warmup = 0.1
max_length = 4096  # Qwen2.5-Math's context
overlong = "drop"  # answers without an end would teach the model not to stop
seed = 42
out_dir = "out/eurus2_sft"
