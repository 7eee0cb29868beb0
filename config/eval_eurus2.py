# The table of the model card. With 8 GPUs, or with one:
#     torchrun --nproc_per_node 8 evaluate.py config/eval_eurus2.py
#     python evaluate.py config/eval_eurus2.py
#
# Source: model card of PRIME-RL/Eurus-2-7B-PRIME; the protocol is in github.com/PRIME-RL/PRIME,
# eval/. One greedy answer per problem; a single run on AIME is uncertain by 16 points either way.
# We have not run it. Code benchmarks, for which the model card has no numbers:
#     --benchmarks='["humaneval", "mbpp"]'

# Or the published ones: PRIME-RL/Eurus-2-7B-PRIME and PRIME-RL/Eurus-2-7B-SFT.
models = ["out/eurus2/policy", "out/eurus2_sft/model"]
benchmarks = ["aime24", "math500", "amc", "minerva", "olympiadbench"]
# The published evaluation reads its prompt from a file that has a backslash and an n where the
# training data has line breaks, and uses the text as it is.
system_prompt = (
    r"\nWhen tackling complex reasoning tasks, you have access to the following actions. Use them "
    r"as needed to progress through your thought process.\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n"
    r"[SIMPLIFY]\n\n[SYNTHESIZE]\n\n[PIVOT]\n\n[OUTPUT]\n\nYou should strictly follow the format "
    r"below:\n\n[ACTION NAME]\n\n# Your action step 1\n\n# Your action step 2\n\n# Your action "
    r"step 3\n\n...\n\nNext action: [NEXT ACTION NAME]\n"
)
user_suffix = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
max_tokens = 4096  # as in eval/ there, for Math/aime, Math/amc and Qwen25-Math
# As in eval/Math/math/evaluate_math.py. Qwen2.5-Math's own 4,096 positions are always the limit.
benchmark_tokens = {"math500": 8192}
# As in Math/math and Math/aime. Their other stop string, <|eot_id|>, is not a token of Qwen's, and
# the stop strings of Qwen25-Math end an answer anyway.
benchmark_stop = {"math500": "\n###\nProblem: ", "aime24": "\n###\nProblem: "}
parity = True
published = {
    "Eurus-2-7B-PRIME": {
        "aime24": 26.7,
        "math500": 79.2,
        "amc": 57.8,
        "minerva": 38.6,
        "olympiadbench": 42.1,
        "average": 48.9,
    },
    "Eurus-2-7B-SFT": {
        "aime24": 3.3,
        "math500": 65.1,
        "amc": 30.1,
        "minerva": 32.7,
        "olympiadbench": 29.8,
        "average": 32.2,
    },
    "Qwen2.5-Math-7B-Instruct": {
        "aime24": 13.3,
        "math500": 79.8,
        "amc": 50.6,
        "minerva": 34.6,
        "olympiadbench": 40.7,
        "average": 43.8,
    },
    "Llama-3.1-70B-Instruct": {
        "aime24": 16.7,
        "math500": 64.6,
        "amc": 30.1,
        "minerva": 35.3,
        "olympiadbench": 31.9,
        "average": 36.4,
    },
    "GPT-4o": {
        "aime24": 9.3,
        "math500": 76.4,
        "amc": 45.8,
        "minerva": 36.8,
        "olympiadbench": 43.3,
        "average": 43.3,
    },
}
published_notes = [
    "Eurus-2-7B-SFT: 65.1 is impossible with 500 problems (MATH-500); 325 are 65.0, 326 are 65.2",
    "Llama-3.1-70B-Instruct: the average is printed as 36.4, the numbers give 35.7",
    "GPT-4o: 9.3 is impossible with 30 problems (AIME; 3 are 10.0): "
    "it must be an average of several runs",
    "GPT-4o: the average is printed as 43.3, the numbers give 42.3",
]
out_dir = "out/eval_eurus2"
