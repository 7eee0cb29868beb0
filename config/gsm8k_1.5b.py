# Qwen2.5-1.5B-Instruct in place of the 0.5B, on one GPU of 80 GB:
#     torchrun --nproc_per_node 1 prime.py config/gsm8k_prime.py config/gsm8k_1.5b.py
#
# Predicted by --dry_run=True: 37 GB of weights and Adam's state, 49 GB in the updates. The engine
# gets 32 GB, enough for all answers of a step at a time. We have not run it. Published for this
# model, by another method (GRPO with LoRA): 77.9 (verl's docs/algo/baseline.md).

model = "Qwen/Qwen2.5-1.5B-Instruct"
checkpointing = True
gpu_memory = 0.4
out_dir = "out/gsm8k_1.5b_prime"
