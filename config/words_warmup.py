# Word problems, stage 4: PRIME in which only outcomes move the policy, while the PRM learns. Its
# rewards count from words_prime.py on, when they are better than chance.
#     torchrun --nproc_per_node 2 prime.py config/words_prime.py config/words_warmup.py

model = "out/words_rft/model"
prm_model = None  # the policy's start
ref_model = None
process_coef = 0.0
max_steps = 4
eval_interval = 4
out_dir = "out/words_warmup"
