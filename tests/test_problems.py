"""lib/problems.py: files of all kinds -> problems; conversations -> tokens and what is scored."""

import csv
import decimal
import gzip
import hashlib
import json
import math
import re
import string

import pandas
import pytest
import torch.distributed as dist
from conftest import ROOT, torchrun, write_jsonl
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from configurator import UserError
from lib.pretrained import load_tokenizer, render_prompt
from lib.problems import check_prompts, load_problems, load_sft_rows, tokenize_messages
from lib.rows import read_rows

# ----------------------------------------------------------------------------------------------
# rows

ROWS = [dict(problem="1+1?", answer="2"), dict(problem="1+2?", answer="3")]


def write_json(path):
    path.write_text(json.dumps(ROWS))


def write_lines(path):
    write_jsonl(path, ROWS)


def write_gzip(path):
    with gzip.open(path, "wt") as file:
        for row in ROWS:
            file.write(json.dumps(row) + "\n")


def write_csv(path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pandas.DataFrame(ROWS).to_parquet(path)


def write_bom(path):
    """As spreadsheets and some editors write, and two such files joined."""
    lines = [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n" for row in ROWS]
    path.write_bytes(b"".join(lines))


def write_json_bom(path):
    path.write_text(json.dumps(ROWS), "utf-8-sig")


def write_folder(path):
    """Two .parquet files, as a hub data set has them in a clone, beside another file."""
    path.mkdir()
    pandas.DataFrame(ROWS[:1]).to_parquet(path / "train-00000-of-00002.parquet")
    pandas.DataFrame(ROWS[1:]).to_parquet(path / "train-00001-of-00002.parquet")
    (path / "README.md").write_text("a data set")


KINDS_OF_FILES = {
    "rows.json": write_json,
    "rows.jsonl": write_lines,
    "rows.jsonl.gz": write_gzip,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "folder": write_folder,
    # Other spellings of the names.
    "rows.JSONL": write_lines,
    "rows.ndjson": write_lines,
    "rows.NDJSON.GZ": write_gzip,
    "rows.Json": write_json,
    "rows.CSV": write_csv,
    "rows.Parquet": write_parquet,
    # Signs that patterns are made of.
    "rows [a-b]*?.jsonl": write_lines,
    "rows [a-b]*?.parquet": write_parquet,
    "folder [0]*": write_folder,
    # Lines under the name of a list.
    "lines.json": write_lines,
    # Byte order marks.
    "bom.jsonl": write_bom,
    "bom.json": write_json_bom,
}


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_kinds_of_files(tmp_path, name):
    path = tmp_path / name
    KINDS_OF_FILES[name](path)
    rows = read_rows(path)
    assert [row for _, row in rows] == ROWS
    assert rows[1][0].startswith(str(path))
    assert load_problems(path)[1].ground_truth == "3"


@pytest.mark.parametrize("name", ["clone", "clone [0]*"])
def test_a_folder_as_the_hub_has_them(tmp_path, name):
    """With the splits in the names of files in another folder."""
    (tmp_path / name / "data").mkdir(parents=True)
    for split, row in zip(("train", "test"), ROWS):
        path = tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"
        pandas.DataFrame([row]).to_parquet(path)
    for split, row in zip(("train", "test"), ROWS):
        assert [found for _, found in read_rows(tmp_path / name, split)] == [row]


def test_where_a_row_stands(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(path) == [(f"{path} line 1", dict(a=1)), (f"{path} line 3", dict(a=2))]

    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"two\nlines"\n3,4\n')
    expected = [
        (f"{path} record 1", dict(a="1", b="two\nlines")),
        (f"{path} record 2", dict(a="3", b="4")),
    ]
    assert read_rows(path) == expected


def csv_of(folder, text, encoding="utf-8"):
    path = folder / "problems.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_csv_records_with_missing_fields_are_counted(tmp_path, capsys):
    path = csv_of(tmp_path, "problem,target\n1?,1\n2?\n3?,3\n4?,4,5\n")
    rows = read_rows(path, max_bad_share=0.5)
    assert [row["problem"] for _, row in rows] == ["1?", "3?"]
    assert "2 of 4 rows skipped (more or fewer fields than the header)" in capsys.readouterr().out


def test_csv_with_blanks_behind_commas(tmp_path):
    rows = read_rows(csv_of(tmp_path, 'problem, target\n"a, b", 1\n'))
    assert [row for _, row in rows] == [dict(problem="a, b", target="1")]


@pytest.mark.parametrize(
    "text, encoding, message",
    [
        ('problem,target\n"1?,1\n2?,2\n', "utf-8", "unexpected end of data"),
        ("problem,problem\n1?,1\n", "utf-8", "two columns have the same name"),
        ("problem,target\nLäufer?,1\n", "latin-1", "utf-8"),
    ],
)
def test_csv_that_would_be_read_wrongly_is_refused(tmp_path, text, encoding, message):
    with pytest.raises(UserError, match=message) as error:
        read_rows(csv_of(tmp_path, text, encoding))
    assert "\n" not in str(error.value)


def test_a_file_of_an_unknown_kind(tmp_path):
    path = tmp_path / "problems.tsv"
    path.write_text("problem\ttarget\n")
    with pytest.raises(UserError, match="known kinds of files"):
        read_rows(str(path))


def test_abilities_and_ids_of_any_type(tmp_path):
    """With an own reward; an id that is an empty text is none."""
    rows = [
        dict(problem="1?", ability=["chess"], id=""),
        dict(problem="2?", ability=3, id=7),
    ]
    problems = load_problems(write_jsonl(tmp_path / "p.jsonl", rows), own_reward=True)
    assert [problem.ability for problem in problems] == ["['chess']", "3"]
    assert [problem.id for problem in problems] == [0, 7]
    assert problems[0].ground_truth is None


def test_ids_and_ground_truths_that_json_does_not_have(tmp_path):
    """Both are written beside answers. An own reward sees the row as it was."""
    table = dict(
        problem=["1?", "2?"],
        id=pandas.to_datetime(["2026-01-01", "2026-01-02"]),
        answer=[[decimal.Decimal("1.50"), decimal.Decimal("2.50")], [decimal.Decimal(3)]],
        picture=[b"\xff", b"\x00"],
    )
    path = str(tmp_path / "p.parquet")
    pandas.DataFrame(table).to_parquet(path)
    problems = load_problems(path, own_reward=True)
    written = json.loads(json.dumps([[problem.id, problem.ground_truth] for problem in problems]))
    assert written == [
        ["2026-01-01 00:00:00", ["1.50", "2.50"]],
        ["2026-01-02 00:00:00", ["3.00"]],
    ]
    assert problems[0].row["picture"] == b"\xff"


def test_csv_of_a_spreadsheet(tmp_path):
    """A byte order mark, a long field, and a record with more fields than the header."""
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffproblem,answer\n1+1?,2\n" + "x" * 200_000 + ",3\na,b,c\n", "utf-8")
    with pytest.raises(UserError, match=r"1 of 3 rows skipped .*record 3"):
        read_rows(path)
    rows = read_rows(path, max_bad_share=0.5)
    assert rows[0][1] == dict(problem="1+1?", answer="2")
    assert len(rows[1][1]["problem"]) == 200_000


def test_rows_that_are_not_objects(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a"\n[1]\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"2 of 4 rows skipped \(not a JSON object\): .*line 2, "):
        read_rows(path)
    assert len(read_rows(path, max_bad_share=0.5)) == 2
    assert "2 of 4 rows skipped" in capsys.readouterr().out


def test_lines_that_python_cannot_read(tmp_path, capsys):
    """Latin-1, brackets without end and too deep: each costs a row, and has its place."""
    good = json.dumps(ROWS[0]).encode()
    lines = [good] * 300
    lines[1] = '{"problem": "Läufer?", "answer": "1"}'.encode("latin-1")
    lines[3] = b"[" * 100_000
    lines[5] = b'{"problem": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert len(read_rows(path)) == 297
    out = capsys.readouterr().out
    assert f"{path} line 2: not UTF-8, {path} line 4, {path} line 6" in out

    # A file that is one value cannot lose a part.
    for name, content in {"deep.json": lines[3], "latin.json": lines[1]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot load the data set") as error:
            read_rows(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_number_of_many_digits(tmp_path, name):
    """As a text, digit by digit: it may be the answer."""
    digits = "7" * 5000
    row = '{"problem": "7?", "answer": %s}' % digits  # noqa: UP031
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    [problem] = load_problems(tmp_path / name)
    assert problem.ground_truth == digits


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="cannot load the data set 'nowhere.jsonl'"):
        read_rows("nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        read_rows(tmp_path / "empty.jsonl")


# ----------------------------------------------------------------------------------------------
# problems

TESTS = dict(inputs=["1\n"], outputs=["2\n"])


def only_problem(tmp_path, row, **kwargs):
    [problem] = load_problems(write_jsonl(tmp_path / "problem.jsonl", [row]), **kwargs)
    return problem


def test_problem_of_numina_math(tmp_path):
    row = dict(problem="a", solution="so \\boxed{1}", id="x", source="olympiads")
    problem = only_problem(tmp_path, row, system_prompt="S", user_suffix="!")
    assert problem.id == "x"
    assert problem.text == "a"
    assert problem.messages == [
        dict(role="system", content="S"),
        dict(role="user", content="a!"),
    ]
    assert problem.reference == dict(ability="math", ground_truth="so \\boxed{1}")
    assert problem.row == row


def test_problem_of_gsm8k(tmp_path):
    row = dict(question="q", answer="1+1=<<1+1=2>>2\n#### 1,234")
    assert only_problem(tmp_path, row).ground_truth == "1234"


@pytest.mark.parametrize(
    "solution",
    [
        "#### Step 1\nadd\n\n#### Conclusion\nThe answer is $\\boxed{(1, 2)}$.",
        "so \\boxed{7}\n\n#### Check\nIt works.",
    ],
)
def test_a_heading_is_no_answer(tmp_path, solution):
    assert only_problem(tmp_path, dict(problem="q", solution=solution)).ground_truth == solution


def test_problem_of_eurus_2(tmp_path):
    tests = json.dumps(TESTS)
    prompt = [dict(role="system", content="act"), dict(role="user", content="code it")]
    row = dict(
        prompt=prompt,
        ability="code",
        reward_model=dict(style="rule", ground_truth=tests),
    )
    problem = only_problem(tmp_path, row)
    assert problem.messages == prompt
    assert problem.reference == dict(ability="code", ground_truth=tests)

    # "" removes the row's own system prompt, a text replaces it.
    assert only_problem(tmp_path, row, system_prompt="").messages == prompt[1:]
    replaced = only_problem(tmp_path, row, system_prompt="think").messages
    assert replaced == [dict(role="system", content="think"), prompt[1]]


def test_numbers_as_answers(tmp_path):
    """The answers of the AMC problems on the hub are floats."""
    assert only_problem(tmp_path, dict(problem="p", answer=36.0)).ground_truth == "36"
    assert only_problem(tmp_path, dict(problem="p", answer=0.5)).ground_truth == "0.5"
    assert only_problem(tmp_path, dict(problem="p", answer=7)).ground_truth == "7"


def test_several_acceptable_answers(tmp_path):
    assert only_problem(tmp_path, dict(problem="p", answer=["1", "2"])).ground_truth == ["1", "2"]


@pytest.mark.parametrize(
    "tests",
    [
        TESTS,
        json.dumps(TESTS),
        dict(TESTS, fn_name="f"),
        ["assert f(1) == 2"],
    ],
)
def test_tests_of_a_program(tmp_path, tests):
    row = dict(prompt="p", ground_truth=tests, ability="code")
    assert only_problem(tmp_path, row).ground_truth == tests


@pytest.mark.parametrize(
    "row",
    [
        dict(ground_truth=dict(inputs=["1"], outputs=[]), ability="code"),
        dict(ground_truth="no JSON", ability="code"),
        dict(ground_truth=[], ability="code"),
        dict(ground_truth="1", ability="algebra"),
        dict(ground_truth=""),
        dict(ground_truth=None),
        dict(ground_truth="1", prompt=5),
        dict(ground_truth="1", prompt=" "),
        dict(ground_truth="1", prompt=[]),
        dict(ground_truth="1", prompt=[dict(role="user", content=[dict(text="f")])]),
        dict(ground_truth="1", prompt=[dict(role="system", content="act")]),
        # What files have in place of a ground truth.
        dict(ground_truth=math.nan),
        dict(ground_truth=" \n"),
        dict(ground_truth="\u200b"),
        dict(ground_truth={}),
        dict(ground_truth=[""]),
        dict(ground_truth=[None, " ", math.nan]),
        dict(ground_truth=dict(ground_truth=None)),
        dict(ground_truth=dict(ground_truth={})),
        dict(ground_truth=dict(style="rule")),
        dict(ground_truth=[dict(a="1")]),
        dict(ground_truth={}, ability="code"),
        dict(ground_truth=math.nan, ability="code"),
        # Half a surrogate pair, in whatever is tokenized or written.
        dict(prompt="1\ud8002?"),
        dict(ground_truth="\ud835"),
        dict(ground_truth=["1", "a\udc00"]),
        dict(id="a\ud800"),
        dict(prompt=[dict(role="system", content="\ud800"), dict(role="user", content="1?")]),
        # Somebody else speaks, or nobody waits for an answer.
        dict(prompt=[dict(role="human", content="1?")]),
        dict(prompt=[dict(role=None, content="1?")]),
        dict(prompt=[dict(role="user", content="1?"), dict(role="assistant", content="2")]),
        dict(prompt=[dict(role="user", content="\u200b ")]),
        dict(prompt=math.nan),
        dict(prompt=None),
    ],
)
def test_unusable_rows(tmp_path, row):
    good = dict(prompt="p", ground_truth="1", ability="math")
    path = write_jsonl(tmp_path / "rows.jsonl", [good, good | row])
    with pytest.raises(
        UserError, match=r"1 of 2 rows skipped \(no usable 'prompt', .*line 2; more"
    ):
        load_problems(path)
    assert len(load_problems(path, max_bad_share=0.5)) == 1


def test_columns_by_name(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(text="t", gold="1", problem_id=7)])
    with pytest.raises(UserError, match="has no column ground_truth and no prompt; it has gold, "):
        load_problems(path)
    with pytest.raises(UserError, match="has no column gilt"):
        load_problems(path, problem_column="text", answer_column="gilt")
    [problem] = load_problems(path, problem_column="text", answer_column="gold")
    assert (problem.id, problem.text, problem.ground_truth) == (7, "t", "1")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_column_that_some_rows_lack(tmp_path, kind):
    """The first row included: it costs these rows, not the file."""
    rows = [dict(problem="9?", prompt=None), *ROWS * 50, dict(answer="7"), dict(x=1)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    problems = load_problems(path, max_bad_share=0.1)
    assert [problem.ground_truth for problem in problems] == ["2", "3"] * 50
    named = load_problems(path, max_bad_share=0.1, problem_column="problem", answer_column="answer")
    assert len(named) == 100


def test_the_first_column_of_the_list_counts_where_most_rows_have_it(tmp_path):
    rows = [dict(problem="1?", answer="", solution="so \\boxed{2}"), *ROWS, *ROWS]
    problems = load_problems(write_jsonl(tmp_path / "p.jsonl", rows), max_bad_share=0.5)
    assert [problem.ground_truth for problem in problems] == ["2", "3"] * 2


def test_ground_truths_as_texts(tmp_path):
    truths = {
        36.0: "36",
        7: "7",
        0.5: "0.5",
        ("1", None, ""): ["1"],
        (2.0, "x"): ["2", "x"],
    }
    for given, expected in truths.items():
        given = list(given) if isinstance(given, tuple) else given
        assert only_problem(tmp_path, dict(problem="p", answer=given)).ground_truth == expected


@pytest.mark.parametrize("ability", ["MATH", "Math", None, " ", math.nan])
def test_spellings_of_an_ability(tmp_path, ability):
    problem = only_problem(tmp_path, dict(problem="p", answer="1", ability=ability))
    assert problem.ability == "math"


def test_missing_ids(tmp_path):
    rows = [dict(problem="1?", answer="2", id=math.nan), dict(problem="2?", answer="3", id=" ")]
    problems = load_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert [problem.id for problem in problems] == [0, 1]


def test_an_own_reward_sees_no_broken_text(tmp_path):
    rows = [dict(problem="1?", hint="a")] * 3 + [dict(problem="1?", hint=["\ud800"])]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    assert len(load_problems(path, own_reward=True, max_bad_share=0.5)) == 3
    # Without it the column is neither graded nor written.
    rows = [dict(row, answer="1") for row in rows]
    assert len(load_problems(write_jsonl(tmp_path / "q.jsonl", rows))) == 4


# ----------------------------------------------------------------------------------------------
# prompts that a model cannot be asked

TAKES_TURNS = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{{ m.content }}{% endfor %}"
)


def problems_and_odd_ones(tmp_path, *odd):
    """A file of 100 problems and these rows, which stand in lines 3, 6, 9 ..."""
    rows = [dict(problem=f"{k}+1?", ground_truth="2") for k in range(100)]
    for number, row in enumerate(odd):
        rows.insert(3 * number + 2, dict(ground_truth="2") | row)
    return write_jsonl(tmp_path / "p.jsonl", rows)


@pytest.mark.parametrize("world_size", [None, 1])
def test_prompts_are_rendered_when_they_are_read(tmp_path, tokenizer, capsys, world_size):
    if world_size:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokenizer.chat_template = TAKES_TURNS
    twice = [said("user", "1"), said("user", "2")]
    path = problems_and_odd_ones(tmp_path, dict(problem=twice))
    try:
        problems = load_problems(path, tokenizer=tokenizer)
    finally:
        if world_size:
            dist.destroy_process_group()
    assert [problem.text for problem in problems] == [f"{k}+1?" for k in range(100)]
    line = capsys.readouterr().out
    assert "1 of 101 rows skipped" in line
    assert "line 3: the chat template does not take it: roles must take turns" in line

    with pytest.raises(UserError, match="roles must take turns"):
        load_problems(path, tokenizer=tokenizer, max_bad_share=0)
    # What does not ask for it is as before.
    assert len(load_problems(path)) == 101


def test_a_template_that_leaves_all_out(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'x' %}x{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="makes nothing of it"):
        load_problems(problems_and_odd_ones(tmp_path), tokenizer=tokenizer)


def test_tokens_that_the_model_does_not_know(tmp_path, tokenizer):
    """As after tokenizer.add_tokens() without a larger model."""
    size = len(tokenizer)
    tokenizer.add_tokens(["777"])
    path = problems_and_odd_ones(tmp_path, dict(problem="777+1?"))
    problems = load_problems(path, tokenizer=tokenizer, vocabulary=size)
    assert len(problems) == 100
    assert len(load_problems(path, tokenizer=tokenizer, vocabulary=size + 1)) == 101


def test_benchmarks_have_no_bad_prompts(tmp_path, tokenizer):
    problems = load_problems(problems_and_odd_ones(tmp_path, dict(problem=[said("tool", "1")])))
    tokenizer.chat_template = TAKES_TURNS
    with pytest.raises(UserError, match="mine, problem 2: the chat template does not take it"):
        check_prompts("mine", problems, tokenizer)
    del problems[2]
    check_prompts("mine", problems, tokenizer)


def test_suffixes_and_number_of_problems(tmp_path):
    rows = [
        dict(prompt="a", ground_truth="1", ability="math"),
        dict(prompt="b", ground_truth=TESTS, ability="code"),
        dict(prompt="c", ground_truth="1", ability="math"),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    problems = load_problems(path, user_suffix="!", code_suffix=" in Python", max_problems=2)
    assert [problem.messages[-1]["content"] for problem in problems] == ["a!", "b in Python"]
    problems = load_problems(path, user_suffix="!")
    assert [problem.messages[-1]["content"] for problem in problems] == ["a!", "b!", "c!"]


def test_rows_that_have_been_read(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rows = read_rows(path)
    path.unlink()
    assert len(load_problems(path, rows=rows)) == 2


def test_own_reward_gets_the_row_of_any_ability(tmp_path):
    row = dict(prompt="Write a haiku.", ability="poetry", style=dict(lines=3))
    with pytest.raises(UserError, match="has no column ground_truth"):
        only_problem(tmp_path, row)
    problem = only_problem(tmp_path, row, own_reward=True)
    assert problem.ability == "poetry"
    assert problem.reference == row


# ----------------------------------------------------------------------------------------------
# conversations


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    """A token per character, and two for where a turn begins and ends."""
    characters = ["<|im_start|>", "<|im_end|>", *string.printable]
    model = WordLevel({character: number for number, character in enumerate(characters)})
    by_character = Tokenizer(model)
    by_character.pre_tokenizer = Split("", "isolated")
    by_character.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=by_character,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def said(role, content):
    return dict(role=role, content=content)


TALK = [
    said("system", "s"),
    said("user", "1+1?"),
    said("assistant", "2"),
    said("user", "2+2?"),
    said("assistant", "4"),
]


def with_loss(tokenizer, tokens, scored):
    """The text of the tokens that the loss counts."""
    return tokenizer.decode([token for token, score in zip(tokens, scored) if score])


def test_the_assistants_words_are_scored(tokenizer):
    tokens, scored = tokenize_messages(tokenizer, TALK)
    assert with_loss(tokenizer, tokens, scored) == "2<|im_end|>4<|im_end|>"
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(tokens) == rendered.rstrip("\n")

    # The same ids as an engine gets and gives.
    prompt = render_prompt(tokenizer, TALK[:-1])
    answer = tokenizer("4<|im_end|>", add_special_tokens=False).input_ids
    assert tokens == prompt + answer


def test_all_is_scored_if_nothing_is_masked(tokenizer):
    tokens, scored = tokenize_messages(tokenizer, TALK, mask_prompt=False)
    assert all(scored)
    assert with_loss(tokenizer, tokens, scored) == tokenizer.decode(tokens)


def test_a_conversation_needs_an_assistant(tokenizer):
    with pytest.raises(ValueError, match="no assistant message"):
        tokenize_messages(tokenizer, TALK[:2])


@pytest.mark.parametrize("shown", ["", "\n", "7\n"])
def test_a_tools_words_are_not_scored(tokenizer, shown):
    text = f"```python\nf()\n```\n```output\n{shown}```\nSo 1.\n```python\ng()\n```"
    messages = [said("user", "1?"), said("assistant", text)]
    tokens, scored = tokenize_messages(tokenizer, messages)
    own_words = text.replace(f"{shown}```\nSo", "\nSo")
    assert with_loss(tokenizer, tokens, scored) == own_words + "<|im_end|>"

    tokens, scored = tokenize_messages(tokenizer, messages, mask_output=False)
    assert with_loss(tokenizer, tokens, scored) == text + "<|im_end|>"


def test_a_template_without_end_token_and_a_tokenizer_with_a_begin_token(tokenizer):
    """As NuminaMath's: each answer gets an end token, the begin token comes once."""
    tokenizer.add_special_tokens(dict(bos_token="<|im_start|>"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ ('P: ' if m['role'] == 'user' else 'S: ') + m['content'] + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'S: ' }}{% endif %}"
    )
    messages = [said("user", "1"), said("assistant", "2")]
    tokens, scored = tokenize_messages(tokenizer, messages)
    assert tokenizer.decode(tokens) == "<|im_start|>P: 1\nS: 2\n<|im_end|>"
    assert with_loss(tokenizer, tokens, scored) == "2\n<|im_end|>"


def test_line_ends_of_another_system(tokenizer):
    """The loop stops at ```output and a new line: so is what it learns from."""
    unix = "```python\nf()\n```\n```output\n42\n```\nSo 42."
    expected = tokenize_messages(tokenizer, [said("user", "1?"), said("assistant", unix)])
    for line_end in ("\r\n", "\r"):
        answer = unix.replace("\n", line_end)
        talk = [said("user", "1?"), said("assistant", answer)]
        assert tokenize_messages(tokenizer, talk) == expected


def test_one_end_token_behind_an_answer(tokenizer):
    """Also if the data set's answers end with it, or the template ends with another one."""
    expected = tokenize_messages(tokenizer, TALK)
    ended = [
        dict(m, content=m["content"] + "<|im_end|>") if m["role"] == "assistant" else m
        for m in TALK
    ]
    assert tokenize_messages(tokenizer, ended) == expected

    tokenizer.eos_token = "~"
    tokens, scored = tokenize_messages(tokenizer, TALK)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(tokens) == rendered + "~"
    assert tokens[:-1] == render_prompt(tokenizer, TALK)[: len(tokens) - 1]


def test_a_conversation_that_the_assistant_begins(tokenizer):
    with pytest.raises(ValueError, match="the assistant begins"):
        tokenize_messages(tokenizer, TALK[2:])


def test_a_template_that_looks_ahead_is_refused(tokenizer):
    """One that changes earlier turns when later ones come has no prefix to go on from."""
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match="as the beginning of a longer one"):
        tokenize_messages(tokenizer, TALK)


# ----------------------------------------------------------------------------------------------
# rows to fine-tune on


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(path, tokenizer, **changes):
    settings = dict(
        max_length=64,
        overlong="truncate",
        mask_prompt=True,
        mask_output=True,
        max_bad_share=0.01,
    )
    return load_sft_rows(str(path), "train", tokenizer, **settings | changes)


def sft_row(question, answer):
    return dict(messages=[said("user", question), said("assistant", answer)])


def test_rows_in_their_order(tmp_path, one_process, tokenizer, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [sft_row("1+1?", "2"), sft_row("1+2?", "3")])
    rows = load(path, tokenizer)
    assert [with_loss(tokenizer, *row) for row in rows] == ["2<|im_end|>", "3<|im_end|>"]
    assert rows[0][0].dtype == "int32" and rows[0][1].dtype == "bool"
    assert f"{path}: 2 rows, " in capsys.readouterr().out


def test_rows_that_are_too_long(tmp_path, one_process, tokenizer, capsys):
    rows = [sft_row("1+1?", "2"), sft_row("1+1?", "2" * 50), sft_row("1" * 99, "2")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    # Cut, and gone if nothing of the answer is left.
    cut = load(path, tokenizer)
    assert len(cut) == 2
    assert len(cut[1][0]) == 64
    assert set(with_loss(tokenizer, *cut[1])) == {"2"}
    assert "2 rows beyond 64 tokens (truncate), of which 1 dropped" in capsys.readouterr().out

    assert len(load(path, tokenizer, overlong="drop")) == 1
    with pytest.raises(UserError, match="no row is left"):
        load(path, tokenizer, max_length=8, overlong="drop")


def test_rows_without_use_are_named_and_limited(tmp_path, one_process, tokenizer, capsys):
    rows = [sft_row("1+1?", "2") for _ in range(8)]
    rows[3] = dict(messages=[said("user", "no answer")])
    rows[5] = sft_row("1+1?", None)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="2 of 8 rows skipped"):
        load(path, tokenizer)
    assert len(load(path, tokenizer, max_bad_share=0.5)) == 6
    out = capsys.readouterr().out
    assert "line 4: no assistant message" in out
    assert "line 6: a content that is NoneType" in out

    path = write_jsonl(tmp_path / "others.jsonl", [dict(text="a")])
    with pytest.raises(UserError, match="has no column 'messages'; it has text"):
        load(path, tokenizer)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking is defined %}({{ m.thinking }}){% endif %}"
    "{% for call in m.calls or [] %}{% if 'x' in call %}[{{ call.x }}]{% endif %}{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_same_rows_of_any_kind_of_file(tmp_path, one_process, tokenizer):
    """Tables have every key in every row, None where it is absent, at any depth."""
    tokenizer.chat_template = THINKING
    rows = [sft_row("1+1?", "2"), sft_row("1+2?", "3"), sft_row("2+2?", "4")]
    rows[1]["messages"][1]["thinking"] = "easy"
    rows[2]["messages"][1]["calls"] = [dict(x=1), dict(y=2)]
    files = [write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet"]
    pandas.DataFrame(rows).to_parquet(files[1])
    files.append(tmp_path / "rows.json")
    files[2].write_text(json.dumps(rows))

    texts = []
    for path in files:
        loaded = load(path, tokenizer)
        texts.append([tokenizer.decode(tokens.tolist()) for tokens, _ in loaded])
    assert texts[0] == texts[1] == texts[2]
    assert "(easy)3" in texts[0][1] and "[1]4" in texts[0][2]
    assert "None" not in "".join(texts[1])


def test_a_dict_of_lists(tmp_path, tokenizer):
    """What a table makes of a sequence of dicts."""
    columns = {key: [message[key] for message in TALK] for key in ("role", "content")}
    assert tokenize_messages(tokenizer, columns) == tokenize_messages(tokenizer, TALK)
    prompt = {key: values[:-1] for key, values in columns.items()}
    assert only_problem(tmp_path, dict(prompt=prompt, answer="4")).messages == TALK[:-1]


def test_a_first_row_without_messages(tmp_path, one_process, tokenizer, capsys):
    odd = [
        dict(text="x"),
        dict(messages=[said("human", "1"), said("gpt", "2")]),
        sft_row("1", "\ud800"),
        dict(messages=[said("assistant", "1")]),
        dict(messages=None),
    ]
    rows = [*odd, *[sft_row("1+1?", "2")] * 5]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(load(path, tokenizer, max_bad_share=0.5)) == 5
    out = capsys.readouterr().out
    assert "5 of 10 rows skipped (unusable messages)" in out
    assert "line 2: an unknown role, 'human'" in out


SHARED = """
import hashlib
import os
import sys

import torch.distributed as dist

from lib import problems
from lib.pretrained import load_tokenizer
from lib.run import leave_distributed

dist.init_process_group("gloo")
problems.ROWS_PER_EXCHANGE = 7
rows = problems.load_sft_rows(
    sys.argv[1],
    "train",
    load_tokenizer(sys.argv[2]),
    max_length=20,
    overlong="truncate",
    mask_prompt=True,
    mask_output=True,
    max_bad_share=0.5,
)
digest = hashlib.sha256()
for tokens, scored in rows:
    digest.update(tokens.tobytes() + scored.tobytes())
maps = [line for line in open("/proc/self/maps") if "/tokens" in line]
line = f"rank {dist.get_rank()}: {len(rows)} {digest.hexdigest()} {maps[0].split()[4]}"
sys.stdout.write(line + "\\n")
sys.stdout.flush()
leave_distributed()
os._exit(0)  # see configurator.run()
"""


@pytest.mark.slow
def test_processes_share_the_same_rows(tmp_path, one_process, world):
    """Same rows in the same order on 1 and 2 processes, which map one file."""
    rows = [sft_row(f"{k}+1?", "7" * (k % 30 + 1)) for k in range(50)]
    rows[20] = dict(messages=None)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(f"{world}/init")
    alone = hashlib.sha256()
    for tokens, scored in load(path, tokenizer, max_length=20, max_bad_share=0.5):
        alone.update(tokens.tobytes() + scored.tobytes())

    (tmp_path / "shared.py").write_text(SHARED)
    environment = dict(PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    done = torchrun(2, tmp_path / "shared.py", path, f"{world}/init", env=environment)
    # Not by lines: what one process prints may stand between another's line and its end.
    lines = re.findall(r"rank \d: (\d+ \w+ \d+)", done.stdout)
    assert len(lines) == 2
    assert lines[0].startswith(f"49 {alone.hexdigest()} ")
    # With the inode of the file.
    assert lines[0] == lines[1]
    assert not list(tmp_path.rglob("tokens"))
