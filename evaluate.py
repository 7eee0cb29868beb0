"""
Score checkpoints on the benchmarks of INTELLECT-MATH, Eurus-2 and NuminaMath, in one table.

    python evaluate.py config/eval_eurus2.py                       # the model card's table
    torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py  # one engine per GPU

Every number has its standard error, and the published one stands beside it. Every response is a row
of <model>.responses.jsonl: started again, the script continues where it was, and --regrade=True
grades the stored responses without an engine.
What is left out on purpose: few-shot prompts, several nodes.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass

from configurator import UserError, run, values
from engine import Engine, make_engine
from grader import Grader, extract_answer, golds
from lib import memory, tables
from lib.answers import Request, sample_seed
from lib.benchmarks import BENCHMARKS, check_dicts, load_benchmark, short_name
from lib.code_tests import find_program
from lib.contamination import find_contamination, print_contamination
from lib.own_reward import reward_name
from lib.pretrained import (
    load_tokenizer,
    positions,
    prompt_trouble,
    render_prompt,
    vocabulary_size,
)
from lib.problems import Problem, check_prompts
from lib.ranking import check_models, find_reference, rank_answers
from lib.responses import (
    ResponseFile,
    answer_key,
    grade_again,
    judge_columns,
    stored_judge,
    write_file,
)
from lib.rows import read_rows
from lib.run import (
    announce_sandbox,
    check_limits,
    cores,
    git_commit,
    join_ranks,
    local_processes,
    pick_device,
    print0,
)
from lib.scores import summarize_sets
from lib.tools import Job, Tool, sample, stream_answers
from lib.weights import check_model_folder

# --- what
models = ["PrimeIntellect/INTELLECT-MATH"]  # hub ids or folders, one row of the table each
# Names of lib/benchmarks.py, or files of problems.
benchmarks = ["math500", "aime24", "amc", "minerva", "olympiadbench"]
data_dir: str = None  # folder with the benchmarks' files, in place of the hub
problem_column: str = None  # of files that are not in lib/benchmarks.py; None: the first known one
answer_column: str = None  # likewise
max_problems: int = None  # only the first so many of each benchmark
system_prompt: str = None  # None: none, though a template may add its own (see the first prompt)
user_suffix = ""  # appended to problems, but not to those of the code benchmarks
code_suffix = (  # appended to those of the code benchmarks
    "\n\nWrite Python code to solve the problem. Present the code in \n"
    "```python\nYour code\n```\nat the end."
)
chat_template: str = None  # .jinja file; None: the tokenizer's own
ask: str = None  # a question: print the first model's answers to Eurus-2's two prompts, and end
against: str = None  # training file or hub id: print which benchmark problems are in it, and end
# a benchmark problem counts if this share of its runs of 10 words is there (10: as for NuminaMath)
overlap = 0.5
# --- sampling
greedy = True  # one greedy answer per problem
samples = 0  # answers per problem at `temperature`: avg@k, pass@k, maj@k
sampled_benchmarks: list = None  # the benchmarks that get the samples; None: all
temperature = 0.6  # of the samples
top_p = 0.95  # of the samples
max_tokens = 8192  # of an answer; less where the model has fewer positions
benchmark_tokens = {}  # {benchmark: max_tokens} where they differ
benchmark_stop = {}  # {benchmark: string that ends an answer and stays in it}; not with tir
max_prompt_tokens = 2048  # longer prompts count as wrong
tir = False  # answers may call Python, as NuminaMath-7B-TIR's do; samples then vote: SC-TIR
tir_rounds = 4  # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0  # seconds per program (Numina: 5)
sandbox = "auto"  # of programs: 'auto' (the best there is, printed) or 'required' (bubblewrap)
tir_numina = False  # the notebook's conversation, its vote modulo 1000; answers are still boxes
seed = 0  # sample k of a problem has its own seed: of this, the benchmark, the problem's id and k
# --- ranking
prm: str = None  # an implicit PRM, folder or hub id, that ranks the samples: bon@k (docs/prm.md)
prm_ref: str = None  # its reference; None: the one that its prm.json names
# --- grading and report
reward: str = None  # your_file.py with reward(response, problem) -> float; None: built-in judges
published = {}  # {column: {benchmark: %}}; the first column belongs to the first model, and so on
published_notes = []  # lines about them for the report: of numbers that cannot be right, say
parity = False  # a second verdict by the published scripts' own, more lenient rules
parity_golds = {}  # {benchmark: .jsonl with unique_id, expected_answer}: their golds that differ
resume = True  # continue after the stored responses; False: all are sampled again, replacing them
regrade = False  # grade the stored responses again, sample nothing
# --- system
engine = "auto"  # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = "auto"  # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = "auto"  # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel: int = None  # GPUs per model (vllm); None: what divides its heads, torchrun: one
gpu_memory = 0.9  # share of each GPU for the engine (vllm)
grade_workers: int = None  # processes; None: one per core
grade_timeout = 5.0  # seconds per answer
dry_run = False  # print what answers take of a GPU, and end
out_dir = "out/evaluate"  # <model>.responses.jsonl, results.md, results.json, results.png

# The settings that the first line of a report shows.
ABOUT = (
    "samples",
    "temperature",
    "top_p",
    "max_tokens",
    "benchmark_tokens",
    "benchmark_stop",
    "seed",
)
# How the card of Eurus-2-7B-PRIME puts questions of mathematics.
MATHS_SUFFIX = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"


# ----------------------------------------------------------------------------------------------
# answers


@dataclass
class Draw:
    """One answer that each problem of a benchmark gets: the greedy one, or sample number k."""

    mode: str  # "greedy" or "sampled"
    k: int
    sampling: dict


def decoding(
    benchmark: str,
    max_tokens: int,
    benchmark_tokens: dict,
    benchmark_stop: dict,
    tool: Tool | None,
) -> dict:
    """How the answers to a benchmark are decoded, besides temperature and top_p."""
    sampling = dict(max_tokens=benchmark_tokens.get(benchmark, max_tokens))
    if tool is not None:
        sampling |= dict(rounds=tool.rounds, tool_timeout=tool.timeout, numina=tool.numina)
    elif benchmark_stop.get(benchmark) is not None:
        sampling["stop"] = benchmark_stop[benchmark]
    return sampling


def make_draws(
    greedy: bool, samples: int, temperature: float, top_p: float, decoded: dict
) -> list[Draw]:
    """The answers that each problem of a benchmark gets. decoded: as decoding() returns it."""
    draws = []
    if greedy:
        draws.append(Draw("greedy", 0, dict(temperature=0.0, top_p=1.0) | decoded))
    for k in range(samples):
        draws.append(Draw("sampled", k, dict(temperature=temperature, top_p=top_p) | decoded))
    return draws


def make_jobs(
    tokenizer,
    sets: dict[str, list[Problem]],
    draws: dict[str, list[Draw]],
    *,
    longest: int,
    seed: int,
    reward: str | None,
    identity: dict,
) -> dict[tuple, Job]:
    """{answer_key: job} of all answers that a model is to give; prompts that are too long get none.

    sets, draws: by benchmark. longest: tokens of a prompt. reward: its reward_name(). identity:
    columns of all rows. Raises UserError if every prompt is too long.
    """
    jobs = {}
    for name, problems in sets.items():
        for problem in problems:
            prompt = render_prompt(tokenizer, problem.messages)
            if len(prompt) > longest:
                continue
            problem_id = str(problem.id)
            text = tokenizer.decode(prompt)
            shared = identity | judge_columns(problem, reward)
            for draw in draws[name]:
                row = shared | dict(
                    benchmark=name,
                    problem_id=problem_id,
                    prompt=text,
                    mode=draw.mode,
                    sample=draw.k,
                    sampling=draw.sampling,
                    seed=sample_seed(seed, name, problem_id, draw.k),
                )
                jobs[answer_key(row)] = Job(make_request(prompt, row), problem, row)
    if not jobs:
        raise UserError(
            f"every prompt is longer than {longest} tokens "
            "(--max_prompt_tokens, or the model's positions)"
        )
    return jobs


def make_request(prompt: list[int], row: dict) -> Request:
    """What an engine is asked for, by the columns `seed` and `sampling` of the answer's row."""
    sampling = row["sampling"]
    return Request(
        prompt,
        row["seed"],
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        max_tokens=sampling["max_tokens"],
        stop=sampling.get("stop"),
    )


# ----------------------------------------------------------------------------------------------
# grading


def graded_alike(row: dict, job: Job) -> bool:
    """Does the verdict of a stored row rest on the job's gold, and on the same own reward?"""
    same_gold = row["ground_truth"] == job.problem.ground_truth
    return same_gold and stored_judge(row) == stored_judge(job.row)


def find_answer(response: str, ability: str) -> str | None:
    """What a response answers: the program if that is asked for, else what it has boxed."""
    if ability == "code":
        return find_program(response)
    return extract_answer(response)


def add_answers(pairs: list[tuple[dict, Problem]], grader: Grader, parity: bool) -> None:
    """Give the rows of (row, problem) pairs their answers, and with `parity` a second verdict."""
    verdicts = []
    for row, problem in pairs:
        row["answer"] = find_answer(row["response"], problem.ability)
        # There may be one of an earlier run.
        row.pop("parity", None)
        if parity:
            verdict = parity_verdict(row["response"], problem, row["benchmark"], grader)
            if verdict is not None:
                verdicts.append((row, verdict))

    # The grader's processes have worked on all of them meanwhile.
    for row, verdict in verdicts:
        row["parity"] = verdict.result()


def parity_verdict(
    response: str, problem: Problem, benchmark: str, grader: Grader
) -> Future[bool] | None:
    """Is a response right by the published scripts' rules? None where there are none."""
    rules = BENCHMARKS[benchmark].rules if benchmark in BENCHMARKS else None
    if rules not in ("prime", "qwen"):
        return None
    gold = problem.published_gold or first_gold(problem)
    answer = published_answer(response, rules, benchmark)

    # Qwen2.5-Math's scripts cannot read a x 10^b where the gold is written as 4.5e33.
    if rules == "qwen" and re.search(r"\de[-+]?\d", gold) and re.search(r"10\s*\^", answer):
        answer = ""
    return grader.compare(answer, gold, parity=True)


def first_gold(problem: Problem) -> str:
    """The first of a problem's golds; "" if there is none, as for an own reward."""
    return next(iter(golds(problem.ground_truth)), "")


def published_answer(response: str, rules: str, benchmark: str | None = None) -> str:
    """What the published scripts take for the answer; "" if there is none.

    "qwen" (Qwen2.5-Math's): what a closing phrase says, else the last box, phrase or number.
    "prime" (PRIME's): what follows the last marker, so that a box before it is lost; of that
    the last box, else all of it.
    """
    if rules == "qwen":
        closing = re.search(r"final answer is \$(.*?)\$\. I hope", response, re.DOTALL)
        if closing:
            return closing[1]
        return extract_answer(response, fallback=True) or ""

    markers = ["answer:\n", "answer: "]
    if benchmark == "math500":
        # The scripts of the other benchmarks misspell this marker, and so never find it.
        markers.insert(0, "the answer is: ")
    for marker in markers:
        response = re.split(marker, response, flags=re.IGNORECASE)[-1].strip()
    answer = extract_answer(response) or response
    if benchmark == "math500":
        return answer
    # strip() takes a set of characters, not a phrase. So do the published scripts: on purpose.
    return answer.strip("The final answer is ").strip(". I hope it is correct.")  # noqa: B005


# ----------------------------------------------------------------------------------------------
# report


def report(results: dict[str, dict], settings: dict, prompt: str) -> None:
    """Write results.md, results.json and results.png, and print the first.

    results: {model: {benchmark: summary}}, models that failed left out. settings: all of this
    script. prompt: the first one.
    """
    sets = next(iter(results.values()))
    published = tables.comparable(settings["published"], sets)
    notes = tables.differences(results, published) + settings["published_notes"]
    if settings["prm"]:
        reference = find_reference(settings["prm"], settings["prm_ref"])
        notes.append(f"bon@k: samples ranked by {settings['prm']} against {reference}")
    for path in settings["models"]:
        if path not in results:
            notes.append(f"{path} is not in this report: the run ended before")

    about = dict(date=time.strftime("%Y-%m-%d %H:%M"), commit=git_commit())
    for name in ("torch", "transformers", "vllm"):
        if name in sys.modules:
            about[name] = sys.modules[name].__version__
    for name in ABOUT:
        about[name] = settings[name]
    head = ", ".join(f"{name} {value}" for name, value in about.items())

    text = f"{head}\n\n~~~\n{prompt}\n~~~\n\n"
    text += tables.tables(results, published, settings["samples"]) + "\n"
    for note in notes:
        text += f"- {note}\n"

    folder = settings["out_dir"]
    write_file(f"{folder}/results.md", text)
    about |= dict(settings=settings, first_prompt=prompt)
    everything = dict(about=about, models=results, notes=notes)
    write_file(f"{folder}/results.json", json.dumps(everything, indent=1))
    mode = "greedy" if settings["greedy"] else "sampled"
    tables.chart(results, published, mode, f"{folder}/results.png")
    shown = text.encode("utf-8", "backslashreplace").decode()
    print0(f"\n{shown}\nwrote {folder}/results.md, results.json and results.png")


# ----------------------------------------------------------------------------------------------
# the steps of main()


def check_names(benchmarks: list[str], named: list) -> None:
    """Raise UserError if two benchmarks have one name, or settings name (`named`) unknown ones."""
    times = collections.Counter(short_name(name) for name in benchmarks)
    known = [*times, *BENCHMARKS]
    # Whoever writes a list or a dict can write anything into it.
    unknown = [str(name) for name in named if name not in known]
    if unknown:
        raise UserError(f"settings name unknown benchmarks: {', '.join(sorted(unknown))}")
    double = [name for name, count in times.items() if count > 1]
    if double:
        raise UserError(f"two benchmarks have the same name: {', '.join(double)}")


def check_settings() -> None:
    """Raise UserError for values that cannot work, before anything is loaded."""
    at_least_one = "max_tokens max_prompt_tokens max_problems tir_rounds tensor_parallel"
    limits = dict.fromkeys(at_least_one.split(), 1)
    limits |= dict.fromkeys(("samples", "grade_workers", "temperature"), 0)
    # Seconds: less than a tenth is no time for any process.
    limits |= dict.fromkeys(("grade_timeout", "tir_timeout"), 0.1)
    check_limits(globals(), limits)
    if not math.isfinite(temperature):
        raise UserError(f"temperature={temperature}: a finite number")
    for name in ("top_p", "overlap", "gpu_memory"):
        if not 0 < globals()[name] <= 1:
            raise UserError(f"{name}={globals()[name]}: more than 0, at most 1")
    if not models or not benchmarks:
        raise UserError("nothing to do: models or benchmarks is empty")
    if not greedy and (samples == 0 or sampled_benchmarks == []):
        raise UserError("nothing to do: greedy=False, and no benchmark gets samples")
    double = [name for name, count in collections.Counter(models).items() if count > 1]
    if double:
        raise UserError(f"a model is there twice: {', '.join(double)}")
    if prm and (samples == 0 or sampled_benchmarks == []):
        raise UserError(f"prm={prm} ranks samples: set --samples, 8 for example")
    check_dicts(benchmark_tokens, benchmark_stop, published, parity_golds)
    named = [*benchmark_tokens, *benchmark_stop, *parity_golds, *(sampled_benchmarks or [])]
    check_names(benchmarks, named)


def longest_answer() -> int:
    """Tokens of the longest answer that any benchmark allows."""
    return max([max_tokens, *benchmark_tokens.values()])


def longest_prompt(path: str) -> int:
    """Tokens of the longest prompt to a model, which must leave room for an answer."""
    return min(max_prompt_tokens, positions(path) - 1)


def print_memory() -> None:
    """What the engine of each model takes of the GPUs: all that --dry_run=True does."""
    for path in models:
        memory.print_engine(
            path,
            memory.gpus_of_this_run(),
            gpu_memory=gpu_memory,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=longest_answer(),
            tensor_parallel=tensor_parallel,
        )


def open_engine(path: str, tokenizer) -> Engine:
    """The engine of a model."""
    torch_device, torch_dtype = pick_device(device, dtype)
    longest = min(max_prompt_tokens + longest_answer(), positions(path))
    return make_engine(
        engine, path, tokenizer, torch_device, torch_dtype, longest, tensor_parallel, gpu_memory
    )


def answer_question(path: str, tool: Tool | None) -> None:
    """Print a model's greedy answers to the question `ask`, as mathematics and as programming.

    Raises UserError if the question is too long, or cannot be asked.
    """
    tokenizer = load_tokenizer(path, chat_template)
    announce_sandbox(sandbox, needed=tir)
    prompts = []
    for suffix in (MATHS_SUFFIX, code_suffix):
        messages = [dict(role="user", content=ask + suffix)]
        if system_prompt:
            messages.insert(0, dict(role="system", content=system_prompt))
        trouble = prompt_trouble(tokenizer, messages, vocabulary_size(path))
        if trouble:
            raise UserError(f"ask: {trouble}")
        prompts.append(render_prompt(tokenizer, messages))
    if max(len(prompt) for prompt in prompts) > longest_prompt(path):
        raise UserError(
            f"the question is longer than {longest_prompt(path)} tokens "
            "(--max_prompt_tokens, or the model's positions)"
        )

    sampler = open_engine(path, tokenizer)
    for prompt in prompts:
        request = Request(prompt, seed, temperature=0.0, max_tokens=max_tokens)
        for _, answer in sample(sampler, tokenizer, [request], tool):
            print0(f"\n{tokenizer.decode(prompt + answer.tokens)}")
            print0(f"({len(answer.tokens)} tokens, {answer.finish_reason})")
    sampler.close()


def load_sets() -> dict[str, list[Problem]]:
    """{short name: problems} of the benchmarks."""
    sets = {}
    for name in benchmarks:
        short = short_name(name)
        sets[short] = load_benchmark(
            name,
            data_dir=data_dir,
            problem_column=problem_column,
            answer_column=answer_column,
            system_prompt=system_prompt,
            user_suffix=user_suffix,
            code_suffix=code_suffix,
            max_problems=max_problems,
            golds_file=parity_golds.get(short),
            own_reward=reward is not None,
        )
    return sets


def check_sets(path: str, tokenizer, sets: dict[str, list[Problem]]) -> None:
    """Raise UserError if a model cannot be asked one of the problems, or its weights do not fit."""
    if not regrade:
        # Whether they are finite is looked at when they are loaded: that takes longer.
        check_model_folder(path, finite=False)
    vocabulary = vocabulary_size(path)
    for name, problems in sets.items():
        check_prompts(name, problems, tokenizer, vocabulary)


def report_contamination(sets: dict[str, list[Problem]]) -> None:
    """Print and write which problems occur in the training file `against`."""
    found = find_contamination(sets, read_rows(against), overlap)
    print_contamination(found, against, overlap)
    write_file(f"{out_dir}/contamination.json", json.dumps(found, indent=1))


def draws_of(sets: dict[str, list[Problem]], tool: Tool | None) -> dict[str, list[Draw]]:
    """{short name: how each of its problems is answered}."""
    draws = {}
    for name in sets:
        count = samples
        if sampled_benchmarks is not None and name not in sampled_benchmarks:
            count = 0
        decoded = decoding(name, max_tokens, benchmark_tokens, benchmark_stop, tool)
        draws[name] = make_draws(greedy, count, temperature, top_p, decoded)
    return draws


def response_files() -> dict[str, ResponseFile]:
    """{model: its file of responses}. Raises UserError if two models would share one."""
    files = {path: ResponseFile(out_dir, path) for path in models}
    if len({file.path for file in files.values()}) < len(files):
        raise UserError(
            f"two of the models {', '.join(models)} would share a file of responses: one at a time"
        )
    return files


def print_found(path: str, jobs: dict[tuple, Job], there: dict[tuple, dict], regrade: bool) -> None:
    """Print how many of a model's answers are stored, and its first prompt."""
    found = [key for key in jobs if key in there]
    line = f"{len(found)} of {len(jobs)} responses are there"
    if regrade and len(found) < len(jobs):
        line += ", problems without one count as wrong"
    other = [key for key in found if not graded_alike(there[key], jobs[key])]
    if other:
        line += f", {len(other)} of them graded by other golds, columns or rewards"
        if not regrade:
            line += ": --regrade=True grades them again"
    if len(found) < min(len(jobs), len(there)):
        rest = len(there) - len(found)
        line += f" ({rest} to other prompts or settings stay in the file)"
    print0(f"\n{path}: {line}; first prompt:\n{first_prompt(jobs)}")


def first_prompt(jobs: dict[tuple, Job]) -> str:
    return next(iter(jobs.values())).row["prompt"]


@contextlib.contextmanager
def report_before_it_fails(results: dict[str, dict], prompts: list[str]):
    """If a model fails in this block, report the ones before it, which are in `results`."""
    try:
        yield
    except Exception:
        if results:
            report(results, values(globals()), prompts[0])
        raise


def main():
    check_settings()
    if dry_run:
        print_memory()
        return

    # Under torchrun each process has an engine of its own and answers its share of the questions.
    gpus_each = 0 if device == "cpu" else tensor_parallel or 1
    rank, world_size, wait = join_ranks(gpus_each)
    tool = Tool(tir_rounds, tir_timeout, tir_numina) if tir else None
    if ask is not None:
        answer_question(models[0], tool)
        return
    sets = load_sets()
    os.makedirs(out_dir, exist_ok=True)
    if against:
        report_contamination(sets)
        return

    # All tokenizers are loaded first: mistakes show before any work.
    if prm:
        check_models(prm, find_reference(prm, prm_ref))
    tokenizers = {path: load_tokenizer(path, chat_template) for path in models}
    for path, tokenizer in tokenizers.items():
        check_sets(path, tokenizer, sets)
    files = response_files()
    draws = draws_of(sets, tool)
    has_code = any(problem.ability == "code" for problem in itertools.chain(*sets.values()))
    announce_sandbox(sandbox, needed=tir or (has_code and reward is None))

    results = {}
    prompts = []
    workers = grade_workers or max(1, cores() // local_processes())
    with (
        Grader(workers, grade_timeout, reward=reward) as grader,
        report_before_it_fails(results, prompts),
    ):
        judge = reward_name(reward)
        for path, tokenizer in tokenizers.items():
            # 1. The answers that the model is to give, and those that are stored.
            file = files[path]
            identity = dict(model=path, asked=[system_prompt, user_suffix, code_suffix])
            jobs = make_jobs(
                tokenizer,
                sets,
                draws,
                longest=longest_prompt(path),
                seed=seed,
                reward=judge,
                identity=identity,
            )
            stored = file.read(identity)
            if regrade and not jobs.keys() & stored.keys():
                raise UserError(f"regrade: {file.path} has no response with these settings")
            prompts.append(first_prompt(jobs))
            print_found(path, jobs, stored, regrade)
            if rank == 0 and not resume and not regrade:
                file.remove_parts()
            wait(f"{path}: all have read")

            # 2. Sample and grade the others, all benchmarks in one queue. With regrade, none.
            missing = [job for key, job in jobs.items() if key not in stored or not resume]
            mine = missing[rank::world_size]
            if mine and not regrade:
                sampler = open_engine(path, tokenizer)
                stream_answers(sampler, grader, tokenizer, mine, file.part(rank), tool)
                sampler.close()
                del sampler  # the next model needs its room
            wait(f"{path}: all have sampled")

            # 3. Join what all processes have written, and compute the metrics.
            if rank == 0:
                stored = file.read(identity)
                pairs = [(stored[key], jobs[key].problem) for key in jobs if key in stored]
                if regrade:
                    grade_again(pairs, grader, judge)
                add_answers(pairs, grader, parity)
                if prm:
                    sampled = [pair for pair in pairs if pair[0]["mode"] == "sampled"]
                    reference = find_reference(prm, prm_ref)
                    rank_answers(sampled, prm, reference, *pick_device(device, dtype))
                file.write(stored.values())
                rows = [row for row, _ in pairs]
                results[path] = summarize_sets(
                    rows, sets, grader.is_equiv, tir_numina, ranked=bool(prm)
                )

    if rank == 0:
        report(results, values(globals()), prompts[0])


if __name__ == "__main__":
    run(main, globals())
