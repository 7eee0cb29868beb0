"""Stored responses: the files of evaluate.py, what makes one count again, and new verdicts."""

import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path

from lib.answers import read_answers
from lib.own_reward import hash_columns
from lib.problems import Problem

# What rows of evaluate.py have besides lib/answers.py's COLUMNS.
COLUMNS = dict(benchmark=str, prompt=str, mode=str, sample=int, sampling=dict, seed=int)

# The columns of judge_columns().
JUDGE_COLUMNS = ("reward", "problem_hash")


def answer_key(row: dict) -> tuple:
    """What makes an answer of a model the same answer: a stored row with this key is kept.

    The seed is made of the setting, and of the benchmark, the problem and the number of the sample:
    a row in which somebody has edited one of them is no answer to any other question. The prompt is
    the rendered one, so another system prompt or chat template makes another answer.
    """
    sampling = json.dumps(row["sampling"], sort_keys=True)
    return (
        row["benchmark"],
        str(row["problem_id"]),
        row["sample"],
        row["mode"],
        row["seed"],
        sampling,
        row["prompt"],
    )


class ResponseFile:
    """A model's stored responses: a .jsonl file, and the parts that processes write beside it.

    A process appends to its own part, <file>.rank3 say. When all are done, the parts are joined
    to the file. What a killed run has left in parts is read as well.
    """

    def __init__(self, out_dir: str, model: str):
        name = model.strip("./").replace("/", "--")
        self.path = f"{out_dir}/{name}.responses.jsonl"

    def part(self, rank: int) -> str:
        return f"{self.path}.rank{rank}"

    def parts(self) -> list[str]:
        path = glob.escape(self.path)
        return glob.glob(path + ".rank*")

    def read(self, identity: dict) -> dict[tuple, dict]:
        """{answer_key: row} of the file and its parts. identity: as for read_answers()."""
        rows = {}
        for path in [self.path, *self.parts()]:
            for row in read_answers(path, identity, COLUMNS):
                key = answer_key(row)
                rows[key] = row
        return rows

    def write(self, rows: Iterable[dict]) -> None:
        """Replace the file and its parts by these rows."""
        write_rows(self.path, rows)
        self.remove_parts()

    def remove_parts(self) -> None:
        for path in self.parts():
            os.remove(path)


def write_rows(path: str, rows: Iterable[dict]) -> None:
    """Write a .jsonl file completely or not at all."""
    lines = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=False)
        lines.append(line + "\n")
    write_file(path, "".join(lines))


def write_file(path: str, text: str) -> None:
    """Write a file completely or not at all."""
    # What has no UTF-8, half a surrogate pair, becomes an escape that JSON knows.
    unfinished = Path(path + ".tmp")
    unfinished.write_text(text, "utf-8", "backslashreplace")
    os.replace(unfinished, path)


# ----------------------------------------------------------------------------------------------
# verdicts


def judge_columns(problem: Problem, reward: str | None) -> dict:
    """The columns of a row that say what an own reward's verdict rests on; without one, none.

    reward: as reward_name() returns it.
    """
    if reward is None:
        return {}
    return dict(reward=reward, problem_hash=hash_columns(problem.row))


def stored_judge(row: dict) -> dict:
    """What judge_columns() has returned for a row."""
    return {name: row[name] for name in JUDGE_COLUMNS if name in row}


def grade_again(pairs: list[tuple[dict, Problem]], grader, reward: str | None) -> None:
    """Give (row, problem) pairs a new verdict. grader: a Grader; reward: its reward_name()."""
    responses = [row["response"] for row, _ in pairs]
    references = [problem.reference for _, problem in pairs]
    scores = grader.grade(responses, references)
    for (row, problem), score in zip(pairs, scores):
        row["correct"] = score == 1.0
        row["ground_truth"] = problem.ground_truth
        row["failure"] = score.failure
        for name in ("score", *JUDGE_COLUMNS):
            row.pop(name, None)
        if reward is not None:
            row["score"] = float(score)
        row.update(judge_columns(problem, reward))
