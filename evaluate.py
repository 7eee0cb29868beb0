"""
Score checkpoints on the benchmarks of INTELLECT-MATH, Eurus-2 and NuminaMath, with standard errors, in one table.

    python evaluate.py config/eval_eurus2.py                       # the model card's table, its numbers beside ours
    torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py  # an engine on each card; they share the questions
    python evaluate.py config/toy_evaluate.py                      # a laptop: base, SFT and PRIME of the built-in world
    python evaluate.py --models='["out/eurus2/policy"]' --ask='What is 6 times 7?'       # an answer to each of two prompts
    python evaluate.py --against=out/generate/sft.jsonl            # which benchmark problems stand in a training file?

Every response is a row of <model>.responses.jsonl with all that grading needs; started again, the script goes on where it was,
and --regrade=True grades what is there without an engine. Out come results.md, results.json, results.png. All metrics are
means over problems of a value of one problem (its share of right samples, its pass@k, its vote); their standard error is
sqrt(sum (x_i - mean)^2 / (N (N - 1))), which counts the noise of sampling and of the choice of problems.
Left out on purpose: few-shot prompts, stop strings, several nodes.
"""
import collections, contextlib, difflib, glob, itertools, json, math, os, re, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import configurator
from configurator import UserError
from generate import (announce_sandbox, load_problems, load_tokenizer, make_engine, read_rows, render_prompt, resume_rows,
                      sample, sample_seed, stream_answers)
from metrics import accuracy, average, by_problem, mcnemar, ngrams, paired_interval, shares, summarize
from sft import pick_device

# --- what
models = ['PrimeIntellect/INTELLECT-MATH']  # hub ids or folders; a row of the table each
benchmarks = ['math500', 'aime24', 'amc', 'minerva', 'olympiadbench']  # names of BENCHMARKS below, or files of problems
data_dir = None                     # folder with the benchmarks' files, in place of the hub
problem_column = None               # of files that are not in BENCHMARKS; None: found
answer_column = None                # likewise
max_problems = None                 # only the first so many of each benchmark
system_prompt = None                # None: none, though a chat template may add its own: the first prompt is printed
user_suffix = ''                    # appended to maths problems
code_suffix = (                     # appended to code problems
    '\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.')
chat_template = None                # .jinja file; None: the tokenizer's own
max_bad_share = 0.0                 # share of malformed rows that is skipped and reported; more is an error
# --- sampling
greedy = True                       # one greedy answer a problem
samples = 0                         # answers a problem at `temperature`: avg@k, pass@k, maj@k
sampled_benchmarks = None           # list of those that get the samples; None: all
temperature = 0.6                   # of the samples
top_p = 0.95                        # of the samples
max_tokens = 8192                   # less where the model has fewer positions
max_prompt_tokens = 2048            # longer prompts count as wrong
tir = False                         # answers may call Python, as NuminaMath-7B-TIR's do (tir.py); samples then vote: SC-TIR
tir_rounds = 4                      # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0                   # seconds a program (Numina: 5)
sandbox = 'auto'                    # of programs: 'auto' (the best there is, said at start) or 'required' (bubblewrap)
tir_numina = False                  # the very rules of Numina's notebook, its vote modulo 1000 included
seed = 0                            # sample k of a problem has a seed of its own, made of this, the problem's id and k
# --- grading and report
published = {}                      # {column: {benchmark: %}}; the first column belongs to the first model, and so on
published_notes = []                # lines about them for the report, of numbers that cannot be right, say
parity = False                      # a second verdict by the published scripts' own, more lenient rules (see BENCHMARKS)
parity_golds = {}                   # {benchmark: .jsonl file with unique_id, expected_answer}: their golds where they differ
resume = True                       # go on after the responses that are there; False: they are deleted, all begins anew
regrade = False                     # grade the responses that are there once more, sample nothing
# --- other things to do
ask = None                          # a question: print the first model's answers to the two prompts of Eurus-2, and end
against = None                      # a training file or hub id: print which benchmark problems stand in it, and end
ngram = 10                          # words; published for NuminaMath: 10
overlap = 0.5                       # share of a problem's n-grams that must stand there
# --- system
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel = None              # GPUs a model is spread over (vllm); None: all of this machine, under torchrun one
gpu_memory = 0.9                    # share of each card for the engine (vllm)
grade_workers = None                # processes; None: one a core
grade_timeout = 5.0                 # seconds an answer
out_dir = 'out/evaluate'            # <model>.responses.jsonl, results.md, results.json, results.png

SUBJECTS = 'algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus'.split()
# name: (problems, file in data_dir, hub id, configurations, split, columns of problem and answer, rules: see published_answer).
# A file may have other usual columns than the hub. OlympiadBench is 674 problems on the hub; its column `error` is a tolerance.
BENCHMARKS = {
    'gsm8k': (1319, 'gsm8k_test', 'openai/gsm8k', ['main'], 'test', 'question', 'answer', 'qwen'),
    'math': (5000, 'math_test', 'EleutherAI/hendrycks_math', SUBJECTS, 'test', 'problem', 'solution', 'qwen'),
    'math500': (500, 'math500', 'HuggingFaceH4/MATH-500', [None], 'test', 'problem', 'answer', 'prime'),
    'aime24': (30, 'aime24', 'HuggingFaceH4/aime_2024', [None], 'train', 'problem', 'answer', 'prime'),
    'amc': (83, 'amc_2022_2023', 'AI-MO/aimo-validation-amc', [None], 'train', 'problem', 'answer', 'prime'),
    'amc23': (40, 'amc23', 'math-ai/amc23', [None], 'test', 'question', 'answer', 'prime'),
    'minerva': (272, 'minerva_math', 'math-ai/minervamath', [None], 'test', 'question', 'answer', 'qwen'),
    'olympiadbench': (675, 'olympiadbench', 'Hothan/OlympiadBench', ['OE_TO_maths_en_COMP'], 'train', 'question',
                      'final_answer', 'qwen'),
    'humaneval': (164, 'humaneval', 'openai/openai_humaneval', [None], 'test', 'prompt', 'test', 'code'),
    'mbpp': (399, 'mbpp_prime', 'google-research-datasets/mbpp', ['sanitized'], 'train+test+validation+prompt', 'prompt',
             'test_list', 'code'),
    'leetcode': (180, 'leetcode_sample', None, [None], None, 'prompt_sft', 'test', 'code'),
}


# ------------------------------------------------------------ problems
def load_benchmark(name):
    """(short name, problems) of a name in BENCHMARKS or a file. Problems are those of load_problems with more keys: group,
    like ["subject Algebra", "level 3"] as far as the file has such columns; their_gold, of parity_golds; and tolerance,
    where the file has one. UserError: no such benchmark, bad file."""
    if name not in BENCHMARKS and not os.path.exists(name):
        near = "".join(f"; did you mean {n!r}?" for n in difflib.get_close_matches(name, BENCHMARKS, 1))
        raise UserError(f"benchmark {name!r} is neither a file nor one of {', '.join(BENCHMARKS)}{near}")
    count, file, source, parts, split, problem, answer, rules = BENCHMARKS.get(
        name, (0, None, name, [None], "train", problem_column, answer_column, None))
    if data_dir and count:
        stems, ends = (os.path.join(data_dir, file), os.path.join(data_dir, name)), (".jsonl", ".jsonl.gz", ".json", ".parquet")
        source, parts = next((stem + end for stem in stems for end in ends if os.path.exists(stem + end)), None), [None]
    if source is None:
        raise UserError(f"{name}: there is no {file}.jsonl in data_dir={data_dir!r}" + " (nor on the hub)" * (data_dir is None))
    rows = [pair for part in parts for pair in read_rows(source, split, part, max_bad_share)]
    if rules == "code":
        rows, problem, answer = [(where, code_row(where, row)) for where, row in rows], "prompt", "ground_truth"
    elif count:
        problem, answer = (column if column in rows[0][1] else None for column in (problem, answer))
    for number, (_, row) in enumerate(rows):                # AMC's ids begin anew with each year
        page = "/".join(str(row["url"]).split("/")[-2:]) if count and row.get("url") else None
        ids = [page, *(row.get(column) for column in ("id", "unique_id", "task_id")), number]
        row.setdefault("problem_id", next(i for i in ids if i is not None))
    row_of = {str(row["problem_id"]): row for _, row in rows}
    if len(row_of) < len(rows):
        again = collections.Counter(str(row["problem_id"]) for _, row in rows).most_common(1)[0][0]
        raise UserError(f"{source}: the id {again!r} stands twice")
    problems = load_problems(source, split, None, problem, answer, system_prompt,
                             code_suffix if rules == "code" else user_suffix, max_problems, max_bad_share, rows)
    if count and len(problems) != min(count, max_problems or count):
        print(f"note: {name} has {len(problems)} problems here, {count} are published")
    theirs = read_rows(parity_golds[name]) if name in parity_golds else []
    theirs = {str(row.get("unique_id")): row.get("expected_answer") for _, row in theirs}
    if theirs and not set(theirs) & set(row_of):
        raise UserError(f"{parity_golds[name]}: no row has the unique_id of a problem of {name}")
    for p in problems:
        row, p["their_gold"] = row_of[str(p["id"])], theirs.get(str(p["id"]))
        kinds = [kind for kind in ("subject", "type", "subfield", "level", "difficulty") if row.get(kind)]
        p["group"] = [f"{kind} {str(row[kind]).removeprefix('Level ')}" for kind in kinds]
        with contextlib.suppress(TypeError, ValueError):    # None; "0.1,0.1" of several answers, which no row used has
            p["tolerance"] = float(row.get("error"))
    return name if count else os.path.basename(name).split(".")[0], problems

def code_row(where, row):
    """A row of HumanEval, MBPP or LeetCode as a row of load_problems: what is asked, and a check program for grade_code.
    HumanEval's checks may use what its prompt defines before the function. MBPP shows the first assertion, as PRIME does."""
    try:
        if "entry_point" in row:
            asked, head = f"```python\n{row['prompt']}```", row["prompt"].rpartition(f"def {row['entry_point']}")[0]
            test = f"{head}\n{row['test']}\ncheck({row['entry_point']})" if row["test"] else ""
        elif "prompt_sft" in row:
            asked, test, row = row["prompt_sft"], row["test"], row | dict(row.get("meta") or {})
        else:
            asked = f"{row.get('prompt') or row['text']}\n{row['test_list'][0]}"
            test = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]])
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"{where} is no row of HumanEval, MBPP or LeetCode ({e!r}); it has {', '.join(sorted(row))}") from None
    return row | dict(prompt=asked, ability="code", ground_truth=[test] if test else [])

def report_overlap(sets):
    """Print and write (contamination.json) the benchmarks' problems of whose n-grams the share `overlap` or more stands in the
    file `against`, in what its users ask."""
    grams = {(name, str(p["id"])): ngrams(p["problem"], ngram) for name, problems in sets.items() for p in problems}
    wanted, seen, report = set().union(*grams.values()), set(), {}
    columns = ("problem", "question", "prompt", "messages", "instruction")
    for where, row in read_rows(against, max_bad_share=max_bad_share):
        asked = next((row[column] for column in columns if row.get(column)), None)
        if asked is None:
            raise UserError(f"{where} has none of the columns {', '.join(columns)}")
        asked = asked if isinstance(asked, str) else " ".join(m["content"] for m in asked if m["role"] == "user")
        seen |= ngrams(asked, ngram) & wanted
    for name, problems in sets.items():
        found = {i: round(len(own & seen) / len(own), 3) for (of, i), own in grams.items() if of == name}
        ids = {i: share for i, share in sorted(found.items(), key=lambda item: -item[1]) if share >= overlap}
        report[name] = dict(problems=len(problems), found=len(ids), ids=ids)
        print(f"{name}: {len(ids)} of {len(problems)} problems ({len(ids) / len(problems):.1%}) stand in {against}, with at "
              f"least {overlap:.0%} of their {ngram}-grams: {', '.join(ids) or 'none'}")
    write("contamination.json", json.dumps(report, indent=1))


# ------------------------------------------------------------ grading
def published_answer(response, rules, benchmark=None):
    """What the published scripts take for the answer of a response, "" if there is none.
    "prime" (PRIME's, for MATH-500, AIME and AMC): markers cut the text first, and a box before them is lost; then the last box,
    else all that is left. "qwen" (Qwen2.5-Math's): one closing phrase, the last box, other phrases, the last number."""
    from grader import extract_answer
    if rules == "qwen":
        closing = re.search(r"final answer is \$(.*?)\$\. I hope", response, re.S)
        return closing[1] if closing else extract_answer(response, fallback=True) or ""
    for marker in ["the answer is: "] * (benchmark == "math500") + ["answer:\n", "answer: "]:    # misspelt there for the others
        found = response.lower().rfind(marker)
        response = response[found + len(marker):].strip() if found >= 0 else response
    answer = extract_answer(response) or response
    return answer if benchmark == "math500" else answer.strip("The final answer is ").strip(". I hope it is correct.")

def grade(rows, problem_of, grader, lenient):
    """Give rows their answer, with `regrade` a new verdict, and with `parity` one by the published rules."""
    from grader import extract_answer, golds
    rows, jobs = [(row, problem_of[row["benchmark"], str(row["problem_id"])]) for row in rows], []
    if regrade:
        for (row, p), score in zip(rows, grader.grade([row["response"] for row, _ in rows], [p for _, p in rows])):
            row.update(correct=score == 1.0, ground_truth=p["ground_truth"])
    for row, p in rows:
        code, answer = re.search(r"```python.*", row["response"], re.S), extract_answer(row["response"])
        row["answer"] = answer if p["ability"] == "math" else code and code[0]
        rules = BENCHMARKS[row["benchmark"]][-1] if row["benchmark"] in BENCHMARKS else None
        if parity and rules in ("prime", "qwen"):
            gold = p["their_gold"] or golds(p["ground_truth"])[0]
            answer = published_answer(row["response"], rules, row["benchmark"])
            if rules == "qwen" and re.search(r"\de[-+]?\d", gold) and re.search(r"10\s*\^", answer):
                answer = ""                                 # it cannot read a x 10^b where the gold is written 4.5e33
            jobs.append((row, f"\\boxed{{{answer}}}", p | dict(ground_truth=gold, tolerance=None)))
    for (row, _, _), score in zip(jobs, lenient.grade([job[1] for job in jobs], [job[2] for job in jobs])):
        row["parity"] = score == 1.0


# ------------------------------------------------------------ report
def table(results):
    """Markdown of {model: {benchmark: metrics}}. pass@k has k <= samples / 2: with k = samples it is as noisy as one draw."""
    passes, maj, lines = f"pass@{2 ** max(0, samples.bit_length() - 2)}", f"maj@{samples}", []
    metrics = {"greedy": "greedy", "by their rules": "greedy_parity", f"avg@{samples}": "sampled", passes: passes, maj: maj}
    for number, (model, scores) in enumerate(results.items()):
        printed = (list(published.values())[number:] or [{}])[0]
        for name, s in scores.items():
            pairs = [s["score"].get(metric) for metric in metrics.values()]
            cells = [f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}" if pair else "" for pair in pairs]
            lines.append([model, name, s["problems"], *cells, printed.get(name, ""), printed.get(f"{name} {maj}", ""),
                          f"{s['tokens']:.0f}", f"{s['truncated']:.1%}", f"{s['no_box']:.1%}"])
    head = ["model", "benchmark", "N", *metrics, "published", f"published {maj}", "tokens", "truncated", "no box"]
    used = [i for i in range(len(head)) if any(str(line[i]) for line in lines)]             # no empty columns
    rule = ["---", "---"] + ["--:"] * (len(head) - 2)
    return "".join("| " + " | ".join(str(line[i]) for i in used) + " |\n" for line in [head, rule, *lines])

def group_table(results):
    """Markdown of accuracy by subject and level, of the benchmarks that have such columns; a column a model."""
    cells = {}
    for model, scores in results.items():
        for name, s in scores.items():
            for group, (mean, se, n) in (s.get("greedy_by_group") or s.get("sampled_by_group") or {}).items():
                cells.setdefault((name, group, n), {})[model] = f"{100 * mean:.1f} ± {100 * se:.1f}"
    lines = [["benchmark", "group", "N", *results], ["---", "---"] + ["--:"] * (len(results) + 1)]
    lines += [[*row, *(cell.get(model, "") for model in results)] for row, cell in cells.items()]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines) if cells else ""

def differences(results, rows, sets):
    """Lines: is each model's difference from its published column, and from the model before it, more than noise?"""
    lines = []
    for (model, scores), (column, numbers) in zip(results.items(), published.items()):
        for name in [name for name in scores if name in numbers and "greedy" in scores[name]["score"]]:
            mean, se = scores[name]["score"].get("greedy_parity", scores[name]["score"]["greedy"])
            p, n = numbers[name] / 100, scores[name]["problems"]    # theirs is one run, too
            noise = 1.96 * (se ** 2 + (se ** 2 if name == "average" else p * (1 - p) / max(1, n - 1))) ** 0.5
            lines.append(f"{name}: {model} {100 * (mean - p):+.1f} against {column} as published, " +
                         ("within" if abs(mean - p) <= noise else "beyond") + f" the noise of two runs (± {100 * noise:.1f})")
    pairs = itertools.pairwise(results)
    for (old, new), (name, problems), mode in itertools.product(pairs, sets.items(), ("greedy", "sampled")):
        if all(mode in results[model][name]["score"] for model in (old, new)):
            a, b = (shares(by_problem([r for r in rows[m] if r["benchmark"] == name], problems, mode)) for m in (new, old))
            (low, high), p = paired_interval(a, b), mcnemar(a, b) if mode == "greedy" else None
            noise = low <= 0 <= high if p is None else p > 0.05
            lines.append(f"{name}, {mode}: {new} {100 * (accuracy(a)[0] - accuracy(b)[0]):+.1f} "
                         f"[{100 * low:+.1f}, {100 * high:+.1f}] against {old}" +
                         (f", p = {p:.2g}" if p is not None else "") + ": within noise" * noise)
    return lines

def chart(results, path):
    """Bars of accuracy with standard errors, a group a benchmark; diamonds are the published numbers."""
    import matplotlib.figure
    names, mode = list(next(iter(results.values()))), "greedy" if greedy else "sampled"
    figure = matplotlib.figure.Figure(figsize=(max(5, 1.5 * len(names)), 4))
    ax, width = figure.subplots(), 0.8 / len(results)
    for i, (model, scores) in enumerate(results.items()):
        x = np.arange(len(names)) + width * (i - (len(results) - 1) / 2)
        mean, se = 100 * np.array([scores[name]["score"].get(mode, (math.nan, math.nan)) for name in names]).T
        ax.bar(x, mean, width, yerr=se, capsize=3, label=model)
        for column in list(published)[i:i + 1]:
            ax.plot(x, [published[column].get(name, math.nan) for name in names], "kD", label=f"{column}, published")
    ax.set(xticks=range(len(names)), xticklabels=names, ylabel=f"{mode}, % right")
    ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight", format="png")

def write(name, content):
    """A file of out_dir, complete or not at all. content: its text, or a function that writes it to a path."""
    path = os.path.join(out_dir, name)
    content(path + ".tmp") if callable(content) else Path(path + ".tmp").write_text(content, "utf-8")
    os.replace(path + ".tmp", path)

def report(rows, sets, prompt, failures):
    """Tables, chart and lines on differences. rows: {model: its responses}; failures: {kind: number} of the grader."""
    results = {model: {name: summarize([row for row in mine if row["benchmark"] == name], problems, tir_numina)
                       for name, problems in sets.items()} for model, mine in rows.items()}
    for scores in results.values() if len(sets) > 1 else ():
        scores["average"] = average(list(scores.values()))
    notes = [*differences(results, rows, sets), *published_notes, f"answers the grader gave up, counted as wrong: {failures}"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).resolve().parent)
    about = dict(date=time.strftime("%Y-%m-%d %H:%M"), commit=git.stdout.strip() or None) | {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "vllm") if name in sys.modules}
    sampling = {name: globals()[name] for name in ("greedy", "samples", "temperature", "top_p", "max_tokens", "seed")}
    text = ", ".join(f"{k} {v}" for k, v in (about | sampling).items()) + f"\n\n~~~\n{prompt}\n~~~\n\n{table(results)}\n"
    text += (groups := group_table(results)) + "\n" * bool(groups)
    text += "".join(f"- {note}\n" for note in notes)
    about |= dict(settings=configurator.values(globals()), first_prompt=prompt)
    write("results.md", text)
    write("results.json", json.dumps(dict(about=about, models=results, notes=notes), indent=1))
    write("results.png", lambda path: chart(results, path))
    print(f"\n{text}\nwrote {out_dir}/results.md, results.json and results.png", flush=True)


# ------------------------------------------------------------ sampling
def join():
    """(rank, processes, together) under torchrun; together(word, value) returns when all have called it with this word, with
    the sum of their values. No process group, because the end of a vLLM ends it: each process has its own cards and engines."""
    env, agent, n = os.environ, "TORCHELASTIC_USE_AGENT_STORE", tensor_parallel or 1
    rank, world, local = (int(env.get(name, default)) for name, default in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())
    if world == 1:
        return 0, 1, lambda word, value=0: value
    store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=rank == 0 and agent not in env)
    cards = (env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    env |= dict(CUDA_VISIBLE_DEVICES=",".join(cards[local * n:(local + 1) * n]), LOCAL_RANK="0")
    env.pop(agent, None)                                    # or vLLM would look for its own group there
    if rank > 0:
        sys.stdout = open(os.devnull, "w")

    def together(word, value=0):
        store.add(f"{word}, sum", value)
        store.set(f"{word} {rank}", "here")
        store.wait([f"{word} {r}" for r in range(world)], timedelta(days=7))
        return store.add(f"{word}, sum", 0)
    return rank, world, together

def key(row):
    return row["benchmark"], str(row["problem_id"]), json.dumps(row["sampling"]), row["sample"]

def merge(file, same, wanted=(), change=lambda rows: None):
    """Put into a model's file what processes have left beside it; change([the rows wanted]) before. Returns those rows."""
    path = os.path.join(out_dir, file)
    parts = glob.glob(glob.escape(path) + ".rank*")
    rows = {key(row): row for part in [*parts, path] for row in resume_rows(part, same)}
    mine = [rows[k] for k in wanted if k in rows]
    change(mine)
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    for part in parts:
        os.remove(part)
    return mine

def tool_settings():
    return dict(rounds=tir_rounds, tool_timeout=tir_timeout, numina=tir_numina) if tir else {}

def answer_question(sampler, tokenizer):
    """Print the answers to `ask`, put as the card of Eurus-2-7B-PRIME puts questions of mathematics, and of programming."""
    for suffix in ("\n\nPresent the answer in LaTex format: \\boxed{Your answer}", code_suffix):
        messages = [dict(role="system", content=system_prompt), dict(role="user", content=ask + suffix)][not system_prompt:]
        ids = render_prompt(tokenizer, messages)
        if len(ids) > max_prompt_tokens:
            raise UserError(f"the question is longer than max_prompt_tokens={max_prompt_tokens}")
        for _, answer in sample(sampler, tokenizer, [(ids, seed)], temperature=0.0, max_tokens=max_tokens, **tool_settings()):
            print(f"\n{tokenizer.decode(ids + answer.tokens)}\n({len(answer.tokens)} tokens, {answer.finish_reason})")
    sampler.close()

def make_jobs(tokenizer, problem_of, modes, same, longest):
    """{key: (prompt ids, problem, row)} of all the answers that a model is to give; longest: tokens of a prompt."""
    jobs = {}
    for (name, number), p in problem_of.items():
        ids = render_prompt(tokenizer, p["messages"])
        row = same | dict(benchmark=name, problem_id=number, prompt=tokenizer.decode(ids))
        for mode, count, sampling in modes if len(ids) <= longest else ():
            if mode == "sampled" and sampled_benchmarks is not None and name not in sampled_benchmarks:
                continue
            for k in range(count):
                own = row | dict(mode=mode, sample=k, sampling=sampling, seed=sample_seed(seed, name, number, k))
                jobs[key(own)] = ids, p, own
    if not jobs:
        raise UserError(f"every prompt is longer than {longest} tokens (--max_prompt_tokens, or the model's positions)")
    return jobs

def main():
    from transformers import AutoConfig
    from grader import Grader
    if not (greedy or samples):
        raise UserError("greedy=False and samples=0: nothing to do")
    if not models:
        raise UserError("models is empty: name at least one checkpoint")
    rank, world, together = join()
    torch_device, torch_dtype = pick_device(device, dtype)
    loaded = [load_benchmark(name) for name in benchmarks if ask is None]
    sets, again = dict(loaded), [name for name, n in collections.Counter(name for name, _ in loaded).items() if n > 1]
    if again:
        raise UserError(f"the benchmark {again[0]!r} stands twice: rename one of the files")
    os.makedirs(out_dir, exist_ok=True)
    if against:
        return report_overlap(sets)
    tokenizers = {path: load_tokenizer(path, chat_template) for path in models}     # all mistakes show before any work
    positions = {path: getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None) or 2**31 for path in models}

    def make_sampler(path):
        return make_engine(engine, path, tokenizers[path], torch_device, torch_dtype,
                           min(max_prompt_tokens + max_tokens, positions[path]), tensor_parallel, gpu_memory)
    if ask is not None:
        return answer_question(make_sampler(models[0]), tokenizers[models[0]])
    modes = [(mode, count, dict(temperature=t, top_p=p, max_tokens=max_tokens) | tool_settings()) for mode, count, t, p in
             (("greedy", int(greedy), 0.0, 1.0), ("sampled", samples, temperature, top_p)) if count]
    announce_sandbox(sandbox, tir or any(p["ability"] == "code" for problems in sets.values() for p in problems))
    problem_of, rows = {(name, str(p["id"])): p for name, problems in sets.items() for p in problems}, {}
    pool = dict(workers=grade_workers or max(1, os.cpu_count() // world), timeout=grade_timeout)
    with Grader(**pool) as grader, Grader(**pool, parity=True) as lenient:
        for number, path in enumerate(models):
            file, sampler = path.strip("./").replace("/", "--") + ".responses.jsonl", None
            part = os.path.join(out_dir, f"{file}.rank{rank}")
            same = dict(model=path, max_tokens=max_tokens, asked=[system_prompt, user_suffix, code_suffix])
            jobs = make_jobs(tokenizers[path], problem_of, modes, same, min(max_prompt_tokens, positions[path] - 1))
            if rank == 0:
                for old in [] if resume else glob.glob(glob.escape(os.path.join(out_dir, file)) + "*"):
                    os.remove(old)
                merge(file, same)
            together(f"before {number}")                    # nobody writes to the file until all have read it
            there = {key(row) for row in resume_rows(os.path.join(out_dir, file), same)}
            if regrade and not there & set(jobs):
                raise UserError(f"regrade: {out_dir}/{file} has no response with these settings")
            prompt = next(iter(jobs.values()))[2]["prompt"]
            print(f"\n{path}: {len(there & set(jobs))} of {len(jobs)} responses are there; first prompt:\n{prompt}", flush=True)
            for _, _, sampling in [] if regrade else modes:  # one queue a mode, over all benchmarks
                mine = [job for k, job in jobs.items() if k not in there and job[2]["sampling"] == sampling][rank::world]
                if mine:
                    sampler = sampler or make_sampler(path)
                    stream_answers(sampler, grader, tokenizers[path], mine, part, sampling)
            if sampler:
                sampler.close()
            together(f"after {number}")
            if rank == 0:
                rows[path] = merge(file, same, jobs, lambda mine: grade(mine, problem_of, grader, lenient))
                if len(rows[path]) < len(jobs):
                    print(f"note: {len(jobs) - len(rows[path])} responses of {path} are missing and count as wrong")
        failures = {name: together(name, getattr(grader, name)) for name in ("timeouts", "crashes", "unparsed")}
    if rank == 0:
        report(rows, sets, prompt, failures)

if __name__ == "__main__":
    configurator.run(main, globals())
