"""A request to an engine, the answer that it gives, and the .jsonl files that hold answers."""

import hashlib
import json
from dataclasses import dataclass

from configurator import UserError

# How a model calls its Python tool, and what follows the tool's words.
TOOL_STOP = "```output\n"
TOOL_END = "\n```"

# What the files have of every answer, besides what a script adds.
COLUMNS = dict(
    problem_id=object,
    ground_truth=object,
    response=str,
    finish_reason=str,
    n_tokens=int,
    correct=bool,
)


@dataclass
class Request:
    """What an engine is asked for.

    prompt: token ids. stop: a string that ends the answer and stays in it.
    Two requests with the same seed and prompt get the same answer, whatever runs beside them.
    """

    prompt: list[int]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: str | None = None


@dataclass
class Answer:
    """What a model wrote.

    tokens: ids, the end token included. logprobs: one per token, at the temperature that it was
    sampled at. finish_reason: "stop" (ended by itself), "length" (cut at max_tokens), "string"
    (ended by Request.stop), and with a Python tool also "rounds" and "malformed" (lib/tools.py).
    mask: 1 on the model's own tokens, 0 on the words of its tool. outcome and failure: the
    grader's verdict in [0, 1], and why there is none.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    mask: list[int] | None = None
    text: str = ""
    outcome: float = 0.0
    failure: str | None = None

    def __post_init__(self):
        if self.mask is None:
            self.mask = [1] * len(self.tokens)


def sample_seed(*names) -> int:
    """A seed made of whatever names a sample, (seed, problem id, k) say."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def read_answers(path: str, identity: dict, columns: dict | None = None) -> list[dict]:
    """The rows of a .jsonl file of answers; the file is created if it does not exist.

    A last line that a kill cut short is removed: that answer is sampled again, with its seed.
    identity: {column: value} that all rows share, such as the model. columns: {column: type} that
    they have besides COLUMNS.
    Raises UserError if a row was made with another identity, a line is none, or the file cannot be
    opened.
    """
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
            incomplete = lines.pop()
            file.truncate(file.tell() - len(incomplete))
    except OSError as error:
        raise UserError(f"no answers can be kept in {path}: {error}", rank_local=True) from error

    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_row(row, COLUMNS | (columns or {}))
        except (ValueError, RecursionError) as error:
            why = f" ({error})" if type(error) is ValueError else ""
            raise UserError(f"{path} line {number} is no answer{why}: remove the line") from None
        rows.append(row)
    for row in rows:
        other = {name: row.get(name) for name in identity if row.get(name) != identity[name]}
        if other:
            raise UserError(
                f"{path} was started with {other}, now it is {identity}: "
                "use the same settings, or another --out_dir"
            )
    return rows


def check_row(row, columns: dict) -> None:
    """Raise ValueError if a row lacks a column, or what it has there is of another type.

    A number that somebody has written into a file would otherwise reach a report.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f"no {name}")
        # True is an int in Python.
        value = row[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r:.40}")
    if not 0 <= row["n_tokens"] < 2**31:
        raise ValueError(f"n_tokens is {row['n_tokens']!r:.40}")
    if not isinstance(row.get("failure"), (str, type(None))):
        raise ValueError(f"failure is {row['failure']!r:.40}")
    score = row.get("score", 0.0)
    if not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise ValueError(f"score is {score!r:.40}, not a number from 0 to 1")
