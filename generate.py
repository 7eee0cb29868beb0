"""
Sample a teacher, grade the answers, keep the correct ones: the data set of supervised fine-tuning.

    python generate.py                             # INTELLECT-MATH: QwQ-32B-Preview, all GPUs
    python generate.py config/toy_generate.py      # a laptop: the built-in world

Every answer is one row of `samples.jsonl`, written as soon as it is graded. Started again, the
script continues where it was. The rows that are right and not too long become `sft.jsonl`
(`messages` rows), which sft.py reads. Left out on purpose: batch files, several nodes, a server.
"""

import json
import os

from configurator import UserError, run, values
from engine import make_engine
from grader import Grader, extract_answer
from lib import memory
from lib.answers import Request, read_answers, sample_seed
from lib.pretrained import load_tokenizer, positions, render_prompt
from lib.problems import load_problems
from lib.run import announce_sandbox, check_limits, pick_device, print0, write_run_config
from lib.tools import Job, Tool, stream_answers

# --- problems
data = "PrimeIntellect/NuminaMath-groundtruth"  # hub id, .jsonl, .json, .csv or .parquet file
data_config: str = None  # the hub data set's configuration
split = "train"  # the hub data set's split
problem_column: str = None  # None: prompt (messages), problem, question or instruction
answer_column: str = None  # None: ground_truth, reward_model, answer, final_answer or solution
max_problems: int = None  # only the first so many
max_bad_share = 0.01  # malformed rows are counted and reported; more than this share is an error
# published: what the student is told
sft_system_prompt = (
    "Solve the following math problem efficiently and clearly. Think carefully and step by step "
    "about your response and reason before providing a final response. Conclude your response "
    "with: \n\nTherefore, the final answer is: $\\boxed{answer}$. I hope it is correct.\n\nWhere "
    "[answer] is just the final number or expression that solves the problem."
)
# what the teacher is told: published, but for the wording of this sentence, which is ours
system_prompt = (
    sft_system_prompt
    + " If it is a multiple choice question, [answer] is the letter of your choice."
)
# --- teacher
model = "Qwen/QwQ-32B-Preview"  # hub id or folder
chat_template: str = None  # .jinja file; None: the tokenizer's own
engine = "auto"  # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = "auto"  # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = "auto"  # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel: int = None  # GPUs a model is spread over (vllm); None: as many as divide its heads
gpu_memory = 0.9  # share of each GPU for the engine (vllm)
# --- sampling
samples_per_problem = 2  # published: 2 per question
temperature = 0.9  # published
top_p = 1.0  # published: the engine's default
max_prompt_tokens = 2048  # longer prompts are skipped and counted
max_tokens = 8192  # published: new tokens per sample
seed = 0  # sample k of a problem has a seed of its own, made of this, the problem's id and k
tir = False  # the answer may call Python, as NuminaMath-7B-TIR's do: see lib/tools.py
tir_rounds = 4  # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0  # seconds per program (Numina: 5)
sandbox = "auto"  # of programs: 'auto' (the best there is, said at start), 'required' (bubblewrap)
tir_numina = False  # the very rules of Numina's notebook: see lib/tools.py
# --- grading and output
grade_workers: int = None  # processes; None: one per core
reward: str = None  # your_file.py with reward(response, problem) -> float; None: grader.py's judges
dry_run = False  # print what answers take of a GPU, and end
out_dir = "out/generate"  # samples.jsonl and sft.jsonl
# longer answers stay out of sft.jsonl (published: unknown; the script's own 512 drops most)
sft_max_tokens = 4500


def main():
    check_settings()
    if dry_run:
        print_memory()
        return

    # What can be wrong shows before any work.
    torch_device, torch_dtype = pick_device(device, dtype)
    problems = read_problems()
    tokenizer = load_tokenizer(model, chat_template)
    runs_programs = tir or any(problem.ability == "code" for problem in problems)
    announce_sandbox(sandbox, runs_programs)
    write_run_config(out_dir, values(globals()))

    # The answers that are missing.
    path = os.path.join(out_dir, "samples.jsonl")
    identity = answer_identity()
    done = read_answers(path, identity)
    jobs = make_jobs(problems, tokenizer, identity, done)

    # Sample, grade, and write them.
    if jobs:
        longest = min(max_prompt_tokens + max_tokens, positions(model))
        sampler = make_engine(
            engine,
            model,
            tokenizer,
            torch_device,
            torch_dtype,
            longest,
            tensor_parallel,
            gpu_memory,
        )
        first_prompt = tokenizer.decode(jobs[0].request.prompt)
        print0(f"engine: {sampler.name}; first prompt:\n{first_prompt}")
        tool = Tool(tir_rounds, tir_timeout, tir_numina) if tir else None
        with Grader(workers=grade_workers, reward=reward) as grader:
            stream_answers(sampler, grader, tokenizer, jobs, path, tool)
        sampler.close()

    # Of all answers, those to learn from.
    rows = read_answers(path, identity)
    write_sft_set(rows, os.path.join(out_dir, "sft.jsonl"), sft_system_prompt, sft_max_tokens)


def check_settings() -> None:
    """Raise UserError for settings that cannot work, before anything is loaded."""
    at_least_one = ("samples_per_problem", "max_tokens", "tir_rounds", "max_problems")
    check_limits(globals(), dict.fromkeys(at_least_one, 1))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("start generate.py with python, not torchrun: one process takes all GPUs")


def print_memory() -> None:
    """What the engine takes of the GPUs: all that --dry_run=True does."""
    memory.print_engine(
        model,
        memory.gpus_of_this_run(),
        gpu_memory=gpu_memory,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        tensor_parallel=tensor_parallel,
    )


def read_problems() -> list:
    """The problems of the settings, with the teacher's system prompt."""
    return load_problems(
        data,
        split,
        data_config,
        problem_column=problem_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        max_problems=max_problems,
        max_bad_share=max_bad_share,
        own_reward=reward is not None,
    )


def answer_identity() -> dict:
    """What all rows of samples.jsonl share: a row made with anything else is refused.

    A setting that is None here is left out of the rows.
    """
    sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    if tir:
        sampling.update(rounds=tir_rounds, tool_timeout=tir_timeout, numina=tir_numina)
    return dict(
        model=model,
        asked=[system_prompt, seed],
        sampling=sampling,
        chat_template=chat_template,
        reward=reward,
    )


def make_jobs(problems: list, tokenizer, identity: dict, done: list[dict]) -> list[Job]:
    """The answers that are still to be sampled. done: the rows that are there.

    Problems whose prompt is too long are counted and left out.
    """
    there = {(str(row["problem_id"]), row["sample"], row["problem"]) for row in done}
    shared = {name: value for name, value in identity.items() if value is not None}
    longest = min(max_prompt_tokens, positions(model) - 1)

    jobs = []
    fitting = 0
    for problem in problems:
        prompt = render_prompt(tokenizer, problem.messages)
        if len(prompt) > longest:
            continue
        fitting += 1
        for k in range(samples_per_problem):
            if (str(problem.id), k, problem.text) not in there:
                jobs.append(make_job(problem, prompt, k, shared))

    print0(
        f"{fitting} problems x {samples_per_problem} samples, "
        f"{len(problems) - fitting} problems have more than {longest} tokens; "
        f"{len(there)} rows are there, {len(jobs)} to sample"
    )
    return jobs


def make_job(problem, prompt: list[int], k: int, shared: dict) -> Job:
    """Sample k of a problem: what the engine is asked, and the beginning of its row."""
    request = Request(
        prompt,
        sample_seed(seed, str(problem.id), k),
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
    )
    # The student has a system prompt of its own.
    messages = [message for message in problem.messages if message["role"] != "system"]
    row = dict(shared, problem=problem.text, sample=k, seed=request.seed, messages=messages)
    return Job(request, problem, row)


def write_sft_set(rows: list[dict], path: str, student_prompt: str, longest: int) -> None:
    """Write `messages` rows for sft.py, and print a summary.

    Of the rows of samples.jsonl those are kept that are right, ended by themselves and have at most
    `longest` tokens. student_prompt: the system prompt to train with; "": none.
    Raises UserError if no row is left.
    """
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    right = [row for row in ended if row["correct"]]
    kept = [row for row in right if row["n_tokens"] <= longest]

    # The file is complete or not there.
    system = [dict(role="system", content=student_prompt)] if student_prompt else []
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for row in kept:
            answer = dict(role="assistant", content=row["response"])
            sft_row = dict(
                messages=[*system, *row["messages"], answer],
                ground_truth=row["ground_truth"],
                id=row["problem_id"],
            )
            file.write(json.dumps(sft_row) + "\n")
    os.replace(path + ".tmp", path)

    wrong = [row for row in ended if not row["correct"]]
    no_box = [row for row in wrong if not extract_answer(row["response"])]
    print0(
        f"{len(rows)} answers: {len(kept)} kept, {len(wrong) - len(no_box)} wrong, "
        f"{len(no_box)} no box, {len(rows) - len(ended)} not ended, "
        f"{len(right) - len(kept)} too long; wrote {path}"
    )
    if not kept:
        raise UserError(
            f"no answer is right: {path} is empty; try more samples_per_problem or another model"
        )


if __name__ == "__main__":
    run(main, globals())
