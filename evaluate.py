"""
Score checkpoints on problems: greedy and average of k samples, with standard errors, in one table.

    python evaluate.py --models='["out/intellect_math/policy"]' --benchmarks='["math500", "aime24"]'
    python evaluate.py config/toy_evaluate.py                      # a laptop: base, SFT and PRIME of the built-in world

Every response is a row of responses.jsonl with its verdict; started again, the script goes on where it was. The table goes to
results.md and results.json. Metrics: accuracy is the mean over problems of the share of right samples; its standard error is
that of the mean over problems, sqrt(sum (s_i - A)^2 / (N (N - 1))), which counts the noise of sampling and of the choice of
problems.
"""
import json
import os
import time

import configurator
from configurator import UserError
from generate import (load_problems, load_tokenizer, make_engine, pick_device, render_prompt, resume_rows, sample_seed,
                      stream_answers)

# --- what
models = ['PrimeIntellect/INTELLECT-MATH']  # hub ids or folders; a row of the table each
benchmarks = ['math500', 'aime24', 'amc', 'minerva', 'olympiadbench']  # names of BENCHMARKS below, or files of problems
data_dir = None                     # take <name>.jsonl of this folder instead of the hub
problem_column = None               # of files that are not in BENCHMARKS; None: found
answer_column = None
max_problems = None                 # only the first so many of each benchmark
system_prompt = None                # None: none
user_suffix = ''
chat_template = None                # .jinja file; None: the tokenizer's own
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
# --- sampling
greedy = True                       # one greedy answer a problem
samples = 0                         # answers a problem at `temperature`: avg@k
temperature = 0.6
top_p = 0.95
max_tokens = 8192
max_prompt_tokens = 2048            # longer prompts count as wrong
seed = 0
# --- system
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel = None              # GPUs a model is spread over; None: all of this machine (vllm)
gpu_memory = 0.9                    # share of each card for the engine (vllm)
grade_workers = None                # processes; None: one a core
grade_timeout = 5.0                 # seconds an answer
out_dir = 'out/evaluate'

# name: (hub id, configuration, split, problem column, answer column, number of problems)
BENCHMARKS = {
    'gsm8k': ('openai/gsm8k', 'main', 'test', 'question', 'answer', 1319),
    'math500': ('HuggingFaceH4/MATH-500', None, 'test', 'problem', 'answer', 500),
    'aime24': ('HuggingFaceH4/aime_2024', None, 'train', 'problem', 'answer', 30),
    'amc': ('AI-MO/aimo-validation-amc', None, 'train', 'problem', 'answer', 83),
    'amc23': ('math-ai/amc23', None, 'test', 'question', 'answer', 40),
    'minerva': ('math-ai/minervamath', None, 'test', 'question', 'answer', 272),
    'olympiadbench': ('Hothan/OlympiadBench', 'OE_TO_maths_en_COMP', 'train', 'question', 'final_answer', 674),
}


def load_benchmark(name):
    """(short name, problems) of a name in BENCHMARKS or a file. UserError: neither, or its file is unusable."""
    options = dict(system_prompt=system_prompt, user_suffix=user_suffix, max_problems=max_problems, max_bad_share=max_bad_share)
    if name not in BENCHMARKS:
        if not os.path.exists(name):
            import difflib
            near = difflib.get_close_matches(name, BENCHMARKS, 1)
            raise UserError(f"benchmark {name!r} is neither a file nor one of {', '.join(BENCHMARKS)}" +
                            (f"; did you mean {near[0]!r}?" if near else ""))
        problems = load_problems(name, problem_column=problem_column, answer_column=answer_column, **options)
        name = os.path.basename(name).split(".")[0]
    else:
        hub, config, split, problem, answer, count = BENCHMARKS[name]
        if data_dir:
            problems = load_problems(os.path.join(data_dir, name + ".jsonl"), **options)
        else:
            problems = load_problems(hub, split, config, problem, answer, **options)
        if len(problems) != min(count, max_problems or count):
            print(f"note: {name} has {len(problems)} problems here, {count} are published")
    ids = [str(p["id"]) for p in problems]
    if len(set(ids)) != len(ids):
        raise UserError(f"{name}: the id {next(i for i in ids if ids.count(i) > 1)!r} stands twice")
    return name, problems


def accuracy(shares):
    """(mean, standard error of the mean) of the problems' shares of right answers.    accuracy([1, 0]) = (0.5, 0.5)"""
    n, mean = len(shares), sum(shares) / len(shares)
    return mean, (sum((s - mean) ** 2 for s in shares) / (n * (n - 1))) ** 0.5 if n > 1 else float("nan")


def summarize(rows, problems):
    """Metrics of one model on one benchmark. rows: its responses; a problem without a response counts as wrong."""
    from grader import extract_answer
    out = dict(problems=len(problems))
    for mode in ("greedy", "sampled"):
        mine = [row for row in rows if row["mode"] == mode]
        if mine:
            right = {str(p["id"]): [] for p in problems}
            for row in mine:
                right[str(row["problem_id"])].append(row["correct"])
            out[mode], out[mode + "_se"] = accuracy([sum(r) / max(1, len(r)) for r in right.values()])
            out[mode + "_k"] = max(map(len, right.values()))
    n = max(1, len(rows))
    return out | dict(tokens=sum(r["n_tokens"] for r in rows) / n,
                      truncated=sum(r["finish_reason"] == "length" for r in rows) / n,
                      no_box=sum(extract_answer(r["response"]) is None for r in rows) / n)


def table(results):
    """Markdown of {model: {benchmark: metrics}}."""
    lines = ["| model | benchmark | N | greedy | avg@k | tokens | truncated | no box |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for name, scores in results.items():
        for benchmark, s in scores.items():
            cell = {mode: f"{100 * s[mode]:.1f} ± {100 * s[mode + '_se']:.1f}" if mode in s else ""
                    for mode in ("greedy", "sampled")}
            avg = cell["sampled"] + (f" (k={s['sampled_k']})" if cell["sampled"] else "")
            lines.append(f"| {name} | {benchmark} | {s['problems']} | {cell['greedy']} | {avg} | {s['tokens']:.0f} | "
                         f"{s['truncated']:.1%} | {s['no_box']:.1%} |")
    return "\n".join(lines) + "\n"


def main():
    from grader import Grader
    if not (greedy or samples):
        raise UserError("greedy=False and samples=0: nothing to do")
    if not models:
        raise UserError("models is empty: name at least one checkpoint")
    torch_device, torch_dtype = pick_device(device, dtype)
    sets = dict(load_benchmark(name) for name in benchmarks)
    tokenizers = {path: load_tokenizer(path, chat_template) for path in models}     # all mistakes show before any work
    os.makedirs(out_dir, exist_ok=True)
    modes = ([("greedy", 1, dict(temperature=0.0, top_p=1.0, max_tokens=max_tokens))] if greedy else []) + (
        [("sampled", samples, dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens))] if samples else [])
    results, began = {}, time.time()
    with Grader(workers=grade_workers, timeout=grade_timeout) as grader:
        for path in models:
            tokenizer, sampler = tokenizers[path], None
            file = os.path.join(out_dir, path.strip("./").replace("/", "--") + ".responses.jsonl")
            same = dict(model=path, max_tokens=max_tokens, prompt=[system_prompt, user_suffix])
            done = resume_rows(file, same)
            there = {(row["benchmark"], str(row["problem_id"]), json.dumps(row["sampling"]), row["sample"]) for row in done}
            prompts = {(name, str(p["id"])): render_prompt(tokenizer, p["messages"])
                       for name, problems in sets.items() for p in problems}
            first = next(iter(prompts.values()))
            print(f"\n{path}: {len(done)} responses are there; first prompt:\n{tokenizer.decode(first)}", flush=True)
            for mode, count, sampling in modes:         # each model has one queue a mode, over all benchmarks
                jobs = []
                for name, problems in sets.items():
                    for p in problems:
                        ids = prompts[name, str(p["id"])]
                        for k in range(count if len(ids) <= max_prompt_tokens else 0):
                            if (name, str(p["id"]), json.dumps(sampling), k) not in there:
                                job_seed = sample_seed(seed, name, str(p["id"]), k)
                                row = dict(benchmark=name, mode=mode, sample=k, sampling=sampling, seed=job_seed)
                                jobs.append((ids, p, same | row))
                if jobs:
                    sampler = sampler or make_engine(engine, path, tokenizer, torch_device, torch_dtype,
                                                     max_prompt_tokens + max_tokens, tensor_parallel, gpu_memory)
                    stream_answers(sampler, grader, tokenizer, jobs, file, sampling)
            if sampler:
                sampler.close()
            rows = [row for row in resume_rows(file, same) for mode, count, sampling in modes
                    if row["mode"] == mode and row["sampling"] == sampling and row["sample"] < count]
            results[path] = {name: summarize([row for row in rows if row["benchmark"] == name], problems)
                             for name, problems in sets.items()}
    text = table(results)
    for name, content in (("results.md", text), ("results.json", json.dumps(results, indent=1))):
        with open(os.path.join(out_dir, name + ".tmp"), "w", encoding="utf-8") as f:
            f.write(content)
        os.replace(os.path.join(out_dir, name + ".tmp"), os.path.join(out_dir, name))
    print(f"\n{text}\nwrote {out_dir}/results.md and results.json after {time.time() - began:.0f} s")


if __name__ == "__main__":
    configurator.run(main, globals())
