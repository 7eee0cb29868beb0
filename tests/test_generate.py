"""generate.py: resume after a kill, what belongs together, the SFT set, its settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, message, read_jsonl, run, write_jsonl

import generate
from configurator import UserError
from grader import Grader
from lib.answers import read_answers
from lib.own_reward import reward_name
from lib.problems import Problem, load_problems
from lib.responses import judge_columns

SETTINGS = (
    "--system_prompt=",
    "--sft_system_prompt=",
    "--engine=hf",
    "--samples_per_problem=12",
    "--temperature=1.0",
    "--max_tokens=24",
    "--max_prompt_tokens=40",
    "--grade_workers=1",
)


def arguments(guesser, guess_data, out):
    return [f"--model={guesser}", f"--data={guess_data[1]}", f"--out_dir={out}", *SETTINGS]


def last_box(text):
    """The content of the last box, read in another way than the grader's."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return boxes[-1] if boxes else None


def kill_while_it_writes(command, path):
    """Start a command in a process of its own, SIGKILL it as soon as the file grows."""
    before = path.stat().st_size if path.exists() else 0
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    while child.poll() is None and not (path.exists() and path.stat().st_size > before):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()


def by_sample(path):
    return {(row["problem_id"], row["sample"]): row for row in read_jsonl(path)}


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, guesser, guess_data, capsys):
    """At the end every sample is there once and equals the uninterrupted run's."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    path = killed / "samples.jsonl"
    call(generate, *arguments(guesser, guess_data, whole))
    assert "kept" in capsys.readouterr().out

    command = ["generate.py", *arguments(guesser, guess_data, killed)]
    for _ in range(2):
        kill_while_it_writes(command, path)
    with open(path, "ab") as file:
        # What a kill in the middle of a write leaves.
        file.write(b'{"problem_id": 10, "sam')
    run(*command)

    rows = by_sample(path)
    assert len(rows) == len(read_jsonl(path)) == 40 * 12
    assert rows == by_sample(whole / "samples.jsonl")
    for row in rows.values():
        assert row["correct"] == (last_box(row["response"]) == row["ground_truth"])

    # What is learned from.
    sft = read_jsonl(killed / "sft.jsonl")
    good = [row for row in rows.values() if row["correct"] and row["finish_reason"] == "stop"]
    assert 0 < len(sft) == len(good) < len(rows)
    for row in sft:
        user, assistant = row["messages"]
        assert user["role"] == "user"
        assert f"\\boxed{{{row['ground_truth']}}}" in assistant["content"]
    settings = json.loads((killed / "config.json").read_text())["settings"]
    assert settings["max_tokens"] == 24


ROW = {
    "model",
    "asked",
    "sampling",
    "problem",
    "sample",
    "seed",
    "messages",
    "problem_id",
    "ground_truth",
    "response",
    "finish_reason",
    "n_tokens",
    "correct",
    "failure",
}


def test_a_row_and_what_may_not_change(tmp_path, guesser, guess_data):
    args = [*arguments(guesser, guess_data, tmp_path), "--samples_per_problem=2"]
    call(generate, *args)
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len(rows) == 80 and all(set(row) == ROW for row in rows)
    assert rows[0]["sampling"] == dict(temperature=1.0, top_p=1.0, max_tokens=24)

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1].content }}")
    changes = ("--temperature=0.5", "--seed=1", "--system_prompt=brief", "--tir=True")
    for change in (*changes, f"--chat_template={template}"):
        with pytest.raises(UserError, match="out_dir"):
            call(generate, *args, change)

    # More samples are another matter: those that are there are kept.
    call(generate, *args, "--samples_per_problem=3")
    assert len(read_jsonl(tmp_path / "samples.jsonl")) == 120


def test_a_chat_template_of_ones_own(tmp_path, guesser, guess_data, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("Q: {{ messages[-1].content }} A:")
    args = arguments(guesser, guess_data, tmp_path / "out")
    call(
        generate,
        *args,
        f"--chat_template={template}",
        "--samples_per_problem=8",
        "--max_problems=8",
    )
    assert "first prompt:\nQ: 10? A:\n" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert rows[0]["chat_template"] == str(template)


REWARD = '''
def reward(response, problem):
    """Longer is better; twelve characters are enough."""
    return min(1.0, len(response) / problem["enough"])
'''


def test_an_own_reward(tmp_path, guesser, capsys):
    """A row of any ability, without a ground truth; the judge sees its columns."""
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD.replace("enough", "typo"))
    problems = [dict(problem=f"{k}?", ability="prose", enough=10) for k in range(10, 30)]
    data = write_jsonl(tmp_path / "problems.jsonl", problems)
    args = arguments(guesser, (None, data), tmp_path / "out")
    args += ["--samples_per_problem=4", f"--reward={reward}"]
    with pytest.raises(UserError) as error:
        call(generate, *args)
    words = "80 of 80 answers could not be graded (reward: 80): correct the reward and start again"
    assert words in str(error.value)
    assert "80 answers: 0 kept, 0 wrong, 80 given up, 0 not ended" in capsys.readouterr().out

    # The corrected reward grades the answers that are there, and nothing is sampled again.
    path = tmp_path / "out" / "samples.jsonl"
    before = read_jsonl(path)
    reward.write_text(REWARD)
    call(generate, *args)
    said = capsys.readouterr().out
    assert "80 of 80 stored answers are graded again" in said
    assert "80 rows are there, 0 to sample" in said
    assert "no box" not in said
    assert "given up" not in said

    rows = read_jsonl(path)
    assert [row["response"] for row in rows] == [row["response"] for row in before]
    for row in rows:
        assert row["score"] == pytest.approx(min(1.0, len(row["response"]) / 10))
        assert row["correct"] == (row["score"] == 1.0)
        assert row["reward"] == reward_name(reward)
        assert row["failure"] is None
    assert 0 < sum(row["correct"] for row in rows) < 80

    # The same reward a second time has nothing to do.
    call(generate, *args)
    assert "graded again" not in capsys.readouterr().out
    assert read_jsonl(path) == rows


# ----------------------------------------------------------------------------------------------
# stored answers and other rewards

LENGTH = """
def reward(response, problem):
    return float(len(response) >= problem["enough"])
"""


def make_problem(number, own_reward=True):
    columns = dict(problem=f"{number}?", enough=5)
    return Problem(number, f"{number}?", [], "math", "2", row=columns, own_reward=own_reward)


def stored_row(problem, reward=None, **more):
    """A row of samples.jsonl whose response has five characters, and is wrong."""
    row = dict(problem_id=problem.id, problem=problem.text, sample=0, response="seven")
    row |= dict(ground_truth="2", correct=False, failure=None)
    return row | judge_columns(problem, reward) | more


@pytest.fixture
def length(tmp_path):
    path = tmp_path / "length.py"
    path.write_text(LENGTH)
    return str(path)


@pytest.mark.slow
def test_which_stored_answers_are_graded_again(tmp_path, length, capsys):
    judge = reward_name(length)
    problems = [make_problem(number) for number in range(6)]
    rows = [
        stored_row(problems[0], judge),
        stored_row(problems[1], judge, failure="crashes"),
        stored_row(problems[2], "length.py@00000000"),
        stored_row(problems[3], judge, problem_hash="of other columns"),
        stored_row(problems[4]),
        # This run does not have its problem.
        stored_row(make_problem(7), "length.py@00000000"),
    ]
    path = tmp_path / "samples.jsonl"
    with Grader(workers=1, reward=length) as grader:
        generate.grade_stored(rows, problems, grader, judge, str(path))
        assert "4 of 6 stored answers are graded again" in capsys.readouterr().out
        assert [row["correct"] for row in rows] == [False, True, True, True, True, False]
        assert read_jsonl(path) == rows
        assert not list(tmp_path.glob("*.tmp"))

        # Now there is nothing to do, and the file is left alone.
        path.unlink()
        generate.grade_stored(rows, problems, grader, judge, str(path))
        assert not path.exists()

    assert generate.keep_judged(rows, judge) == rows[:5]
    assert "1 answers to other problems are left out" in capsys.readouterr().out


@pytest.mark.slow
def test_back_to_the_built_in_judges(tmp_path, length):
    """Only verdicts of an own reward are replaced; a failure of their own is kept."""
    problems = [make_problem(number, own_reward=False) for number in range(2)]
    rows = [
        stored_row(problems[0], reward_name(length), score=0.0, response="\\boxed{2}"),
        stored_row(problems[1], failure="unparsed"),
    ]
    path = tmp_path / "samples.jsonl"
    with Grader(workers=1) as grader:
        generate.grade_stored(rows, problems, grader, None, str(path))
    assert rows[0] == stored_row(problems[0], response="\\boxed{2}", correct=True)
    assert rows[1] == stored_row(problems[1], failure="unparsed")
    assert generate.keep_judged(rows, None) == rows


def test_the_sft_set(tmp_path, capsys):
    """Kept is what is right, ended by itself and is short enough."""
    good = dict(
        problem_id=1,
        messages=[message("user", "1+1?")],
        response="\\boxed{2}",
        ground_truth="2",
        finish_reason="stop",
        correct=True,
        n_tokens=9,
    )
    rows = [
        good,
        dict(good, n_tokens=10),
        dict(good, n_tokens=11),
        dict(good, finish_reason="length"),
        dict(good, correct=False),
        dict(good, correct=False, response="2"),
    ]
    path = tmp_path / "sft.jsonl"
    generate.write_sft_set(rows, str(path), "Be brief.", 10)
    kept = read_jsonl(path)
    assert len(kept) == 2
    assert kept[0] == dict(
        messages=[
            message("system", "Be brief."),
            message("user", "1+1?"),
            message("assistant", "\\boxed{2}"),
        ],
        ground_truth="2",
        id=1,
    )
    said = capsys.readouterr().out
    assert "6 answers: 2 kept, 1 wrong, 1 no box, 1 not ended, 1 too long" in said

    generate.write_sft_set(rows, str(path), "", 10)
    assert read_jsonl(path)[0]["messages"][0]["role"] == "user"
    with pytest.raises(UserError, match="no answer is right"):
        generate.write_sft_set(rows[4:], str(path), "", 10)

    # Answers that could not be graded are neither wrong nor without a box.
    failed = [dict(row, failure="timeouts") for row in rows[4:]]
    generate.write_sft_set(rows + failed, str(path), "", 10)
    said = capsys.readouterr().out
    assert "8 answers: 2 kept, 1 wrong, 1 no box, 2 given up, 1 not ended, 1 too long" in said
    words = r"2 of 4 answers could not be graded \(timeouts: 2\); none of the others is right"
    with pytest.raises(UserError, match=words):
        generate.write_sft_set(rows[4:] + failed, str(path), "", 10)


@pytest.mark.parametrize("line", ["{", "[1]", "7", "", '{"a": 1}{"a": 1}'])
def test_stored_answers_that_somebody_has_edited(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    good = dict(model="m", problem_id=1, ground_truth="2", response="", finish_reason="stop")
    good = json.dumps(good | dict(n_tokens=1, correct=True))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match="samples.jsonl line 2 is no answer"):
        read_answers(str(path), dict(model="m"))


def test_prompts_that_are_too_long_are_counted(tmp_path, guesser, capsys):
    problems = [dict(problem="1" * n, ground_truth="1") for n in (3, 300)]
    data = write_jsonl(tmp_path / "problems.jsonl", problems)
    with pytest.raises(UserError, match="no answer is right"):
        call(generate, *arguments(guesser, (None, data), tmp_path), "--samples_per_problem=1")
    said = capsys.readouterr().out
    assert "1 problems x 1 samples, 1 problems have more than 40 tokens" in said


@pytest.mark.slow
def test_odd_problems_cost_themselves_only(tmp_path, guesser, capsys):
    """One that stands there twice is asked once; one that cannot be asked is counted."""
    good = [dict(problem=f"{k}?", ground_truth="1", problem_id=k) for k in range(10, 16)]
    odd = [
        dict(problem=[message("user", "1"), message("user", "2")], ground_truth="1"),
        dict(problem="1\ud8002?", ground_truth="2"),
        dict(problem="12?", ground_truth="\ud835"),
        dict(problem="12?", ground_truth=None),
        dict(problem=[message("human", "12?")], ground_truth="1"),
    ]
    template = tmp_path / "turns.jinja"
    template.write_text(
        "{% for m in messages %}{% if not loop.first %}{{ raise_exception('one turn') }}{% endif %}"
        "<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    )
    data = write_jsonl(tmp_path / "p.jsonl", [*odd, *good, *good[:3]])
    settings = [*arguments(guesser, (None, data), tmp_path), f"--chat_template={template}"]
    call(generate, *settings, "--max_bad_share=0.5")
    out = capsys.readouterr().out
    assert "5 of 14 rows skipped" in out and "one turn" in out
    assert "3 problems are duplicates and are asked once" in out

    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len(rows) == len(by_sample(tmp_path / "samples.jsonl")) == 6 * 12
    with pytest.raises(UserError, match="5 of 14 rows skipped"):
        call(generate, *settings)

    # Started again it has nothing to do, with fewer rows only these.
    call(generate, *settings, "--max_bad_share=0.5")
    assert read_jsonl(tmp_path / "samples.jsonl") == rows
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    call(generate, *settings, "--max_bad_share=0.5")
    assert len(by_sample(tmp_path / "samples.jsonl")) == 6 * 12


def test_several_processes_would_do_the_same(tmp_path, guesser, guess_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        call(generate, *arguments(guesser, guess_data, tmp_path))


def test_a_dry_run_samples_nothing(tmp_path, guesser, guess_data, capsys):
    call(generate, *arguments(guesser, guess_data, tmp_path / "out"), "--dry_run=True")
    assert str(guesser) in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


COUNTS = dict(
    gsm8k_test=1319,
    math500=500,
    aime24=30,
    amc_2022_2023=83,
    amc23=40,
    minerva_math=272,
    olympiadbench=675,
)


@pytest.mark.slow
def test_real_files_load(shared):
    for name, count in COUNTS.items():
        assert len(load_problems(shared / "data" / f"{name}.jsonl")) == count
    assert len(load_problems(shared / "data" / "math_test.jsonl.gz")) == 5000


def test_rows_to_learn_from_are_in_the_order_of_the_data():
    """In whatever order the answers were finished."""
    problems = [Problem(number, text, [], "math", "1") for number, text in enumerate("cab")]
    rows = [
        dict(problem=text, problem_id=number, sample=k)
        for k in (1, 0)
        for number, text in [(2, "b"), (9, "z"), (0, "c"), (1, "a")]
    ]
    ordered = generate.in_order_of(problems, rows)
    found = [(row["problem"], row["sample"]) for row in ordered]
    assert found == [(text, k) for text in "cabz" for k in (0, 1)]
