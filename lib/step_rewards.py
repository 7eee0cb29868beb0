"""Where the lines of a solution are known: do process rewards find the first wrong step?"""

import numpy as np

from lib.samples import first_wrong_line, known_steps, token_texts


def wrong_step_metrics(groups: list, stream, process) -> dict[str, float]:
    """How well process rewards [N, T] of the groups' answers tell right steps from wrong ones.

    wrong_step_found: the share of the wrong answers whose lowest reward is on their first wrong
    step. wrong_step_chance: what it would be for a token drawn at random. step_auc: the probability
    that a token of a right step has a higher reward than one of a first wrong step, all answers
    together; 0.5 says that rewards tell nothing. What follows a first wrong step is left out.

    No metrics if process is None, no solutions are known (see known_steps), or no answer is wrong.
    stream: a PromptStream.
    """
    if process is None:
        return {}
    found = []
    of_right = []
    of_wrong = []
    all_wrong_tokens = first_wrong_tokens(groups, stream)
    for i, (answer, steps) in enumerate(answers_with_steps(groups, stream)):
        if not steps:
            continue
        rewards = process[i, : len(answer.tokens)].tolist()
        wrong = all_wrong_tokens[i]
        if wrong is None:
            texts = token_texts(stream.tokenizer, answer.tokens)
            of_right += rewards[: tokens_of_line(texts, len(steps)).start]
            continue
        found.append(finds_wrong_step(rewards, wrong))
        of_right += rewards[: wrong.start]
        of_wrong += rewards[wrong.start : wrong.stop]

    if not found:
        return {}
    shares = [sum(values) / len(found) for values in zip(*found)]
    metrics = dict(wrong_step_found=shares[0], wrong_step_chance=shares[1])
    if of_right:
        metrics["step_auc"] = auc(of_right, of_wrong)
    return metrics


def answers_with_steps(groups: list, stream):
    """Yield all answers of the groups in their order, each with its problem's known steps."""
    for group in groups:
        steps = known_steps(stream.problems[group.index])
        for answer in group.answers:
            yield answer, steps


def first_wrong_tokens(groups: list, stream) -> list[range | None]:
    """The numbers of the tokens of each answer's first wrong step; None if no step is wrong.

    None, too, where the steps are not known. stream: a PromptStream.
    """
    found = []
    for answer, steps in answers_with_steps(groups, stream):
        if not steps or answer.outcome == 1:
            found.append(None)
            continue
        line = first_wrong_line(answer.text, steps, answer.outcome)
        texts = token_texts(stream.tokenizer, answer.tokens)
        found.append(tokens_of_line(texts, line))
    return found


def finds_wrong_step(rewards: list[float], step: range) -> tuple[bool, float]:
    """(Is the lowest of the rewards negative, and in this step?, the share of tokens that are).

    >>> finds_wrong_step([0, -0.1, 0, -0.2, 0], range(2, 5))
    (True, 0.6)
    """
    lowest = min(rewards)
    is_found = lowest < 0 and rewards.index(lowest) in step
    return is_found, len(step) / len(rewards)


def tokens_of_line(texts: list[str], line: int) -> range:
    """The numbers of the tokens of a line, the new line at its end included; lines count from 0.

    The last token if there is no such line: there it is missing.
    """
    first = None
    newlines = 0
    for number, text in enumerate(texts):
        newlines_then = newlines + text.count("\n")
        # A new line at a token's end begins a line of the next token.
        begins_here = newlines_then >= line and not text.endswith("\n")
        if first is None and (newlines >= line or begins_here):
            first = number
        if first is not None and newlines_then > line:
            return range(first, number + 1)
        newlines = newlines_then
    if first is None:
        first = len(texts) - 1
    return range(first, len(texts))


def auc(high: list[float], low: list[float]) -> float:
    """The probability that a number of `high` is greater than one of `low`; ties count one half.

    >>> auc([1, 2, 3], [0, 2])
    0.75
    """
    ordered = np.sort(high)
    not_greater = np.searchsorted(ordered, low, "left") + np.searchsorted(ordered, low, "right")
    return float(1 - not_greater.mean() / 2 / len(high))
