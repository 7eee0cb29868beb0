# The model card's table.   python evaluate.py config/eval_intellect_math.py
# Published (greedy, INTELLECT-MATH after 256 steps / its SFT model): MATH-500 82.0 / 72.8, OlympiadBench 49.5 / 39.1,
# AIME 2024 26.7 / 16.6, AMC 60.2 / 45.8, Minerva 39.7 / 33.8. One greedy run of AIME is known to +-16 points.
models = ['out/intellect_math/policy', 'out/intellect_math_sft/model']
benchmarks = ['math500', 'olympiadbench', 'aime24', 'amc', 'minerva']
user_suffix = '\n\nPresent the answer in LaTex format: \\boxed{Your answer}'     # github.com/PRIME-RL/PRIME, eval/
system_prompt = 'Solve the following math problem efficiently and clearly. Think carefully and step by step about your response and reason before providing a final response. Conclude your response with: \n\nTherefore, the final answer is: $\\boxed{answer}$. I hope it is correct.\n\nWhere [answer] is just the final number or expression that solves the problem.'
max_tokens = 4096                   # 8192 for MATH-500 there; Qwen2.5-Math has 4096 positions
out_dir = 'out/eval_intellect_math'
