"""Files and hub data sets -> problems to sample, and token rows to fine-tune on."""

import csv
import gzip
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.distributed as dist

from configurator import UserError
from lib.answers import TOOL_STOP
from lib.code_tests import read_tests
from lib.pretrained import encode
from lib.run import print0

PROMPT_COLUMNS = ("prompt", "problem", "question", "instruction", "Problem")
ANSWER_COLUMNS = (
    "ground_truth",
    "reward_model",
    "answer",
    "final_answer",
    "solution",
    "Answer",
)
ID_COLUMNS = ("problem_id", "id", "unique_id", "task_id")


@dataclass
class Problem:
    """One problem, as sampling, grading and reports need it.

    text: the user's words. messages: the whole conversation so far. ability: "math", "code", or
    whatever an own reward knows. ground_truth: a text, a list or the tests of a program. row: all
    columns of the data set. tolerance, group and published_gold: of benchmarks only.
    """

    id: object
    text: str
    messages: list[dict]
    ability: str
    ground_truth: object
    row: dict = field(default_factory=dict)
    own_reward: bool = False
    tolerance: float | None = None
    group: list[str] = field(default_factory=list)
    published_gold: str | None = None

    @property
    def reference(self) -> dict:
        """What the grader judges an answer by; an own reward sees the whole row."""
        if self.own_reward:
            return self.row
        reference = dict(ability=self.ability, ground_truth=self.ground_truth)
        if self.tolerance is not None:
            reference["tolerance"] = self.tolerance
        return reference


# ----------------------------------------------------------------------------------------------
# rows


def read_rows(
    source: str, split: str = "train", config: str | None = None, max_bad_share: float = 0.01
) -> list[tuple[str, dict]]:
    """List of (where, row) of a file, a folder of .parquet files, or a hub data set.

    Files: .jsonl, .jsonl.gz, .json, .csv, .parquet. `where` names the row ("file.jsonl line 7").
    Rows that are not JSON objects are reported and skipped.
    Raises UserError if there is nothing to read, or too many rows are bad.
    """
    name = os.fspath(source)
    try:
        rows = read_any(name, split, config)
    except Exception as error:
        # `datasets` raises a dozen kinds: not found, no network, no such split.
        raise UserError(
            f"cannot load the data set {name!r} (split {split!r}): {error!s:.200}"
        ) from None
    if not rows:
        raise UserError(f"{name} has no rows")

    bad = [where for where, row in rows if not isinstance(row, dict)]
    what = "not a JSON object"
    if name.endswith(".csv"):
        what = "more or fewer fields than the header"
    report_bad(bad, len(rows), max_bad_share, what)
    return [(where, row) for where, row in rows if isinstance(row, dict)]


def read_any(name: str, split: str, config: str | None) -> list[tuple[str, object]]:
    """What read_rows() returns, before anything is checked."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(name)
    if name.endswith(".csv"):
        return read_csv(name)
    if name.endswith(".json"):
        # Not by `datasets`, which turns strings like 2020-01-01 into dates.
        table = json.loads(Path(name).read_bytes())
    elif os.path.isfile(name) and not name.endswith(".parquet"):
        raise ValueError("known kinds of files are .jsonl, .jsonl.gz, .json, .csv and .parquet")
    else:
        table = read_table(name, split, config)
    return [(f"{name} row {number}", row) for number, row in enumerate(table)]


def read_table(name: str, split: str, config: str | None):
    """A `datasets` table of a .parquet file, a folder of them, or a hub data set."""
    from datasets import Dataset, load_dataset

    if name.endswith(".parquet"):
        return Dataset.from_parquet(name)
    parts = sorted(str(path) for path in Path(name).glob("*.parquet"))
    if parts:
        return Dataset.from_parquet(parts)
    return load_dataset(name, config, split=split)


def read_json_lines(name: str) -> list[tuple[str, object]]:
    """A row per line; None for a line that is no JSON."""
    open_file = gzip.open if name.endswith(".gz") else open
    rows = []
    with open_file(name, "rt", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            rows.append((f"{name} line {number}", row))
    return rows


def read_csv(name: str) -> list[tuple[str, object]]:
    """A row per record, all values strings; None for a record with more or fewer fields.

    Raises ValueError if two columns have one name, csv.Error for an open quote.
    """
    # The default limit, 131,072 characters, is less than the tests of some programming problems.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = []
    with open(name, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, skipinitialspace=True)
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns have the same name: {', '.join(columns)}")

        # DictReader collects surplus fields under None, and fills missing ones with None.
        for number, row in enumerate(reader, 1):
            complete = None not in row and None not in row.values()
            rows.append((f"{name} record {number}", row if complete else None))
    return rows


def report_bad(bad: list[str], total: int, max_share: float, what: str) -> None:
    """Print how many rows are skipped; `bad` has their places.

    Raises UserError if they are more than max_share of the total, or all.
    """
    line = f"{len(bad)} of {total} rows skipped ({what}): {', '.join(bad[:4])}"
    if len(bad) > max_share * total or len(bad) == total:
        raise UserError(
            f"{line}; more than max_bad_share={max_share} is not accepted: fix the file"
        )
    if bad:
        print0(line)


# ----------------------------------------------------------------------------------------------
# problems


def load_problems(
    source: str,
    split: str = "train",
    config: str | None = None,
    *,
    problem_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    user_suffix: str = "",
    code_suffix: str | None = None,
    max_problems: int | None = None,
    max_bad_share: float = 0.01,
    rows: list[tuple[str, dict]] | None = None,
    own_reward: bool = False,
) -> list[Problem]:
    """The problems of a file or data set; knows NuminaMath, GSM8K and Eurus-2-RL-Data.

    system_prompt replaces the row's own; None leaves it, "" removes it. user_suffix is appended
    to the problem; code_suffix takes its place for code. rows: those of read_rows(source), if
    they have been read. own_reward: any ability will do, and an answer column is not needed.
    Raises UserError for a missing column, and if too many rows are unusable.
    """
    if rows is None:
        rows = read_rows(source, split, config, max_bad_share)
    columns = rows[0][1].keys()
    prompt_key = problem_column or first_of(PROMPT_COLUMNS, columns)
    answer_key = answer_column or first_of(ANSWER_COLUMNS, columns)

    needed = {prompt_key: "--problem_column"}
    if not own_reward:
        needed[answer_key] = "--answer_column"
    missing = {column: setting for column, setting in needed.items() if column not in columns}
    if missing:
        raise UserError(
            f"{source} has no column {' and no '.join(sorted(missing))}; "
            f"it has {', '.join(sorted(columns))}: set {' and '.join(sorted(missing.values()))}"
        )

    problems = []
    bad = []
    for index, (where, row) in enumerate(rows[:max_problems]):
        try:
            problem = make_problem(row, prompt_key, answer_key, index, own_reward)
        except Exception:
            # A row can be anything.
            bad.append(where)
            continue
        suffix = user_suffix
        if problem.ability == "code" and code_suffix is not None:
            suffix = code_suffix
        problem.messages = with_prompts(problem.messages, system_prompt, suffix)
        problems.append(problem)

    what = f"no usable {prompt_key!r}, {answer_key!r} or 'ability'"
    report_bad(bad, len(bad) + len(problems), max_bad_share, what)
    return problems


def first_of(names, columns) -> str:
    """The first of the names that is a column; the first name if none is."""
    for name in names:
        if name in columns:
            return name
    return names[0]


def make_problem(row: dict, prompt_key: str, answer_key: str, index: int, own_reward: bool):
    """A row as a Problem. Raises some exception if it is unusable."""
    messages = row[prompt_key]
    if isinstance(messages, str):
        messages = [dict(role="user", content=messages)]
    messages = [dict(role=m["role"], content=m["content"]) for m in messages]
    if not all(message["role"] and message["content"].strip() for message in messages):
        raise ValueError("an empty message")
    if messages[-1]["role"] == "system":
        raise ValueError("no problem after the system prompt")

    ability = str(row.get("ability") or "math")
    truth = read_truth(row.get(answer_key))
    if not own_reward:
        check_truth(ability, truth)

    problem_id = index
    for name in reversed(ID_COLUMNS):
        if row.get(name) not in (None, ""):
            problem_id = row[name]

    if truth is not None and not isinstance(truth, (list, dict)):
        truth = str(truth)
    return Problem(
        id=problem_id,
        text=messages[-1]["content"],
        messages=messages,
        ability=ability,
        ground_truth=truth,
        row=row,
        own_reward=own_reward,
    )


def read_truth(truth):
    """The ground truth in what a data set has for it.

    Eurus-2-RL-Data wraps it in a dict, GSM8K's solutions end in "#### 1,234", and the answers of
    the AMC problems on the hub are floats: 36.0.
    """
    if isinstance(truth, dict):
        # Without the key it is a dict of tests.
        truth = truth.get("ground_truth", truth)
    if isinstance(truth, str):
        # At the end only: elsewhere #### is a heading.
        last_line = re.search(r"#### *(-?[\d.,]+)\s*$", truth)
        if last_line:
            truth = last_line[1].replace(",", "")
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)
    return truth


def check_truth(ability: str, truth) -> None:
    """Raise ValueError if the built-in judges cannot use this ground truth."""
    if truth in (None, "", []):
        raise ValueError("no ground truth")
    if ability == "code":
        read_tests(truth)
    elif ability != "math":
        raise ValueError(f"ability {ability!r} needs an own reward")


def with_prompts(messages: list[dict], system_prompt: str | None, suffix: str) -> list[dict]:
    """The messages with another system prompt (None: their own) and a suffix on the last one."""
    if system_prompt is not None:
        messages = [message for message in messages if message["role"] != "system"]
    if system_prompt:
        messages = [dict(role="system", content=system_prompt), *messages]
    last = messages[-1]
    return [*messages[:-1], dict(last, content=last["content"] + suffix)]


# ----------------------------------------------------------------------------------------------
# rows to fine-tune on


def tokenize_messages(
    tokenizer, messages: list[dict], mask_prompt: bool = True, mask_output: bool = True
) -> tuple[list[int], list[bool]]:
    """A conversation -> (tokens, scored): which tokens the loss counts.

    The assistant's words and its end token are scored; a template without end token gets one.
    With mask_prompt the rest of the conversation is not, with mask_output a tool's words are not:

        user "1+1?", assistant "2"    ->    <user>1+1?<assistant> 2 <end>,  scored 0 ... 0 1 1

    Prompt, answer and tool output are tokenized separately, as when an engine samples them.
    Raises ValueError for a conversation without an assistant, and if the chat template does not
    render a conversation as the beginning of a longer one.
    """
    tokens = []
    scored = []

    def add(ids, score):
        tokens.extend(ids)
        scored.extend([score] * len(ids))

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    rendered = ""  # the conversation up to and with the last turn that was added
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, tokenize=False
        )
        full = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (prompt.startswith(rendered) and full.startswith(prompt)):
            raise ValueError(
                "the chat template does not render a conversation as the beginning of a longer one"
            )

        # What stands before the assistant's words.
        if tokens:
            add(ids_of(prompt[len(rendered) :]), not mask_prompt)
        else:
            add(encode(tokenizer, prompt), not mask_prompt)

        # The words up to the end token; what a template writes behind it belongs to the next turn.
        end = full.rfind(tokenizer.eos_token, len(prompt))
        rendered = full if end < 0 else full[: end + len(tokenizer.eos_token)]
        answer = rendered[len(prompt) :].removesuffix(tokenizer.eos_token)
        for piece, from_tool in split_tool_output(answer):
            add(ids_of(piece), not (from_tool and mask_output))
        add([tokenizer.eos_token_id], True)

    if not tokens:
        raise ValueError("no assistant message")
    return tokens, scored


def split_tool_output(text: str) -> list[tuple[str, bool]]:
    """An answer's pieces, by turns the model's own words and what its tool said.

    >>> split_tool_output("so ```output\\n4\\n``` four")
    [('so ```output\\n', False), ('4\\n```', True), (' four', False)]
    """
    pieces = re.split(f"(?<={TOOL_STOP})((?:.*?\n)??```)", text, flags=re.DOTALL)
    return [(piece, number % 2 == 1) for number, piece in enumerate(pieces)]


def load_sft_rows(
    source: str,
    split: str,
    tokenizer,
    *,
    max_length: int,
    overlong: str,
    mask_prompt: bool,
    mask_output: bool,
    max_bad_share: float,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """List of (tokens int32 [T], scored bool [T]) of the `messages` rows of a file or data set.

    overlong: "truncate" cuts rows at max_length tokens, "drop" leaves them out. Collective: each
    rank tokenizes its share, every rank gets all rows in the order of the table.
    Raises UserError if there is no column `messages`, too many rows are bad, or none is left.
    """
    table = read_rows(source, split, max_bad_share=max_bad_share)
    columns = table[0][1].keys()
    if "messages" not in columns:
        raise UserError(f"{source} has no column 'messages'; it has {', '.join(sorted(columns))}")

    pairs = tokenize_table(tokenizer, table, mask_prompt, mask_output)
    good = [pair for pair in pairs if not isinstance(pair, str)]
    bad = [f"{where}: {pair}" for (where, _), pair in zip(table, pairs) if isinstance(pair, str)]
    report_bad(bad, len(table), max_bad_share, "unusable messages")

    rows = []
    beyond = 0
    for tokens, scored in good:
        too_long = len(tokens) > max_length
        beyond += too_long
        cut = (tokens[:max_length], scored[:max_length])
        if not too_long or (overlong == "truncate" and cut[1].any()):
            rows.append(cut)
    if not rows:
        raise UserError(
            f"{source}: no row is left (max_length={max_length}, overlong={overlong!r})"
        )

    total = sum(len(tokens) for tokens, _ in rows)
    total_scored = sum(int(scored.sum()) for _, scored in rows)
    print0(
        f"{source}: {len(rows)} rows, {total} tokens, {total_scored} with loss; "
        f"{beyond} rows beyond {max_length} tokens ({overlong}), "
        f"of which {len(good) - len(rows)} dropped"
    )
    return rows


def tokenize_table(tokenizer, table: list, mask_prompt: bool, mask_output: bool) -> list:
    """tokenize_row() of all rows of a table, in its order. Collective: each rank does its share."""
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    mine = []
    for _, row in table[rank::world_size]:
        mine.append(tokenize_row(tokenizer, row, mask_prompt, mask_output))

    by_rank = [None] * world_size
    dist.all_gather_object(by_rank, mine)
    return [by_rank[i % world_size][i // world_size] for i in range(len(table))]


def tokenize_row(tokenizer, row: dict, mask_prompt: bool, mask_output: bool):
    """(tokens int32 [T], scored bool [T]) of a row with `messages`, or what is wrong with it."""
    try:
        for message in row["messages"]:
            if not isinstance(message["content"], str):
                raise ValueError(f"a content that is {type(message['content']).__name__}, no text")
        tokens, scored = tokenize_messages(tokenizer, row["messages"], mask_prompt, mask_output)
    except Exception as error:
        # Ours, or one of the template's.
        return str(error)
    return np.array(tokens, np.int32), np.array(scored, bool)
