"""evaluate.py: the published scripts' rules, whole runs on small models, resume, mistakes."""

import gzip
import json
import math
import re
import shutil
import statistics
import time

import pytest
import torch
from conftest import ROOT, call, read_jsonl, torchrun, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import evaluate
import grader
from configurator import UserError
from lib import scores
from lib.benchmarks import load_benchmark
from lib.problems import Problem
from lib.responses import ResponseFile


@pytest.fixture
def data_dir(shared):
    return str(shared / "data")


# ----------------------------------------------------------------------------------------------
# the published scripts' rules

SECOND = "The final answer is $3$."
SAID = "so the final answer is $x$. I hope it is correct."


@pytest.mark.parametrize(
    "response, rules, benchmark, answer",
    [
        (r"so \boxed{3}.", "prime", "math500", "3"),
        (rf"\boxed{{3}} Final Answer: {SECOND}", "prime", "math500", SECOND),
        (r"\boxed{3} The answer is: 4", "prime", "math500", "4"),
        (r"\boxed{3} The answer is: 4", "prime", "aime24", "3"),
        ("The final answer is 36. I hope it is correct.", "prime", "aime24", "36"),
        ("", "prime", "amc", ""),
        ("Answer: 4", "prime", "amc", "4"),
        ("Answer:\n\\boxed{4}", "prime", "math500", "4"),
        (rf"\boxed{{3}} {SAID}", "qwen", None, "x"),
        (r"\boxed{3} or 4", "qwen", None, "3"),
        ("first 5, then 6 left", "qwen", None, "6"),
        ("nothing", "qwen", None, ""),
    ],
)
def test_answers_as_the_published_scripts_take_them(response, rules, benchmark, answer):
    assert evaluate.published_answer(response, rules, benchmark) == answer


def test_published_rules_on_real_responses(data_dir):
    """Verdicts of a harness of the same family as Qwen2.5-Math's.

    As its project published them with its responses.
    """
    rows = []
    with gzip.open(f"{data_dir}/grader/real_math.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if row["origin"].startswith("microsoft/rho"):
                rows.append(row)

    agree = 0
    for row in rows:
        answer = evaluate.published_answer(row["response"], "qwen")
        verdict = grader.is_equiv(answer, row["gold"], parity=True)
        agree += verdict == row["harness_score"]
    assert len(rows) == 1088
    assert agree / len(rows) > 0.985


def verdicts(name, problems, responses):
    """(correct, parity, answer) of (problem number, response) pairs, as a regrade gives them."""
    pairs = []
    for number, response in responses:
        problem = problems[number]
        row = dict(benchmark=name, problem_id=problem.id, response=response, correct=False)
        pairs.append((row, problem))
    with grader.Grader(workers=1) as judge:
        evaluate.grade_again(pairs, judge, reward=None)
        evaluate.add_answers(pairs, judge, parity=True)
    return [(row["correct"], row["parity"], row["answer"]) for row, _ in pairs]


@pytest.mark.slow
def test_tolerance_of_olympiadbench(data_dir):
    rows = read_jsonl(f"{data_dir}/olympiadbench.jsonl")
    with_error = [number for number, row in enumerate(rows) if row["error"]]
    problems = load_benchmark("olympiadbench", data_dir=data_dir)

    # The first has the answer 4.2 and the error 0.1.
    answers = ["4.1", "4.3", r"4.3 \%", "4.35", "5", r"\frac{21}{5}"]
    responses = [(with_error[0], f"\\boxed{{{answer}}}") for answer in answers]
    graded = verdicts("olympiadbench", problems, responses)
    assert [correct for correct, _, _ in graded] == [True, True, True, False, False, True]
    assert graded[3][2] == "4.35"


@pytest.mark.slow
def test_parity_and_strict_differ_on_minerva(data_dir):
    """The published script cannot read a power of ten where the gold is 4.5e33."""
    problems = load_benchmark("minerva", data_dir=data_dir)
    golds = [grader.golds(problem.ground_truth)[0] for problem in problems]
    assert sum(bool(re.search(r"\de[-+]?\d", gold)) for gold in golds) == 58

    is_power = [re.fullmatch(r"\d\.\d+e\d+", gold) is not None for gold in golds]
    number = is_power.index(True)
    mantissa, exponent = golds[number].split("e")
    responses = [
        (number, f"\\boxed{{{mantissa} \\times 10^{{{exponent}}}}}"),
        (number, f"\\boxed{{{golds[number]}}}"),
        (number, "no box but 7"),
    ]
    graded = verdicts("minerva", problems, responses)
    assert [verdict[:2] for verdict in graded] == [(1, 0), (1, 1), (0, 0)]


@pytest.mark.slow
def test_parity_and_strict_differ_on_olympiadbench(data_dir):
    """The published script takes a hundredfold, and the last number where there is no box."""
    problems = load_benchmark("olympiadbench", data_dir=data_dir)
    assert problems[0].ground_truth == ["2"]
    responses = [(0, r"\boxed{200}"), (0, "so we get 2"), (0, r"\boxed{3}")]
    graded = verdicts("olympiadbench", problems, responses)
    assert [verdict[:2] for verdict in graded] == [(0, 1), (0, 1), (0, 0)]


def test_parity_and_strict_differ_on_math500(data_dir, tmp_path):
    """The published script has other golds, and loses a box that stands before "Answer: "."""
    first = read_jsonl(f"{data_dir}/math500.jsonl")[0]
    edited = dict(unique_id=first["unique_id"], expected_answer="1000")
    golds = write_jsonl(tmp_path / "golds.jsonl", [edited])
    problems = load_benchmark("math500", data_dir=data_dir, golds_file=str(golds))
    responses = [
        (0, r"\boxed{1000}"),
        (0, r"\boxed{(3, \pi/2)}"),
        (2, r"\boxed{14/3}. Answer: none"),
    ]
    graded = verdicts("math500", problems, responses)
    assert [verdict[:2] for verdict in graded] == [(0, 1), (1, 0), (1, 0)]


# The judge's process, in which the answer HANG takes for ever.
HANGING = """
import sys
sys.path.insert(0, {root!r})
import grader

honest_judge = grader.judge


def judge(answer, *rest):
    while answer == "HANG":
        pass
    return honest_judge(answer, *rest)


grader.judge = judge
grader.end_with_parent()
grader.serve(grader.answer_task)
"""


@pytest.mark.slow
def test_no_answer_holds_up_an_evaluation(tmp_path, monkeypatch):
    """What is compared after the grading, by their rules and in a vote, has a deadline as well."""
    child = tmp_path / "child.py"
    child.write_text(HANGING.format(root=str(ROOT)))
    monkeypatch.setattr(grader, "CHILD_FILE", str(child))
    problem = Problem(1, "1?", [], "math", "50")
    pairs = []
    for answer in ("50", "HANG", "0.5", "7"):
        row = dict(response=f"\\boxed{{{answer}}}", benchmark="aime24", sample=len(pairs))
        row |= dict(problem_id="1", mode="sampled", finish_reason="stop", correct=answer == "50")
        pairs.append((row, problem))

    began = time.monotonic()
    with grader.Grader(workers=2, timeout=1) as judge:
        evaluate.add_answers(pairs, judge, parity=True)
        rows = [row for row, _ in pairs]
        voted = scores.vote(rows, problem, judge.is_equiv)
    assert [row["parity"] for row in rows] == [True, False, True, False]
    assert voted == (True, 0.25)
    assert time.monotonic() - began < 30
    assert not judge.failures


def stored_row(**changes):
    row = dict(benchmark="b", problem_id=1, prompt="1?", mode="greedy", sample=0, sampling={})
    row |= dict(seed=1, ground_truth="2", response="", finish_reason="stop", n_tokens=1)
    return row | dict(correct=True, failure=None) | changes


def test_rows_take_any_text(tmp_path):
    """Half a surrogate pair comes from broken JSON; it has no UTF-8."""
    file = ResponseFile(str(tmp_path), "m")
    rows = []
    for number, text in enumerate(["\ud835", "a\udc00b", "½ \u2028 \0 \\ud835", "x"]):
        row = dict(stored_row(seed=number), prompt=text, ground_truth=[text], problem_id=text)
        rows.append(row)
    file.write(rows)
    assert list(file.read({}).values()) == rows
    # What can be read as it is stays so.
    assert "½" in (tmp_path / "m.responses.jsonl").read_text("utf-8")


@pytest.mark.parametrize(
    "column, value",
    [
        ("response", None),
        ("response", 3),
        ("correct", 5),
        ("correct", "yes"),
        ("correct", math.nan),
        ("n_tokens", math.nan),
        ("n_tokens", -7),
        ("n_tokens", True),
        ("sample", "a"),
        ("prompt", {}),
        ("failure", ["a"]),
        ("score", 5.0),
        ("score", math.nan),
    ],
)
def test_a_number_that_somebody_has_written_into_a_row_reaches_no_report(tmp_path, column, value):
    file = ResponseFile(str(tmp_path), "m")
    file.write([stored_row(), stored_row(seed=2) | {column: value}])
    with pytest.raises(UserError, match=f"m.responses.jsonl line 2 is no answer.*{column} is"):
        file.read({})


@pytest.mark.parametrize("column", sorted(stored_row().keys() - {"failure"}))
def test_a_row_without_a_column_is_no_answer(tmp_path, column):
    file = ResponseFile(str(tmp_path), "m")
    row = stored_row()
    del row[column]
    file.write([row])
    with pytest.raises(UserError, match=f"line 1 is no answer .no {column}.: remove"):
        file.read({})


def test_an_edited_row_answers_no_other_question(tmp_path):
    """Its seed is that of another benchmark, problem or sample."""
    key = evaluate.answer_key(stored_row())
    for change in (dict(benchmark="c"), dict(problem_id=2), dict(sample=1)):
        assert evaluate.answer_key(stored_row(**change)) != key
    assert evaluate.answer_key(stored_row(problem_id="1", response="x")) == key


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "m.responses.jsonl").symlink_to(tmp_path / "nowhere/x")
    with pytest.raises(UserError, match="no answers can be kept in .*m.responses.jsonl"):
        ResponseFile(str(tmp_path), "m").read({})


def test_the_answer_of_a_program_is_the_program():
    response = "```python\nprint(1)\n```\nso \\boxed{5}"
    assert evaluate.find_answer(response, "code") == "print(1)\n"
    assert evaluate.find_answer(response, "math") == "5"
    assert evaluate.find_answer("\\boxed{5}", "code") is None


# ----------------------------------------------------------------------------------------------
# whole runs


def run_args(out, *models, data, **more):
    """A command line with few and short answers."""
    settings = dict(
        models=[str(model) for model in models],
        benchmarks=[str(name) for name in data],
        out_dir=out,
        samples=3,
        temperature=1.0,
        top_p=1.0,
        max_tokens=12,
        max_prompt_tokens=40,
        engine="hf",
        device="cpu",
        grade_workers=1,
    )
    settings |= more
    return [f"--{name}={value}" for name, value in settings.items()]


def read_results(folder):
    """{model: {benchmark: summary}} as a run has written it."""
    return json.loads((folder / "results.json").read_text())["models"]


def summaries_of(folder, model):
    return read_results(folder)[str(model)]


def response_file(folder):
    """The only file of responses in a folder."""
    (path,) = folder.glob("*.responses.jsonl")
    return path


def same_rows(a, b):
    return sorted(a, key=str) == sorted(b, key=str)


def change_rows(path, **changes):
    write_jsonl(path, [row | changes for row in read_jsonl(path)])


@pytest.mark.slow
def test_table_of_two_checkpoints(tmp_path, guesser, guess_data, world, capsys):
    args = run_args(tmp_path, guesser, world / "init", data=[guess_data[1]])
    call(evaluate, *args)
    out = capsys.readouterr().out

    # The rendered prompt of the first problem is printed, and the files are complete.
    assert "<|im_start|>user\n10?<|im_end|>" in out
    assert len(list(tmp_path.glob("*.responses.jsonl"))) == 2
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.rank*"))
    assert not list(tmp_path.glob("*.tmp"))

    # The metrics are those of the rows.
    results = read_results(tmp_path)
    right = {}
    for model in (str(guesser), f"{world}/init"):
        name = model.strip("./").replace("/", "--")
        rows = read_jsonl(tmp_path / f"{name}.responses.jsonl")
        summary = results[model]["problems"]
        assert len(rows) == 40 * 4
        assert summary["problems"] == 40
        for mode, n in (("greedy", 40), ("sampled", 120)):
            correct = sum(row["correct"] for row in rows if row["mode"] == mode)
            assert summary["score"][mode][0] == pytest.approx(correct / n)
        assert summary["tokens"] == pytest.approx(statistics.mean(row["n_tokens"] for row in rows))
        assert f"{100 * summary['score']['sampled'][0]:.1f}" in out
        for row in rows:
            assert row["answer"] == grader.extract_answer(row["response"])
            assert row["prompt"].startswith("<|im_start|>user")
        greedy = [row for row in rows if row["mode"] == "greedy"]
        right[model] = {row["problem_id"] for row in greedy if row["correct"]}

    # The second model is untrained.
    old = results[str(guesser)]["problems"]
    new = results[f"{world}/init"]["problems"]
    assert old["no_box"] < 0.2 < 0.9 < new["no_box"]
    assert new["truncated"] > 0.5 > old["truncated"]

    # It has nothing right, so all that differ are in favour of the first.
    differ = len(right[str(guesser)] ^ right[f"{world}/init"])
    p_value = min(1, 2 * 0.5**differ)
    assert f"p = {p_value:.2g}" in (tmp_path / "results.md").read_text()

    about = json.loads((tmp_path / "results.json").read_text())["about"]
    assert about["settings"]["samples"] == 3
    assert about["torch"]
    assert "10?" in about["first_prompt"]


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path, guesser, guess_data):
    args = run_args(tmp_path, guesser, data=[guess_data[1]])
    call(evaluate, *args)
    first = read_results(tmp_path)
    path = response_file(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]

    # A kill may leave half a line.
    path.write_text("".join(lines[:50]) + lines[50][:20])
    call(evaluate, *args)
    assert same_rows(read_jsonl(path), rows)
    assert read_results(tmp_path) == first

    # Fewer samples are those that are there, cut to k = 1.
    call(evaluate, *args, "--samples=1")
    assert "maj@1" in summaries_of(tmp_path, guesser)["problems"]["score"]
    assert len(read_jsonl(path)) == 160

    # Other prompts are another evaluation.
    with pytest.raises(UserError, match="was started with"):
        call(evaluate, *args, "--user_suffix=x")
    assert same_rows(read_jsonl(path), rows)


@pytest.mark.slow
def test_two_processes_share_the_questions(tmp_path, guesser, guess_data):
    data = [guess_data[1]]
    torchrun(2, "evaluate.py", *run_args(tmp_path / "two", guesser, data=data, samples=2))
    call(evaluate, *run_args(tmp_path / "one", guesser, data=data, samples=2))
    two = read_jsonl(response_file(tmp_path / "two"))
    one = read_jsonl(response_file(tmp_path / "one"))
    assert same_rows(two, one)
    assert len(one) == 120
    assert read_results(tmp_path / "two") == read_results(tmp_path / "one")
    assert not list((tmp_path / "two").glob("*.rank*"))


@pytest.mark.slow
def test_parts_of_a_killed_run_are_taken_up(tmp_path, guesser, guess_data):
    args = run_args(tmp_path, guesser, data=[guess_data[1]], samples=2)
    call(evaluate, *args)
    path = response_file(tmp_path)
    lines = path.read_text().splitlines(keepends=True)

    # 10 of the file's lines are in a part, too, as after a kill between two steps.
    path.write_text("".join(lines[:30]))
    (tmp_path / f"{path.name}.rank0").write_text("".join(lines[20:70]))
    cut = lines[100][:-9]
    (tmp_path / f"{path.name}.rank1").write_text("".join(lines[70:100]) + cut)
    call(evaluate, *args)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    assert not list(tmp_path.glob("*.rank*"))

    change_rows(path, response="spoiled")
    call(evaluate, *args, "--resume=False")
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.slow
def test_old_parts_do_not_come_back(tmp_path, guesser, guess_data):
    """--resume=False: what processes of an older run have left behind is no answer of this one."""
    args = run_args(tmp_path, guesser, data=[guess_data[1]], samples=0)
    call(evaluate, *args)
    path = response_file(tmp_path)
    before = path.read_text()
    old = [row | dict(response="old", correct=True) for row in read_jsonl(path)]
    write_jsonl(tmp_path / f"{path.name}.rank1", old)

    call(evaluate, *args, "--resume=False")
    assert sorted(path.read_text().splitlines()) == sorted(before.splitlines())
    assert not list(tmp_path.glob("*.rank*"))


@pytest.mark.slow
def test_regrade_needs_no_weights(tmp_path, guesser, guess_data, capsys):
    model = tmp_path / "model"
    shutil.copytree(guesser, model)
    args = run_args(tmp_path, model, data=[guess_data[1]], samples=0)
    call(evaluate, *args)
    path = response_file(tmp_path)
    before = read_results(tmp_path)
    rows = read_jsonl(path)
    spoiled = [row | dict(correct=not row["correct"], answer="?") for row in rows]
    write_jsonl(path, spoiled)
    (model / "model.safetensors").unlink()
    call(evaluate, *args, "--regrade=True")
    assert read_results(tmp_path) == before
    assert read_jsonl(path) == [row | dict(failure=None) for row in rows]

    # It does not sample what is missing.
    write_jsonl(path, rows[:30])
    call(evaluate, *args, "--regrade=True")
    assert summaries_of(tmp_path, model)["problems"]["responses"] == 30
    assert len(read_jsonl(path)) == 30
    out = capsys.readouterr().out
    assert "30 of 40 responses are there, problems without one count as wrong" in out

    # Other golds are noticed, and a regrade takes them.
    changed = [row | dict(ground_truth="9") for row in read_jsonl(guess_data[1])]
    other = write_jsonl(tmp_path / guess_data[1].name, changed)
    args = run_args(tmp_path, model, data=[other], samples=0)
    call(evaluate, *args, "--regrade=True")
    assert "30 of them graded by other golds" in capsys.readouterr().out
    assert summaries_of(tmp_path, model)["problems"]["score"]["greedy"][0] == 0

    elsewhere = run_args(tmp_path / "other", model, data=[other], samples=0)
    with pytest.raises(UserError, match="no response with these settings"):
        call(evaluate, *elsewhere, "--regrade=True")


# ----------------------------------------------------------------------------------------------
# own rewards

REWARD = '''
def reward(response, problem):
    """Half of a point for a box, all of it for a box on a problem of weight 1."""
    if "boxed" not in response:
        return 0.0
    return 1.0 if problem["weight"] == 1 else 0.5
'''


@pytest.mark.slow
def test_own_reward(tmp_path, guesser):
    """A row of any ability, without an answer: the file's reward is averaged, 1.0 is right."""
    reward = tmp_path / "my_reward.py"
    reward.write_text(REWARD)
    rows = [dict(problem=f"{k}?", ability="guesses", weight=k % 2, id=k) for k in range(10, 20)]
    data = write_jsonl(tmp_path / "guesses.jsonl", rows)
    args = run_args(tmp_path / "out", guesser, data=[data], reward=reward)
    call(evaluate, *args)

    scores = []
    for row in read_jsonl(response_file(tmp_path / "out")):
        full = 1.0 if row["problem_id"] % 2 else 0.5
        assert row["score"] == (full if "boxed" in row["response"] else 0.0)
        assert row["correct"] == (row["score"] == 1.0)
        if row["mode"] == "sampled":
            scores.append(row["score"])
    summary = summaries_of(tmp_path / "out", guesser)["guesses"]
    assert summary["score"]["sampled"][0] == pytest.approx(statistics.mean(scores))
    assert 0.3 < summary["score"]["sampled"][0] <= 0.75
    assert "maj@3" not in summary["score"]


@pytest.mark.slow
def test_stored_responses_get_the_verdicts_of_another_reward(tmp_path, guesser, capsys):
    rows = [dict(problem=f"{k}?", answer="2", weight=k % 2, id=k) for k in range(10, 20)]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    args = run_args(tmp_path / "out", guesser, data=[data], samples=0)
    call(evaluate, *args)
    before = read_results(tmp_path / "out")
    path = response_file(tmp_path / "out")
    stored = read_jsonl(path)
    capsys.readouterr()

    reward = tmp_path / "my_reward.py"
    reward.write_text(REWARD)
    call(evaluate, *args, f"--reward={reward}")
    out = capsys.readouterr().out
    words = "10 of 10 responses are there, 10 of them graded by other golds, columns or rewards"
    assert words in out
    assert read_jsonl(path) == stored

    call(evaluate, *args, f"--reward={reward}", "--regrade=True")
    scores = [row["score"] for row in read_jsonl(path)]
    assert {0.5, 1.0} <= set(scores)
    mean = summaries_of(tmp_path / "out", guesser)["p"]["score"]["greedy"][0]
    assert mean == pytest.approx(statistics.mean(scores))

    # An edited reward and a problem with another column are noticed, and nothing else is.
    capsys.readouterr()
    call(evaluate, *args, f"--reward={reward}")
    assert "of them graded by" not in capsys.readouterr().out
    reward.write_text(REWARD.replace("0.5", "0.7"))
    call(evaluate, *args, f"--reward={reward}")
    assert ", 10 of them graded by other" in capsys.readouterr().out
    reward.write_text(REWARD)
    write_jsonl(data, [rows[0] | dict(weight=2), *rows[1:]])
    call(evaluate, *args, f"--reward={reward}")
    assert ", 1 of them graded by other" in capsys.readouterr().out

    # And back to the built-in judges.
    call(evaluate, *args, "--regrade=True")
    assert read_results(tmp_path / "out") == before
    assert read_jsonl(path) == stored


# ----------------------------------------------------------------------------------------------
# several benchmarks


@pytest.mark.slow
def test_two_benchmarks_published_numbers_and_groups(tmp_path, guesser, capsys):
    for name, n in (("aime24", 30), ("amc23", 40)):
        rows = []
        for k in range(10, 10 + n):
            rows.append(dict(problem=f"{k}?", answer="2", level=f"Level {k % 2}", id=k))
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    args = run_args(
        tmp_path,
        guesser,
        data=["aime24", "amc23"],
        samples=4,
        data_dir=tmp_path,
        parity=True,
        sampled_benchmarks=["amc23"],
    )
    call(evaluate, *args)
    capsys.readouterr()

    # A count of 40, some two standard errors off: within the noise of two runs.
    mean, error = summaries_of(tmp_path, guesser)["amc23"]["score"]["greedy_parity"]
    near = min(100, 100 * (mean + 1.5 * error) // 2.5 * 2.5 + 2.5)
    card = {"aime24": 99.0, "amc23": near, "amc23 maj@4": 40.0}
    published = {"Card": card, "Other": {"aime24": 10.0}}
    notes = ["Card: 99.0 is no count."]
    call(evaluate, *args, f"--published={published}", f"--published_notes={notes}")
    out = capsys.readouterr().out
    assert re.search(r"aime24: .* against Card as published, beyond the noise", out)
    assert re.search(r"amc23: .* against Card as published, within the noise", out)
    assert "- Card: 99.0 is no count.\n" in out

    summaries = summaries_of(tmp_path, guesser)
    assert set(summaries) == {"aime24", "amc23", "average"}
    aime = summaries["aime24"]
    assert "sampled" not in aime["score"]
    assert summaries["amc23"]["responses"] == 200

    means = []
    errors = []
    for name in ("aime24", "amc23"):
        mean, error = summaries[name]["score"]["greedy"]
        means.append(mean)
        errors.append(error)
    average, error = summaries["average"]["score"]["greedy"]
    assert average == pytest.approx(statistics.mean(means))
    assert error == pytest.approx(math.hypot(*errors) / 2)

    assert list(aime["by_group"]) == ["level 0", "level 1"]
    mean, error, _ = aime["by_group"]["level 0"]
    assert f"| aime24 | level 0 | 15 | {100 * mean:.1f} ± {100 * error:.1f} |\n" in out

    (head,) = [line for line in out.splitlines() if line.startswith("| model")]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "model",
        "benchmark",
        "N",
        "greedy",
        "by their rules",
        "avg@4",
        "pass@2",
        "maj@4",
        "published",
        "published maj@4",
        "tokens",
        "truncated",
        "no box",
    ]


def two_benchmarks(folder):
    """run_args' data and data_dir: 3 problems called AIME and 4 called AMC, whose answers are 2."""
    for name, n in (("aime24", 3), ("amc23", 4)):
        rows = [dict(problem=f"{k}?", answer="2", id=k) for k in range(10, 10 + n)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return dict(data=["aime24", "amc23"], data_dir=folder)


@pytest.mark.slow
def test_decoding_of_each_benchmark_and_resume(tmp_path, guesser):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=1)
    call(evaluate, *args, '--benchmark_tokens={"amc23": 3}')
    path = response_file(tmp_path)
    first = read_jsonl(path)
    before = summaries_of(tmp_path, guesser)
    limits = {"aime24": 12, "amc23": 3}
    assert len(first) == 14
    for row in first:
        assert row["sampling"]["max_tokens"] == limits[row["benchmark"]]
        assert row["n_tokens"] <= limits[row["benchmark"]]

    # A box has more than three tokens.
    assert before["amc23"]["truncated"] == 1
    assert before["aime24"]["truncated"] < 1

    # With another limit AMC is sampled again, AIME is not.
    call(evaluate, *args, '--benchmark_tokens={"amc23": 30, "math500": 8192}')
    now = summaries_of(tmp_path, guesser)
    rows = read_jsonl(path)
    assert rows[:14] == first
    assert {row["benchmark"] for row in rows[14:]} == {"amc23"}
    assert len(rows) == 22
    assert now["aime24"] == before["aime24"]
    assert now["amc23"]["truncated"] < 1

    # The old answers are still there.
    call(evaluate, *args, '--benchmark_tokens={"amc23": 3}', "--regrade=True")
    assert summaries_of(tmp_path, guesser) == before
    others = ["--max_tokens=13", '--benchmark_tokens={"amc23": 4}']
    with pytest.raises(UserError, match="no response with these settings"):
        call(evaluate, *args, *others, "--regrade=True")


@pytest.mark.slow
def test_answers_to_another_prompt_are_not_kept(tmp_path, guesser, capsys):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=0)
    call(evaluate, *args)
    path = response_file(tmp_path)
    before = read_jsonl(path)
    template = tmp_path / "t.jinja"
    template.write_text("1" + AutoTokenizer.from_pretrained(guesser).chat_template)

    # The second time they are there.
    for number in range(2):
        capsys.readouterr()
        call(evaluate, *args, f"--chat_template={template}")
        words = "to other prompts or settings stay in the file)"
        assert (words in capsys.readouterr().out) == (number == 0)
        after = read_jsonl(path)
        assert len(after) == 2 * len(before)
        assert {row["prompt"][0] for row in after} == {"1", before[0]["prompt"][0]}


@pytest.mark.slow
def test_stop_string_of_a_benchmark(tmp_path, guesser):
    stop = {"amc23": "\\boxed", "math500": "x"}
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=1)
    call(evaluate, *args, f"--benchmark_stop={stop}")
    for row in read_jsonl(response_file(tmp_path)):
        cut = row["response"].endswith("\\boxed") and row["finish_reason"] == "stop"
        assert cut == (row["benchmark"] == "amc23")
    summaries = summaries_of(tmp_path, guesser)
    assert summaries["amc23"]["no_box"] == 1
    assert summaries["aime24"]["no_box"] < 1
    assert summaries["amc23"]["endings"] == {"stop": 8}


@pytest.mark.slow
def test_answers_the_grader_gave_up_are_counted_by_benchmark(tmp_path, guesser, capsys):
    args = run_args(tmp_path, guesser, **two_benchmarks(tmp_path), samples=0)
    call(evaluate, *args)
    assert " given up |" not in capsys.readouterr().out

    path = response_file(tmp_path)
    kinds = {"10": "timeouts", "11": "timeouts", "12": "unparsed"}
    rows = read_jsonl(path)
    for row in rows:
        if row["benchmark"] == "amc23":
            row["failure"] = kinds.get(str(row["problem_id"]))
    write_jsonl(path, rows)
    call(evaluate, *args)
    summaries = summaries_of(tmp_path, guesser)
    assert summaries["aime24"]["given_up"] == {}
    assert summaries["amc23"]["given_up"] == {"timeouts": 2, "unparsed": 1}

    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if "| model |" in line]
    (amc,) = [line for line in lines if "| amc23 |" in line]
    assert head.endswith(" given up |")
    assert amc.endswith("| 2 timeouts, 1 unparsed |")

    call(evaluate, *args, "--regrade=True")
    assert summaries_of(tmp_path, guesser)["amc23"]["given_up"] == {}


@pytest.mark.slow
def test_code_end_to_end(tmp_path, guesser, data_dir):
    """A model of digits writes no program: all wrong, no block.

    A stored program that is right counts after a regrade.
    """
    rows = read_jsonl(f"{data_dir}/mbpp_prime.jsonl")[:2]
    write_jsonl(tmp_path / "mbpp.jsonl", rows)
    more = dict(samples=2, data_dir=tmp_path, max_prompt_tokens=900)
    args = run_args(tmp_path, guesser, data=["mbpp"], **more)
    call(evaluate, *args)
    summary = summaries_of(tmp_path, guesser)["mbpp"]
    assert summary["score"]["greedy"][0] == 0
    assert summary["no_box"] == 1
    assert "maj@2" not in summary["score"]

    change_rows(response_file(tmp_path), response=f"So:\n```python\n{rows[0]['code']}\n```\n")
    call(evaluate, *args, "--regrade=True")
    summary = summaries_of(tmp_path, guesser)["mbpp"]
    assert summary["score"]["greedy"][0] == 0.5
    assert summary["score"]["pass@1"][0] == 0.5
    assert summary["no_box"] == 0


@pytest.mark.slow
def test_long_prompts_count_as_wrong(tmp_path, guesser):
    def numbers(name, *lengths):
        rows = [dict(problem="7" * n, answer="1") for n in lengths]
        return write_jsonl(tmp_path / f"{name}.jsonl", rows)

    data = numbers("p", 1, 100)
    call(evaluate, *run_args(tmp_path, guesser, data=[data], samples=0))
    summary = summaries_of(tmp_path, guesser)["p"]
    assert summary["problems"] == 2
    assert summary["responses"] == 1
    assert summary["score"]["greedy"][0] <= 0.5
    with pytest.raises(UserError, match="longer than 1 tokens"):
        call(evaluate, *run_args(tmp_path, guesser, data=[data], max_prompt_tokens=1))

    # The model has 512 positions.
    more = dict(samples=0, max_prompt_tokens=1000, max_tokens=1000)
    call(evaluate, *run_args(tmp_path / "q", guesser, data=[numbers("q", 1, 600)], **more))
    (row,) = read_jsonl(response_file(tmp_path / "q"))
    assert row["n_tokens"] < 512


def test_ask(tmp_path, world, capsys):
    args = run_args(tmp_path / "out", world / "init", data=["nothing"], ask="12?")
    with pytest.raises(UserError, match="longer than 40 tokens"):
        call(evaluate, *args)
    capsys.readouterr()

    call(evaluate, *args, "--max_prompt_tokens=200")
    out = capsys.readouterr().out
    assert out.count("<|im_start|>user\n12?") == 2
    assert "Present the answer in LaTex format: \\boxed{Your answer}<|im_end|>" in out
    code = "Present the code in \n```python\nYour code\n```\nat the end.<|im_end|>"
    assert code in out
    assert out.count(" tokens, ") == 2
    assert not list(tmp_path.glob("out/*"))


# ----------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    "change, words",
    [
        (["--max_tokens=0"], "max_tokens=0: at least 1"),
        (["--samples=-1"], "samples=-1: at least 0"),
        (["--max_problems=0"], "max_problems=0"),
        (["--benchmarks=[]"], "nothing to do"),
        (["--greedy=False", "--samples=2", "--sampled_benchmarks=[]"], "nothing to do"),
        (["--models=['a', 'b', 'a']"], "a model is there twice: a"),
        (["--top_p=0"], "top_p=0.0: more than 0, at most 1"),
        (["--top_p=1.5"], "top_p=1.5"),
        (["--temperature=1e400"], "temperature=inf: a finite number"),
        (["--grade_timeout=0"], "grade_timeout=0.0: at least 0.1"),
        (["--grade_workers=-1"], "grade_workers=-1: at least 0"),
        (["--benchmark_tokens={'math500': 0}"], "benchmark_tokens of math500 is 0: at least 1"),
        (["--benchmark_tokens={'math500': None}"], "benchmark_tokens of math500 is None"),
        (["--benchmark_stop={'math500': ''}"], "benchmark_stop of math500 is ''"),
        (["--published={'a': 5}"], "published of 'a' is 5"),
        (["--published={'a': {'math500': 'x'}}"], "published of math500 in 'a' is 'x'"),
        (["--published={'a': {'math500': 300}}"], "a percentage"),
        (["--ask=\ud800?"], "ask: has half a character"),
        (["--chat_template=nowhere.jinja"], "chat_template: cannot read nowhere.jinja"),
    ],
)
def test_settings_that_cannot_work(tmp_path, world, guess_data, change, words):
    settings = run_args(tmp_path, world / "init", data=["math500"])
    if "chat_template" in change[0]:
        settings = run_args(tmp_path, world / "init", data=[guess_data[1]])
    with pytest.raises(UserError, match=words):
        call(evaluate, *settings, *change)


@pytest.mark.parametrize(
    "change, words",
    [
        (['--benchmarks=["mat500"]'], ["mat500", "did you mean 'math500'"]),
        (["--models=[]"], ["models"]),
        (["--greedy=False"], ["greedy"]),
        (['--models=["out/nowhere"]'], ["out/nowhere"]),
        (['--benchmarks=["leetcode"]'], ["leetcode", "data_dir"]),
        (['--benchmarks=["gsm8k"]', "--data_dir=nowhere"], ["gsm8k_test.jsonl", "nowhere"]),
        (["--against=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--problem_column=text"], ["text", "--problem_column"]),
        (['--benchmark_tokens={"mat500": 8192}'], ["unknown", "mat500"]),
        (["--engine=none"], ["engine"]),
        (["--reward=nowhere.py"], ["nowhere.py"]),
    ],
)
def test_mistakes(tmp_path, world, guess_data, change, words):
    settings = [f'--models=["{world}/init"]', f'--benchmarks=["{guess_data[1]}"]', "--device=cpu"]
    with pytest.raises(UserError) as error:
        call(evaluate, *settings, f"--out_dir={tmp_path}/out", *change)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("out/results*"))


@pytest.mark.parametrize(
    "name, rows, words",
    [
        (
            "p",
            [dict(problem="a", answer="1", id=1), dict(problem="b", answer="2", id=1)],
            ["'1' is there twice"],
        ),
        ("p", [dict(text="a", answer="1")], ["no column", "problem"]),
        ("p", [dict(problem="a", gold="1")], ["no column", "answer"]),
        (
            "p",
            [dict(problem="a", answer="1"), dict(problem="b", answer="")],
            ["1 of 2 rows", "p.jsonl line 2"],
        ),
        (
            "p",
            [dict(problem="a", answer="1"), dict(problem="b", answer="nan")],
            ["1 of 2 rows", "p.jsonl line 2"],
        ),
        (
            "humaneval",
            [dict(task_id="x", prompt="def f(): pass")],
            ["humaneval.jsonl line 1", "no row of HumanEval"],
        ),
        ("mbpp", [dict(task_id="x", prompt="f", test_list=[])], ["mbpp.jsonl line 1"]),
        (
            "humaneval",
            [dict(task_id="x", prompt="def f(): pass", entry_point="f", test="")],
            ["1 of 1 rows", "humaneval.jsonl line 1"],
        ),
    ],
)
def test_bad_files(tmp_path, name, rows, words):
    path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    data = [path] if name == "p" else [name]
    with pytest.raises(UserError) as error:
        call(evaluate, *run_args(tmp_path / "out", "a model", data=data, data_dir=tmp_path))
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("out/*"))


TAKE_TURNS = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must take turns') }}{% endif %}{{ m['content'] }}{% endfor %}"""


def test_a_problem_that_the_model_cannot_be_asked(tmp_path, world):
    """It is named before anything is sampled."""
    rows = [dict(problem=f"{k}?", answer="2", id=k) for k in range(10, 14)]
    rows[2]["problem"] = [dict(role="user", content="1"), dict(role="user", content="2")]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    template = tmp_path / "t.jinja"
    template.write_text(TAKE_TURNS)
    args = run_args(tmp_path / "out", world / "init", data=[data], chat_template=template)
    with pytest.raises(UserError, match="p, problem 12: .*roles must take turns"):
        call(evaluate, *args)
    assert not list(tmp_path.glob("out/*"))


def test_two_files_of_one_name(tmp_path, guess_data):
    other = tmp_path / guess_data[1].name
    shutil.copy(guess_data[1], other)
    args = run_args(tmp_path / "out", "a model", data=[guess_data[1], other])
    with pytest.raises(UserError, match="two benchmarks have the same name: problems$"):
        call(evaluate, *args)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_whose_weights_are_not_finite(tmp_path, world, guess_data, number):
    """It would answer without a word, and get 0.0 ± 3.1."""
    model = tmp_path / "model"
    shutil.copytree(world / "init", model)
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    weights[name].flatten()[7] = number
    save_file(weights, model / "model.safetensors", dict(format="pt"))
    args = run_args(tmp_path / "out", model, data=[guess_data[1]])
    with pytest.raises(UserError, match="not finite") as error:
        call(evaluate, *args)
    assert str(model) in str(error.value)
    assert not list(tmp_path.glob("out/results*"))


@pytest.mark.slow
def test_the_models_before_a_bad_one_are_reported(tmp_path, world, guess_data):
    bad = tmp_path / "bad"
    shutil.copytree(world / "init", bad)
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, bad / "model.safetensors", dict(format="pt"))
    shutil.copytree(world / "init", tmp_path / "last")
    models = [world / "init", bad, tmp_path / "last"]
    settings = run_args(tmp_path / "out", *models, data=[guess_data[1]], samples=0)
    with pytest.raises(UserError, match="not finite"):
        call(evaluate, *settings, "--max_problems=3", "--max_tokens=2")
    assert list(read_results(tmp_path / "out")) == [str(models[0])]
    text = (tmp_path / "out/results.md").read_text()
    assert f"- {bad} is not in this report" in text
    assert f"- {models[2]} is not in this report" in text


def change_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        # transformers would take random numbers for all weights of the other kind.
        (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "lacks .* gpt2 model"),
        (dict(vocab_size=300), "has the shape"),
        (dict(num_attention_heads=0), "no model by its config.json"),
        (dict(hidden_act="zz"), "no model by its config.json: KeyError: 'zz'"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "cannot load .* GPTQ"),
        ({}, "cannot load .* no file named model.safetensors"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, world, guess_data, changes, words):
    model = tmp_path / "model"
    shutil.copytree(world / "init", model)
    change_config(model, **changes)
    if not changes:
        (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=words) as error:
        call(evaluate, *run_args(tmp_path / "out", model, data=[guess_data[1]]))
    assert str(model) in str(error.value)
    assert not list(tmp_path.glob("out/results*"))


def test_weights_that_are_integers(tmp_path, world, guess_data):
    """Somebody has quantized them: transformers would take -3 for a weight."""
    model = tmp_path / "model"
    shutil.copytree(world / "init", model)
    weights = load_file(model / "model.safetensors")
    integers = {name: weight.to(torch.int8) for name, weight in weights.items()}
    save_file(integers, model / "model.safetensors", dict(format="pt"))
    args = run_args(tmp_path / "out", model, data=[guess_data[1]])
    with pytest.raises(UserError, match="26 weights that are integers"):
        call(evaluate, *args)

    # An index that names no file.
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(UserError, match="no index of weights"):
        call(evaluate, *args)


def test_two_models_need_two_files(tmp_path, world, guess_data):
    for name in ("m/a", "m--a"):
        shutil.copytree(world / "init", tmp_path / name)
    models = [tmp_path / "m/a", tmp_path / "m--a"]
    with pytest.raises(UserError, match="would share a file"):
        call(evaluate, *run_args(tmp_path / "out", *models, data=[guess_data[1]]))


def test_no_chat_template(tmp_path, world, guess_data):
    model = tmp_path / "model"
    shutil.copytree(world / "init", model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    about = json.loads((model / "tokenizer_config.json").read_text())
    about.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="no chat template"):
        call(evaluate, *run_args(tmp_path / "out", model, data=[guess_data[1]]))
    assert not list(tmp_path.glob("out/*.json*"))
