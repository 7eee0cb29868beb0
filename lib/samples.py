"""What samples.jsonl has of each answer: its tokens, their numbers, its first wrong step."""

import re

from lib.answers import sample_seed
from lib.problems import Problem

# A character has at most so many bytes in UTF-8, and so at most so many tokens.
LONGEST_CHARACTER = 4


def rows_for_log(step: int, groups: list, stream, numbers: dict, limit: int) -> list[dict]:
    """Rows for samples.jsonl: what was written, its outcome, and numbers of its tokens.

    All answers to as few prompts as make `limit` rows. They are those that come first in an order
    of all problems that never changes, so that a problem of earlier steps is likely to be seen
    again. stream: a PromptStream. numbers: {name: [N, T], of the groups' answers in their order}.
    """
    first_rows = {}
    row_number = 0
    for number, group in enumerate(groups):
        first_rows[number] = row_number
        row_number += len(group.answers)

    rows = []
    for number in sorted(first_rows, key=lambda number: sample_seed(groups[number].index)):
        if len(rows) >= limit:
            break
        group = groups[number]
        problem = stream.problems[group.index]
        for i, answer in enumerate(group.answers, first_rows[number]):
            row = describe_answer(problem, answer, stream.tokenizer)
            for name, values in numbers.items():
                row[name] = rounded(values[i, : len(answer.tokens)].tolist())
            rows.append(dict(step=step, **row))
    return rows


def describe_answer(problem: Problem, answer, tokenizer) -> dict:
    """The columns of an answer (lib/answers.py) that do not depend on models.

    mask is left out where the model wrote all tokens; first_wrong where the problem has no `steps`.
    """
    row = dict(
        problem=problem.text,
        ground_truth=problem.ground_truth,
        response=answer.text,
        outcome=answer.outcome,
        finish_reason=answer.finish_reason,
        tokens=answer.tokens,
        token_texts=token_texts(tokenizer, answer.tokens),
    )
    if not all(answer.mask):
        row["mask"] = answer.mask
    steps = known_steps(problem)
    if steps:
        row["first_wrong"] = first_wrong_line(answer.text, steps, answer.outcome)
    return row


def known_steps(problem: Problem) -> list[str]:
    """The lines of the solution, if a column `steps` of the problem's row has them; else none."""
    steps = problem.row.get("steps")
    if not hasattr(steps, "__iter__") or isinstance(steps, (str, dict)):
        return []
    # A .parquet file gives an array.
    steps = list(steps)
    return steps if all(isinstance(step, str) for step in steps) else []


def rounded(values: list[float]) -> list[float]:
    """The same numbers with three significant digits."""
    return [float(f"{value:.3g}") for value in values]


def token_texts(tokenizer, tokens: list[int]) -> list[str]:
    """The text that each token adds; together they are the text of all.

    A character of several tokens belongs to the last of them, and the others have none.
    """
    texts = []
    # Each token is decoded together with the one before: in some tokenizers a word has a space in
    # front of it only where something stands before it.
    start = 0
    complete = 0
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[start:complete])
        text = tokenizer.decode(tokens[start:end])
        is_part = text.endswith("\ufffd") and end - complete < LONGEST_CHARACTER
        if is_part and end < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start = complete
        complete = end
    return texts


def first_wrong_line(response: str, steps: list[str], outcome: float) -> int | None:
    """Index of the first line of a response that is not the solution's; None if there is none.

    steps: the solution's lines without the answer, which is right if the outcome is 1. A missing
    line is the one after the last, and empty lines at the start count.

    >>> first_wrong_line("2 + 1 = 3\\n3 * 4 = 7\\n7", ["1 + 2 = 3", "3 * 4 = 12"], 0)
    1
    """
    lines = response.rstrip().split("\n")
    first = 0
    while first + 1 < len(lines) and not lines[first].strip():
        first += 1
    for number, step in enumerate(steps, first):
        if number >= len(lines) or plain_line(lines[number]) != plain_line(step):
            return number
    if outcome == 1:
        return None
    return first + len(steps)


def plain_line(line: str) -> str:
    """A line without what does not matter: spaces around it, the order of a sum or a product.

    >>> plain_line(" 12 + 10 = 22")
    '10 + 12 = 22'
    """
    found = re.fullmatch(r"(\d+) ([+*]) (\d+) = (.*)", line.strip())
    if found is None:
        return line.strip()
    left, operation, right, result = found.groups()
    left, right = sorted([left, right])
    return f"{left} {operation} {right} = {result}"
