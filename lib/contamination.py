"""Which benchmark problems occur in a training file: by word n-grams, as for NuminaMath."""

import re

from configurator import UserError
from lib.problems import Problem, as_list_of_dicts
from lib.run import print0

# Where the training file's question may be, in the order in which columns are tried.
QUESTION_COLUMNS = ("messages", "problem", "question", "prompt", "instruction")


def find_contamination(
    sets: dict[str, list[Problem]],
    rows: list[tuple[str, dict]],
    overlap: float,
) -> dict[str, dict]:
    """The problems of which at least a share `overlap` of the 10-grams occurs in training data.

    sets: {benchmark: problems}. rows: (where, row) of the training data, of which the user's words
    count, not the answers. Returns {benchmark: dict(problems, found, ids)}; ids is {problem id:
    share}, the largest share first.
    Raises UserError if a row has no question.
    """
    grams = {}
    wanted = set()
    for name, problems in sets.items():
        grams[name] = {str(problem.id): ngrams(problem.text) for problem in problems}
        for own in grams[name].values():
            wanted |= own
    seen = find_ngrams(rows, wanted)

    report = {}
    for name, problems in sets.items():
        shares = {}
        for number, own in grams[name].items():
            share = len(own & seen) / max(1, len(own))
            shares[number] = round(share, 3)

        ids = {}
        for number in sorted(shares, key=shares.get, reverse=True):
            if shares[number] >= overlap:
                ids[number] = shares[number]
        report[name] = dict(problems=len(problems), found=len(ids), ids=ids)
    return report


def print_contamination(report: dict[str, dict], source: str, overlap: float) -> None:
    """Print a line per benchmark of what find_contamination() has found in `source`."""
    for name, found in report.items():
        share = found["found"] / found["problems"]
        print0(
            f"{name}: {found['found']} of {found['problems']} problems ({share:.1%}) occur in "
            f"{source}, with at least {overlap:.0%} of their 10-grams: "
            f"{', '.join(found['ids']) or 'none'}"
        )


def ngrams(text: str, n: int = 10) -> set[tuple[str, ...]]:
    """The set of a text's n-grams of words and numbers, in lower case, without LaTeX's signs.

    A text of fewer than n words is one shorter n-gram.

    >>> ngrams("What is $2+2$?", n=3) == {("what", "is", "2"), ("is", "2", "2")}
    True
    """
    words = re.findall(r"[^\W\d_]+|\d+", text.lower())
    count = max(1, len(words) - n + 1)
    grams = {tuple(words[i : i + n]) for i in range(count)}
    return grams - {()}


def find_ngrams(rows: list[tuple[str, dict]], wanted: set[tuple]) -> set[tuple]:
    """Those of the wanted n-grams that occur in the questions of (where, row) pairs."""
    # A short problem is one shorter n-gram.
    sizes = {len(gram) for gram in wanted}
    seen = set()
    for where, row in rows:
        text = question(where, row)
        for n in sizes:
            seen |= ngrams(text, n) & wanted
    return seen


def question(where: str, row: dict) -> str:
    """What the user says in a row of training data. Raises UserError if nothing is found."""
    asked = None
    for name in QUESTION_COLUMNS:
        asked = asked or row.get(name)
    if asked is None:
        raise UserError(f"{where} has none of the columns {', '.join(QUESTION_COLUMNS)}")
    if isinstance(asked, str):
        return asked
    try:
        messages = as_list_of_dicts(asked)
        return " ".join(str(m["content"]) for m in messages if m["role"] == "user")
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{where} has no text and no messages, but {asked!r:.60}") from None
