"""
Score checkpoints on the benchmarks of INTELLECT-MATH, Eurus-2 and NuminaMath, with standard errors, in one table.

    python evaluate.py config/eval_eurus2.py                       # the model card's table, its numbers beside ours
    torchrun --nproc_per_node 8 evaluate.py config/eval_numina.py  # an engine on each card; they share the questions

Every response is a row of <model>.responses.jsonl; started again, the script goes on where it was, and --regrade=True grades
what is there without an engine. Left out on purpose: few-shot prompts, several nodes.
"""
import collections, contextlib, difflib, glob, itertools, json, math, os, re, statistics, sys, time
from pathlib import Path
import numpy as np
from configurator import UserError, run, values
from generate import (load_problems, load_tokenizer, make_engine, read_rows, render_prompt, resume_rows, sample, sample_seed,
                      stream_answers)
from grader import Grader, extract_answer, golds, is_equiv
from runs import plan

# --- what
models = ['PrimeIntellect/INTELLECT-MATH']  # hub ids or folders; a row of the table each
benchmarks = ['math500', 'aime24', 'amc', 'minerva', 'olympiadbench']  # names of BENCHMARKS below, or files of problems
data_dir: str = None                # folder with the benchmarks' files, in place of the hub
problem_column: str = None          # of files that are not in BENCHMARKS; None: found
answer_column: str = None           # likewise
max_problems: int = None            # only the first so many of each benchmark
system_prompt: str = None           # None: none, though a chat template may add its own: the first prompt is printed
user_suffix = ''                    # appended to problems, but not to those of the code benchmarks
code_suffix = (                     # appended to those
    '\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.')
chat_template: str = None           # .jinja file; None: the tokenizer's own
ask: str = None                     # a question: print the first model's answers to the two prompts of Eurus-2, and end
against: str = None                 # a training file or hub id: print which benchmark problems stand in it, and end
overlap = 0.5                       # share of a problem's 10-grams of words that must stand there (10: as for NuminaMath)
# --- sampling
greedy = True                       # one greedy answer a problem
samples = 0                         # answers a problem at `temperature`: avg@k, pass@k, maj@k
sampled_benchmarks: list = None     # list of those that get the samples; None: all
temperature = 0.6                   # of the samples
top_p = 0.95                        # of the samples
max_tokens = 8192                   # of an answer; less where the model has fewer positions
benchmark_tokens = {}               # {benchmark: max_tokens} where they differ
benchmark_stop = {}                 # {benchmark: string that ends an answer and stays in it}; not with tir
max_prompt_tokens = 2048            # longer prompts count as wrong
tir = False                         # answers may call Python, as NuminaMath-7B-TIR's do; samples then vote: SC-TIR
tir_rounds = 4                      # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0                   # seconds a program (Numina: 5)
sandbox = 'auto'                    # of programs: 'auto' (the best there is, said at start) or 'required' (bubblewrap)
tir_numina = False                  # the notebook's rules of the conversation, its vote modulo 1000; answers are still boxes
seed = 0                            # sample k of a problem has a seed of its own, made of this, the problem's id and k
# --- grading and report
published = {}                      # {column: {benchmark: %}}; the first column belongs to the first model, and so on
published_notes = []                # lines about them for the report, of numbers that cannot be right, say
parity = False                      # a second verdict by the published scripts' own, more lenient rules (see BENCHMARKS)
parity_golds = {}                   # {benchmark: .jsonl file with unique_id, expected_answer}: their golds where they differ
resume = True                       # go on after the responses that are there; False: all are sampled anew and replace them
regrade = False                     # grade the responses that are there once more, sample nothing
# --- system
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel: int = None         # GPUs a model is spread over (vllm); None: as many as divide its heads, under torchrun one
gpu_memory = 0.9                    # share of each card for the engine (vllm)
grade_workers: int = None           # processes; None: one a core
grade_timeout = 5.0                 # seconds an answer
dry_run = False                     # print what answers take of a card, and end
out_dir = 'out/evaluate'            # <model>.responses.jsonl, results.md, results.json, results.png

# name: (problems, file in data_dir, hub id, configuration, split, columns of problem and answer, rules: see published_answer).
# Code has the columns that code_row makes. OlympiadBench is 674 problems on the hub; its column `error` is a tolerance.
BENCHMARKS = {
    'gsm8k': (1319, 'gsm8k_test', 'openai/gsm8k', 'main', 'test', 'question', 'answer', 'qwen'),
    'math': (5000, 'math_test', 'DigitalLearningGmbH/MATH-lighteval', 'default', 'test', 'problem', 'solution', 'qwen'),
    'math500': (500, '', 'HuggingFaceH4/MATH-500', None, 'test', 'problem', 'answer', 'prime'),
    'aime24': (30, '', 'HuggingFaceH4/aime_2024', None, 'train', 'problem', 'answer', 'prime'),
    'amc': (83, 'amc_2022_2023', 'AI-MO/aimo-validation-amc', None, 'train', 'problem', 'answer', 'prime'),
    'amc23': (40, '', 'math-ai/amc23', None, 'test', 'question', 'answer', 'prime'),
    'minerva': (272, 'minerva_math', 'math-ai/minervamath', None, 'test', 'question', 'answer', 'qwen'),
    'olympiadbench': (675, '', 'Hothan/OlympiadBench', 'OE_TO_maths_en_COMP', 'train', 'question', 'final_answer', 'qwen'),
    'humaneval': (164, '', 'openai/openai_humaneval', None, 'test', 'prompt', 'ground_truth', 'code'),
    'mbpp': (399, 'mbpp_prime', 'google-research-datasets/mbpp', 'sanitized', 'all', 'prompt', 'ground_truth', 'code'),
    'leetcode': (180, 'leetcode_sample', 'data_dir/leetcode_sample.jsonl', None, None, 'prompt', 'ground_truth', 'code'),
}

def load_benchmark(name):
    """(short name, problems) of a name in BENCHMARKS or a file. Problems are those of load_problems with more keys: group, like
    ["subject Algebra", "level 3"], their_gold (of parity_golds) and tolerance. UserError: no such benchmark, bad file."""
    known, short = name in BENCHMARKS, Path(name).name.split(".")[0]
    if not known and not os.path.exists(name):
        raise UserError(f"no such file {name!r}; did you mean {difflib.get_close_matches(name, BENCHMARKS, 1, 0)[0]!r}?")
    count, file, source, part, split, problem, answer, rules = BENCHMARKS.get(
        name, (None, None, name, None, "train", problem_column, answer_column, None))
    if known and data_dir:                                  # a file may have other usual columns than the hub
        found = [path for stem in (file or name, name) for path in sorted(Path(data_dir).glob(f"{stem}.*"))]
        source, problem, answer = found[0] if found else f"{data_dir}/{file or name}.jsonl", None, None
    rows, suffix = read_rows(source, split, part, max_bad_share=0), user_suffix
    if rules == "code":
        rows, suffix = [(where, code_row(where, row)) for where, row in rows], code_suffix
    problems = load_problems(source, split, part, problem, answer, system_prompt, suffix, max_problems, 0, rows)
    theirs = read_rows(parity_golds[short]) if short in parity_golds else []
    theirs = {row.get("unique_id"): row.get("expected_answer") for _, row in theirs}
    for p, (_, row) in zip(problems, rows):                 # AMC's own ids begin anew with each year
        p["id"] = "/".join(row["url"].split("/")[-2:]) if known and row.get("url") else p["id"]
        p["their_gold"], error = theirs.get(str(p["id"])), str(known and row.get("error") or "")
        p["tolerance"] = float(error) if error and "," not in error else None       # "0.1,0.1" stands in no row used
        kinds = "subject type subfield level difficulty".split()
        p["group"] = [f"{kind} {str(row[kind]).removeprefix('Level ')}" for kind in kinds if row.get(kind)]
    if again := [number for number, times in collections.Counter(str(p["id"]) for p in problems).items() if times > 1]:
        raise UserError(f"{source}: the id {again[0]!r} stands twice")
    if theirs and not any(p["their_gold"] for p in problems):
        raise UserError(f"{parity_golds[short]}: no row has the unique_id of a problem of {name}")
    if known and len(problems) != min(count, max_problems or count):
        print(f"note: {name} has {len(problems)} problems here, {count} are published")
    return short, problems

def code_row(where, row):
    """A row of HumanEval, MBPP or LeetCode as one of load_problems: what is asked, and a check program for grade_code."""
    try:
        if "entry_point" in row:                            # the check may use what stands before the function
            asked, head = f"```python\n{row['prompt']}```", row["prompt"].rpartition(f"def {row['entry_point']}")[0]
            test = f"{head}\n{row['test']}\ncheck({row['entry_point']})" if row["test"] else ""
        elif "prompt_sft" in row:
            asked, test, row = row["prompt_sft"], row["test"], row | dict(row.get("meta") or {})
        else:                                               # the first assertion is shown, as PRIME does
            asked = f"{row.get('prompt') or row['text']}\n{row['test_list'][0]}"
            test = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]])
    except (KeyError, IndexError, TypeError) as e:
        raise UserError(f"{where} is no row of HumanEval, MBPP or LeetCode ({e!r}); it has {', '.join(sorted(row))}") from None
    return row | dict(prompt=asked, ability="code", ground_truth=[test] if test else [])

def ngrams(text, n=10):
    """The set of a text's n-grams of words and numbers, lower case, without LaTeX's signs; all its words if there are fewer."""
    words = re.findall(r"[^\W\d_]+|\d+", text.lower())
    return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} - {()}

def report_overlap(sets):
    """Print and write (contamination.json) the problems of whose 10-grams a share `overlap` stands in prompts of `against`."""
    grams = {(name, str(p["id"])): ngrams(p["problem"]) for name, problems in sets.items() for p in problems}
    seen, wanted, report = set(), set().union(*grams.values()), {}
    sizes = set(map(len, wanted))                           # a short problem is one shorter n-gram
    for where, row in read_rows(against):
        asked = row.get("messages") or row.get("problem") or row.get("question") or row.get("prompt") or row.get("instruction")
        if asked is None:
            raise UserError(f"{where} has none of the columns messages, problem, question, prompt, instruction")
        asked = asked if isinstance(asked, str) else " ".join(str(m["content"]) for m in asked if m["role"] == "user")
        seen |= set().union(*(ngrams(asked, n) for n in sizes)) & wanted
    for name, problems in sets.items():
        share = {i: round(len(own & seen) / max(1, len(own)), 3) for (of, i), own in grams.items() if of == name}
        ids = {i: share[i] for i in sorted(share, key=share.get, reverse=True) if share[i] >= overlap}
        report[name] = dict(problems=len(problems), found=len(ids), ids=ids)
        print(f"{name}: {len(ids)} of {len(problems)} problems ({len(ids) / len(problems):.1%}) stand in {against}, with at "
              f"least {overlap:.0%} of their 10-grams: {', '.join(ids) or 'none'}")
    write("contamination.json", json.dumps(report, indent=1))

def published_answer(response, rules, benchmark=None):
    """What published scripts take for the answer, "" if there is none. rules "prime" (PRIME's): markers cut the text, and a box
    before them is lost; the last box, else all that is left. "qwen" (Qwen2.5-Math's): a phrase, last box, phrase or number."""
    if rules == "qwen":
        closing = re.search(r"final answer is \$(.*?)\$\. I hope", response, re.S)
        return closing[1] if closing else extract_answer(response, fallback=True) or ""
    for marker in ["the answer is: "] * (benchmark == "math500") + ["answer:\n", "answer: "]:    # misspelt there for the others
        response = re.split(marker, response, flags=re.IGNORECASE)[-1].strip()
    answer = extract_answer(response) or response
    return answer if benchmark == "math500" else answer.strip("The final answer is ").strip(". I hope it is correct.")

def grade(pairs, grader):
    """Give each row of (row, problem) pairs its answer, with `regrade` a new verdict, with `parity` one by published rules."""
    scores = grader.grade([row["response"] for row, _ in pairs], [p for _, p in pairs]) if regrade else []
    for (row, p), score in zip(pairs, scores):
        row.update(correct=score == 1.0, ground_truth=p["ground_truth"], failure=score.failure)
    for row, p in pairs:
        response, (*_, rules) = row["response"], BENCHMARKS.get(row["benchmark"], [None])
        row.pop("parity", None)                             # of a run before
        program = re.search(r"```python.*", response, re.S) or [None]
        row["answer"] = extract_answer(response) if p["ability"] == "math" else program[0]
        if parity and rules in ("prime", "qwen"):
            gold, answer = p["their_gold"] or golds(p["ground_truth"])[0], published_answer(response, rules, row["benchmark"])
            unread = rules == "qwen" and re.search(r"\de[-+]?\d", gold) and re.search(r"10\s*\^", answer)
            row["parity"] = not unread and is_equiv(answer, gold, parity=True)      # unread: a x 10^b for the gold 4.5e33

def accuracy(values):
    """(mean, its standard error) of a value of each problem, 0 to 1.    accuracy([1, 0]) = (0.5, 0.5)
    Where all values are the same, the error is that of an adjusted proportion, two successes and two failures more (Agresti and
    Coull, The American Statistician 52, 1998), not 0.    accuracy([0] * 30) = (0.0, 0.040): p = 2/34, sqrt(p (1 - p) / 34)"""
    n, mean = len(values), sum(values) / len(values)
    if min(values) == max(values):
        p = (sum(values) + 2) / (n + 4)
        return mean, math.sqrt(p * (1 - p) / (n + 4))
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n * (n - 1)))

def pass_at_k(n, c, k):
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones.   pass_at_k(4, 1, 2) = 0.5"""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(answers):
    """(the answer that most agree on, its share of all). Equivalent answers vote together, under the name of the first; a tie
    goes to those seen first; None is no vote, but lowers the share.    majority(["1/2", None, "0.5", "3"]) = ("1/2", 0.5)"""
    votes = collections.Counter()
    for answer in [answer for answer in answers if answer is not None]:
        same = (v for v in votes if v == answer or is_equiv(answer, v) and is_equiv(v, answer))
        votes[next(same, answer)] += 1
    winner = max(votes, key=votes.get, default=None)
    return winner, votes[winner] / max(1, len(answers))

def notebook_vote(answers):
    """The vote of NuminaMath's notebook (cell 18), for AIME-like answers only: rounded to integers, what is none or negative
    dropped, modulo 1000, the most frequent, ties to the first, 0 without a vote.   notebook_vote(["1003", "3.4", "5"]) = 3"""
    numbers = []
    for answer in answers:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            numbers.append(round(float(answer)))
    return statistics.mode([number % 1000 for number in numbers if number >= 0] or [0])

def vote(rows, problem, numina):
    """(is the majority answer of a problem's rows right, its share). A conversation that lost its way has no vote."""
    answers = [row["answer"] if row["finish_reason"] not in ("rounds", "malformed") else None for row in rows]
    winner, share = majority(answers)
    if numina:
        gold = re.fullmatch(r"-?\d+", str(problem["ground_truth"]))
        return bool(gold) and notebook_vote(answers) == int(gold[0]) % 1000, share
    return any(row["correct"] and row["answer"] == winner for row in rows), share

def mcnemar(a, b):
    """Exact two-sided p-value of two models' verdicts on the same problems, from those where they differ; of shares of right
    samples: the sign test.   mcnemar([1, 1, 1, 0], [0, 0, 1, 0]) = 0.5: two differ, both in favour of a; 2 (1/2)^2"""
    n = (only_a := sum(x > y for x, y in zip(a, b))) + (only_b := sum(x < y for x, y in zip(a, b)))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)

def summarize(rows, problems, numina=False):
    """Metrics of one model on one benchmark. values: {metric: one of each problem}, 0 without a row (its prompt was too long);
    score: {metric: (mean, standard error)}; by_group: {group: (mean, standard error, problems)} of the first metric."""
    n, lengths, values = max(1, len(rows)), [row["n_tokens"] for row in rows] or [0], {}
    endings = collections.Counter(row["finish_reason"] for row in rows)
    out = dict(problems=len(problems), responses=len(rows), tokens=sum(lengths) / n, tokens_p95=np.percentile(lengths, 95),
               truncated=endings["length"] / n, no_box=sum(row["answer"] is None for row in rows) / n, values=values,
               given_up=collections.Counter(row["failure"] for row in rows if row.get("failure")), endings=endings)
    for mode in ("greedy", "sampled"):
        by_id = {str(p["id"]): [] for p in problems}
        for row in sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["sample"]):
            by_id[str(row["problem_id"])].append(row)
        own, k = list(by_id.values()), max(map(len, by_id.values()))
        for metric, verdict in ((mode, "correct"), (f"{mode}_parity", "parity")):
            if k and all(verdict in row for answers in own for row in answers):
                values[metric] = [sum(row[verdict] for row in answers) / max(1, len(answers)) for answers in own]
        if k and mode == "sampled":
            for m in (2 ** i for i in range(k.bit_length())):
                values[f"pass@{m}"] = [pass_at_k(k, sum(row["correct"] for row in answers), m) for answers in own]
            if all(p["ability"] == "math" for p in problems):                       # programs do not vote
                values[f"maj@{k}"], shares = zip(*(vote(answers, p, numina) for answers, p in zip(own, problems)))
                out["vote_confidence"] = sum(shares) / len(shares)
    first, groups = next(iter(values.values()), [0] * len(problems)), {group for p in problems for group in p["group"]}
    members = {group: [value for p, value in zip(problems, first) if group in p["group"]] for group in sorted(groups)}
    out["by_group"] = {group: (*accuracy(own), len(own)) for group, own in members.items()}
    return out | dict(score={metric: accuracy(own) for metric, own in values.items()})

def average(scores):
    """Plain mean over benchmarks, as the model cards have it, of what all of them have."""
    shared = [metric for metric in scores[0]["score"] if all(metric in s["score"] for s in scores)]
    pairs = {metric: np.transpose([s["score"][metric] for s in scores]) for metric in shared}
    score = {metric: (np.mean(means), math.hypot(*errors) / len(scores)) for metric, (means, errors) in pairs.items()}
    means = {key: np.mean([s[key] for s in scores]) for key in ("tokens", "truncated", "no_box")}
    return dict(score=score, problems=sum(s["problems"] for s in scores), **means)

def markdown(rows):
    """A Markdown table of dicts {column: cell}, without columns that are empty everywhere. Pairs are (mean, standard error)."""
    columns = [column for column in rows[0] if any(row[column] != "" for row in rows)]
    show = lambda cell: f"{100 * cell[0]:.1f} ± {100 * cell[1]:.1f}" if isinstance(cell, tuple) else str(cell)
    lines = [columns, ["---", "---"] + ["--:"] * (len(columns) - 2), *([row[column] for column in columns] for row in rows)]
    return "".join("| " + " | ".join(map(show, line)) + " |\n" for line in lines)

def tables(results):
    """Markdown of {model: {benchmark: metrics}}: scores, then accuracy by subject and level, a column a model."""
    passes, maj = f"pass@{2 ** max(0, samples.bit_length() - 2)}", f"maj@{samples}"     # k = samples is as noisy as one draw
    metrics = {"greedy": "greedy", "by their rules": "greedy_parity", f"avg@{samples}": "sampled", passes: passes, maj: maj}
    theirs, rows, groups = dict(zip(results, published.values())), [], {}
    for model, name, s in [(model, name, s) for model, scores in results.items() for name, s in scores.items()]:
        row, printed = dict(model=model, benchmark=name, N=s["problems"]), theirs.get(model, {})
        row |= {column: s["score"].get(metric, "") for column, metric in metrics.items()}
        row |= {"published": printed.get(name, ""), f"published {maj}": printed.get(f"{name} {maj}", "")}
        row |= {"tokens": f"{s['tokens']:.0f}", "truncated": f"{s['truncated']:.1%}", "no box": f"{s['no_box']:.1%}"}
        rows.append(row | {"given up": ", ".join(f"{n} {kind}" for kind, n in s.get("given_up", {}).items())})
        for group, (mean, error, n) in s.get("by_group", {}).items():
            line = dict(benchmark=name, group=group, N=n) | dict.fromkeys(results, "")
            groups.setdefault((name, group), line)[model] = mean, error
    return "\n".join(markdown(table) for table in (rows, list(groups.values())) if table)

def differences(results):
    """Lines: is each model's difference from its published column, and from the model before it, more than noise?"""
    for (model, scores), (column, numbers) in zip(results.items(), published.items()):
        for name, s in scores.items():
            if name in numbers and "greedy" in s["score"]:
                mean, se = s["score"].get("greedy_parity", s["score"]["greedy"])
                right = round(numbers[name] / 100 * s["problems"])
                their_se = se if name == "average" else accuracy([1] * right + [0] * (s["problems"] - right))[1]
                lead, noise = 100 * mean - numbers[name], 196 * math.hypot(se, their_se)
                yield (f"{name}: {model} {lead:+.1f} against {column} as published, "
                       f"{'within' if abs(lead) <= noise else 'beyond'} the noise of two runs (± {noise:.1f})")
    for (old, new), mode in itertools.product(itertools.pairwise(results), ("greedy", "sampled")):
        for name in results[new]:
            a, b = (results[model][name].get("values", {}).get(mode) for model in (new, old))
            if a is None or b is None:                      # an average, or answers that are not there
                continue
            lead, p = 100 * (np.mean(a) - np.mean(b)), mcnemar(a, b)
            yield f"{name}, {mode}: {new} {lead:+.1f} against {old}, p = {p:.2g}" + ": within noise" * (p > 0.05)

def chart(results, path):
    """Bars of accuracy with standard errors, a group a benchmark, beside the published numbers."""
    import matplotlib.figure, pandas
    mode = "greedy" if greedy else "sampled"
    mean, error = (pandas.DataFrame({model: {name: 100 * s["score"].get(mode, (math.nan,) * 2)[i] for name, s in scores.items()}
                                     for model, scores in results.items()}) for i in (0, 1))
    for _, column in zip(results, published):
        mean[f"{column}, published"] = pandas.Series(published[column])
    ax = mean.plot.bar(ax=matplotlib.figure.Figure((9, 4)).subplots(), yerr=error, capsize=3, rot=20, ylabel=f"{mode}, % right")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1)).figure.savefig(path, dpi=120, bbox_inches="tight", format="png")

def write(name, content):
    """A file of out_dir, complete or not at all. content: its text, or a function that writes it to a path."""
    path = os.path.join(out_dir, name)
    content(path + ".tmp") if callable(content) else Path(path + ".tmp").write_text(content, "utf-8")
    os.replace(path + ".tmp", path)

def report(rows, sets, prompt):
    """Tables, chart and lines on differences. rows: {model: its responses}; sets: {benchmark: problems}."""
    results = {model: {name: summarize([row for row in mine if row["benchmark"] == name], problems, tir_numina)
                       for name, problems in sets.items()} for model, mine in rows.items()}
    for scores in results.values() if len(sets) > 1 else ():
        scores["average"] = average(list(scores.values()))
    for numbers in published.values():                      # the average of other benchmarks is another number
        if {name for name in numbers if " maj@" not in name} != {*sets, "average"}:
            numbers.pop("average", None)
    about = dict(date=time.strftime("%Y-%m-%d %H:%M"), commit=plan.commit())
    about |= {name: sys.modules[name].__version__ for name in ("torch", "transformers", "vllm") if name in sys.modules}
    about |= {k: globals()[k] for k in "samples temperature top_p max_tokens benchmark_tokens benchmark_stop seed".split()}
    notes = [*differences(results), *published_notes]
    text = ", ".join(f"{name} {value}" for name, value in about.items()) + f"\n\n~~~\n{prompt}\n~~~\n\n{tables(results)}\n"
    text += "".join(f"- {note}\n" for note in notes)
    about |= dict(settings=values(globals()), first_prompt=prompt)
    write("results.md", text)
    write("results.json", json.dumps(dict(about=about, models=results, notes=notes), indent=1))
    write("results.png", lambda path: chart(results, path))
    print(f"\n{text}\nwrote {out_dir}/results.md, results.json and results.png", flush=True)

ANSWER = "mode", "seed", "sampling", "prompt"               # what makes it this answer: what is there with the same is kept
def parts(file):
    """What processes have written beside a model's file and not yet joined to it."""
    return glob.glob(glob.escape(f"{out_dir}/{file}") + ".rank*")

def read_responses(file, same):
    """{(mode, seed, sampling, prompt): row} of a model's file and of the parts that processes have left beside it."""
    paths = [f"{out_dir}/{file}", *parts(file)]
    return {tuple(str(row[key]) for key in ANSWER): row for path in paths for row in resume_rows(path, same)}

def decoding(name=None):
    """What sample() is told about an answer to a problem of this benchmark."""
    more = dict(rounds=tir_rounds, tool_timeout=tir_timeout, numina=tir_numina) if tir else dict(stop=benchmark_stop.get(name))
    return dict(max_tokens=benchmark_tokens.get(name, max_tokens)) | {k: v for k, v in more.items() if v is not None}

def open_engine(path, tokenizer):
    longest = min(max_prompt_tokens + max([max_tokens, *benchmark_tokens.values()]), plan.positions(path))
    return make_engine(engine, path, tokenizer, *plan.pick_device(device, dtype), longest, tensor_parallel, gpu_memory)

def answer_question(path, tokenizer):
    """Print the answers to `ask`, put as the card of Eurus-2-7B-PRIME puts questions of mathematics, and of programming."""
    plan.announce_sandbox(sandbox, tir)
    sampler = open_engine(path, tokenizer)
    for suffix in ("\n\nPresent the answer in LaTex format: \\boxed{Your answer}", code_suffix):
        ids = render_prompt(tokenizer, [dict(role="system", content=system_prompt)] * bool(system_prompt) +
                            [dict(role="user", content=ask + suffix)])
        if len(ids) > (longest := min(max_prompt_tokens, plan.positions(path) - 1)):
            raise UserError(f"the question is longer than {longest} tokens (--max_prompt_tokens, or the model's positions)")
        for _, answer in sample(sampler, tokenizer, [(ids, seed, dict(temperature=0.0) | decoding())]):
            print(f"\n{tokenizer.decode(ids + answer.tokens)}\n({len(answer.tokens)} tokens, {answer.finish_reason})")
    sampler.close()

def make_jobs(path, tokenizer, sets):
    """{(mode, seed, ...): (prompt ids, problem, row)} of all answers that a model is to give; what its rows have in common."""
    jobs, same = {}, dict(model=path, asked=[system_prompt, user_suffix, code_suffix])
    longest = min(max_prompt_tokens, plan.positions(path) - 1)
    for name, problems in sets.items():
        runs = [("greedy", 0, dict(temperature=0.0, top_p=1.0) | decoding(name))] if greedy else []
        for k in range(samples) if name in (sets if sampled_benchmarks is None else sampled_benchmarks) else ():
            runs.append(("sampled", k, dict(temperature=temperature, top_p=top_p) | decoding(name)))
        for p in problems:
            ids, number = render_prompt(tokenizer, p["messages"]), str(p["id"])
            own = same | dict(benchmark=name, problem_id=number, prompt=tokenizer.decode(ids))
            for mode, k, sampling in runs if len(ids) <= longest else ():
                row = own | dict(mode=mode, sample=k, sampling=sampling, seed=sample_seed(seed, name, number, k))
                jobs[tuple(str(row[key]) for key in ANSWER)] = ids, p, row
    if not jobs:
        raise UserError(f"every prompt is longer than {longest} tokens (--max_prompt_tokens, or the model's positions)")
    return jobs, same

def main():
    plan.check(globals(), dict(samples=0, temperature=0, max_tokens=1, max_prompt_tokens=1, tir_rounds=1, max_problems=1))
    if not models or not benchmarks or not (greedy or samples):
        raise UserError("nothing to do: models or benchmarks is empty, or greedy=False and samples=0")
    plan.dry_run("evaluate", globals())
    rank, world, wait = plan.join(tensor_parallel or 1)
    if ask is not None:
        return answer_question(models[0], load_tokenizer(models[0], chat_template))
    sets = dict(map(load_benchmark, benchmarks))
    unknown = {*benchmark_tokens, *benchmark_stop, *parity_golds, *(sampled_benchmarks or [])} - {*sets, *BENCHMARKS}
    if unknown or len(sets) < len(benchmarks):
        raise UserError(f"two benchmarks have the same name, or settings name unknown ones: {', '.join(unknown or sets)}")
    os.makedirs(out_dir, exist_ok=True)
    if against:
        return report_overlap(sets)
    rows, tokenizers = {}, {path: load_tokenizer(path, chat_template) for path in models}       # mistakes show before any work
    files = {path: path.strip("./").replace("/", "--") + ".responses.jsonl" for path in models}
    if len(set(files.values())) < len(files):
        raise UserError(f"two of the models {', '.join(models)} would share a file of responses: one at a time")
    plan.announce_sandbox(sandbox, tir or any(p["ability"] == "code" for problems in sets.values() for p in problems))
    with Grader(grade_workers or max(1, os.cpu_count() // world), grade_timeout) as grader:
        for path, tokenizer in tokenizers.items():
            file, (jobs, same) = files[path], make_jobs(path, tokenizer, sets)
            there = read_responses(file, same)
            mine = [job for k, job in jobs.items() if k not in there or not resume][rank::world]
            found, prompt = len(jobs.keys() & there.keys()), next(iter(jobs.values()))[2]["prompt"]
            if regrade and not found:
                raise UserError(f"regrade: {out_dir}/{file} has no response with these settings")
            rest = ", problems without one count as wrong" * (regrade and found < len(jobs))
            if other := sum(there[k]["ground_truth"] != p["ground_truth"] for k, (_, p, _) in jobs.items() if k in there):
                rest += f", {other} of them graded by other golds" + ": --regrade=True grades them anew" * (not regrade)
            print(f"\n{path}: {found} of {len(jobs)} responses are there{rest}; first prompt:\n{prompt}", flush=True)
            for part in parts(file) if rank == 0 and not resume else ():
                os.remove(part)                             # of a run before
            wait(f"{path}: all have read")
            if mine and not regrade:
                sampler = open_engine(path, tokenizer)
                stream_answers(sampler, grader, tokenizer, mine, f"{out_dir}/{file}.rank{rank}")     # all benchmarks, one queue
                sampler = sampler.close()                   # the next model needs its room
            wait(f"{path}: all have sampled")
            if rank == 0:
                there = read_responses(file, same)
                pairs = [(there[k], p) for k, (_, p, _) in jobs.items() if k in there]
                grade(pairs, grader)
                write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in there.values()))
                for part in parts(file):
                    os.remove(part)
                rows[path] = [row for row, _ in pairs]
    if rank == 0:
        report(rows, sets, prompt)

if __name__ == "__main__":
    run(main, globals())
