# The table of the model card. With 8 GPUs, or with one:
#     torchrun --nproc_per_node 8 evaluate.py config/eval_intellect_math.py
#     python evaluate.py config/eval_intellect_math.py
#
# Source: model card of PrimeIntellect/INTELLECT-MATH; the protocol is in github.com/PRIME-RL/PRIME,
# eval/. One greedy answer per problem; a single run on AIME is uncertain by 16 points either way.
# We have not run it.

# Or the published ones: PrimeIntellect/INTELLECT-MATH and PrimeIntellect/INTELLECT-MATH-SFT.
models = ["out/intellect_math/policy", "out/intellect_math_sft/model"]
benchmarks = ["math500", "olympiadbench", "aime24", "amc", "minerva"]
# The prompt of the SFT data and of the model card. The one in the repository's eval/ is Eurus-2's,
# which this SFT model has never seen.
system_prompt = (
    "Solve the following math problem efficiently and clearly. Think carefully and step by step "
    "about your response and reason before providing a final response. Conclude your response "
    "with: \n\nTherefore, the final answer is: $\\boxed{answer}$. I hope it is correct.\n\n"
    "Where [answer] is just the final number or expression that solves the problem."
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
    "INTELLECT-MATH, 256 steps": {
        "math500": 82.0,
        "olympiadbench": 49.5,
        "aime24": 26.7,
        "amc": 60.2,
        "minerva": 39.7,
        "average": 51.6,
    },
    "INTELLECT-MATH-SFT": {
        "math500": 72.8,
        "olympiadbench": 39.1,
        "aime24": 16.6,
        "amc": 45.8,
        "minerva": 33.8,
        "average": 41.6,
    },
    "INTELLECT-MATH, 48 steps": {
        "math500": 81.6,
        "olympiadbench": 46.7,
        "aime24": 26.7,
        "amc": 57.8,
        "minerva": 37.8,
        "average": 50.1,
    },
    "Eurus-2-7B-PRIME": {
        "math500": 79.2,
        "olympiadbench": 42.1,
        "aime24": 26.7,
        "amc": 57.8,
        "minerva": 38.6,
        "average": 48.9,
    },
    "Eurus-2-7B-SFT": {
        "math500": 65.1,
        "olympiadbench": 29.8,
        "aime24": 3.3,
        "amc": 30.1,
        "minerva": 32.7,
        "average": 32.2,
    },
    # The model card calls it Qwen-2.5-Math, but these are the numbers that the model card of
    # Eurus-2 gives for the Instruct model.
    "Qwen2.5-Math-7B-Instruct": {
        "math500": 79.8,
        "olympiadbench": 40.7,
        "aime24": 13.3,
        "amc": 50.6,
        "minerva": 34.6,
        "average": 43.8,
    },
}
published_notes = [
    "INTELLECT-MATH-SFT: 16.6 is 5 of the 30 problems of AIME (16.67), cut instead of rounded",
    "INTELLECT-MATH, 48 steps: 37.8 is impossible with 272 problems (Minerva); 103 are 37.87",
    "Eurus-2-7B-SFT: 65.1 is impossible with 500 problems (MATH-500); 325 are 65.0, 326 are 65.2",
]
out_dir = "out/eval_intellect_math"
