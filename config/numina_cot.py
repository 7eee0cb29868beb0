# NuminaMath-7B, stage 1: chain of thought.
#     torchrun --nproc_per_node 8 sft.py config/numina_cot.py
#
# Source: github.com/project-numina/aimo-progress-prize, training/configs/stage-1-cot.yaml, and the
# model card of NuminaMath-7B-CoT. We have not run it at this size.

data = "AI-MO/NuminaMath-CoT"  # 859,494 rows
model = "out/deepseek_math_7b"  # deepseek-ai/deepseek-math-7b-base as safetensors: runs/numina.sh
tokenizer = None
chat_template = "config/numina.jinja"
epochs = 3
learning_rate = 2e-5
schedule = "cosine"
warmup = 0.0
weight_decay = 0.0
# Published: 32 blocks of 2,048 tokens, which is 65,536 tokens. We guess 500 tokens per row.
batch_size = 128
# The model's context. Published: texts are joined and cut into blocks of 2,048 tokens, and tokens
# attend across the borders between texts. Here a text stays whole and sees only itself.
max_length = 4096
overlong = "drop"
mask_prompt = False  # published: loss on the problem as well
seed = 42
val_interval = 6000  # published: once per epoch
out_dir = "out/numina_cot"
