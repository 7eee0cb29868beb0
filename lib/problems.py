"""Files and hub data sets -> problems to sample, and token rows to fine-tune on."""

import collections
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np
import torch.distributed as dist

from configurator import UserError
from lib.answers import TOOL_END, TOOL_STOP
from lib.code_tests import read_tests
from lib.own_reward import as_plain_json
from lib.pretrained import (
    encode,
    encode_after,
    encode_words,
    prompt_trouble,
    top_token,
    unknown_signs,
)
from lib.rows import (
    check_text,
    is_missing,
    name_columns,
    read_rows,
    report_bad,
    without_none,
)
from lib.run import local_rank, print0

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
# Who may speak; a template leaves out others, or takes them for somebody else, without a word.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Rows that all processes tokenize before they exchange them.
ROWS_PER_EXCHANGE = 32768


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
    tokenizer=None,
    vocabulary: int | None = None,
) -> list[Problem]:
    """The problems of a file or data set; knows NuminaMath, GSM8K and Eurus-2-RL-Data.

    system_prompt replaces the row's own; None leaves it, "" removes it. user_suffix is appended
    to the problem; code_suffix takes its place for code. rows: those of read_rows(source), if
    they have been read. own_reward: any ability will do, and an answer column is not needed.
    tokenizer, vocabulary: a row is also unusable if the chat template refuses its prompt, or the
    prompt has a token id from `vocabulary` on; with a tokenizer the function is collective.
    Raises UserError for a missing column, and if too many rows are unusable.
    """
    if rows is None:
        rows = read_rows(source, split, config, max_bad_share)
    prompt_key, answer_key = find_columns(source, rows, problem_column, answer_column, own_reward)

    found = {}
    bad = {}
    for index, (where, row) in enumerate(rows[:max_problems]):
        try:
            problem = make_problem(row, prompt_key, answer_key, index, own_reward)
        except Exception:
            # A row can be anything.
            bad[index] = where
            continue
        suffix = user_suffix
        if problem.ability == "code" and code_suffix is not None:
            suffix = code_suffix
        problem.messages = with_prompts(problem.messages, system_prompt, suffix)
        found[index] = problem

    if tokenizer is not None:
        troubles = prompt_troubles(list(found.values()), tokenizer, vocabulary)
        for index, trouble in zip(list(found), troubles):
            if trouble is not None:
                bad[index] = f"{rows[index][0]}: {trouble}"
                del found[index]

    what = f"no usable {prompt_key!r}, {answer_key!r} or 'ability'"
    places = [bad[index] for index in sorted(bad)]
    report_bad(places, len(bad) + len(found), max_bad_share, what)
    return list(found.values())


def find_columns(
    source: str, rows: list, problem_column: str | None, answer_column: str | None, own_reward: bool
) -> tuple[str, str]:
    """The names of the columns of problems and of ground truths.

    Raises UserError if no row has one of them.
    """
    counts = collections.Counter()
    for _, row in rows:
        counts.update(key for key, value in row.items() if not is_missing(value))
    prompt_key = problem_column or common_column(PROMPT_COLUMNS, counts, len(rows))
    answer_key = answer_column or common_column(ANSWER_COLUMNS, counts, len(rows))

    columns = {key for _, row in rows for key in row}
    needed = {prompt_key: "--problem_column"}
    if not own_reward:
        needed[answer_key] = "--answer_column"
    missing = {column: setting for column, setting in needed.items() if column not in columns}
    if missing:
        raise UserError(
            f"{source} has no column {' and no '.join(sorted(missing))}; "
            f"it has {name_columns(rows)}: set {' and '.join(sorted(missing.values()))}"
        )
    return prompt_key, answer_key


def common_column(names, counts: dict[str, int], rows: int) -> str:
    """The first of the names that at least half of the rows have a value for, or else most."""
    for name in names:
        if counts[name] and 2 * counts[name] >= rows:
            return name
    return max(names, key=lambda name: counts[name])


def make_problem(row: dict, prompt_key: str, answer_key: str, index: int, own_reward: bool):
    """A row as a Problem. Raises some exception if it is unusable."""
    messages = row[prompt_key]
    if isinstance(messages, str):
        messages = [dict(role="user", content=messages)]
    messages = [dict(role=m["role"], content=m["content"]) for m in as_list_of_dicts(messages)]
    check_messages(messages)

    ability = "math" if is_missing(row.get("ability")) else str(row["ability"])
    if not own_reward and ability.lower() in ("math", "code"):
        # DAPO's data set writes MATH.
        ability = ability.lower()
    truth = read_truth(row.get(answer_key), ability, own_reward)
    if not own_reward:
        check_truth(ability, truth)

    problem_id = index
    for name in reversed(ID_COLUMNS):
        if not is_missing(row.get(name)):
            problem_id = row[name]

    # Both are written beside answers; tables have dates, decimals and bytes, which JSON has not.
    problem_id = as_plain_json(problem_id)
    truth = as_plain_json(truth)

    problem = Problem(
        id=problem_id,
        text=messages[-1]["content"],
        messages=messages,
        ability=ability,
        ground_truth=truth,
        row=row,
        own_reward=own_reward,
    )
    # All that is tokenized, graded or written.
    check_text([problem.messages, problem.ability, problem.ground_truth, problem.id])
    if own_reward:
        check_text(row)
    return problem


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError if these are not the messages of somebody who waits for an answer."""
    if any(is_missing(message["content"]) for message in messages):
        raise ValueError("an empty message")
    check_roles(messages)
    if messages[-1]["role"] in ("system", "developer", "assistant"):
        raise ValueError("no problem at the end")


def check_roles(messages: list[dict]) -> None:
    """Raise ValueError for a role that chat templates do not know, or a content that is no text."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages have to be a list of dicts")
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"a content that is {type(content).__name__}, no text")
        if message.get("role") not in ROLES:
            raise ValueError(f"an unknown role, {message.get('role')!r}")


def read_truth(truth, ability: str = "math", own_reward: bool = False):
    """The ground truth in what a data set has for it: a text, or a list or dict of tests or texts.

    Eurus-2-RL-Data wraps it in a dict, GSM8K's solutions end in "#### 1,234", and the answers of
    the AMC problems on the hub are floats: 36.0. Of several answers those count that are there.
    """
    if isinstance(truth, dict):
        # Without the key it is a dict of tests.
        truth = without_none(truth)
        truth = truth.get("ground_truth", truth)
    if isinstance(truth, list) and ability != "code" and not own_reward:
        return [read_truth(one) for one in truth if not is_missing(one)]
    if truth is None or isinstance(truth, (list, dict)):
        return truth

    if isinstance(truth, str):
        # At the end only: elsewhere #### is a heading.
        last_line = re.search(r"#### *(-?[\d.,]+)\s*$", truth)
        if last_line:
            truth = last_line[1].replace(",", "")
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)
    if not own_reward:
        check_writable(truth)
    return truth if is_missing(truth) else str(truth)


def check_writable(truth) -> None:
    """Raise ValueError for a value of a table that is no answer when it is written as a text.

    A date or bytes say. A number that a float cannot hold has become infinity.
    """
    if not isinstance(truth, (str, int, float, Decimal)):
        raise ValueError(f"a ground truth that is {type(truth).__name__}")
    if isinstance(truth, (float, Decimal)) and math.isinf(truth):
        raise ValueError("a ground truth that is infinite")


def check_truth(ability: str, truth) -> None:
    """Raise ValueError if the built-in judges cannot use this ground truth."""
    if is_missing(truth):
        raise ValueError("no ground truth")
    if ability == "code":
        read_tests(truth)
    elif ability != "math":
        raise ValueError(f"ability {ability!r} needs an own reward")
    elif not all(isinstance(text, str) for text in as_list(truth)):
        raise ValueError("a ground truth that is no text")


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def prompt_troubles(problems: list[Problem], tokenizer, vocabulary: int | None) -> list[str | None]:
    """What is wrong with each problem's prompt, or None. Collective: each rank looks at its share.

    Rendering is all that costs time, some 20,000 prompts per second: tokens are only looked at if
    the tokenizer has some that the model does not know, or does not take every text.
    """
    limit = vocabulary  # token ids are below it; None: they need not be looked at
    if vocabulary is None or top_token(tokenizer) < vocabulary:
        limit = top_token(tokenizer) + 1 if unknown_signs(tokenizer) else None
    talks = [problem.messages for problem in problems]
    return share_work(lambda talk: prompt_trouble(tokenizer, talk, limit), talks)


def check_prompts(
    name: str, problems: list[Problem], tokenizer, vocabulary: int | None = None
) -> None:
    """Raise UserError if a model cannot be asked one of these problems. name: where they are from.

    tokenizer, vocabulary: as for load_problems(), which leaves such problems out.
    """
    for problem, trouble in zip(problems, prompt_troubles(problems, tokenizer, vocabulary)):
        if trouble:
            raise UserError(f"{name}, problem {problem.id}: {trouble}")


def share_work(function, items: list) -> list:
    """[function(item), ...], with processes that are joined each doing its share. Collective."""
    if not dist.is_initialized():
        return [function(item) for item in items]
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    mine = [function(item) for item in items[rank::world_size]]
    by_rank = [None] * world_size
    dist.all_gather_object(by_rank, mine)
    return [by_rank[i % world_size][i // world_size] for i in range(len(items))]


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

    The assistant's words and its end token are scored; a template without end token gets one at
    the end. With mask_prompt the rest of the conversation is not, with mask_output a tool's words
    are not:

        user "1+1?", assistant "2"    ->    <user>1+1?<assistant> 2 <end>,  scored 0 ... 0 1 1

    Prompt, answer and tool output are tokenized separately, as when an engine samples them.
    Raises ValueError for a conversation without an assistant, and if the chat template does not
    render a conversation as the beginning of a longer one.
    """
    messages = as_messages(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no assistant message")
    if answers[0] == 0:
        raise ValueError("the assistant begins: nothing is there to answer")

    pieces = []  # (ids, scored)
    rendered = ""  # the conversation up to and with the last turn that was added
    for i in answers:
        prompt, full = render_turn(tokenizer, messages[: i + 1])
        if not (prompt.startswith(rendered) and full.startswith(prompt)):
            raise ValueError(
                "the chat template does not render a conversation as the beginning of a longer one"
            )

        # What stands before the assistant's words.
        if not pieces:
            context = encode(tokenizer, prompt)
        else:
            context = encode_after(tokenizer, rendered, prompt[len(rendered) :])
        pieces.append((context, not mask_prompt))

        # The words up to the end token; what a template writes behind it belongs to the next turn.
        end = full.rfind(tokenizer.eos_token, len(prompt))
        rendered = full if end < 0 else full[: end + len(tokenizer.eos_token)]
        pieces += tokenize_answer(tokenizer, prompt, rendered[len(prompt) :], mask_output)

        # Between the turns of a longer talk a prompt has no end token but the template's.
        if end >= 0 or i == answers[-1]:
            pieces.append(([tokenizer.eos_token_id], True))
    return join_pieces(pieces)


def tokenize_answer(tokenizer, prompt: str, answer: str, mask_output: bool) -> list[tuple]:
    """(ids, scored) of the pieces of an answer, its own words and those of its tool.

    prompt: what stands before it. End tokens are left out.
    """
    while answer.endswith(tokenizer.eos_token):
        answer = answer.removesuffix(tokenizer.eos_token)

    pieces = []
    before = prompt
    for text, from_tool in split_tool_output(answer):
        if from_tool:
            pieces.append((encode_words(tokenizer, TOOL_STOP, text), not mask_output))
            before = TOOL_END
        else:
            pieces.append((encode_after(tokenizer, before, text), True))
    return pieces


def join_pieces(pieces: list[tuple]) -> tuple[list[int], list[bool]]:
    """(ids, scored) of pieces -> (tokens, scored) of the whole."""
    tokens = []
    scored = []
    for ids, is_scored in pieces:
        tokens.extend(ids)
        scored.extend([is_scored] * len(ids))
    return tokens, scored


def render_turn(tokenizer, messages: list[dict]) -> tuple[str, str]:
    """A conversation that ends with an answer, as text: (up to the answer, with the answer)."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    return prompt, tokenizer.apply_chat_template(messages, tokenize=False)


def as_messages(messages) -> list[dict]:
    """The messages of a row in one form, whatever kind of file it came from.

    Raises ValueError for a role that templates do not know, or a content that is no text.
    """
    messages = without_none(as_list_of_dicts(messages))
    check_roles(messages)
    check_text(messages)

    # An answer that writes lines ending in \r\n would never stop for its tool.
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = re.sub("\r\n?", "\n", message["content"])
    return messages


def as_list_of_dicts(table):
    """Undo what `datasets` does to a list of dicts: it makes a dict of lists of it."""
    if isinstance(table, dict):
        return [dict(zip(table, values)) for values in zip(*table.values())]
    return table


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
    rank tokenizes its share, every rank gets all rows in the order of the table. The processes of
    a node share the memory of the arrays.
    Raises UserError if there is no column `messages`, too many rows are bad, or none is left.
    """
    table = read_rows(source, split, max_bad_share=max_bad_share)
    if not any("messages" in row for _, row in table):
        raise UserError(f"{source} has no column 'messages'; it has {name_columns(table)}")

    pairs, bad = tokenize_table(tokenizer, table, mask_prompt, mask_output)
    report_bad(bad, len(table), max_bad_share, "unusable messages")

    rows = []
    beyond = 0
    for tokens, scored in pairs:
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
        f"of which {len(pairs) - len(rows)} dropped"
    )
    return rows


def tokenize_table(
    tokenizer, table: list, mask_prompt: bool, mask_output: bool
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """(tokens, scored) of the usable rows of a table, in its order, and what is wrong with others.

    Collective. What the ranks make is exchanged in parts, and the first process of each node writes
    it to files that all processes of the node map into memory: 700,000 rows are gigabytes.
    """

    with tempfile.TemporaryDirectory() as folder:
        # Each process knows its own folder; what counts is that of the node's first.
        folders = [None] * dist.get_world_size()
        dist.all_gather_object(folders, folder)
        folder = folders[dist.get_rank() - local_rank()]
        tokens_path = os.path.join(folder, "tokens")
        scored_path = os.path.join(folder, "scored")
        writes = local_rank() == 0
        try:
            with (
                open(tokens_path if writes else os.devnull, "wb") as tokens_file,
                open(scored_path if writes else os.devnull, "wb") as scored_file,
            ):
                lengths, bad = write_table(
                    tokenizer, table, mask_prompt, mask_output, tokens_file, scored_file
                )
        except OSError as error:
            raise UserError(
                f"the tokens of {len(table)} rows cannot be kept in {folder}: {error}; "
                "TMPDIR names another folder"
            ) from None

        # The files are complete on all nodes; once mapped they need no name.
        dist.barrier()
        pairs = map_rows(tokens_path, scored_path, lengths)
        dist.barrier()
    return pairs, bad


def write_table(
    tokenizer, table: list, mask_prompt: bool, mask_output: bool, tokens_file, scored_file
) -> tuple[list[int], list[str]]:
    """Write the usable rows of a table -> (lengths, what is wrong with the others). Collective."""

    def tokenize(place_and_row):
        return tokenize_row(tokenizer, place_and_row[1], mask_prompt, mask_output)

    lengths = []
    bad = []
    for first in range(0, len(table), ROWS_PER_EXCHANGE):
        part = table[first : first + ROWS_PER_EXCHANGE]
        for (where, _), pair in zip(part, share_work(tokenize, part)):
            if isinstance(pair, str):
                bad.append(f"{where}: {pair}")
                continue
            lengths.append(len(pair[0]))
            tokens_file.write(pair[0].tobytes())
            scored_file.write(pair[1].tobytes())
        if len(table) > ROWS_PER_EXCHANGE:
            print0(f"tokenized {first + len(part)} of {len(table)} rows")
    return lengths, bad


def map_rows(tokens_path: str, scored_path: str, lengths: list[int]) -> list[tuple]:
    """The rows of two files, mapped into memory; a process that writes to them has its own copy."""
    if not lengths:
        return []
    tokens = np.asarray(np.memmap(tokens_path, np.int32, "c"))
    scored = np.asarray(np.memmap(scored_path, bool, "c"))
    pairs = []
    end = 0
    for length in lengths:
        start = end
        end += length
        pairs.append((tokens[start:end], scored[start:end]))
    return pairs


def tokenize_row(tokenizer, row: dict, mask_prompt: bool, mask_output: bool):
    """(tokens int32 [T], scored bool [T]) of a row with `messages`, or what is wrong with it."""
    try:
        tokens, scored = tokenize_messages(tokenizer, row["messages"], mask_prompt, mask_output)
    except Exception as error:
        # Ours, or one of the template's.
        return f"{error!s:.200}" or type(error).__name__
    return np.array(tokens, np.int32), np.array(scored, bool)
