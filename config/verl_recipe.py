# PRIME as in verl's recipe, on top of another config:
#     torchrun --nproc_per_node 8 prime.py config/eurus2_prime.py config/verl_recipe.py
#
# Source: github.com/verl-project/verl-recipe, prime/ (prime_ray_trainer.py, prime_core_algos.py,
# prime_dp_rm.py and the run script).

# One draw of 4 x the prompts; prompts that fail the filter fill up the batch.
collect = "once"
oversample = 4.0
prompts_per_step = 64
filter_truncated = True  # on by default there; a prompt with a truncated answer fails the filter
prm_update = "before"  # train on the whole batch, then score it again
last_token_reward = False
# Equal coefficients cancel in the whitening.
outcome_coef = 5.0
process_coef = 5.0
entropy_coef = 0.001  # left on in its yaml file
# Its script says 64 twice: for the policy it counts prompts, which makes one update per step, and
# for the PRM it counts rows, which makes four.
batch_rows = 256
prm_batch_rows = 64
