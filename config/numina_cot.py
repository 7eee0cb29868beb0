# NuminaMath-7B, stage 1: chain of thought.   torchrun --nproc_per_node 8 sft.py config/numina_cot.py
# Source: github.com/project-numina/aimo-progress-prize, training/configs/stage-1-cot.yaml, and the card of NuminaMath-7B-CoT.
# Not run by us at this size.
data = 'AI-MO/NuminaMath-CoT'       # 859,494 rows
model = 'out/deepseek_math_7b'      # deepseek-ai/deepseek-math-7b-base as safetensors: runs/numina.sh
tokenizer = None
chat_template = 'config/numina.jinja'
epochs = 3
learning_rate = 2e-5
schedule = 'cosine'
warmup = 0.0
weight_decay = 0.0
batch_size = 128                    # published: 32 blocks of 2,048 tokens, that is 65,536 tokens; rows of some 500 tokens (our guess)
max_length = 4096                   # the model's context. Published: texts are joined and cut into blocks of 2,048 tokens, and
overlong = 'drop'                   # attention crosses their borders; here a text is whole and sees only itself
mask_prompt = False                 # published: loss on the problem, too
seed = 42
val_interval = 6000                 # published: once an epoch
out_dir = 'out/numina_cot'
