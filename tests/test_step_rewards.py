"""lib/step_rewards.py: do process rewards find the first wrong step? Counted by hand."""

import doctest
import random

import pytest
import torch

from lib import step_rewards
from lib.answers import Answer
from lib.pretrained import load_tokenizer
from lib.problems import Problem
from lib.rollouts import Group, PromptStream


def share_of_pairs(high, low):
    """Of all pairs of a number of `high` and one of `low`, those whose first is the greater."""
    wins = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    return sum(wins) / len(wins)


def test_metrics_of_wrong_steps(world):
    """Two wrong answers of three lines. In the first the lowest reward is on the wrong step, the
    second of three, which has 9 of its 26 tokens; in the other it is on the right step.
    """
    tokenizer = load_tokenizer(f"{world}/init")
    steps = ["1+1+0=02", "1+1+0=02"]
    problem = Problem(0, "11+11?", [], "math", "22", dict(steps=steps))
    answers = []
    for second, outcome in (("1+1+0=03", 0.0), ("1+1+0=01", 0.0), (steps[1], 1.0)):
        text = f"{steps[0]}\n{second}\n1+1+0=02"
        tokens = tokenizer.encode(text)
        answers.append(Answer(tokens, [], "stop", text=text, outcome=outcome))
    groups = [Group(0, [1], answers)]
    stream = PromptStream([problem], tokenizer, 10, seed=0)

    process = torch.zeros(3, 26)
    process[0, 16] = -0.2
    process[0, 3] = -0.1
    process[1, 3] = -0.2
    process[1, 16] = -0.1
    metrics = step_rewards.wrong_step_metrics(groups, stream, process)
    assert metrics["wrong_step_found"] == 0.5
    assert metrics["wrong_step_chance"] == pytest.approx(9 / 26)

    # Of right steps: 9 tokens before each wrong one, and the two lines of the right answer.
    right = process[0, :9].tolist() + process[1, :9].tolist() + process[2, :18].tolist()
    wrong = process[0, 9:18].tolist() + process[1, 9:18].tolist()
    assert metrics["step_auc"] == pytest.approx(share_of_pairs(right, wrong))

    assert step_rewards.wrong_step_metrics(groups, stream, None) == {}
    problem.row.clear()
    assert step_rewards.wrong_step_metrics(groups, stream, process) == {}


def test_auc_by_all_pairs():
    draw = random.Random(0)
    for _ in range(20):
        high = [draw.randint(0, 5) for _ in range(draw.randint(1, 9))]
        low = [draw.randint(0, 5) for _ in range(draw.randint(1, 9))]
        assert step_rewards.auc(high, low) == pytest.approx(share_of_pairs(high, low))


def test_examples_of_the_docstrings():
    assert doctest.testmod(step_rewards).failed == 0
