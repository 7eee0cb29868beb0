"""Rewards of one's own: a file with `reward(response, problem) -> float`, in the grader's pool."""

import csv
import datetime
import os
import sys
import time

import pytest

from configurator import UserError
from grader import Grader
from lib.own_reward import hash_columns, reward_name
from lib.problems import Problem
from lib.responses import grade_again, judge_columns, stored_judge

# One function that does whatever its response says.
MISCHIEF = '''
import os
import signal
import subprocess
import sys
import time

print("printed while it is imported")


def reward(response, problem):
    """What the response says."""
    if response == "hang":
        time.sleep(1000)
    if response == "sys.exit":
        sys.exit(3)
    if response == "os._exit":
        os._exit(0)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    if response == "recurse":
        return reward(response, problem)
    if response == "print":
        print("[1.0, null, false]")
        print("seen on stderr", file=sys.stderr)
        sys.stdout.flush()
        os.write(1, b"more noise")
        return 1
    if response == "read":
        own = sys.stdin.read()
        program = subprocess.run(["cat"], capture_output=True, text=True)
        return own == "" and program.stdout == ""
    if response == "fork":
        os.fork()
        return 1
    if response.startswith("return "):
        return eval(response.removeprefix("return "))
    return float(response == problem["wanted"])
'''


@pytest.fixture
def write(tmp_path):
    """Writes a reward file, and returns its path."""

    def write_file(text, name="my_reward.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


@pytest.fixture(scope="module")
def mischief(tmp_path_factory):
    """A pool with a reward that does what it is told."""
    path = tmp_path_factory.mktemp("mischief") / "my_reward.py"
    path.write_text(MISCHIEF)
    with Grader(workers=1, timeout=3, memory_mb=200, reward=str(path)) as pool:
        yield pool


def grade_one(pool, response, **problem):
    problem = {"wanted": "good"} | problem
    return pool.submit(response, problem).result()


# ----------------------------------------------------------------------------------------------
# what it is for

OWN_REWARD = '''
"""Right if the answer names the capital; half of it if it is in lower case."""

import re


def reward(response: str, problem: dict) -> float:
    answer = re.sub(r".*:", "", response).strip()
    if answer == problem["capital"]:
        return 1.0
    if answer.lower() == problem["capital"].lower():
        return float(problem["credit"])
    return 0.0
'''
OWN_DATA = "country,capital,credit\nFrance,Paris,0.5\nPeru,Lima,0.25\nChad,N'Djamena,0.5\n"


def test_own_data_and_own_reward(write, tmp_path):
    """Rows with columns of one's own are judged by these columns."""
    (tmp_path / "capitals.csv").write_text(OWN_DATA)
    with open(tmp_path / "capitals.csv") as file:
        problems = list(csv.DictReader(file))
    responses = ["The capital is: Paris", "It is: lima", "I do not know"]
    with Grader(workers=2, reward=write(OWN_REWARD)) as pool:
        scores = pool.grade(responses, problems)
    assert scores == [1.0, 0.25, 0.0]
    assert [score.failure for score in scores] == [None, None, None]
    assert not pool.failures


@pytest.mark.slow
def test_it_can_build_on_the_grader(write):
    """A shorter answer gets more; mathematics and programs are the reward's to grade as well."""
    path = write("""
from grader import grade_math

def reward(response, problem):
    right = grade_math(response, problem["ground_truth"])
    return right / (1 + response.count("wait"))
""")
    with Grader(workers=1, reward=path) as pool:
        reference = {"ability": "math", "ground_truth": "1/2"}
        responses = [r"\boxed{0.5}", r"wait ... \boxed{0.5}", r"\boxed{2}"]
        assert pool.grade(responses, [reference] * 3) == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_it_may_import_files_of_its_folder_and_read_files_of_the_run(write, tmp_path, monkeypatch):
    write("FACTOR = 0.5", "my_helper.py")
    write("import my_helper\ndef reward(r, p): return my_helper.FACTOR * len(open('words').read())")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "words").write_text("x")
    monkeypatch.chdir(tmp_path / "run")
    with Grader(workers=1, reward="../my_reward.py") as pool:
        assert grade_one(pool, "x") == 0.5


@pytest.mark.slow
def test_a_relative_path_is_that_of_the_start(write, tmp_path, monkeypatch):
    write("def reward(response, problem): return 1")
    monkeypatch.chdir(tmp_path)
    with Grader(workers=1, reward="my_reward.py") as pool:
        monkeypatch.chdir("/")
        assert grade_one(pool, "x") == 1.0


@pytest.mark.slow
def test_it_is_imported_once_per_child(write, tmp_path):
    log = tmp_path / "log"
    path = write(f"""
with open({str(log)!r}, "a") as file:
    file.write("imported ")

def reward(response, problem):
    return 1
""")
    with Grader(workers=1, reward=path) as pool:
        assert pool.grade(["x"] * 5, [{}] * 5) == [1.0] * 5
    assert log.read_text() == "imported "


@pytest.mark.slow
def test_importing_may_take_longer_than_an_item(write):
    path = write("import time\ntime.sleep(1.5)\ndef reward(response, problem): return 1")
    with Grader(workers=2, timeout=0.5, reward=path) as pool:
        scores = pool.grade(["x"] * 4, [{}] * 4)
    assert scores == [1.0] * 4


@pytest.mark.slow
def test_the_problem_arrives_with_all_that_json_can_hold(write):
    path = write("""
import datetime

def reward(response, problem):
    wanted = {"n": 1, "list": [1, None, "é"], "day": "2024-01-02", "array": [1, 2]}
    return problem == wanted
""")

    class Array:
        def tolist(self):
            return [1, 2]

    day = datetime.date(2024, 1, 2)
    problem = {"n": 1, "list": [1, None, "é"], "day": day, "array": Array()}
    with Grader(workers=1, reward=path) as pool:
        assert pool.submit("x", problem).result() == 1.0


# ----------------------------------------------------------------------------------------------
# what it returns


@pytest.mark.parametrize(
    "value, score",
    [
        ("1", 1.0),
        ("0", 0.0),
        ("0.25", 0.25),
        ("True", 1.0),
        ("__import__('numpy').float32(0.5)", 0.5),
        ("__import__('numpy').int64(1)", 1.0),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
    ],
)
def test_numbers_from_0_to_1(mischief, value, score):
    result = grade_one(mischief, f"return {value}")
    assert result == score
    assert result.failure is None


@pytest.mark.parametrize("value", ["None", "1.5", "-1", "float('nan')", "'1'", "1j", "[1]"])
def test_all_else_is_a_failure(mischief, value, capsys):
    result = grade_one(mischief, f"return {value}")
    assert result == 0.0
    assert result.failure == "reward"
    assert "not a number from 0 to 1" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# what it does wrong


@pytest.mark.parametrize(
    "response, failure, message",
    [
        ("return 1 / 0", "reward", "ZeroDivisionError: division by zero"),
        ("return problem['nothing']", "reward", "KeyError: 'nothing'"),
        ("sys.exit", "reward", "SystemExit: 3"),
        ("recurse", "reward", "RecursionError"),
        # These cost a process each.
        pytest.param("eat", "reward", "MemoryError", marks=pytest.mark.slow),
        pytest.param("os._exit", "crashes", "reward ended its process", marks=pytest.mark.slow),
        pytest.param("kill", "crashes", "reward ended its process", marks=pytest.mark.slow),
        pytest.param(
            "hang", "timeouts", "reward did not return within 3 seconds", marks=pytest.mark.slow
        ),
    ],
)
def test_failures_are_counted_and_cost_no_other(mischief, response, failure, message, capsys):
    mischief.complaints.clear()
    before = mischief.failures[failure]
    result = grade_one(mischief, response)
    assert result == 0.0
    assert result.failure == failure
    assert mischief.failures[failure] == before + 1
    assert grade_one(mischief, "good") == 1.0

    line = capsys.readouterr().err
    assert line.startswith("reward: ")
    assert line.count("\n") == 1
    assert "my_reward.py" in line
    assert message in line


@pytest.mark.slow
def test_a_process_that_somebody_else_ends_costs_nothing(write, tmp_path):
    """The first call is killed; the answer is graded by a new process."""
    path = write(
        "import os, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "def reward(response, problem):\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return 0.5\n"
    )
    with Grader(workers=1, reward=path) as pool:
        assert pool.grade(["a"] * 3, [{}] * 3) == [0.5] * 3
        assert pool.crashes == 0


@pytest.mark.slow
def test_a_message_names_the_line_and_is_printed_once(write, capsys):
    path = write("def reward(response, problem):\n\n    return {}[response]\n")
    with Grader(workers=2, reward=path) as pool:
        scores = pool.grade(["a"] * 10 + ["b"], [{}] * 11)
    assert scores == [0.0] * 11
    assert pool.failures == {"reward": 11}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        f"reward: {path}, line 3: KeyError: 'a'",
        f"reward: {path}, line 3: KeyError: 'b'",
    ]


@pytest.mark.slow
def test_a_message_names_the_users_file_where_none_of_its_lines_has_run(write, capsys):
    path = write("def reward(response):\n    return 1\n")
    with Grader(workers=1, reward=path) as pool:
        assert pool.grade(["a"], [{}]) == [0.0]
    line = capsys.readouterr().err
    assert line.startswith(f"reward: {path}: TypeError: reward() takes 1 positional argument")


@pytest.mark.slow
def test_messages_that_differ_each_time_come_to_an_end(write, capsys):
    path = write("def reward(response, problem):\n    return {}[response]\n")
    with Grader(workers=1, reward=path) as pool:
        pool.grade([str(k) for k in range(50)], [{}] * 50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "reward: other messages like these are not shown"


@pytest.mark.parametrize("response", ["print", "read", "fork"])
def test_what_it_prints_reads_or_forks_does_not_disturb_the_pool(mischief, response):
    for _ in range(3):
        assert grade_one(mischief, response) == 1.0
        assert grade_one(mischief, "bad") == 0.0
        assert grade_one(mischief, "good") == 1.0


@pytest.mark.slow
def test_its_standard_error_can_be_seen_and_its_output_cannot(write, capfd):
    with Grader(workers=1, reward=write(MISCHIEF)) as pool:
        assert grade_one(pool, "print") == 1.0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "seen on stderr\n"


@pytest.mark.slow
def test_a_hanging_reward_costs_its_own_deadline_only(write):
    path = write(MISCHIEF)
    responses = ["good"] * 50
    responses[10] = "hang"
    responses[20] = "kill"
    with Grader(workers=2, timeout=2, reward=path) as pool:
        start = time.time()
        scores = pool.grade(responses, [{"wanted": "good"}] * 50)
    assert scores == [float(response == "good") for response in responses]
    assert pool.failures == {"timeouts": 1, "crashes": 1}
    assert time.time() - start < 30


# ----------------------------------------------------------------------------------------------
# mistakes that end a run before it begins


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, message",
    [
        ("def reward(:", r"my_reward\.py, line 1: SyntaxError"),
        ("x = 1\n1 / 0", r"my_reward\.py, line 2: ZeroDivisionError"),
        ("import no_such_module", r"line 1: ModuleNotFoundError: .*no_such_module"),
        ("import sys\nsys.exit(0)", r"line 2: SystemExit"),
        ("import os\nos._exit(0)", "importing it ended the process"),
        ("def rewards(r, p): return 1", r"my_reward\.py has no function reward"),
        ("reward = 1", r"my_reward\.py has no function reward"),
    ],
)
def test_a_file_that_cannot_be_used(write, text, message):
    with pytest.raises(UserError, match=message) as error:
        Grader(workers=1, reward=write(text))
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file .*nothing\.py"):
        Grader(workers=1, reward=str(tmp_path / "nothing.py"))


@pytest.mark.slow
def test_a_file_that_takes_for_ever_to_import(write, monkeypatch):
    monkeypatch.setattr("grader.LOAD_SECONDS", 1)
    path = write("import time\ntime.sleep(1000)")
    with pytest.raises(UserError, match="importing it took more than 1 seconds"):
        Grader(workers=1, reward=path)


@pytest.mark.slow
def test_the_file_is_not_imported_into_this_process(write):
    path = write("import sys\nsys.here = 1\ndef reward(response, problem): return 1")
    with Grader(workers=1, reward=path):
        assert not hasattr(sys, "here")
        assert os.path.dirname(path) not in sys.path


# ----------------------------------------------------------------------------------------------
# what stored verdicts rest on


def test_an_edited_file_has_another_name(write, tmp_path, monkeypatch):
    path = write("def reward(response, problem): return 1")
    first = reward_name(path)
    name, _, digest = first.partition("@")
    assert name == "my_reward.py"
    assert len(digest) == 8
    assert reward_name(None) is None

    # However the file is named.
    monkeypatch.chdir(tmp_path)
    assert reward_name("my_reward.py") == reward_name("./my_reward.py") == first
    write("def reward(response, problem): return 0")
    assert reward_name(path) != first


def test_the_hash_of_a_problem_changes_with_its_columns_only():
    row = dict(problem="1?", weight=1, day=datetime.date(2024, 1, 2))
    assert hash_columns(row) == hash_columns(dict(reversed(row.items())))
    assert hash_columns(row) != hash_columns(row | dict(weight=2))


@pytest.mark.slow
def test_a_file_that_is_edited_at_once_is_not_taken_from_its_bytecode(write):
    for value in ("0.25", "0.75"):
        path = write(f"def reward(response, problem): return {value}")
        with Grader(workers=1, reward=path) as pool:
            assert pool.grade(["x"], [{}]) == [float(value)]


@pytest.mark.slow
def test_a_new_verdict_says_what_it_rests_on(write):
    path = write("def reward(response, problem): return problem['weight']")
    columns = dict(problem="1?", weight=0.5)
    problem = Problem(1, "1?", [], "prose", "2", row=columns, own_reward=True)
    row = dict(response="x", correct=True, ground_truth="1", failure="reward")
    assert stored_judge(row) == judge_columns(problem, None) == {}
    with Grader(workers=1, reward=path) as pool:
        grade_again([(row, problem)], pool, reward_name(path))
    assert row == dict(
        response="x",
        correct=False,
        ground_truth="2",
        failure=None,
        score=0.5,
        reward=reward_name(path),
        problem_hash=hash_columns(columns),
    )
    assert stored_judge(row) == judge_columns(problem, reward_name(path))
