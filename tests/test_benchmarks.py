"""lib/benchmarks.py and lib/contamination.py, and the published protocols in config/eval_*.py."""

import gzip
import hashlib
import json
import math
import re
import statistics

import pandas
import pytest
from conftest import ROOT, call, read_jsonl, write_jsonl

import evaluate
import grader
from configurator import UserError
from lib import contamination
from lib.benchmarks import BENCHMARKS, code_row, load_benchmark, short_name

MATHS = []
for name in BENCHMARKS:
    if BENCHMARKS[name].rules != "code":
        # It has 5,000 problems.
        marks = [pytest.mark.slow] if name == "math" else []
        MATHS.append(pytest.param(name, marks=marks))


@pytest.fixture
def data_dir(shared):
    return str(shared / "data")


def config(name):
    """The settings in a file of config/."""
    scope = {}
    exec((ROOT / "config" / f"{name}.py").read_text(), scope)
    return {key: value for key, value in scope.items() if not key.startswith("_")}


def block(code):
    return f"So:\n```python\n{code}\n```\n"


# ----------------------------------------------------------------------------------------------
# benchmark files


@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_files_have_the_published_counts(data_dir, name, capsys):
    problems = load_benchmark(name, data_dir=data_dir)
    assert len({str(problem.id) for problem in problems}) == len(problems)

    # The file has a sample of LeetCode's 180.
    expected = 15 if name == "leetcode" else BENCHMARKS[name].count
    assert len(problems) == expected
    said = "180 are published" in capsys.readouterr().out
    assert said == (name == "leetcode")

    if name in ("math", "math500"):
        groups = set()
        for problem in problems:
            groups |= set(problem.group)
        levels = {group for group in groups if group.startswith("level")}
        assert len(levels) == 5
        assert len(groups - levels) == 7


@pytest.mark.parametrize("name", MATHS)
def test_golds_as_responses_are_right(data_dir, name):
    problems = load_benchmark(name, data_dir=data_dir)
    wrong = []
    for problem in problems:
        gold = grader.golds(problem.ground_truth)[0]
        if not grader.grade_math(f"We find $\\boxed{{{gold}}}$.", problem.ground_truth):
            wrong.append(problem.id)
        assert not grader.grade_math("", problem.ground_truth)
    assert len(wrong) <= 0.002 * len(problems), wrong


def test_golds_of_the_competitions(data_dir):
    golds = {}
    for problem in load_benchmark("amc", data_dir=data_dir):
        golds[problem.id] = problem.ground_truth

    # They are 36.0 in the file.
    assert all(re.fullmatch(r"-?\d+", gold) for gold in golds.values())
    assert {"-4", "-1", "8178", "1296", "3159", "1625"} <= set(golds.values())
    assert grader.grade_math(r"\boxed{025}", "25")
    assert not grader.grade_math(r"\boxed{1003}", "3")
    assert sum(number.startswith("2023") for number in golds) == 40


def test_files_and_names(tmp_path):
    rows = []
    for i in range(3):
        rows.append(dict(problem=f"{i}?", answer=str(i), level="Level 2", type="Algebra"))
    with gzip.open(tmp_path / "math500.jsonl.gz", "wt") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")

    problems = load_benchmark(
        "math500",
        data_dir=str(tmp_path),
        user_suffix="!",
        system_prompt="Think.",
        max_problems=2,
    )
    assert [problem.ground_truth for problem in problems] == ["0", "1"]
    assert [message["content"] for message in problems[0].messages] == ["Think.", "0?!"]
    assert problems[0].group == ["type Algebra", "level 2"]

    path = write_jsonl(tmp_path / "mine.jsonl", [dict(q="1+1?", a="2", id="x")])
    problems = load_benchmark(str(path), problem_column="q", answer_column="a")
    assert problems[0].id == "x"
    assert problems[0].ground_truth == "2"
    assert short_name(str(path)) == "mine"
    assert short_name("my/problems.jsonl.gz") == "problems"


def test_the_same_benchmark_as_a_table(tmp_path):
    """A .parquet file has None where a row has no such key."""
    first = dict(task_id=1, text="Write f.", test_list=["assert f(1) == 2"])
    second = dict(first, task_id=2, test_imports=["import math"], level=math.nan)
    pandas.DataFrame([first, second]).to_parquet(tmp_path / "mbpp_prime.parquet")
    problems = load_benchmark("mbpp", data_dir=str(tmp_path))
    tests = [problem.ground_truth for problem in problems]
    assert tests == [["\nassert f(1) == 2"], ["import math\n\nassert f(1) == 2"]]
    assert [problem.group for problem in problems] == [[], []]


def test_a_tolerance_that_is_no_number(tmp_path):
    row = dict(question="pi?", final_answer=["3.14"], id=7, error="about 0.1")
    write_jsonl(tmp_path / "olympiadbench.jsonl", [row])
    with pytest.raises(UserError, match="problem 7: its error, 'about 0.1', is no number"):
        load_benchmark("olympiadbench", data_dir=str(tmp_path))
    write_jsonl(tmp_path / "olympiadbench.jsonl", [row | dict(error=math.nan)])
    assert load_benchmark("olympiadbench", data_dir=str(tmp_path))[0].tolerance is None


def test_own_reward_takes_any_row(tmp_path):
    """No answer is needed, any ability will do, and the reward sees all columns."""
    row = dict(problem="A poem?", ability="poems", theme="rain")
    path = write_jsonl(tmp_path / "poems.jsonl", [row])
    problem = load_benchmark(str(path), own_reward=True)[0]
    assert problem.ability == "poems"
    assert problem.reference == row
    with pytest.raises(UserError, match="no column"):
        load_benchmark(str(path))


@pytest.mark.slow
def test_code_is_right_as_published_and_wrong_when_changed(data_dir):
    """Also with the helpers of HumanEval. tests/test_grader.py runs more reference solutions."""
    rows = read_jsonl(f"{data_dir}/humaneval.jsonl")
    problems = load_benchmark("humaneval", data_dir=data_dir, code_suffix="In Python.")

    # The checks of 32, 38 and 50 call helpers of the prompt.
    for number in (0, 32, 38, 50):
        row = rows[number]
        problem = problems[number]
        assert problem.id == f"HumanEval/{number}"
        assert problem.ability == "code"
        assert problem.messages[-1]["content"].endswith("In Python.")

        tests = problem.ground_truth
        solution = row["prompt"] + row["canonical_solution"]
        assert grader.grade_code(block(solution), tests) == 1.0
        assert grader.grade_code(block(row["prompt"] + "    return 1"), tests) == 0.0

        # An answer without what comes before the function; 32 and 38 need the helper themselves.
        if number in (0, 50):
            start = row["prompt"].index(f"def {row['entry_point']}")
            bare = row["prompt"][start:] + row["canonical_solution"]
            assert grader.grade_code(block("from typing import *\n" + bare), tests) == 1.0

    row = read_jsonl(f"{data_dir}/mbpp_full.jsonl")[10]
    made = code_row("line 11", row)
    assert row["test_list"][0] in made["prompt"]
    assert grader.grade_code(block(row["code"]), made["ground_truth"]) == 1.0
    wrong = row["code"].replace("return", "return not")
    assert grader.grade_code(block(wrong), made["ground_truth"]) == 0.0


def test_edited_golds_of_the_published_script(data_dir, tmp_path):
    golds = f"{data_dir}/math500_prime_golds.jsonl"
    problems = load_benchmark("math500", data_dir=data_dir, golds_file=golds)
    assert sum(p.published_gold != p.ground_truth for p in problems) == 85

    golds = write_jsonl(tmp_path / "golds.jsonl", [dict(unique_id="x", expected_answer="1")])
    with pytest.raises(UserError, match="golds.jsonl: no row has the unique_id"):
        load_benchmark("math500", data_dir=data_dir, golds_file=str(golds))


# ----------------------------------------------------------------------------------------------
# published protocols


@pytest.mark.parametrize("name", ["eval_eurus2", "eval_intellect_math"])
def test_decoding_is_the_published_one(name):
    """PRIME's scripts: 8,192 tokens for MATH-500, 4,096 for the others.

    And a stop string for MATH-500 and AIME.
    """
    settings = config(name)
    decoded = {}
    for benchmark in settings["benchmarks"]:
        decoded[benchmark] = evaluate.decoding(
            benchmark,
            settings["max_tokens"],
            settings["benchmark_tokens"],
            settings["benchmark_stop"],
            tool=None,
        )
    stop = "\n###\nProblem: "
    assert decoded == {
        "math500": dict(max_tokens=8192, stop=stop),
        "aime24": dict(max_tokens=4096, stop=stop),
        "amc": dict(max_tokens=4096),
        "minerva": dict(max_tokens=4096),
        "olympiadbench": dict(max_tokens=4096),
    }


def impossible_numbers(published):
    """(column, number[, mean]) of those that are no count of right answers, rounded, or no mean."""
    wrong = []
    for column, numbers in published.items():
        own = [value for key, value in numbers.items() if key in BENCHMARKS]
        for key, value in numbers.items():
            if key == "average":
                continue
            n = BENCHMARKS[key.split()[0]].count
            nearest = min(abs(value - 100 * right / n) for right in range(n + 1))
            if nearest >= 0.0501:
                wrong.append((column, value))
        mean = statistics.mean(own)
        if abs(numbers.get("average", mean) - mean) > 0.101:
            wrong.append((column, numbers["average"], round(mean, 1)))
    return wrong


@pytest.mark.parametrize(
    "name, count", [("eval_eurus2", 4), ("eval_intellect_math", 3), ("eval_numina", 0)]
)
def test_notes_name_the_published_numbers_that_cannot_be_right(name, count):
    settings = config(name)
    notes = settings.get("published_notes", [])
    wrong = impossible_numbers(settings["published"])
    assert len(notes) == len(wrong) == count
    for note, numbers in zip(notes, wrong):
        for number in numbers:
            assert str(number) in note


def test_prompts_are_the_published_ones():
    def digest(text):
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    asked = config("eval_eurus2")["system_prompt"]
    assert len(asked) == 414
    assert "\n" not in asked

    # The system message of Eurus-2-RL-Data.
    assert digest(asked.replace(r"\n", "\n") + "\n") == "7053563ec2998c97"
    assert digest(config("eval_intellect_math")["system_prompt"]) == "c020b67348d5cb45"


# ----------------------------------------------------------------------------------------------
# contamination


# 16 words: 7 10-grams.
COPIED = "Find the sum of all positive integers $n$ such that n divides 12 and n is even."
# 17 words: 8 10-grams, of which 4 occur in the training file.
HALF = "Let a b c d e f g h i j k l m n be letters?"
SHORT = "What is 2+2?"
UNSEEN = "Another problem of ten or more words, which nobody has seen yet."


def train_rows(asked, answer="1"):
    rows = []
    for text in asked:
        user = dict(role="user", content=text)
        rows.append(dict(messages=[user, dict(role="assistant", content=answer)]))
    return rows


def test_overlap_by_hand(tmp_path, capsys):
    rows = [dict(problem=text, answer="1") for text in (COPIED, HALF, SHORT, UNSEEN)]
    data = write_jsonl(tmp_path / "b.jsonl", rows)

    def found_in(name, rows, *more):
        train = write_jsonl(tmp_path / name, rows)
        settings = [f"--against={train}", f"--out_dir={tmp_path}/out", *more]
        call(evaluate, f'--benchmarks=["{data}"]', *settings)
        return json.loads((tmp_path / "out/contamination.json").read_text())["b"]

    # The answer does not count.
    asked = [
        "Easy: " + COPIED.upper().replace("$", ""),
        " ".join(HALF.split()[:13]),
        "what is \\(2 + 2\\) ?",
        "What is 2+2+2?",
    ]
    train = train_rows(asked, answer=UNSEEN)
    expected = dict(problems=4, found=3, ids={"0": 1.0, "2": 1.0, "1": 0.5})
    assert found_in("t.jsonl", train) == expected
    assert "3 of 4 problems (75.0%)" in capsys.readouterr().out
    assert found_in("t.jsonl", train, "--overlap=0.6")["found"] == 2

    # A suffix hides nothing, of short problems neither.
    suffix = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
    suffixed = [dict(problem=row["problem"] + suffix) for row in rows]
    assert found_in("s.jsonl", suffixed)["found"] == 4

    with pytest.raises(UserError, match="bare.jsonl line 1 has none of the columns"):
        found_in("bare.jsonl", [dict(text="x")])


def test_ngrams_of_other_scripts_and_of_nothing():
    chinese = contamination.ngrams("求所有正整数的和")
    assert chinese
    assert chinese != contamination.ngrams("证明三角形")
    assert contamination.ngrams("$+$") == set()


@pytest.mark.slow
def test_overlap_of_real_files(data_dir, tmp_path):
    """MATH-500 is part of MATH's 5,000 test problems, and nothing of GSM8K is."""
    call(
        evaluate,
        '--benchmarks=["math500", "gsm8k"]',
        f"--data_dir={data_dir}",
        f"--against={data_dir}/math_test.jsonl.gz",
        f"--out_dir={tmp_path}",
        "--overlap=1.0",
    )
    report = json.loads((tmp_path / "contamination.json").read_text())
    assert report["math500"]["found"] >= 499
    assert report["gsm8k"]["found"] == 0
