"""
Sample a teacher, grade the answers, keep the correct ones: the data set of supervised fine-tuning.

    python generate.py                             # INTELLECT-MATH: QwQ-32B-Preview, all GPUs
    python generate.py config/toy_generate.py      # a laptop: the built-in world

Every answer is one row of `samples.jsonl`, written as soon as it is graded. Started again, the
script continues where it was; with another reward it first grades the stored answers again. The
rows that are right and not too long become `sft.jsonl` (`messages` rows), which sft.py reads. Left
out on purpose: batch files, several nodes, a server.
"""

import collections
import json
import os

from configurator import UserError, run, values
from engine import make_engine
from grader import Grader, extract_answer
from lib import memory
from lib.answers import Request, read_answers, sample_seed
from lib.own_reward import reward_name
from lib.pretrained import load_tokenizer, positions, render_prompt, vocabulary_size
from lib.problems import Problem, load_problems
from lib.responses import grade_again, judge_columns, stored_judge, write_rows
from lib.run import announce_sandbox, check_limits, pick_device, print0, write_run_config
from lib.tools import Job, Tool, stream_answers

# What rows of samples.jsonl have besides lib/answers.py's COLUMNS.
COLUMNS = dict(problem=str, sample=int, messages=list)

# --- problems
# hub id, a .jsonl, .json, .csv or .parquet file, or a folder of .parquet files
data = "PrimeIntellect/NuminaMath-groundtruth"
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
# what the teacher is told: published, but for the wording of the last sentence, which is ours
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
grade_timeout = 5.0  # seconds per answer
reward: str = None  # your_file.py with reward(response, problem) -> float; None: grader.py's judges
dry_run = False  # print what answers take of a GPU, and end
out_dir = "out/generate"  # samples.jsonl and sft.jsonl
# longer answers stay out of sft.jsonl (published: unknown)
sft_max_tokens = 4500


def main():
    check_settings()
    if dry_run:
        print_memory()
        return

    # What can be wrong shows before any work.
    torch_device, torch_dtype = pick_device(device, dtype)
    tokenizer = load_tokenizer(model, chat_template)
    problems = read_problems(tokenizer)
    runs_programs = tir or any(problem.ability == "code" for problem in problems)
    announce_sandbox(sandbox, runs_programs)
    write_run_config(out_dir, values(globals()))

    path = os.path.join(out_dir, "samples.jsonl")
    identity = answer_identity()
    with Grader(workers=grade_workers, timeout=grade_timeout, reward=reward) as grader:
        # Answers that are there may need another verdict.
        judge = reward_name(reward)
        done = read_answers(path, identity, COLUMNS)
        grade_stored(done, problems, grader, judge, path)

        # Sample the answers that are missing, grade and write them.
        jobs = make_jobs(problems, tokenizer, identity, judge, done)
        if jobs:
            first_prompt = tokenizer.decode(jobs[0].request.prompt)
            sampler = open_engine(tokenizer, torch_device, torch_dtype)
            print0(f"engine: {sampler.name}; first prompt:\n{first_prompt}")
            tool = Tool(tir_rounds, tir_timeout, tir_numina) if tir else None
            stream_answers(sampler, grader, tokenizer, jobs, path, tool)
            sampler.close()

    # Of all answers, those to learn from.
    rows = keep_judged(read_answers(path, identity, COLUMNS), judge)
    rows = in_order_of(problems, rows)
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


def read_problems(tokenizer) -> list[Problem]:
    """The problems of the settings, with the teacher's system prompt, without duplicates."""
    problems = load_problems(
        data,
        split,
        data_config,
        problem_column=problem_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        max_problems=max_problems,
        max_bad_share=max_bad_share,
        own_reward=reward is not None,
        tokenizer=tokenizer,
        vocabulary=vocabulary_size(model),
    )

    # The same problem again has the same seeds, and so the same answers.
    distinct = {}
    for problem in problems:
        distinct.setdefault((str(problem.id), problem.text), problem)
    if len(distinct) < len(problems):
        print0(f"{len(problems) - len(distinct)} problems are duplicates and are asked once")
    return list(distinct.values())


def open_engine(tokenizer, torch_device, torch_dtype):
    """The teacher's engine."""
    longest = min(max_prompt_tokens + max_tokens, positions(model))
    return make_engine(
        engine,
        model,
        tokenizer,
        torch_device,
        torch_dtype,
        longest,
        tensor_parallel,
        gpu_memory,
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
    )


def grade_stored(
    rows: list[dict], problems: list[Problem], grader: Grader, judge: str | None, path: str
) -> None:
    """Grade stored rows again, in place and in their file, if another judge has graded them.

    judge: the reward_name() of an own reward, or None. A verdict of an own reward that has failed,
    or that saw other columns of the problem, is not kept either. Rows of other problems than
    `problems` are left as they are.
    """
    known = {}
    for problem in problems:
        known[str(problem.id), problem.text] = problem, judge_columns(problem, judge)

    pairs = []
    for row in rows:
        key = str(row["problem_id"]), row["problem"]
        if key not in known:
            continue
        problem, columns = known[key]
        has_failed = judge is not None and row["failure"] is not None
        if has_failed or stored_judge(row) != columns:
            pairs.append((row, problem))

    if pairs:
        print0(
            f"{len(pairs)} of {len(rows)} stored answers are graded again: "
            "the reward or the problem has changed, or grading had failed"
        )
        grade_again(pairs, grader, judge)
        write_rows(path, rows)


def make_jobs(
    problems: list[Problem], tokenizer, identity: dict, judge: str | None, done: list[dict]
) -> list[Job]:
    """The answers that are still to be sampled. done: the rows that are there.

    judge: the reward_name() of an own reward, or None. Problems whose prompt is too
    long are counted and left out. Raises UserError if none is left.
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
        columns = shared | judge_columns(problem, judge)
        for k in range(samples_per_problem):
            if (str(problem.id), k, problem.text) not in there:
                jobs.append(make_job(problem, prompt, k, columns))

    print0(
        f"{fitting} problems x {samples_per_problem} samples, "
        f"{len(problems) - fitting} problems have more than {longest} tokens; "
        f"{len(there)} rows are there, {len(jobs)} to sample"
    )
    if not fitting:
        raise UserError(
            f"every prompt is longer than {longest} tokens "
            "(--max_prompt_tokens, or the model's positions)"
        )
    return jobs


def make_job(problem: Problem, prompt: list[int], k: int, columns: dict) -> Job:
    """Sample k of a problem: what the engine is asked, and the beginning of its row.

    columns: what the row has of the settings.
    """
    request = Request(
        prompt,
        sample_seed(seed, str(problem.id), k),
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
    )
    # The student has a system prompt of its own.
    messages = [message for message in problem.messages if message["role"] != "system"]
    row = dict(columns, problem=problem.text, sample=k, seed=request.seed, messages=messages)
    return Job(request, problem, row)


def keep_judged(rows: list[dict], judge: str | None) -> list[dict]:
    """The rows that this judge has graded; how many others there are is printed.

    Those belong to problems that this run does not have, so that it cannot grade them again.
    """
    kept = [row for row in rows if row.get("reward") == judge]
    if len(kept) < len(rows):
        print0(
            f"{len(rows) - len(kept)} answers to other problems are left out: "
            "another reward has graded them"
        )
    return kept


def in_order_of(problems: list[Problem], rows: list[dict]) -> list[dict]:
    """Rows in the order of their problems and samples: answers finish in an order by chance."""
    places = {}
    for place, problem in enumerate(problems):
        places[str(problem.id), problem.text] = place

    def order(row):
        # Of other data than today's: last.
        place = places.get((str(row["problem_id"]), row["problem"]), len(problems))
        return place, row["sample"]

    return sorted(rows, key=order)


def write_sft_set(rows: list[dict], path: str, student_prompt: str, longest: int) -> None:
    """Write `messages` rows for sft.py, and print a summary.

    Of the rows of samples.jsonl those are kept that are right, ended by themselves and have at most
    `longest` tokens. student_prompt: the system prompt to train with; "": none.
    Raises UserError if no row is left.
    """
    given_up = [row for row in rows if row.get("failure") is not None]
    graded = [row for row in rows if row.get("failure") is None]
    ended = [row for row in graded if row["finish_reason"] == "stop"]
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

    # An own reward may want no box.
    wrong = [row for row in ended if not row["correct"]]
    counts = {"kept": len(kept), "wrong": len(wrong)}
    if not any("reward" in row for row in rows):
        no_box = [row for row in wrong if not extract_answer(row["response"])]
        counts["wrong"] -= len(no_box)
        counts["no box"] = len(no_box)
    if given_up:
        counts["given up"] = len(given_up)
    counts["not ended"] = len(graded) - len(ended)
    counts["too long"] = len(right) - len(kept)
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    print0(f"{len(rows)} answers: {shown}; wrote {path}")
    if right and not kept:
        raise UserError(f"all {len(right)} right answers are longer than sft_max_tokens={longest}")
    if not kept:
        raise UserError(f"no answer is right: {path} is empty; {advice(rows, given_up)}")


def advice(rows: list[dict], given_up: list[dict]) -> str:
    """What to do if no row is right. given_up: those that could not be graded."""
    more = "try more samples_per_problem or another model"
    if not given_up:
        return more
    kinds = collections.Counter(row["failure"] for row in given_up)
    reasons = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
    text = f"{len(given_up)} of {len(rows)} answers could not be graded ({reasons})"
    if "reward" in given_up[0]:
        text += ": correct the reward and start again, the answers are kept"
    if len(given_up) < len(rows):
        text += f"; none of the others is right: {more}"
    return text


if __name__ == "__main__":
    run(main, globals())
