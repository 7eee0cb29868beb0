"""The files in which evaluate.py stores responses, and what makes a stored one count again."""

import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path

from lib.answers import read_answers


def answer_key(row: dict) -> tuple:
    """What makes an answer of a model the same answer: a stored row with this key is kept.

    The seed is made of the setting, the benchmark, the problem and the number of the sample. The
    prompt is the rendered one, so another system prompt or chat template makes another answer.
    """
    sampling = json.dumps(row["sampling"], sort_keys=True)
    return row["mode"], row["seed"], sampling, row["prompt"]


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
        return glob.glob(glob.escape(self.path) + ".rank*")

    def read(self, identity: dict) -> dict[tuple, dict]:
        """{answer_key: row} of the file and its parts. identity: as for read_answers()."""
        rows = {}
        for path in [self.path, *self.parts()]:
            for row in read_answers(path, identity):
                rows[answer_key(row)] = row
        return rows

    def write(self, rows: Iterable[dict]) -> None:
        """Replace the file and its parts by these rows."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_file(self.path, "".join(lines))
        self.remove_parts()

    def remove_parts(self) -> None:
        for path in self.parts():
            os.remove(path)


def write_file(path: str, text: str) -> None:
    """Write a file completely or not at all."""
    Path(path + ".tmp").write_text(text, "utf-8")
    os.replace(path + ".tmp", path)
