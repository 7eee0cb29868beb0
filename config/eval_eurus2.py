# The model card's table.   torchrun --nproc_per_node 8 evaluate.py config/eval_eurus2.py       (8 GPUs; or python, 1 GPU)
# Source: model card of PRIME-RL/Eurus-2-7B-PRIME; the protocol is github.com/PRIME-RL/PRIME, eval/. Greedy, one answer each.
# A single run of AIME is known to +-16 points. Not run by us. Code (the card has no numbers):
#     --benchmarks='["humaneval", "mbpp"]'
models = ['out/eurus2/policy', 'out/eurus2_sft/model']  # or the published ones, PRIME-RL/Eurus-2-7B-PRIME and -SFT
benchmarks = ['aime24', 'math500', 'amc', 'minerva', 'olympiadbench']
# The evaluation's file has a backslash and an n where the training data has line breaks, and is read as it is.
system_prompt = (
    r'\nWhen tackling complex reasoning tasks, you have access to the following actions. Use them as needed to progress through '
    r'your thought process.\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n[SIMPLIFY]\n\n[SYNTHESIZE]\n\n[PIVOT]\n\n[OUTPUT]\n\nYou '
    r'should strictly follow the format below:\n\n[ACTION NAME]\n\n# Your action step 1\n\n# Your action step 2\n\n# Your action '
    r'step 3\n\n...\n\nNext action: [NEXT ACTION NAME]\n')
user_suffix = '\n\nPresent the answer in LaTex format: \\boxed{Your answer}'
max_tokens = 4096                   # eval/ there, Math/aime, Math/amc and Qwen25-Math
benchmark_tokens = {'math500': 8192}    # eval/Math/math/evaluate_math.py; the 4,096 positions of Qwen2.5-Math cut all of them
# Math/math and Math/aime; their other stop string, <|eot_id|>, is no token of Qwen's, those of Qwen25-Math end answers anyway.
benchmark_stop = {'math500': '\n###\nProblem: ', 'aime24': '\n###\nProblem: '}
parity = True
published = {
    'Eurus-2-7B-PRIME': {
        'aime24': 26.7, 'math500': 79.2, 'amc': 57.8, 'minerva': 38.6, 'olympiadbench': 42.1, 'average': 48.9},
    'Eurus-2-7B-SFT': {
        'aime24': 3.3, 'math500': 65.1, 'amc': 30.1, 'minerva': 32.7, 'olympiadbench': 29.8, 'average': 32.2},
    'Qwen2.5-Math-7B-Instruct': {
        'aime24': 13.3, 'math500': 79.8, 'amc': 50.6, 'minerva': 34.6, 'olympiadbench': 40.7, 'average': 43.8},
    'Llama-3.1-70B-Instruct': {
        'aime24': 16.7, 'math500': 64.6, 'amc': 30.1, 'minerva': 35.3, 'olympiadbench': 31.9, 'average': 36.4},
    'GPT-4o': {
        'aime24': 9.3, 'math500': 76.4, 'amc': 45.8, 'minerva': 36.8, 'olympiadbench': 43.3, 'average': 43.3},
}
published_notes = [
    'Eurus-2-7B-SFT: 65.1 is no count of the 500 problems of MATH-500; 325 are 65.0, 326 are 65.2',
    'Llama-3.1-70B-Instruct: the average is printed as 36.4, the numbers give 35.7',
    'GPT-4o: 9.3 is no count of the 30 problems of AIME (3 are 10.0): an average of several runs, from elsewhere',
    'GPT-4o: the average is printed as 43.3, the numbers give 42.3',
]
out_dir = 'out/eval_eurus2'
