"""Files that nobody wrote on purpose: each is loaded, its bad rows counted and named, or refused.

Files of rows, settings, stored answers and models' folders, out of hypothesis and of a written
corpus. A loader may raise nothing but UserError, whose message names the file.
"""

import contextlib
import datetime
import gzip
import io
import json
import math
import os
import re
import shutil
from decimal import Decimal

import pytest
import torch
import torch.distributed as dist
from conftest import call, read_jsonl, run, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import evaluate
import generate
import model
import prime
import sft
from configurator import UserError
from data.arithmetic import prepare
from grader import Grader
from lib.answers import read_answers
from lib.benchmarks import load_benchmark
from lib.contamination import find_contamination, question
from lib.pretrained import (
    load_tokenizer,
    model_config,
    positions,
    spread_gpus,
    stop_tokens,
    vocabulary_size,
)
from lib.problems import load_problems, load_sft_rows
from lib.report import plot_curves, read_metrics
from lib.responses import COLUMNS, answer_key
from lib.rows import read_rows
from lib.run import keep_lines, make_run_folder, write_run_config
from lib.token_page import choose_rows, write_token_page

# How a script samples with a small model, in a moment.
LAPTOP = ["--engine=hf", "--device=cpu", "--max_tokens=4", "--grade_workers=1"]

# The same examples in every run.
thorough = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def join_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    join_group()
    yield
    dist.destroy_process_group()


@pytest.fixture
def scripts_run():
    """For tests that run a script here: at its end it leaves the process group."""
    yield
    join_group()


@pytest.fixture(scope="module")
def init(world):
    """The folder of a small model."""
    return world / "init"


@pytest.fixture(scope="module")
def tokenizer(init):
    return load_tokenizer(str(init))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def attempt(path, load):
    """What load(path) returns and prints; (None, message) if it raises UserError."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            return load(str(path)), printed.getvalue()
        except UserError as error:
            assert str(path) in str(error)
            return None, str(error)


# ----------------------------------------------------------------------------------------------
# rows


@pytest.fixture(scope="module")
def loaders(tokenizer):
    """The functions that read files of rows, with few demands."""

    def problems(path):
        return load_problems(path, max_bad_share=0.99, tokenizer=tokenizer, vocabulary=500)

    def problems_for_an_own_reward(path):
        return load_problems(path, max_bad_share=0.99, own_reward=True)

    def sft_rows(path):
        return load_sft_rows(
            path,
            "train",
            tokenizer,
            max_length=64,
            overlong="truncate",
            mask_prompt=True,
            mask_output=True,
            max_bad_share=0.99,
        )

    return problems, problems_for_an_own_reward, sft_rows


def check_rows(loaders, path, total=None):
    """Each loader refuses the file, or every row of it is loaded or counted as skipped or dropped.

    total: rows of the file, if that is known.
    """
    for load in loaders:
        rows, said = attempt(path, load)
        if rows is None or total is None:
            continue
        skipped = sum(map(int, re.findall(r"(\d+) of \d+ rows skipped", said)))
        dropped = sum(map(int, re.findall(r"of which (\d+) dropped", said)))
        assert len(rows) + skipped + dropped == total, said
        if skipped:
            assert f"{path} " in said


GOOD = dict(
    problem="1+1?",
    ground_truth="2",
    messages=[dict(role="user", content="1+1?"), dict(role="assistant", content="2")],
)
ODD_TEXTS = ["\ud800", "\0", "\ufeff", "nan", "9" * 5000, "\r\n", "<|im_end|>", "#### 7", "\u2028"]

texts = st.text(max_size=12) | st.sampled_from(ODD_TEXTS)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "x", None, 3]) | texts
messages = st.lists(st.fixed_dictionaries(dict(role=roles, content=values)), max_size=4)
COLUMN_NAMES = ["problem", "prompt", "ground_truth", "answer", "ability", "id", "messages"]
columns = st.sampled_from(COLUMN_NAMES) | texts
abilities = st.sampled_from(["math", "code", "MATH", "x", None]) | values
rows = (
    st.dictionaries(columns, values, max_size=5)
    | st.fixed_dictionaries(
        dict(problem=values | st.just("1+1?"), ground_truth=values | st.just("2")),
        optional=dict(ability=abilities, problem_id=values),
    )
    | st.fixed_dictionaries(dict(messages=messages | values))
    | st.fixed_dictionaries(dict(prompt=messages, reward_model=values))
)


@thorough
@given(table=st.lists(rows | values, max_size=4), with_a_good_one=st.booleans())
def test_rows_of_json(loaders, folder, table, with_a_good_one):
    if with_a_good_one:
        table = [*table, GOOD]
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in table))
    check_rows(loaders, lines, len(table))
    whole = folder / "rows.json"
    whole.write_text(json.dumps(table))
    check_rows(loaders, whole, len(table))


@thorough
@given(table=st.lists(rows, min_size=1, max_size=4), with_a_good_one=st.booleans())
def test_rows_of_arrow(loaders, folder, table, with_a_good_one):
    import pyarrow
    from pyarrow import parquet

    if with_a_good_one:
        table = [*table, GOOD]
    path = folder / "rows.parquet"
    try:
        parquet.write_table(pyarrow.Table.from_pylist(table), path)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        # Arrow's columns have a type each.
        return
    check_rows(loaders, path, parquet.read_metadata(path).num_rows)


LINE = json.dumps(GOOD).encode() + b"\n"
CSV = b'problem,ground_truth,messages\n1+1?,2,x\n"1+2?",3,y\n'
ODD_BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b'"',
    b"\x1a",
    b"\n\n",
    b"\xc2\x85",
]


@thorough
@given(
    blob=st.binary(max_size=20) | st.sampled_from(ODD_BYTES),
    share=st.floats(0, 1),
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt"]),
)
def test_bytes_in_the_middle_of_a_file(loaders, folder, blob, share, kind):
    body = CSV if kind == ".csv" else 3 * LINE
    place = int(share * len(body))
    path = folder / ("bytes" + kind)
    path.write_bytes(body[:place] + blob + body[place:])
    check_rows(loaders, path)


def nested(levels, opened="[", closed="]"):
    return opened * levels + "1" + closed * levels


def line_with(column, value):
    """A good row as a line of JSON, with this text as one of its values."""
    row = {name: given for name, given in GOOD.items() if name != column}
    return json.dumps(row)[:-1] + f', "{column}": {value}}}\n'


@pytest.mark.parametrize("levels", [90, 110, 450, 900, 990, 100_000])
@pytest.mark.parametrize("column", ["problem", "ground_truth", "messages", "problem_id", "other"])
def test_deep_rows(loaders, tmp_path, levels, column):
    """They are counted, whatever column it is; beside them a good row is loaded."""
    for value in (nested(levels), nested(levels, '{"a": ', "}")):
        path = tmp_path / "deep.jsonl"
        path.write_text(line_with(column, value) + LINE.decode())
        check_rows(loaders, path, 2)
        if levels > 100:
            for load in loaders:
                assert len(load(str(path))) == 1


# {what: the bytes of a file, its kind, how many rows of it are good, None if it is refused}
FILES = {
    "empty": (b"", ".jsonl", None),
    "only new lines": (b"\n\r\n\n", ".jsonl", None),
    "UTF-16": (LINE.decode().encode("utf-16"), ".jsonl", None),
    "a list in a file of lines": (json.dumps([GOOD]).encode(), ".jsonl", None),
    "a number": (b"7", ".json", None),
    "an object": (b"{}", ".json", None),
    "half of it": (LINE[:40], ".json", None),
    "Infinity and NaN": (line_with("x", "[Infinity, NaN]").encode(), ".jsonl", 1),
    "a byte order mark": (b"\xef\xbb\xbf" + LINE, ".jsonl", 1),
    "lines of Windows": (LINE.replace(b"\n", b"\r\n") * 2, ".jsonl", 2),
    "bytes that are no UTF-8": (LINE + LINE.replace(b"1+1", b"1\xff1"), ".jsonl", 1),
    "half a surrogate pair": (LINE + LINE.replace(b"1+1", b"1\\ud8001"), ".jsonl", 1),
    "a huge row": (line_with("other", json.dumps("x" * 5_000_000)).encode(), ".jsonl", 1),
    "5,000 digits": (line_with("ground_truth", "9" * 5000).encode(), ".jsonl", 1),
    "the same id twice": (line_with("id", "1").encode() * 2, ".jsonl", 2),
    "a key twice": (LINE + line_with("problem", '"1", "problem": "2"').encode(), ".jsonl", 1),
    "a key twice, in a list": (b'[{"problem": "1", "problem": "2"}]', ".json", None),
    "a truth beyond all floats": (LINE + line_with("ground_truth", "1e400").encode(), ".jsonl", 1),
    "an infinite truth": (LINE + line_with("ground_truth", "-Infinity").encode(), ".jsonl", 1),
    "not gzip": (LINE, ".jsonl.gz", None),
    "half of a gzip": (gzip.compress(LINE * 99)[:60], ".jsonl.gz", None),
    "two columns of one name": (b"problem,problem\n1,2\n", ".csv", None),
    "an open quote": (b'problem,ground_truth\n"1+1?,2\n', ".csv", None),
    "no parquet": (b"PAR1" + bytes(20) + b"PAR1", ".parquet", None),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_problems(loaders, tmp_path, name):
    body, kind, good = FILES[name]
    path = tmp_path / ("problems" + kind)
    path.write_bytes(body)
    found, said = attempt(path, loaders[0])
    if good is None:
        assert found is None, said
    else:
        assert len(found) == good, said


DAY = datetime.datetime(2020, 1, 2, 3, 4)
# {what: (a column of two ground truths as Arrow has it, the texts of those that are good)}
TRUTHS = {
    "whole numbers": ([7, 2**63 - 1], ["7", "9223372036854775807"]),
    "decimals": ([Decimal("1.50"), Decimal("2.00")], ["1.50", "2.00"]),
    "floats": ([0.5, 36.0], ["0.5", "36"]),
    "floats with a gap": ([math.nan, 1.0], ["1"]),
    "infinity": ([math.inf, 1.0], ["1"]),
    "nulls": ([None, "2"], ["2"]),
    "lists": ([["1", None], None], [["1"]]),
    "dicts": ([dict(ground_truth="5", style=None), dict(ground_truth=None, style="x")], ["5"]),
    "bytes": ([b"\xff", b"2"], []),
    "moments": ([DAY, DAY], []),
    "dates": ([DAY.date(), DAY.date()], []),
    "times": ([DAY.time(), DAY.time()], []),
    "durations": ([datetime.timedelta(1), datetime.timedelta(2)], []),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_ground_truths_of_arrow(tmp_path, name):
    """What is no answer when it is written as a text is a bad row."""
    import pyarrow
    from pyarrow import parquet

    column, good = TRUTHS[name]
    path = tmp_path / "problems.parquet"
    table = pyarrow.table(dict(problem=["1?", "2?"], ground_truth=column))
    parquet.write_table(table, path)
    found, said = attempt(path, lambda where: load_problems(where, max_bad_share=0.99))
    assert [problem.ground_truth for problem in found or []] == good
    if len(good) < 2:
        assert f"{2 - len(good)} of 2 rows skipped" in said


def test_two_columns_of_one_name_in_a_table_of_arrow(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "problems.parquet"
    columns = [pyarrow.array(["1?"]), pyarrow.array(["2?"]), pyarrow.array(["3"])]
    table = pyarrow.Table.from_arrays(columns, names=["problem", "problem", "ground_truth"])
    parquet.write_table(table, path)
    with pytest.raises(UserError, match="two columns have the same name: problem, problem"):
        load_problems(str(path))


# What a value of a row, a file or a setting can be, where somebody has written something else.
ODD = [None, True, -1, 10**400, 1.5, math.inf, "", "x", "\ud800", "a\0b", [], {}, [7], {"a": 1}]

QUESTION = dict(problem="1+1?", answer="2", id="a")
HUMANEVAL = dict(entry_point="f", prompt="def f():\n", test="def check(f): pass", task_id="t")
MBPP = dict(text="?", test_list=["assert f()"], test_imports=[], test_setup_code="", task_id=1)
LEETCODE = dict(prompt_sft="?", test="assert f()", meta=dict(level="easy"), task_id=1)
# {benchmark: (the name of its file, a row, more columns that it may have)}
BENCHMARK_ROWS = {
    "math500": ("math500", QUESTION, ["subject", "level"]),
    "olympiadbench": ("olympiadbench", QUESTION, ["error"]),
    "amc": ("amc_2022_2023", QUESTION, ["url"]),
    "humaneval": ("humaneval", HUMANEVAL, []),
    "mbpp": ("mbpp_prime", MBPP, []),
    "leetcode": ("leetcode_sample", LEETCODE, []),
}


@pytest.mark.parametrize("name", BENCHMARK_ROWS)
def test_rows_of_benchmarks(tmp_path, name):
    """Of a benchmark each row counts: an odd one is loaded, or its file is refused."""
    stem, row, more = BENCHMARK_ROWS[name]
    path = tmp_path / f"{stem}.jsonl"
    for column in [*row, *more]:
        for value in ODD:
            write_jsonl(path, [row | {column: value}])
            found, said = attempt(path, lambda _: load_benchmark(name, data_dir=str(tmp_path)))
            assert found is None or len(found) == 1, said


@pytest.mark.parametrize("error", ["1e999", math.inf, -0.5, "-1", [0.1], {"a": 1}, 10**400, "x"])
def test_tolerances_that_there_are_not(tmp_path, error):
    path = write_jsonl(tmp_path / "olympiadbench.jsonl", [QUESTION | dict(error=error)])
    found, said = attempt(path, lambda _: load_benchmark("olympiadbench", data_dir=str(tmp_path)))
    assert found is None
    assert "problem a" in said


def test_golds_of_a_published_script(tmp_path):
    """A gold belongs to the problem of its id, whatever type both have; all else is refused."""
    write_jsonl(tmp_path / "math500.jsonl", [QUESTION | dict(id=7)])
    path = tmp_path / "golds.jsonl"
    options = dict(data_dir=str(tmp_path), golds_file=str(path))

    write_jsonl(path, [dict(unique_id=7, expected_answer=3.0)])
    assert load_benchmark("math500", **options)[0].published_gold == "3"
    for value in ODD:
        other = dict(unique_id=value, expected_answer="5")
        write_jsonl(path, [other, dict(unique_id="7", expected_answer="3")])
        found, _ = attempt(path, lambda _: load_benchmark("math500", **options))
        assert found[0].published_gold == "3"

        write_jsonl(path, [dict(unique_id="7", expected_answer=value)])
        found, _ = attempt(path, lambda _: load_benchmark("math500", **options))
        assert found is None or found[0].published_gold == str(value)


@pytest.mark.parametrize("column", ["messages", "problem"])
def test_training_files_to_compare_with(tmp_path, column):
    path = tmp_path / "training.jsonl"
    for value in [*ODD, [turn("user", None)], [dict(role="user")], [dict(content="x")], [[1]]]:
        write_jsonl(path, [{column: value}])
        attempt(path, lambda where: find_contamination({}, read_rows(where), 0.5))


def test_the_same_messages_as_dicts_and_as_lists():
    talk = [turn("user", "one two"), turn("assistant", "three")]
    lists = dict(role=["user", "assistant"], content=["one two", "three"])
    assert question("line 1", dict(messages=talk)) == "one two"
    assert question("line 1", dict(messages=lists)) == "one two"


def turn(role, content="x"):
    return dict(role=role, content=content)


TALKS = {
    "nothing": [],
    "nobody answers": [turn("user")],
    "nobody asks": [turn("assistant")],
    "a role that there is not": [turn("user"), turn("bot")],
    "no content": [turn("user"), turn("assistant", None)],
    "parts of a content": [turn("user"), turn("assistant", [dict(type="text", text="x")])],
    "no role": [dict(content="x"), turn("assistant")],
    "a text": "1+1?",
    "a number": 7,
    "null": None,
    "half a surrogate pair": [turn("user"), turn("assistant", "\ud800")],
}


@pytest.mark.parametrize("name", TALKS)
def test_conversations_that_teach_nothing(loaders, tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict(messages=TALKS[name])) + "\n" + LINE.decode())
    found, said = attempt(path, loaders[2])
    assert len(found) == 1
    assert f"1 of 2 rows skipped (unusable messages): {path} line 1: " in said


# ----------------------------------------------------------------------------------------------
# settings

SCRIPTS = [prime, sft, generate, evaluate]
ODD_SETTINGS = [
    "seed = 'x'",
    "seed = 1\0",
    "x" * 10_000,
    "(" * 1000,
    "seed = " + "9" * 5000,
    "seed = -" * 500 + "1",
    "\ufeffseed = 1",
    "import os",
    "seed = __import__('os')",
    "seed = seed",
    "seed = 1e999",
    "out_dir = '\\ud800'",
    "out_dir = 'a\\0b'",
    "def f(): pass",
]


@thorough
@given(
    text=st.text(max_size=30) | st.sampled_from(ODD_SETTINGS),
    end=st.binary(max_size=6),
    script=st.sampled_from(SCRIPTS),
)
def test_settings(folder, text, end, script):
    """Every setting keeps the type of its default, or one line says what is wrong."""
    path = folder / "config.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass") + end)
    for argument in (str(path), f"--{text}", f"--seed={text}", f"--out_dir={text}"):
        before = vars(script).copy()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                new = configurator.configure(before, [argument])
        except UserError as error:
            assert "config.py" in str(error) or "command line" in str(error)
            continue
        assert isinstance(new["seed"], (int, type(None)))
        assert isinstance(new["out_dir"], (str, type(None)))
        assert "\0" not in (new["out_dir"] or "")


SETTINGS_TEXTS = [
    "None",
    "[None]",
    "[7]",
    "[[]]",
    "{7: 5}",
    "{'a': None}",
    "{'a': 'b\\0'}",
    "['\\ud800']",
    "'x'",
    "nan",
    "-1",
    "0",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "[" * 150,
    "-" * 100_000 + "1",
    "()",
    "1j",
    "b'x'",
]


@pytest.mark.parametrize("script", [*SCRIPTS, prepare], ids=lambda script: script.__name__)
def test_every_setting_with_odd_values(script):
    """A script takes what can be written to its config.json, or says in a line what is wrong."""
    before = configurator.values(vars(script))
    for name in before:
        for text in SETTINGS_TEXTS:
            # As configurator.run() does, with what the script itself checks before it begins.
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    new = configurator.configure(vars(script), [f"--{name}={text}"])
                configurator._check_numbers(before, new)
                script.check_settings()
            except UserError as error:
                assert str(error)
            else:
                assert json.loads(json.dumps(new)).keys() == before.keys()
            finally:
                vars(script).update(before)


CONFIG_FILES = {
    "a number of 5,000 digits": ("seed = 10 ** 5000", "c.py:1: seed: a whole number of more than"),
    "many levels": ("seed = " + "-" * 100_000 + "1", "c.py: an expression has too many levels"),
    "many terms": ("seed = 1" + " + 1" * 50_000, "c.py: an expression has too many levels"),
    "many dots": ("seed = seed" + ".a" * 50_000, "c.py: an expression has too many levels"),
    "None for a list": ("models = None", "models=None: a value like"),
    "None in a list": ("models = ['a', None]", "c.py:1: models: has None in a list"),
    "a NUL in a list": ("benchmarks = ['a\\0b']", "c.py:1: benchmarks: has a NUL at 1"),
    "a NUL in a dict": ("parity_golds = {'a': '\\0'}", "c.py:1: parity_golds: has a NUL at 0"),
    "a benchmark's number": ("sampled_benchmarks = [7]", "unknown benchmarks: 7"),
    "a list for a benchmark": ("sampled_benchmarks = [[]]", "unknown benchmarks: []"),
    "a file that is none": ("parity_golds = {'math500': 7}", "parity_golds of math500 is 7"),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_odd_config_files(tmp_path, name):
    text, words = CONFIG_FILES[name]
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as said:
        run_with(evaluate, evaluate.check_settings, str(path))
    assert ended.value.code == 2
    assert words in said.getvalue()
    assert said.getvalue().count("\n") == 1


def run_with(script, main, *argv):
    """configurator.run() of a script with another main(), and then its settings as before."""
    before = configurator.values(vars(script))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script.py", *argv])
        # A test that made a process group in this process has named it rank 0.
        patch.delenv("RANK", raising=False)
        try:
            configurator.run(main, vars(script))
        finally:
            vars(script).update(before)


def test_a_config_file_that_begins_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "c.py"
    path.write_bytes(b"\xef\xbb\xbfseed = 5\r\n")
    assert configurator.configure(vars(sft).copy(), [str(path)])["seed"] == 5


def test_paths_of_bytes_that_are_no_text(init, tmp_path):
    """Rows, reports and charts can have them; a folder for models is refused at once."""
    problems = os.fsencode(tmp_path) + b"/odd $x \xff.jsonl"
    with open(problems, "wb") as file:
        file.write(LINE)
    benchmark = os.fsdecode(problems)
    out_dir = os.fsdecode(os.fsencode(tmp_path) + b"/out \xff")
    # On the command line a list is Python's text of it.
    listed = f"--benchmarks={[benchmark]!r}"
    run("evaluate.py", *LAPTOP, f"--models=['{init}']", listed, f"--out_dir={out_dir}")
    for name in ("results.md", "results.json", "results.png"):
        assert os.path.getsize(os.path.join(out_dir, name))
    with pytest.raises(UserError, match="no model can be written"):
        make_run_folder(out_dir, "model")
    write_run_config(out_dir, dict(out_dir=out_dir))
    with open(os.path.join(out_dir, "config.json"), encoding="utf-8") as file:
        assert json.load(file)["settings"]["out_dir"] == out_dir


def test_a_message_is_one_line_of_bounded_length(capsys, monkeypatch):
    def main():
        raise UserError("a\n" * 10_000)

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        configurator.run(main, {"__file__": __file__, "__doc__": ""})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2100


# ----------------------------------------------------------------------------------------------
# stored answers

ANSWER = dict(
    model="m",
    asked=["", 0],
    sampling=dict(temperature=1.0),
    problem="p",
    sample=0,
    seed=1,
    messages=[],
    problem_id="a",
    ground_truth="2",
    response="x",
    finish_reason="stop",
    n_tokens=3,
    correct=True,
    failure=None,
    benchmark="b",
    prompt="p",
    mode="m",
)


def read_stored(path):
    return [answer_key(row) for row in read_answers(path, {}, COLUMNS)]


@thorough
@given(column=st.sampled_from(list(ANSWER)), value=values, blob=st.binary(max_size=8))
def test_stored_answers(folder, column, value, blob):
    path = folder / "stored.jsonl"
    path.write_text(json.dumps(ANSWER | {column: value}) + "\n")
    found, _ = attempt(path, read_stored)
    assert found is None or len(found) == 1
    line = json.dumps(ANSWER).encode()
    path.write_bytes(line[:100] + blob + line[100:] + b"\n")
    attempt(path, read_stored)


# A row that is right, so that what else it says is used.
RIGHT = dict(correct=True, finish_reason="stop", failure=None)


@pytest.mark.parametrize("script", [generate, evaluate], ids=lambda script: script.__name__)
def test_a_run_goes_on_after_odd_rows(scripts_run, init, tmp_path, script):
    """The row that somebody has edited is taken, sampled anew, or its line is named.

    A number becomes one that a float cannot hold, all else an object.
    """
    problems = write_jsonl(tmp_path / "problems.jsonl", [GOOD])
    argv = [*LAPTOP, f"--out_dir={tmp_path}"]
    if script is generate:
        argv += [f"--model={init}", f"--data={problems}", "--system_prompt="]
        argv += ["--samples_per_problem=1", "--sft_system_prompt="]
    else:
        argv += [f"--models=['{init}']", f"--benchmarks=['{problems}']"]
    # generate.py ends with an error: a model that has learned nothing is never right.
    with contextlib.suppress(UserError):
        call(script, *argv)
    name = "samples.jsonl" if script is generate else "*.responses.jsonl"
    stored = next(tmp_path.glob(name))
    row = read_jsonl(stored)[0]

    for column in [*row, "score", "reward", "problem_hash", "parity"]:
        value = 10**400 if type(row.get(column)) is int else dict(a=1)
        write_jsonl(stored, [row | RIGHT | {column: value}])
        try:
            call(script, *argv)
        except UserError as error:
            assert f"{stored} " in str(error) or "no answer is right" in str(error)


# ----------------------------------------------------------------------------------------------
# what a run has written


def test_a_config_of_an_earlier_run_with_another_content(tmp_path):
    path = tmp_path / "config.json"
    contents = [*CONTENTS.values(), b'{"settings": 7}', b'{"settings": [1]}', b'{"settings": null}']
    for content in contents:
        path.write_bytes(content)
        write_run_config(str(tmp_path), dict(seed=5))
        assert json.loads(path.read_text())["settings"] == dict(seed=5)


METRICS = dict(step=0, outcome=0.5, mine=1.0, seconds=dict(total=1.0))


@pytest.mark.parametrize("column", METRICS)
def test_metrics_that_somebody_has_edited(tmp_path, column):
    """Rows without a step are named when a run goes on; a run's end still draws its curves."""
    path = tmp_path / "metrics.jsonl"
    for value in [*ODD, [None], [[1]], math.nan]:
        write_jsonl(path, [METRICS | {column: value}, METRICS | dict(step=1)])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            keep_lines(str(path), 5)
        rows = read_jsonl(path)
        assert (
            len(rows) == 2
            or "lines that are no rows are dropped: 1" in said.getvalue()
            or (
                # It says that it is of a step that is still to come, or of none.
                column == "step" and isinstance(value, (int, float))
            )
        )
        table = read_metrics(str(path))
        assert table["outcome"].iloc[-1] == 0.5
        assert table.dtypes.map(str).eq("float64").all()
    plot_curves(str(path), str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size


SAMPLE = dict(
    step=0,
    problem="1+1?",
    ground_truth="2",
    response="ab",
    outcome=1.0,
    finish_reason="stop",
    tokens=[1, 2],
    token_texts=["a", "b"],
    mask=[1, 0],
    first_wrong=None,
    process_rewards=[0.0, 1.0],
    prm_logprobs=[-1.0, -1.0],
    ref_logprobs=[-1.0, -1.0],
    returns=[1.0, 1.0],
    advantages=[1.0, -1.0],
)


@pytest.mark.parametrize("column", SAMPLE)
def test_pages_of_odd_samples(tmp_path, column):
    """A page shows the row or says that there is one that it cannot show."""
    path = tmp_path / "samples.jsonl"
    page = tmp_path / "tokens.html"
    values_of_two = [["x", "y"], [None, None], [10**400, 1], [[1], [2]], [5e-324, 0], [True, 1e308]]
    for value in [*ODD, *values_of_two]:
        write_jsonl(path, [SAMPLE | {column: value}, SAMPLE])
        rows, notes = choose_rows(str(path))
        assert len(rows) == 2 or "1 lines of the file are no answers" in " ".join(notes)
        write_token_page(str(path), str(page))
        write_jsonl(path, [SAMPLE | {column: value}])
        attempt(path, lambda where: write_token_page(where, str(page)))


# ----------------------------------------------------------------------------------------------
# own rewards

REWARDS = {
    "empty": (b"", "has no function"),
    "UTF-16": ("def reward(a, b): return 1.0".encode("utf-16"), "SyntaxError"),
    "a number": (b"reward = 5", "has no function"),
    "many levels": (b"x = " + b"-" * 100_000 + b"1", "MemoryError"),
    "a process that ends": (b"import os; os._exit(0)", "ended the process"),
    "a long message": (b"raise Exception('a\\nb' * 5000)", "line 1: Exception: a b"),
    "half a character": (b"raise Exception('\\ud800')", "line 1: Exception"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_files_that_are_no_rewards(tmp_path, name):
    content, words = REWARDS[name]
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    found, said = attempt(path, lambda where: Grader(workers=1, reward=where))
    assert found is None
    assert words in said
    assert "\n" not in said


# ----------------------------------------------------------------------------------------------
# models' folders

CONTENTS = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "object": b"{}",
    "deep": b"[" * 100_000,
    "UTF-16": "{}".encode("utf-16"),
    "zeros": bytes(50),
}
FILES_OF_A_MODEL = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def open_end_tokens(path):
    """What is read of a model's folder before its weights are."""
    return stop_tokens(load_tokenizer(path), path)


def open_model(path):
    """All that is read of a model's folder."""
    open_end_tokens(path)
    for function in (model_config, positions, vocabulary_size):
        function(path)
    spread_gpus(path, 4)
    return model.load_model(path, device=torch.device("cpu"), dtype=torch.float32, trained=False)


def copy_with(init, tmp_path, name, content):
    """A copy of a model's folder in which a file has another content."""
    copy = tmp_path / "copy"
    shutil.copytree(init, copy)
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FILES_OF_A_MODEL)
def test_a_file_of_a_model_with_another_content(init, tmp_path, name, content):
    attempt(copy_with(init, tmp_path, name, CONTENTS[content]), open_model)


def test_half_of_a_file_of_a_model(init, tmp_path):
    for path in sorted(init.iterdir()):
        folder = tmp_path / f"without half of {path.name}"
        folder.mkdir()
        half = path.read_bytes()[: path.stat().st_size // 2]
        attempt(copy_with(init, folder, path.name, half), open_model)


def odd_headers(whole):
    """Files of weights: {what: bytes}, with other lengths, types, shapes and places."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    changed = {}
    for key in ("dtype", "shape", "data_offsets"):
        for value in [None, "x", [], {}, [-1, -1], ["a", "b"], "F64", [2**62, 2**62], [0, 4]]:
            other = header | {first: header[first] | {key: value}}
            text = json.dumps(other).encode()
            name = f"{key} {value}"
            changed[name] = len(text).to_bytes(8, "little") + text + whole[8 + size :]
    for length in (0, 5, 2**63, 2**64 - 1):
        changed[f"length {length}"] = length.to_bytes(8, "little") + whole[8:]
    changed["cut"] = whole[:-1]
    changed["longer"] = whole + b"\0"
    return changed


def test_weights_with_odd_headers(init, tmp_path):
    copy = copy_with(init, tmp_path, "model.safetensors", b"")
    whole = (init / "model.safetensors").read_bytes()
    for name, content in odd_headers(whole).items():
        (copy / "model.safetensors").write_bytes(content)
        found, _ = attempt(copy, open_model)
        assert found is None, name


def test_indices_of_weights_that_name_no_files(init, tmp_path):
    copy = copy_with(init, tmp_path, "config.json", (init / "config.json").read_bytes())
    (copy / "model.safetensors").unlink()
    names = [5, None, [], "", ".", "../x", "a\0b", "\ud800", "x" * 5000, "config.json"]
    maps = [None, [], {}, "x", *({"lm_head.weight": name} for name in names)]
    for weight_map in maps:
        text = json.dumps(dict(weight_map=weight_map))
        (copy / "model.safetensors.index.json").write_text(text)
        found, _ = attempt(copy, open_model)
        assert found is None, weight_map


def places(value, place=()):
    """The keys that lead to the first few values at each level of JSON."""
    pairs = []
    if isinstance(value, dict):
        pairs = list(value.items())[:8]
    elif isinstance(value, list):
        pairs = list(enumerate(value))[:2]
    for key, inner in pairs:
        yield (*place, key)
        yield from places(inner, (*place, key))


def replaced(value, place, new):
    """JSON with another value at a place."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = replaced(copy[place[0]], place[1:], new)
    return copy


def test_values_inside_of_a_tokenizer(init, tmp_path):
    copy = copy_with(init, tmp_path, "config.json", (init / "config.json").read_bytes())
    whole = json.loads((init / "tokenizer.json").read_text())
    for place in places(whole):
        for value in (None, -1, "x", ["a", "b"]):
            text = json.dumps(replaced(whole, place, value))
            (copy / "tokenizer.json").write_text(text)
            attempt(copy, open_end_tokens)


ODD_VALUES = [None, -1, 0, "x", [], {}, 1e400, True, 10**30, 2.5]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_values_in_the_files_of_a_model(init, tmp_path, name):
    """Each value of the file is in turn replaced by values of other types and sizes."""
    settings_of_file = json.loads((init / name).read_text())
    copy = copy_with(init, tmp_path, name, b"")
    # The weights depend on the first of the three alone.
    load = open_model if name == "config.json" else open_end_tokens
    for key in settings_of_file:
        for value in ODD_VALUES:
            (copy / name).write_text(json.dumps(settings_of_file | {key: value}))
            attempt(copy, load)


TEMPLATES = [
    "{{",
    "{% for %}",
    "{{ raise_exception('no system') }}",
    "{{ undefined_function() }}",
    "",
    "{{ messages[7].content }}",
    '{% include "x" %}',
    "{{ 1/0 }}",
    "{{" * 5000,
    "{{ messages }}" * 3,
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_chat_templates(init, tmp_path, template):
    """What a template does not take is a bad row, or the run ends with a line."""
    path = tmp_path / "mine.jinja"
    path.write_text(template)
    tokenizer = load_tokenizer(str(init), str(path))
    rows_path = tmp_path / "rows.jsonl"
    rows_path.write_bytes(LINE)
    found, _ = attempt(rows_path, lambda name: load_problems(name, tokenizer=tokenizer))
    assert found is None or template == "{{ messages }}" * 3


def test_a_chat_template_that_is_no_text(init, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read .*mine.jinja"):
        load_tokenizer(str(init), str(path))


# ----------------------------------------------------------------------------------------------
# checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(init, tmp_path_factory):
    """(a folder with the checkpoints of steps 1 and 2, what they are of)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    net = model.load_model(str(init), device=torch.device("cpu"), dtype=torch.float32)
    trained = dict(policy=(net, model.make_optimizer(net, 1e-3)))
    for step in (1, 2):
        model.save_checkpoint(str(folder), step, trained, dict(step=step), keep=2)
    return folder, trained


@pytest.mark.parametrize("content", [*CONTENTS, "half", "none"])
def test_a_file_of_a_checkpoint_with_another_content(two_checkpoints, tmp_path, content):
    """The one before it is taken."""
    folder, trained = two_checkpoints
    newest = folder / "step_000002"
    for name in sorted(path.name for path in newest.iterdir()):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        path = copy / newest.name / name
        if content == "none":
            path.unlink()
        elif content == "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_bytes(CONTENTS[content])
        found, said = attempt(copy, lambda where: model.load_checkpoint(where, trained))
        if content == "none" and name == "checksums.json":
            # As in a checkpoint of before there were any.
            assert found == (2, dict(step=2))
            continue
        assert found == (1, dict(step=1)), (name, said)
        assert "step_000002" in said
