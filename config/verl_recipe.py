# PRIME as verl's recipe has it, on top of another config:   torchrun --nproc_per_node 8 prime.py config/eurus2_prime.py config/verl_recipe.py
# Source: github.com/verl-project/verl-recipe, prime/ (prime_ray_trainer.py, prime_core_algos.py, prime_dp_rm.py, run script).
collect = 'once'                    # one draw of 4 x the prompts; those that fail the filter fill up
oversample = 4.0
prompts_per_step = 64
filter_truncated = True             # on by default there; a prompt with a cut answer counts as failing
prm_update = 'before'               # train on the whole batch, then score it again
last_token_reward = False
outcome_coef = 5.0
process_coef = 5.0                  # equal coefficients cancel in the whitening
entropy_coef = 0.001                # left on in its yaml
batch_rows = 256                    # its script's 64 counts prompts here: one policy update a step ...
prm_batch_rows = 64                 # ... and rows here: four of the PRM
