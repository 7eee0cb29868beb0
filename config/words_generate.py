# Word problems, stage 2: the fine-tuned model's own answers; the right ones are kept.
#     python generate.py config/words_generate.py

data = "data/words/world/train.jsonl"
model = "out/words_sft/model"
system_prompt = ""
sft_system_prompt = ""
samples_per_problem = 4
temperature = 1.0
max_prompt_tokens = 128
max_tokens = 80  # the longest right answer has 60
device = "cpu"  # also where there is a GPU; --device=cuda uses it
dtype = "bfloat16"
out_dir = "out/words_generate"
