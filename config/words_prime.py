# Word problems, stage 5: PRIME, with the PRM that words_warmup.py has trained.
#     torchrun --nproc_per_node 2 prime.py config/words_prime.py

data = "data/words/world/rl.jsonl"
eval_data = "data/words/world/test_unseen.jsonl"
model = "out/words_warmup/policy"
prm_model = "out/words_warmup/prm"
ref_model = "out/words_rft/model"  # the PRM's start
prompts_per_step = 32
samples_per_prompt = 8
oversample = 2.0  # about half of the prompts have right and wrong answers
max_prompt_tokens = 128
max_tokens = 80
# The PRM's logit should spread by about 1. A pretrained model moves its log-probabilities much
# faster than a small one: the "50 / length" of other runs, 2 here, made the PRM worse than chance.
beta = 0.5
prm_learning_rate = 1e-5
prm_update = "before"
prm_batch_rows = 32
learning_rate = 1e-5
batch_rows = 64
weight_decay = 0.0
beta2 = 0.95  # a short run needs a shorter average of squared gradients
entropy_coef = 0.005  # without it the model only sharpens after some steps
micro_batch_tokens = 4096
checkpointing = False  # memory is no issue
max_steps = 12
max_draws = 8
eval_problems = 100
eval_samples = 2
eval_interval = 5
save_interval = 2
keep_checkpoints = 1
device = "cpu"  # also where there is a GPU; --device=cuda uses it
dtype = "bfloat16"
seed = 1337
out_dir = "out/words_prime"
