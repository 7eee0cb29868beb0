"""evaluate.py: metrics by hand and by brute force, the real benchmark files, whole runs on small models, mistakes."""
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import statistics

import pytest
from transformers import AutoTokenizer

import configurator
import evaluate
import grader
from conftest import ROOT, call, read_jsonl, torchrun, write_jsonl

MATHS = [name for name, row in evaluate.BENCHMARKS.items() if row[-1] != "code"]


@pytest.fixture
def settings():
    """A way to change settings for one test."""
    before = configurator.values(vars(evaluate))
    yield vars(evaluate).update
    vars(evaluate).update(before)


@pytest.fixture
def files(shared, settings):
    settings(dict(data_dir=str(shared / "data")))
    return shared / "data"


def config(name):
    """The settings that a file of config/ makes."""
    scope = {}
    exec((ROOT / "config" / f"{name}.py").read_text(), scope)
    return {key: value for key, value in scope.items() if key[0] != "_"}


def block(code):
    return f"So:\n```python\n{code}\n```\n"


# ---- metrics ----

def test_accuracy_by_hand():
    assert evaluate.accuracy([1, 0]) == (0.5, 0.5)
    values = [1.0, 0.5, 0.25, 0.0, 1.0]
    mean, se = evaluate.accuracy(values)
    assert mean == pytest.approx(statistics.mean(values)) and se == pytest.approx(statistics.stdev(values) / 5 ** 0.5)
    mean, se = evaluate.accuracy([1] * 8 + [0] * 22)        # AIME: one greedy answer a problem is a Bernoulli trial
    assert se == pytest.approx((mean * (1 - mean) / 29) ** 0.5) and se == pytest.approx(0.082, abs=1e-3)


def test_the_error_of_none_and_of_all_by_hand():
    """Two successes and two failures more: 0 of 30 becomes 2 of 34, whose error is sqrt(2/34 * 32/34 / 34) = 8 / 34^1.5."""
    assert evaluate.accuracy([0] * 30) == (0, pytest.approx(8 / 34 ** 1.5))
    assert evaluate.accuracy([0] * 30)[1] == pytest.approx(0.04035, abs=1e-5)
    assert evaluate.accuracy([1] * 30) == (1, pytest.approx(8 / 34 ** 1.5))
    assert evaluate.accuracy([True]) == (1, pytest.approx((3 / 5 * 2 / 5 / 5) ** 0.5))
    assert evaluate.accuracy([0.5] * 12) == (0.5, pytest.approx(0.125))                    # 8 of 16


def test_pass_at_k_by_counting():
    for n, c in [(n, c) for n in range(1, 7) for c in range(n + 1)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority_by_hand():
    assert evaluate.majority(["1/2", None, "0.5", "3"]) == ("1/2", 0.5)
    assert evaluate.majority(["3", "x", "x", "3"]) == ("3", 0.5)                    # a tie: seen first
    assert evaluate.majority(["x", "3", "3", "x"]) == ("x", 0.5)
    assert evaluate.majority([r"\dfrac{1}{2}", "2", r"\frac12", " 2", r"\left( 2 \right)"]) == ("2", 0.6)
    assert evaluate.majority([None, None]) == (None, 0.0) and evaluate.majority([]) == (None, 0.0)
    assert evaluate.majority([None, None, "7"]) == ("7", pytest.approx(1 / 3))
    assert evaluate.majority(["0.33", "1/3", "1/3"]) == ("1/3", pytest.approx(2 / 3))  # a decimal is no third, whatever a gold grants


def test_majority_does_not_depend_on_the_order():
    answers = ["12", "12.0", r"\boxed{12}", "13", "13", "x+1", None]
    for _ in range(50):
        random.Random(_).shuffle(answers)
        winner, share = evaluate.majority(answers)
        assert grader.is_equiv(winner, "12") and share == 3 / 7


def test_mcnemar_by_counting_signs():
    rng = random.Random(0)
    for _ in range(20):
        a, b = ([rng.random() < 0.5 for _ in range(12)] for _ in range(2))
        differ = sum(x != y for x, y in zip(a, b))
        lead = abs(sum(a) - sum(b))                         # under the null each difference falls either way
        chance = [abs(sum(signs)) >= lead for signs in itertools.product((-1, 1), repeat=differ)]
        assert evaluate.mcnemar(a, b) == pytest.approx(sum(chance) / len(chance)) == evaluate.mcnemar(b, a)
    assert evaluate.mcnemar([1, 0], [1, 0]) == 1.0


def test_differences_by_hand(settings):
    def scored(**values):
        score = {metric: evaluate.accuracy(own) for metric, own in values.items()}
        return {"b": dict(problems=len(values["greedy"]), values=values, score=score)}

    right = [1] * 8 + [0] * 22                              # like the card's: errors 8.21 each, 1.96 * 8.21 * sqrt(2) = 22.8
    settings(dict(published={"Card": {"b": 26.7}, "None": {"b": 0.0, "missing": 5.0}}))
    old, new = scored(greedy=right, sampled=[0.5] * 30), scored(greedy=[1] * 16 + [0] * 14, sampled=[0.5] * 21 + [1] * 9)
    assert list(evaluate.differences({"old": old, "new": new})) == [
        "b: old -0.0 against Card as published, within the noise of two runs (± 22.8)",
        "b: new +53.3 against None as published, beyond the noise of two runs (± 19.8)",   # 16 of 30: 9.26; none of 30: 4.03
        "b, greedy: new +26.7 against old, p = 0.0078",     # 8 differ, all in favour of new: 2 / 2^8
        "b, sampled: new +15.0 against old, p = 0.0039"]    # 9 differ: 2 / 2^9
    old, new = scored(greedy=[1, 1, 0, 0]), scored(greedy=[1, 0, 1, 1])
    assert [*evaluate.differences({"old": old, "new": new})][2:] == ["b, greedy: new +25.0 against old, p = 1: within noise"]


def rows_of(verdicts, mode="sampled", answers=None):
    """Rows of verdicts[problem][sample]."""
    return [dict(problem_id=i, mode=mode, sample=k, correct=right, answer=answers[i][k] if answers else str(right), n_tokens=10 * (k + 1),
                 finish_reason="length" if k == 1 else "stop") for i, own in enumerate(verdicts) for k, right in enumerate(own)]


def test_summary_by_hand():
    problems = [dict(id=i, ability="math", group=["level 1"] if i < 2 else ["level 2"]) for i in range(4)]
    verdicts = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    answers = [["5", "5.0", "6", "6"], [None] * 4, ["1", "2", "2", "2"], ["9"] * 4]
    s = evaluate.summarize(rows_of(verdicts, answers=answers)[::-1], problems)          # the order of the file does not matter
    assert s["score"]["sampled"] == evaluate.accuracy([0.5, 0, 0.25, 1])
    assert s["score"]["pass@1"] == pytest.approx(s["score"]["sampled"])
    assert s["score"]["pass@2"] == pytest.approx(evaluate.accuracy([5 / 6, 0, 1 / 2, 1]))
    assert s["score"]["pass@4"] == evaluate.accuracy([1, 0, 1, 1])
    assert s["score"]["maj@4"] == evaluate.accuracy([1, 0, 0, 1])
    assert s["vote_confidence"] == pytest.approx((0.5 + 0 + 0.75 + 1) / 4)
    assert s["by_group"] == {"level 1": (*evaluate.accuracy([0.5, 0]), 2), "level 2": (*evaluate.accuracy([0.25, 1]), 2)}
    assert s["tokens"] == 25 and s["tokens_p95"] == 40 and s["truncated"] == 0.25 and s["no_box"] == 0.25
    assert s["given_up"] == {} and s["endings"] == {"stop": 12, "length": 4}
    kinds = ["timeouts", None, "unparsed", "timeouts"]
    failed = [row | dict(failure=kinds[row["problem_id"]]) for row in rows_of(verdicts)]
    assert evaluate.summarize(failed, problems)["given_up"] == {"timeouts": 8, "unparsed": 4}
    missing = evaluate.summarize([row for row in rows_of(verdicts) if row["problem_id"] != 3], problems)
    assert missing["score"]["sampled"] == evaluate.accuracy([0.5, 0, 0.25, 0])          # its prompt was too long, say
    both = evaluate.average([s, missing])
    assert both["score"]["sampled"][0] == pytest.approx((1.75 + 0.75) / 8)
    assert both["score"]["sampled"][1] == pytest.approx(math.hypot(s["score"]["sampled"][1], missing["score"]["sampled"][1]) / 2)


# ---- benchmark files ----

@pytest.mark.parametrize("name", evaluate.BENCHMARKS)
def test_real_files_have_the_published_counts(files, name, capsys):
    short, problems = evaluate.load_benchmark(name)
    assert short == name and len({str(p["id"]) for p in problems}) == len(problems)
    assert len(problems) == {"leetcode": 15}.get(name, evaluate.BENCHMARKS[name][0])     # of leetcode's 180 the file has a sample
    assert ("180 are published" in capsys.readouterr().out) == (name == "leetcode")
    if name in ("math", "math500"):
        assert len({g for p in problems for g in p["group"] if "evel" not in g}) == 7
        assert len({g for p in problems for g in p["group"] if "evel" in g}) == 5


@pytest.mark.parametrize("name", MATHS)
def test_golds_as_responses_are_right(files, name):
    problems = evaluate.load_benchmark(name)[1]
    wrong = []
    for p in problems:
        response = f"We find $\\boxed{{{grader.golds(p['ground_truth'])[0]}}}$."
        wrong += [p["id"]] * (not grader.grade_math(response, p["ground_truth"]))
        assert not grader.grade_math("", p["ground_truth"])
    assert len(wrong) <= 0.002 * len(problems), wrong


def test_golds_of_the_competitions(files):
    golds = {p["id"]: p["ground_truth"] for p in evaluate.load_benchmark("amc")[1]}
    assert all(re.fullmatch(r"-?\d+", gold) for gold in golds.values())                   # 36.0 in the file
    assert {"-4", "-1", "8178", "1296", "3159", "1625"} <= set(golds.values())
    assert grader.grade_math(r"\boxed{025}", "25") and not grader.grade_math(r"\boxed{1003}", "3")
    assert sum(id.startswith("2023") for id in golds) == 40


def test_files_and_names(tmp_path, settings):
    rows = [dict(problem=f"{i}?", answer=str(i), level="Level 2", type="Algebra") for i in range(3)]
    with gzip.open(tmp_path / "math500.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
    settings(dict(data_dir=str(tmp_path), user_suffix="!", system_prompt="Think.", max_problems=2))
    name, problems = evaluate.load_benchmark("math500")
    assert name == "math500" and [p["ground_truth"] for p in problems] == ["0", "1"]
    assert [m["content"] for m in problems[0]["messages"]] == ["Think.", "0?!"]
    settings(dict(problem_column="q", answer_column="a"))
    name, problems = evaluate.load_benchmark(str(write_jsonl(tmp_path / "mine.jsonl", [dict(q="1+1?", a="2", id="x")])))
    assert name == "mine" and problems[0]["id"] == "x" and problems[0]["ground_truth"] == "2"


def test_code_is_right_as_published_and_wrong_when_changed(files):
    """Also LeetCode's and HumanEval's helpers. All reference solutions: tests/test_execution.py takes more of them."""
    rows = read_jsonl(files / "humaneval.jsonl")
    problems = evaluate.load_benchmark("humaneval")[1]
    for number in (0, 32, 38, 50):                          # the checks of 32, 38 and 50 call helpers of the prompt
        row, p = rows[number], problems[number]
        assert p["id"] == f"HumanEval/{number}" and p["ability"] == "code" and p["messages"][-1]["content"].endswith(evaluate.code_suffix)
        head = row["prompt"][:row["prompt"].index(f"def {row['entry_point']}")]
        bare = row["prompt"][len(head):] + row["canonical_solution"]                      # without what stands before
        assert grader.grade_code(block(row["prompt"] + row["canonical_solution"]), p["ground_truth"]) == 1.0
        if number in (0, 50):                               # the solutions of the others need the helper themselves
            assert grader.grade_code(block("from typing import *\n" + bare), p["ground_truth"]) == 1.0
        assert grader.grade_code(block(row["prompt"] + "    return 1"), p["ground_truth"]) == 0.0
    row, p = read_jsonl(files / "mbpp_full.jsonl")[10], evaluate.code_row("line 11", read_jsonl(files / "mbpp_full.jsonl")[10])
    assert grader.grade_code(block(row["code"]), p["ground_truth"]) == 1.0 and row["test_list"][0] in p["prompt"]
    assert grader.grade_code(block(row["code"].replace("return", "return not")), p["ground_truth"]) == 0.0


# ---- published tables, prompts and rules ----

@pytest.mark.parametrize("name", ["eval_eurus2", "eval_intellect_math"])
def test_decoding_is_the_published_one(name, settings):
    """PRIME's scripts: 8,192 tokens for MATH-500, 4,096 for the others; a stop string for MATH-500 and AIME."""
    settings(config(name))
    told = {benchmark: evaluate.decoding(benchmark) for benchmark in config(name)["benchmarks"]}
    stop = dict(stop="\n###\nProblem: ")
    assert told == {"math500": dict(max_tokens=8192) | stop, "aime24": dict(max_tokens=4096) | stop,
                    **{other: dict(max_tokens=4096) for other in ("amc", "minerva", "olympiadbench")}}


@pytest.mark.parametrize("name, count", [("eval_eurus2", 4), ("eval_intellect_math", 3), ("eval_numina", 0)])
def test_notes_name_the_published_numbers_that_cannot_be_right(name, count):
    """Those that are no count of right answers, rounded, and those that are no mean."""
    published, notes = config(name)["published"], config(name).get("published_notes", [])
    wrong = []
    for column, numbers in published.items():
        for key, value in numbers.items():
            n = evaluate.BENCHMARKS[key.split()[0]][0] if key != "average" else None
            if n and not any(abs(value - 100 * c / n) < 0.0501 for c in range(n + 1)):
                wrong.append((column, value))
        mean = statistics.mean(value for key, value in numbers.items() if key in evaluate.BENCHMARKS)
        if abs(numbers.get("average", mean) - mean) > 0.101:
            wrong.append((column, numbers["average"], round(mean, 1)))
    assert len(notes) == len(wrong) == count
    for note, numbers in zip(notes, wrong):
        assert all(str(x) in note for x in numbers), (note, numbers)


def test_prompts_are_the_published_ones():
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
    asked = config("eval_eurus2")["system_prompt"]
    assert len(asked) == 414 and "\n" not in asked
    assert digest(asked.replace(r"\n", "\n") + "\n") == "7053563ec2998c97"                # the system message of Eurus-2-RL-Data
    assert digest(config("eval_intellect_math")["system_prompt"]) == "c020b67348d5cb45"


@pytest.mark.parametrize("response, rules, benchmark, answer", [
    (r"so \boxed{3}.", "prime", "math500", "3"), (r"\boxed{3} Final Answer: The final answer is $3$.", "prime", "math500",
                                                 "The final answer is $3$."),
    (r"\boxed{3} The answer is: 4", "prime", "math500", "4"), (r"\boxed{3} The answer is: 4", "prime", "aime24", "3"),
    ("The final answer is 36. I hope it is correct.", "prime", "aime24", "36"), ("", "prime", "amc", ""),
    ("Answer: 4", "prime", "amc", "4"), ("Answer:\n\\boxed{4}", "prime", "math500", "4"),
    (r"\boxed{3} so the final answer is $x$. I hope it is correct.", "qwen", None, "x"), (r"\boxed{3} or 4", "qwen", None, "3"),
    ("first 5, then 6 left", "qwen", None, "6"), ("nothing", "qwen", None, "")])
def test_answers_as_the_published_scripts_take_them(response, rules, benchmark, answer):
    assert evaluate.published_answer(response, rules, benchmark) == answer


def test_published_rules_on_real_responses(shared):
    """Verdicts of a harness of the same family as Qwen2.5-Math's, as its project published them with its responses."""
    with gzip.open(shared / "data/grader/real_math.jsonl.gz", "rt") as f:
        rows = [row for row in map(json.loads, f) if row["origin"].startswith("microsoft/rho")]
    same = [grader.is_equiv(evaluate.published_answer(row["response"], "qwen"), row["gold"], parity=True) == row["harness_score"]
            for row in rows]
    assert len(rows) == 1088 and sum(same) / len(rows) > 0.985


def graded(name, pairs, settings, **changes):
    """Rows of (problem number, response) pairs on a benchmark, graded as evaluate.py does it again from a file."""
    settings(dict(regrade=True, parity=True) | changes)
    problems = evaluate.load_benchmark(name)[1]
    rows = [dict(benchmark=name, problem_id=problems[i]["id"], response=text, correct=False) for i, text in pairs]
    with grader.Grader(workers=1) as strict:
        evaluate.grade([(row, problems[i]) for row, (i, _) in zip(rows, pairs)], strict)
    return [(row["correct"], row["parity"], row["answer"]) for row in rows]


def test_tolerance_of_olympiadbench(files, settings):
    number = next(i for i, row in enumerate(read_jsonl(files / "olympiadbench.jsonl")) if row["error"])     # 4.2, error 0.1
    answers = ["4.1", "4.3", r"4.3 \%", "4.35", "5", r"\frac{21}{5}"]
    verdicts = graded("olympiadbench", [(number, f"\\boxed{{{a}}}") for a in answers], settings)
    assert [v[0] for v in verdicts] == [True, True, True, False, False, True] and verdicts[3][2] == "4.35"


def test_parity_and_strict_differ_where_the_protocols_do(files, settings, tmp_path):
    golds = [grader.golds(p["ground_truth"])[0] for p in evaluate.load_benchmark("minerva")[1]]
    number, (mantissa, exponent) = next((i, g.split("e")) for i, g in enumerate(golds) if re.fullmatch(r"\d\.\d+e\d+", g))
    assert sum(bool(re.search(r"\de[-+]?\d", g)) for g in golds) == 58
    texts = [f"\\boxed{{{mantissa} \\times 10^{{{exponent}}}}}", f"\\boxed{{{golds[number]}}}", "no box but 7"]
    assert [v[:2] for v in graded("minerva", [(number, text) for text in texts], settings)] == [(1, 0), (1, 1), (0, 0)]
    assert evaluate.load_benchmark("olympiadbench")[1][0]["ground_truth"] == ["2"]
    verdicts = graded("olympiadbench", [(0, r"\boxed{200}"), (0, "so we get 2"), (0, r"\boxed{3}")], settings)
    assert [v[:2] for v in verdicts] == [(0, 1), (0, 1), (0, 0)]                          # a hundredfold; the last number
    ids = [row["unique_id"] for row in read_jsonl(files / "math500.jsonl")]
    theirs = write_jsonl(tmp_path / "golds.jsonl", [dict(unique_id=ids[0], expected_answer="1000")])
    texts = [(0, r"\boxed{1000}"), (0, r"\boxed{(3, \pi/2)}"), (2, r"\boxed{14/3}. Answer: none")]
    verdicts = graded("math500", texts, settings, parity_golds={"math500": str(theirs)})
    assert [v[:2] for v in verdicts] == [(0, 1), (1, 0), (1, 0)]                          # another gold; a box that is cut off
    settings(dict(parity_golds={"math500": str(files / "math500_prime_golds.jsonl")}))
    assert sum(p["their_gold"] != p["ground_truth"] for p in evaluate.load_benchmark("math500")[1]) == 85
    settings(dict(parity_golds={"math500": str(write_jsonl(theirs, [dict(unique_id="x", expected_answer="1")]))}))
    with pytest.raises(evaluate.UserError, match="golds.jsonl: no row has the unique_id"):
        evaluate.load_benchmark("math500")


# ---- whole runs ----

def run_args(out, *models, data, **more):
    more = dict(samples=3, temperature=1.0, top_p=1.0, max_tokens=12, max_prompt_tokens=40, engine="hf", device="cpu", grade_workers=1) | more
    return [f"--models={json.dumps(list(map(str, models)))}", f"--benchmarks={json.dumps(list(map(str, data)))}", f"--out_dir={out}",
            *(f"--{key}={value}" for key, value in more.items())]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_table_of_two_checkpoints_and_resume(tmp_path, guesser, guess_data, world, capsys):
    args = run_args(tmp_path, guesser, world / "init", data=[guess_data[1]])
    call(evaluate, *args)
    out = capsys.readouterr().out
    assert "<|im_start|>user\n10?<|im_end|>" in out         # the rendered prompt of the first problem
    first, files = results(tmp_path), sorted(tmp_path.glob("*.responses.jsonl"))
    assert len(first["models"]) == 2 == len(files) and (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.rank*")) and not list(tmp_path.glob("*.tmp"))
    for model, scores in first["models"].items():
        file = next(f for f in files if f.name.startswith(model.strip("./").replace("/", "--")))
        rows, s = read_jsonl(file), scores["problems"]
        assert len(rows) == 40 * 4 and s["problems"] == 40
        for mode, n in (("greedy", 40), ("sampled", 120)):
            assert s["score"][mode][0] == pytest.approx(sum(r["correct"] for r in rows if r["mode"] == mode) / n)
        assert s["tokens"] == pytest.approx(statistics.mean(r["n_tokens"] for r in rows))
        assert f"{100 * s['score']['sampled'][0]:.1f}" in out
        assert all(r["answer"] == grader.extract_answer(r["response"]) and r["prompt"].startswith("<|im_start|>user") for r in rows)
    old, new = (first["models"][str(m)]["problems"] for m in (guesser, world / "init"))
    assert old["no_box"] < 0.2 < 0.9 < new["no_box"] and new["truncated"] > 0.5 > old["truncated"]
    by_id = {}
    for row in (row for row in read_jsonl(files[0]) + read_jsonl(files[1]) if row["mode"] == "greedy"):
        by_id.setdefault(row["problem_id"], []).append(row["correct"])
    lost = sum(a > b for a, b in by_id.values()) + sum(a < b for a, b in by_id.values())
    assert f"p = {min(1, 2 * 0.5 ** lost):.2g}" in (tmp_path / "results.md").read_text()  # the second model has nothing right
    assert first["about"]["settings"]["samples"] == 3 and first["about"]["torch"] and "10?" in first["about"]["first_prompt"]

    whole = files[0].read_text()
    lines = whole.splitlines(keepends=True)
    files[0].write_text("".join(lines[:50]) + lines[50][:20])       # as a kill leaves it
    call(evaluate, *args)
    assert sorted(read_jsonl(files[0]), key=str) == sorted(map(json.loads, lines), key=str)
    assert results(tmp_path)["models"] == first["models"]
    call(evaluate, *args, "--samples=1")                    # fewer samples: those that are there, cut to k = 1
    again = results(tmp_path)["models"]
    assert all("maj@1" in m["problems"]["score"] for m in again.values()) and len(read_jsonl(files[0])) == 160
    with pytest.raises(evaluate.UserError, match="begun with"):     # other prompts are another evaluation
        call(evaluate, *args, "--user_suffix=x")
    assert sorted(read_jsonl(files[0]), key=str) == sorted(map(json.loads, lines), key=str)


def test_two_processes_share_the_questions(tmp_path, guesser, guess_data):
    args = run_args(tmp_path / "two", guesser, guesser, data=[guess_data[1]], samples=2)
    torchrun(2, "evaluate.py", *args)
    call(evaluate, *run_args(tmp_path / "one", guesser, data=[guess_data[1]], samples=2))
    (two,), (one,) = ([*(tmp_path / n).glob("*.responses.jsonl")] for n in ("two", "one"))
    assert sorted(read_jsonl(two), key=str) == sorted(read_jsonl(one), key=str) and len(read_jsonl(one)) == 120
    two, one = (results(tmp_path / n) for n in ("two", "one"))
    assert two["models"] == one["models"]
    assert not list((tmp_path / "two").glob("*.rank*"))


def test_parts_of_a_killed_run_are_taken_up(tmp_path, guesser, guess_data):
    args = run_args(tmp_path, guesser, data=[guess_data[1]], samples=2)
    call(evaluate, *args)
    (file,) = tmp_path.glob("*.responses.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:30]))                    # of which 10 stand in a part, too, as after a kill between two steps
    for rank, part in enumerate((lines[20:70], lines[70:100] + [lines[100][:-9]])):
        (tmp_path / f"{file.name}.rank{rank}").write_text("".join(part))
    call(evaluate, *args)
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines) and not list(tmp_path.glob("*.rank*"))
    write_jsonl(file, [row | dict(response="spoiled") for row in read_jsonl(file)])
    call(evaluate, *args, "--resume=False")
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


def test_old_parts_do_not_come_back(tmp_path, guesser, guess_data):
    """--resume=False: what processes of an older run have left behind is no answer of this one."""
    args = run_args(tmp_path, guesser, data=[guess_data[1]], samples=0)
    call(evaluate, *args)
    (file,) = tmp_path.glob("*.responses.jsonl")
    before = file.read_text()
    write_jsonl(tmp_path / f"{file.name}.rank1", [row | dict(response="old", correct=True) for row in read_jsonl(file)])
    call(evaluate, *args, "--resume=False")
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines()) and len(list(tmp_path.glob("*.rank*"))) == 0


@pytest.mark.parametrize("change, words", [
    (["--max_tokens=0"], "max_tokens=0: at least 1"), (["--samples=-1"], "samples=-1: at least 0"), (["--max_problems=0"], "max_problems=0"),
    (["--benchmarks=[]"], "nothing to do")])
def test_settings_that_cannot_work(tmp_path, guesser, guess_data, change, words):
    with pytest.raises(evaluate.UserError, match=words):
        call(evaluate, *run_args(tmp_path, guesser, data=[guess_data[1]]), *change)


def test_two_models_need_two_files(tmp_path, guesser, guess_data):
    for name in ("m/a", "m--a"):
        shutil.copytree(guesser, tmp_path / name)
    with pytest.raises(evaluate.UserError, match="would share a file"):
        call(evaluate, f"--models=['{tmp_path}/m/a', '{tmp_path}/m--a']", f'--benchmarks=["{guess_data[1]}"]', f"--out_dir={tmp_path}/out")


def test_votes_are_of_mathematics_whatever_the_order():
    """A program among the problems: no vote, wherever it stands."""
    problems = [dict(id=i, ability=ability, group=[], ground_truth="1") for i, ability in enumerate(("math", "code"))]
    rows = [dict(mode="sampled", sample=k, problem_id=p["id"], correct=True, answer="1", n_tokens=1, finish_reason="stop") for p in problems
            for k in (0, 1)]
    for order in (problems, problems[::-1]):
        assert set(evaluate.summarize(rows, order)["values"]) == {"sampled", "pass@1", "pass@2"}


def test_regrade_needs_no_weights(tmp_path, guesser, guess_data, capsys):
    model = tmp_path / "model"
    shutil.copytree(guesser, model)
    args = run_args(tmp_path, model, data=[guess_data[1]], samples=0)
    call(evaluate, *args)
    (file,) = tmp_path.glob("*.responses.jsonl")
    before, rows = results(tmp_path)["models"], read_jsonl(file)
    write_jsonl(file, [row | dict(correct=not row["correct"], answer="?") for row in rows])
    (model / "model.safetensors").unlink()
    call(evaluate, *args, "--regrade=True")
    assert results(tmp_path)["models"] == before and read_jsonl(file) == [row | dict(failure=None) for row in rows]
    write_jsonl(file, rows[:30])                            # nor does it sample what is missing
    call(evaluate, *args, "--regrade=True")
    assert results(tmp_path)["models"][str(model)]["problems"]["responses"] == 30 and len(read_jsonl(file)) == 30
    assert "30 of 40 responses are there, problems without one count as wrong" in capsys.readouterr().out
    other = write_jsonl(tmp_path / guess_data[1].name, [row | dict(ground_truth="9") for row in read_jsonl(guess_data[1])])
    call(evaluate, *run_args(tmp_path, model, data=[other], samples=0, regrade=True))     # told, and graded by the new golds
    assert "30 of them graded by other golds" in capsys.readouterr().out and results(tmp_path)["models"][str(model)]["problems"]["score"]["greedy"][0] == 0
    half, whole = (dict(problems=dict(values=values)) for values in (dict(greedy=[1, 0]), dict(greedy=[1, 1], sampled=[0.5, 1])))
    assert len(list(evaluate.differences(dict(half=half, whole=whole)))) == 1       # what only one of them has is not compared
    with pytest.raises(evaluate.UserError, match="no response with these settings"):
        call(evaluate, *run_args(tmp_path / "other", model, data=[guess_data[1]], samples=0, regrade=True))


def test_two_benchmarks_published_numbers_and_groups(tmp_path, guesser, capsys):
    for name, n in (("aime24", 30), ("amc23", 40)):
        rows = [dict(problem=f"{k}?", answer="2", level=f"Level {k % 2}", id=k) for k in range(10, 10 + n)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    args = run_args(tmp_path, guesser, data=["aime24", "amc23"], samples=4, data_dir=tmp_path, parity=True, sampled_benchmarks=["amc23"])
    call(evaluate, *args)
    mean, se = results(tmp_path)["models"][str(guesser)]["amc23"]["score"]["greedy_parity"]
    near = min(100, 100 * (mean + 1.5 * se) // 2.5 * 2.5 + 2.5)     # a count of 40, some two standard errors off: within two runs' noise
    capsys.readouterr()
    published = {"Card": {"aime24": 99.0, "amc23": near, "amc23 maj@4": 40.0}, "Other": {"aime24": 10.0}}
    call(evaluate, *args, f"--published={published}", "--published_notes=['Card: 99.0 is no count.']")
    out, s = capsys.readouterr().out, results(tmp_path)["models"][str(guesser)]
    assert set(s) == {"aime24", "amc23", "average"} and "sampled" not in s["aime24"]["score"] and s["amc23"]["responses"] == 200
    assert s["average"]["score"]["greedy"][0] == pytest.approx((s["aime24"]["score"]["greedy"][0] + s["amc23"]["score"]["greedy"][0]) / 2)
    assert s["average"]["score"]["greedy"][1] == pytest.approx(
        math.hypot(s["aime24"]["score"]["greedy"][1], s["amc23"]["score"]["greedy"][1]) / 2)
    assert list(s["aime24"]["by_group"]) == ["level 0", "level 1"]
    even = s["aime24"]["by_group"]["level 0"]
    assert f"| aime24 | level 0 | 15 | {100 * even[0]:.1f} ± {100 * even[1]:.1f} |\n" in out
    line = next(line for line in out.splitlines() if line.startswith("| model"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["model", "benchmark", "N", "greedy", "by their rules", "avg@4", "pass@2", "maj@4",
                                                               "published", "published maj@4", "tokens", "truncated", "no box"]
    assert re.search(r"aime24: .* against Card as published, beyond the noise", out)
    assert re.search(r"amc23: .* against Card as published, within the noise", out)
    assert "- Card: 99.0 is no count.\n" in out


def two_benchmarks(folder):
    """run_args' data and data_dir: 3 problems called AIME and 4 called AMC, whose answers are all 2."""
    for name, n in (("aime24", 3), ("amc23", 4)):
        write_jsonl(folder / f"{name}.jsonl", [dict(problem=f"{k}?", answer="2", id=k) for k in range(10, 10 + n)])
    return dict(data=["aime24", "amc23"], data_dir=folder)


def test_decoding_of_each_benchmark_and_resume(tmp_path, guesser):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=1)
    call(evaluate, *args, '--benchmark_tokens={"amc23": 3}')
    (file,) = tmp_path.glob("*.responses.jsonl")
    first, before = read_jsonl(file), results(tmp_path)["models"][str(guesser)]
    limits = {"aime24": 12, "amc23": 3}
    assert len(first) == 14
    assert all(row["sampling"]["max_tokens"] == limits[row["benchmark"]] >= row["n_tokens"] for row in first)
    assert before["amc23"]["truncated"] == 1 and before["aime24"]["truncated"] < 1     # a box has more than three tokens
    call(evaluate, *args, '--benchmark_tokens={"amc23": 30, "math500": 8192}')             # AMC is sampled again, AIME is not
    now = results(tmp_path)["models"][str(guesser)]
    assert read_jsonl(file)[:14] == first and {row["benchmark"] for row in read_jsonl(file)[14:]} == {"amc23"}
    assert len(read_jsonl(file)) == 22 and now["aime24"] == before["aime24"] and now["amc23"]["truncated"] < 1
    call(evaluate, *args, '--benchmark_tokens={"amc23": 3}', "--regrade=True")             # the old ones are still there
    assert results(tmp_path)["models"][str(guesser)] == before
    with pytest.raises(evaluate.UserError, match="no response with these settings"):
        call(evaluate, *args, "--max_tokens=13", '--benchmark_tokens={"amc23": 4}', "--regrade=True")


def test_answers_to_another_prompt_are_not_kept(tmp_path, guesser):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=0)
    call(evaluate, *args)
    (file,) = tmp_path.glob("*.responses.jsonl")
    before = read_jsonl(file)
    template = tmp_path / "t.jinja"
    template.write_text("1" + AutoTokenizer.from_pretrained(guesser).chat_template)
    for _ in range(2):                                      # the second time they are there
        call(evaluate, *args, f"--chat_template={template}")
        after = read_jsonl(file)
        assert len(after) == 2 * len(before) and {row["prompt"][0] for row in after} == {"1", before[0]["prompt"][0]}


def test_stop_string_of_a_benchmark(tmp_path, guesser):
    stop = {"amc23": "\\boxed", "math500": "x"}
    call(evaluate, *run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=1), f"--benchmark_stop={stop}")
    rows, s = read_jsonl(next(tmp_path.glob("*.responses.jsonl"))), results(tmp_path)["models"][str(guesser)]
    for row in rows:
        assert (row["benchmark"] == "amc23") == row["response"].endswith("\\boxed") and row["finish_reason"] == "stop"
    assert s["amc23"]["no_box"] == 1 and s["aime24"]["no_box"] < 1 and s["amc23"]["endings"] == {"stop": 8}


def test_answers_the_grader_gave_up_are_counted_by_benchmark(tmp_path, guesser, capsys):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=0)
    call(evaluate, *args)
    assert " given up |" not in capsys.readouterr().out
    (file,) = tmp_path.glob("*.responses.jsonl")
    kinds = {"10": "timeouts", "11": "timeouts", "12": "unparsed"}
    write_jsonl(file, [row | dict(failure=kinds.get(str(row["problem_id"])) if row["benchmark"] == "amc23" else None)
                       for row in read_jsonl(file)])
    call(evaluate, *args)
    s, out = results(tmp_path)["models"][str(guesser)], capsys.readouterr().out
    assert s["aime24"]["given_up"] == {} and s["amc23"]["given_up"] == {"timeouts": 2, "unparsed": 1}
    head, line = (next(line for line in out.splitlines() if word in line) for word in ("| model |", "| amc23 |"))
    assert head.endswith(" given up |") and line.endswith("| 2 timeouts, 1 unparsed |")
    call(evaluate, *args, "--regrade=True")
    assert results(tmp_path)["models"][str(guesser)]["amc23"]["given_up"] == {}


def test_code_end_to_end(tmp_path, guesser, shared):
    """A model of digits writes no program: all wrong, no block; a stored program that is right counts after a regrade."""
    rows = read_jsonl(shared / "data/mbpp_prime.jsonl")[:2]
    write_jsonl(tmp_path / "mbpp.jsonl", rows)
    args = run_args(tmp_path, guesser, data=["mbpp"], samples=2, data_dir=tmp_path, max_prompt_tokens=900)
    call(evaluate, *args)
    (file,), s = tmp_path.glob("*.responses.jsonl"), results(tmp_path)["models"][str(guesser)]["mbpp"]
    assert s["score"]["greedy"][0] == 0 and s["no_box"] == 1 and "maj@2" not in s["score"]
    write_jsonl(file, [row | dict(response=block(rows[0]["code"])) for row in read_jsonl(file)])
    call(evaluate, *args, "--regrade=True")
    s = results(tmp_path)["models"][str(guesser)]["mbpp"]
    assert s["score"]["greedy"][0] == 0.5 and s["score"]["pass@1"][0] == 0.5 and s["no_box"] == 0


def test_long_prompts_count_as_wrong(tmp_path, guesser):
    data = write_jsonl(tmp_path / "p.jsonl", [dict(problem="7" * n, answer="1") for n in (1, 100)])
    call(evaluate, *run_args(tmp_path, guesser, data=[data], samples=0))
    s = results(tmp_path)["models"][str(guesser)]["p"]
    assert s["problems"] == 2 and s["responses"] == 1 and s["score"]["greedy"][0] <= 0.5
    with pytest.raises(evaluate.UserError, match="longer than 1 tokens"):
        call(evaluate, *run_args(tmp_path, guesser, data=[data], max_prompt_tokens=1))
    beyond = write_jsonl(tmp_path / "q.jsonl", [dict(problem="7" * n, answer="1") for n in (1, 600)])      # more than the model's positions
    call(evaluate, *run_args(tmp_path / "q", guesser, data=[beyond], samples=0, max_prompt_tokens=1000, max_tokens=1000))
    rows = read_jsonl(next(tmp_path.glob("q/*.responses.jsonl")))
    assert len(rows) == 1 and all(row["n_tokens"] < 512 for row in rows)


def test_ask(tmp_path, guesser, capsys):
    with pytest.raises(evaluate.UserError, match="longer than 40 tokens"):
        call(evaluate, *run_args(tmp_path / "out", guesser, data=["nothing"], ask="12?"))
    capsys.readouterr()
    call(evaluate, *run_args(tmp_path / "out", guesser, data=["nothing"], ask="12?", max_prompt_tokens=200))
    out = capsys.readouterr().out
    assert out.count("<|im_start|>user\n12?") == 2 and "Present the answer in LaTex format: \\boxed{Your answer}<|im_end|>" in out
    assert "Present the code in \n```python\nYour code\n```\nat the end.<|im_end|>" in out and out.count(" tokens, ") == 2
    assert not list(tmp_path.glob("out/*"))


# ---- contamination ----

def test_overlap_by_hand(tmp_path, capsys):
    copied = "Find the sum of all positive integers $n$ such that n divides 12 and n is even."       # 16 words: 7 10-grams
    half = "Let a b c d e f g h i j k l m n be letters?"    # 17 words: 8 10-grams, of which 4 stand in the training file
    problems = [copied, half, "What is 2+2?", "Another problem of ten or more words, which nobody has seen yet."]
    data = write_jsonl(tmp_path / "b.jsonl", [dict(problem=p, answer="1") for p in problems])
    asked = ["Easy: " + copied.upper().replace("$", ""), " ".join(half.split()[:13]), "what is \\(2 + 2\\) ?", "What is 2+2+2?"]
    train = write_jsonl(tmp_path / "t.jsonl", [dict(messages=[dict(role="user", content=a), dict(role="assistant", content=problems[3])])
                                               for a in asked])
    call(evaluate, f'--benchmarks=["{data}"]', f"--against={train}", f"--out_dir={tmp_path}/out")
    report = json.loads((tmp_path / "out/contamination.json").read_text())
    assert report == {"b": dict(problems=4, found=3, ids={"0": 1.0, "2": 1.0, "1": 0.5})}            # the answer does not count
    assert "3 of 4 problems (75.0%)" in capsys.readouterr().out
    call(evaluate, f'--benchmarks=["{data}"]', f"--against={train}", f"--out_dir={tmp_path}/out", "--overlap=0.6")
    assert json.loads((tmp_path / "out/contamination.json").read_text())["b"]["found"] == 2
    suffixed = [dict(problem=f"{p}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}") for p in problems]      # short ones, too
    call(evaluate, f'--benchmarks=["{data}"]', f"--against={write_jsonl(tmp_path / 's.jsonl', suffixed)}", f"--out_dir={tmp_path}/out")
    assert json.loads((tmp_path / "out/contamination.json").read_text())["b"]["found"] == 4
    assert evaluate.ngrams("求所有正整数的和") != evaluate.ngrams("证明三角形") and evaluate.ngrams("$+$") == set()
    bare = write_jsonl(tmp_path / "bare.jsonl", [dict(text="x")])
    with pytest.raises(evaluate.UserError, match="bare.jsonl line 1 has none of the columns"):
        call(evaluate, f'--benchmarks=["{data}"]', f"--against={bare}", f"--out_dir={tmp_path}/out")


def test_overlap_of_real_files(shared, tmp_path):
    """MATH-500 is part of MATH's 5,000 test problems, and nothing of GSM8K is."""
    call(evaluate, '--benchmarks=["math500", "gsm8k"]', f"--data_dir={shared}/data", f"--against={shared}/data/math_test.jsonl.gz",
         f"--out_dir={tmp_path}", "--overlap=1.0")
    report = json.loads((tmp_path / "contamination.json").read_text())
    assert report["math500"]["found"] >= 499 and report["gsm8k"]["found"] == 0


# ---- mistakes ----

@pytest.mark.parametrize("change, words", [
    (['--benchmarks=["mat500"]'], ["mat500", "did you mean 'math500'"]), (['--models=[]'], ["models"]), (["--greedy=False"], ["greedy"]),
    (['--models=["out/nowhere"]'], ["out/nowhere"]), (['--benchmarks=["leetcode"]'], ["leetcode", "data_dir"]),
    (['--benchmarks=["gsm8k"]', "--data_dir=nowhere"], ["gsm8k_test.jsonl", "nowhere"]), (["--against=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--problem_column=text"], ["text", "--problem_column"]), (['--benchmark_tokens={"mat500": 8192}'], ["unknown", "mat500"]),
    (["--engine=none"], ["engine"]),
])
def test_mistakes(tmp_path, guesser, guess_data, change, words):
    with pytest.raises(evaluate.UserError) as e:
        call(evaluate, f'--models=["{guesser}"]', f'--benchmarks=["{guess_data[1]}"]', f"--out_dir={tmp_path}/out", "--device=cpu", *change)
    assert all(word in str(e.value) for word in words)
    assert not list(tmp_path.glob("out/results*"))


@pytest.mark.parametrize("name, rows, words", [
    ("p", [dict(problem="a", answer="1", id=1), dict(problem="b", answer="2", id=1)], ["'1' stands twice"]),
    ("p", [dict(text="a", answer="1")], ["no column", "problem"]), ("p", [dict(problem="a", gold="1")], ["no column", "answer"]),
    ("p", [dict(problem="a", answer="1"), dict(problem="b", answer="")], ["1 of 2 rows", "p.jsonl line 2"]),
    ("humaneval", [dict(task_id="x", prompt="def f(): pass")], ["humaneval.jsonl line 1", "no row of HumanEval"]),
    ("mbpp", [dict(task_id="x", prompt="f", test_list=[])], ["mbpp.jsonl line 1"]),
    ("humaneval", [dict(task_id="x", prompt="def f(): pass", entry_point="f", test="")], ["1 of 1 rows", "humaneval.jsonl line 1"]),
])
def test_bad_files(tmp_path, guesser, name, rows, words):
    path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(evaluate.UserError) as e:
        call(evaluate, *run_args(tmp_path / "out", guesser, data=[path if name == "p" else name], data_dir=tmp_path))
    assert all(word in str(e.value) for word in words), e.value
    assert not list(tmp_path.glob("out/*"))


def test_two_files_of_one_name(tmp_path, guesser, guess_data):
    other = tmp_path / guess_data[1].name
    shutil.copy(guess_data[1], other)
    with pytest.raises(evaluate.UserError, match="two benchmarks have the same name.*: problems$"):
        call(evaluate, *run_args(tmp_path / "out", guesser, data=[guess_data[1], other]))


def test_no_chat_template(tmp_path, guesser, guess_data):
    model = tmp_path / "model"
    shutil.copytree(guesser, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in about.items() if k != "chat_template"}))
    with pytest.raises(evaluate.UserError, match="no chat template"):
        call(evaluate, *run_args(tmp_path / "out", model, data=[guess_data[1]]))
    assert not list(tmp_path.glob("out/*.json*"))
