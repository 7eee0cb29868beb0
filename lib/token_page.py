"""samples.jsonl -> tokens.html: a page on which one sees the reward of every token."""

import base64
import gzip
import json
import math
import os
from pathlib import Path

from configurator import UserError
from lib.pretrained import load_tokenizer
from lib.samples import token_texts
from lib.step_rewards import finds_wrong_step, tokens_of_line

TEMPLATE = Path(__file__).with_name("tokens.html")
# Where the template wants the data.
PLACEHOLDER = "{{ data }}"
# What a page holds at most.
MAX_ANSWERS = 128
MAX_BYTES = 2_000_000
ATTEMPTS = 5  # to keep within MAX_BYTES
MAX_PROBLEM = 4000  # characters
MAX_TRUTH = 300
# The numbers of a token, by their names in samples.jsonl. A file may lack some of them.
NUMBERS = ("process_rewards", "prm_logprobs", "ref_logprobs", "returns", "advantages")


def write_token_page(samples_path: str, page_path: str) -> None:
    """The answers of a run of prime.py as one HTML file, which needs no other file and no network.

    Raises UserError if samples_path cannot be read, or has no answers with tokens.
    """
    rows, notes = choose_rows(samples_path)
    notes += add_texts(rows, os.path.dirname(samples_path))
    notes += count_found_steps(rows)
    if not any("process_rewards" in row for row in rows):
        notes.append("This run had no process rewards.")
    template = TEMPLATE.read_text("utf-8")

    # Long answers lose their middle until the page is small enough.
    longest = max(len(row["tokens"]) for row in rows)
    limit = longest
    for _ in range(ATTEMPTS):
        cut = []
        if limit < longest:
            cut = [f"Longer answers than {limit:,} tokens are shown without their middle."]
        data = dict(source=samples_path, notes=notes + cut, prompts=by_prompt(rows, limit))
        page = template.replace(PLACEHOLDER, packed(data))
        if len(page) <= MAX_BYTES:
            break
        limit = max(4, int(0.95 * limit * MAX_BYTES / len(page)))

    Path(page_path + ".tmp").write_text(page, "utf-8")
    os.replace(page_path + ".tmp", page_path)


def packed(data: dict) -> str:
    """Data as the page reads it: JSON, gzip, base64. Nothing in it can be taken for HTML."""
    text = json.dumps(data, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


# ----------------------------------------------------------------------------------------------
# which answers


def choose_rows(path: str) -> tuple[list[dict], list[str]]:
    """At most MAX_ANSWERS rows of a file, and sentences that say what was left out.

    Where there are more, whole steps are left out: the first and the last stay, and others between
    them, at equal distances. Raises UserError if there is none.
    """
    rows_of_step = {}
    others = 0
    for row in read_lines(path):
        if is_answer(row):
            rows_of_step[row["step"]] = rows_of_step.get(row["step"], 0) + 1
        else:
            others += 1
    if not rows_of_step:
        raise UserError(
            f"{path} has no answers with tokens and outcomes: name a samples.jsonl of prime.py"
        )

    # The rows are read again, since all of a long run may not fit into memory.
    steps = sorted(rows_of_step)
    shown = spread(steps, max(1, MAX_ANSWERS // max(rows_of_step.values())))
    wanted = set(shown)
    rows = []
    for row in read_lines(path):
        if is_answer(row) and row["step"] in wanted and len(rows) < MAX_ANSWERS:
            rows.append(row)

    notes = []
    total = sum(rows_of_step.values())
    if len(rows) < total:
        notes.append(
            f"{len(rows)} of {total:,} answers are shown, of {len(shown)} of {len(steps)} steps."
        )
    if others:
        notes.append(f"{others} lines of the file are no answers with tokens and outcomes.")
    return rows, notes


def spread(items: list, count: int) -> list:
    """At most `count` items, the first, the last, and others at equal distances.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3), spread([0, 1], 5), spread([0, 1, 2], 1)
    ([0, 3, 6], [0, 1], [2])
    """
    if len(items) <= count:
        return items
    if count == 1:
        return items[-1:]
    last = len(items) - 1
    return [items[round(i * last / (count - 1))] for i in range(count)]


def read_lines(path: str):
    """The value of each line of a .jsonl file; None for a line that is not JSON."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def is_answer(row) -> bool:
    """Is it a row that the page can show?"""
    if not isinstance(row, dict):
        return False
    kinds = dict(step=int, problem=str, tokens=list)
    if not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return False
    if not all(isinstance(token, int) for token in row["tokens"]):
        return False
    if not is_number(row.get("outcome")):
        return False
    if not isinstance(row.get("first_wrong"), (int, type(None))):
        return False
    per_token = [row[name] for name in (*NUMBERS, "token_texts", "mask") if name in row]
    tokens = len(row["tokens"])
    if not all(isinstance(values, list) and len(values) == tokens for values in per_token):
        return False
    if not all(isinstance(text, str) for text in row.get("token_texts", [])):
        return False
    return tokens > 0


def add_texts(rows: list[dict], folder: str) -> list[str]:
    """The texts of the tokens of rows that lack them: earlier versions of prime.py wrote ids alone.

    The tokenizer is that of the policy beside the file; where there is none, ids take their place,
    and a sentence that is returned says so.
    """
    rows = [row for row in rows if "token_texts" not in row]
    if not rows:
        return []
    policy = os.path.join(folder, "policy")
    if os.path.isdir(policy):
        tokenizer = load_tokenizer(policy)
        for row in rows:
            row["token_texts"] = token_texts(tokenizer, row["tokens"])
        return []
    for row in rows:
        row["token_texts"] = [f"[{token}]" for token in row["tokens"]]
    return ["The file has no texts of tokens, and no policy/ lies beside it: these are their ids."]


def count_found_steps(rows: list[dict]) -> list[str]:
    """A sentence on how often the lowest reward of a wrong answer is on its first wrong step."""
    found = 0
    chance = 0.0
    wrong = 0
    for row in rows:
        line = row.get("first_wrong")
        if line is None or row["outcome"] == 1 or "process_rewards" not in row:
            continue
        step = tokens_of_line(row["token_texts"], line)
        is_found, share = finds_wrong_step(row["process_rewards"], step)
        found += is_found
        chance += share
        wrong += 1
    if not wrong:
        return []
    return [
        f"In {found} of {wrong} wrong answers the lowest reward is on the first wrong step; "
        f"a token drawn at random would be there in {chance:.1f}."
    ]


# ----------------------------------------------------------------------------------------------
# what the page is told


def by_prompt(rows: list[dict], limit: int) -> list[dict]:
    """The prompts in the order in which they first occur.

    Each has its steps, and each step its answers, those with the highest outcome first. limit:
    tokens per answer.
    """
    prompts = {}
    for row in rows:
        truth = row.get("ground_truth")
        truth = truth if isinstance(truth, str) else json.dumps(truth)
        steps = prompts.setdefault((row["problem"], truth), {})
        steps.setdefault(row["step"], []).append(row)

    found = []
    for (problem, truth), steps in prompts.items():
        described = []
        for step in sorted(steps):
            answers = sorted(steps[step], key=lambda row: -row["outcome"])
            answers = [answer_data(row, limit) for row in answers]
            # People count steps from 1, as the curves do.
            described.append(dict(step=step + 1, answers=answers))
        problem = shortened(problem, MAX_PROBLEM)
        found.append(dict(problem=problem, truth=shortened(truth, MAX_TRUTH), steps=described))
    return found


def shortened(text: str, characters: int) -> str:
    """A text, or its beginning and three dots."""
    return text if len(text) <= characters else text[:characters] + "..."


def answer_data(row: dict, limit: int) -> dict:
    """An answer as the page wants it. limit: tokens, of which one half are the last ones.

    gap is the number of the first token that is left out. wrong is the number of the token at which
    the first wrong step begins; None: all are right; missing: nobody knows.
    """
    tokens = len(row["tokens"])
    gap = min(tokens, limit - limit // 2)
    rest = max(gap, tokens - limit // 2)

    def shown(values):
        return values[:gap] + values[rest:]

    data = dict(
        outcome=row["outcome"],
        finish=str(row.get("finish_reason", "")),
        tokens=tokens,
        gap=gap,
        left_out=rest - gap,
        texts=shown(row["token_texts"]),
        numbers={name: fixed_point(shown(row[name])) for name in NUMBERS if name in row},
    )
    if "process_rewards" in row:
        data["sum"] = sum(filter(is_number, row["process_rewards"]))
    if "mask" in row:
        data["mask"] = shown(row["mask"])
    if "first_wrong" in row:
        data["wrong"] = None
        if row["first_wrong"] is not None:
            data["wrong"] = tokens_of_line(row["token_texts"], row["first_wrong"]).start
    return data


def fixed_point(values: list) -> dict:
    """Numbers as whole numbers, which take less room: four digits for the largest.

    >>> fixed_point([0.5, -0.0123])
    {'decimals': 4, 'values': [5000, -123]}
    """
    largest = max((abs(value) for value in values if is_number(value)), default=0)
    decimals = 0
    if largest > 0:
        # Beyond the largest float there is no power of ten to multiply one by.
        decimals = min(300, max(0, 3 - math.floor(math.log10(largest))))
    whole = [round(value * 10**decimals) if is_number(value) else None for value in values]
    return dict(decimals=decimals, values=whole)


def is_number(value) -> bool:
    """Is it a number that a float can be?"""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False
