# The model card's table.   python evaluate.py config/eval_eurus2.py
# Published (greedy, Eurus-2-7B-PRIME / Eurus-2-7B-SFT): AIME 2024 26.7 / 3.3, MATH-500 79.2 / 65.1, AMC 57.8 / 30.1,
# Minerva 38.6 / 32.7, OlympiadBench 42.1 / 29.8. One greedy run of AIME is known to +-16 points.
models = ['out/eurus2/policy', 'out/eurus2_sft/model']
benchmarks = ['aime24', 'math500', 'amc', 'minerva', 'olympiadbench']
user_suffix = '\n\nPresent the answer in LaTex format: \\boxed{Your answer}'     # github.com/PRIME-RL/PRIME, eval/
max_tokens = 4096
out_dir = 'out/eval_eurus2'
