# NuminaMath-7B, stage 2: tool-integrated reasoning.   torchrun --nproc_per_node 8 sft.py config/numina_tir.py
# Source: github.com/project-numina/aimo-progress-prize, training/configs/stage-2-tir.yaml, and the card of NuminaMath-7B-TIR.
# Not run by us at this size.
data = 'AI-MO/NuminaMath-TIR'       # 72,441 rows
model = 'out/numina_cot/model'
tokenizer = None
chat_template = 'config/numina.jinja'
epochs = 4
learning_rate = 2e-5
schedule = 'cosine'
warmup = 0.1
weight_decay = 0.0
batch_size = 48                     # published: 32 blocks of 1,024 tokens, that is 32,768 tokens; rows of some 700 tokens (our guess)
max_length = 4096                   # published: blocks of 1,024 tokens, which cut many a trace in two; here none is cut
overlong = 'drop'
mask_prompt = False                 # published: loss on all of the text, the tool's output included. mask_output=True keeps the
mask_output = False                 # model from learning to make up what only the tool can know
seed = 42
val_interval = 1500                 # published: once an epoch
out_dir = 'out/numina_tir'
