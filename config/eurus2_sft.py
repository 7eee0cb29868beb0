# Eurus-2-7B-SFT.   torchrun --nproc_per_node 8 sft.py config/eurus2_sft.py
# Source: model card PRIME-RL/Eurus-2-7B-SFT: 229,763 action-style samples of Llama-3.1-70B-Instruct, lr 1e-5 cosine, warm-up
# 0.1, batch 96, 3 epochs, seed 42. The card does not state the sequence limit. Not run by us at this size.
data = 'PRIME-RL/Eurus-2-SFT-Data'
model = 'Qwen/Qwen2.5-Math-7B'
tokenizer = 'Qwen/Qwen2.5-Math-7B-Instruct'
epochs = 3
batch_size = 96
learning_rate = 1e-5
schedule = 'cosine'
warmup = 0.1
max_length = 4096                   # Qwen2.5-Math's context
overlong = 'drop'                   # an answer without its end would teach not to stop
seed = 42
out_dir = 'out/eurus2_sft'
