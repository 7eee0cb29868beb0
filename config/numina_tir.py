# NuminaMath-7B, stage 2: tool-integrated reasoning.
#     torchrun --nproc_per_node 8 sft.py config/numina_tir.py
#
# Source: github.com/project-numina/aimo-progress-prize, training/configs/stage-2-tir.yaml, and the
# model card of NuminaMath-7B-TIR. We have not run it at this size.

data = "AI-MO/NuminaMath-TIR"  # 72,441 rows
model = "out/numina_cot/model"
tokenizer = None
chat_template = "config/numina.jinja"
epochs = 4
learning_rate = 2e-5
schedule = "cosine"
warmup = 0.1
weight_decay = 0.0
# Published: 32 blocks of 1,024 tokens, which is 32,768 tokens. We guess 700 tokens per row.
batch_size = 48
# Published: blocks of 1,024 tokens, which cut many traces in two. Here no trace is cut.
max_length = 4096
overlong = "drop"
# Published: loss on the whole text, including the output of the tool. mask_output = True would keep
# the model from learning to make up what only the tool can know.
mask_prompt = False
mask_output = False
seed = 42
val_interval = 1500  # published: once per epoch
out_dir = "out/numina_tir"
