"""Graded answers of a file, as tokens and as groups: what a PRM can be trained on, or rank."""

from configurator import UserError
from lib.answers import Answer
from lib.pretrained import encode, render_prompt
from lib.problems import as_messages, join_pieces, tokenize_answer
from lib.rollouts import Group
from lib.rows import read_rows, report_bad
from lib.run import print0


def tokenize_stored(tokenizer, row: dict) -> tuple[list[int], Answer]:
    """(prompt ids, Answer without log-probabilities) of a row of generate.py or evaluate.py.

    row: its `messages`, or else its `prompt` as text, is what was asked; `response` the answer;
    `finish_reason`; `score` or `correct` the outcome. An answer that ended by itself ("stop") gets
    its end token back. Raises ValueError for another row.
    """
    if "messages" in row:
        messages = as_messages(row["messages"])
        prompt = render_prompt(tokenizer, messages)
        before = tokenizer.decode(prompt)
    elif isinstance(row.get("prompt"), str):
        before = row["prompt"]
        prompt = encode(tokenizer, before)
    else:
        raise ValueError("neither messages nor prompt")
    if not isinstance(row.get("response"), str):
        raise ValueError("no response")

    pieces = tokenize_answer(tokenizer, before, row["response"], mask_output=True)
    if row.get("finish_reason") == "stop":
        pieces.append(([tokenizer.eos_token_id], True))
    tokens, scored = join_pieces(pieces)
    if not any(scored):
        raise ValueError("an empty response")
    answer = Answer(
        tokens=tokens,
        logprobs=[0.0] * len(tokens),
        finish_reason=row.get("finish_reason", ""),
        mask=[int(is_scored) for is_scored in scored],
        text=row["response"],
        outcome=stored_outcome(row),
    )
    return prompt, answer


def stored_outcome(row: dict) -> float:
    """The outcome of a row, in [0, 1]. Raises ValueError if it has none."""
    for name in ("score", "correct", "outcome"):
        if isinstance(row.get(name), (int, float)) and 0 <= row[name] <= 1:
            return float(row[name])
    raise ValueError("no outcome: score, correct or outcome, from 0 to 1")


def read_groups(
    source: str,
    tokenizer,
    n_samples: int,
    max_prompt_tokens: int,
    max_tokens: int,
    max_bad_share: float = 0.01,
) -> list[Group]:
    """The prompts of a file that have at least n_samples answers, with the first so many of them.

    source: what read_rows() reads, of generate.py or evaluate.py. What is too long, a prompt or one
    of its answers, is left out and counted, and so are prompts with fewer answers.
    Raises UserError if no prompt is left, or too many rows are bad.
    """
    rows = read_rows(source, max_bad_share=max_bad_share)
    groups = {}
    bad = []
    too_long = 0
    for where, row in rows:
        if row.get("mode") == "greedy":
            # evaluate.py's samples are answers of the policy; its greedy answer is none.
            continue
        try:
            prompt, answer = tokenize_stored(tokenizer, row)
        except (ValueError, UserError) as error:
            bad.append(f"{where}: {error}")
            continue
        if len(prompt) > max_prompt_tokens or len(answer.tokens) > max_tokens:
            too_long += 1
            continue
        group = groups.setdefault(tuple(prompt), Group(len(groups), prompt, []))
        group.answers.append(answer)
    report_bad(bad, len(rows), max_bad_share, "no graded answer")

    whole = [group for group in groups.values() if len(group.answers) >= n_samples]
    print0(
        f"{source}: {len(rows)} answers to {len(groups)} prompts, {too_long} answers too long; "
        f"{len(whole)} prompts have {n_samples} answers or more"
    )
    if not whole:
        raise UserError(f"{source}: no prompt has samples_per_prompt={n_samples} answers")
    for group in whole:
        del group.answers[n_samples:]
    return whole
