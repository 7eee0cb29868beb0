"""Files that nobody wrote on purpose: each is loaded, its bad rows counted and named, or refused.

Files of rows, settings, stored answers and models' folders, out of hypothesis and of a written
corpus. A loader may raise nothing but UserError, whose message names the file.
"""

import contextlib
import gzip
import io
import json
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import evaluate
import generate
import model
import prime
import sft
from configurator import UserError
from lib.answers import read_answers
from lib.pretrained import (
    load_tokenizer,
    model_config,
    positions,
    spread_gpus,
    stop_tokens,
    vocabulary_size,
)
from lib.problems import load_problems, load_sft_rows
from lib.responses import COLUMNS, answer_key

# The same examples in every run.
thorough = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def test_a_message_is_one_line_of_bounded_length(capsys):
    def main():
        raise UserError("a\n" * 10_000)

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


def open_model(path):
    """All that is read of a model's folder."""
    tokenizer = load_tokenizer(path)
    stop_tokens(tokenizer, path)
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


@pytest.mark.parametrize("name", FILES_OF_A_MODEL)
def test_half_of_a_file_of_a_model(init, tmp_path, name):
    if not (init / name).exists():
        pytest.skip("this model has none")
    whole = (init / name).read_bytes()
    attempt(copy_with(init, tmp_path, name, whole[: len(whole) // 2]), open_model)


ODD_VALUES = [None, -1, 0, "x", [], {}, 1e400, True, 10**30, 2.5]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_values_in_the_files_of_a_model(init, tmp_path, name):
    """Each value of the file is in turn replaced by values of other types and sizes."""
    settings_of_file = json.loads((init / name).read_text())
    for key in settings_of_file:
        for number, value in enumerate(ODD_VALUES):
            folder = tmp_path / f"{key}_{number}"
            folder.mkdir()
            content = json.dumps(settings_of_file | {key: value}).encode()
            attempt(copy_with(init, folder, name, content), open_model)


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
