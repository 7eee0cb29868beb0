"""lib/scores.py and lib/tables.py: statistics by hand and by brute force, summaries, tables."""

import collections
import itertools
import math
import random
import statistics

import pytest

from grader import is_equiv
from lib import scores, tables
from lib.problems import Problem


def make_problem(number, ability="math", ground_truth="1", group=(), own_reward=False):
    return Problem(
        id=number,
        text=f"{number}?",
        messages=[],
        ability=ability,
        ground_truth=ground_truth,
        group=list(group),
        own_reward=own_reward,
    )


def make_rows(verdicts, answers=None):
    """Rows of sampled answers; verdicts[problem][sample]: is it right? answers: likewise."""
    rows = []
    for i, own in enumerate(verdicts):
        for k, right in enumerate(own):
            row = dict(
                problem_id=i,
                mode="sampled",
                sample=k,
                correct=right,
                answer=answers[i][k] if answers else str(right),
                n_tokens=10 * (k + 1),
                finish_reason="length" if k == 1 else "stop",
            )
            rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------
# statistics


def test_accuracy_by_hand():
    assert scores.accuracy([1, 0]) == (0.5, 0.5)

    values = [1.0, 0.5, 0.25, 0.0, 1.0]
    mean, error = scores.accuracy(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 5**0.5)

    # AIME: one greedy answer per problem is a Bernoulli trial.
    mean, error = scores.accuracy([1] * 8 + [0] * 22)
    assert error == pytest.approx((mean * (1 - mean) / 29) ** 0.5)
    assert error == pytest.approx(0.082, abs=1e-3)


def test_the_error_of_none_and_of_all_by_hand():
    """0 of 30 becomes 2 of 34, whose error is sqrt(2/34 * 32/34 / 34) = 8 / 34^1.5."""
    assert scores.accuracy([0] * 30) == (0, pytest.approx(8 / 34**1.5))
    assert scores.accuracy([0] * 30)[1] == pytest.approx(0.04035, abs=1e-5)
    assert scores.accuracy([1] * 30) == (1, pytest.approx(8 / 34**1.5))
    assert scores.accuracy([True]) == (1, pytest.approx((3 / 5 * 2 / 5 / 5) ** 0.5))

    # 8 of 16.
    assert scores.accuracy([0.5] * 12) == (0.5, pytest.approx(0.125))


def test_pass_at_k_by_counting():
    for n in range(1, 7):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(samples, k))
                share = sum(any(draw) for draw in draws) / len(draws)
                assert scores.pass_at_k(n, c, k) == pytest.approx(share)


def test_majority_by_hand():
    def majority(*answers):
        return scores.majority(list(answers), is_equiv)

    assert majority("1/2", None, "0.5", "3") == ("1/2", 0.5)
    assert majority(r"\dfrac{1}{2}", "2", r"\frac12", " 2", r"\left( 2 \right)") == ("2", 0.6)
    assert majority(None, None, "7") == ("7", pytest.approx(1 / 3))
    assert majority(None, None) == (None, 0.0)
    assert majority() == (None, 0.0)

    # A tie goes to the one seen first.
    assert majority("3", "x", "x", "3") == ("3", 0.5)
    assert majority("x", "3", "3", "x") == ("x", 0.5)

    # A decimal is no third, whatever a gold grants.
    assert majority("0.33", "1/3", "1/3") == ("1/3", pytest.approx(2 / 3))


def test_majority_does_not_depend_on_the_order():
    answers = ["12", "12.0", r"\boxed{12}", "13", "13", "x+1", None]
    for seed in range(50):
        random.Random(seed).shuffle(answers)
        winner, share = scores.majority(answers, is_equiv)
        assert is_equiv(winner, "12")
        assert share == 3 / 7


def test_a_vote_without_hostile_answers_is_the_plain_one():
    answers = ["1/2", None, "0.5", "3", r"\frac12", "x", "3.0", "50%", "-1", "2", "(1,2)", "x+0"]
    for k in range(len(answers)):
        order = answers[k:] + answers[:k]
        assert scores.majority(order, scores.Agreement(is_equiv)) == scores.majority(
            order, is_equiv
        )


class Clock:
    """A clock that only goes on when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(scores.time, "monotonic", lambda: self.now)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 2, 5])
def test_hostile_answers_do_not_hold_up_a_vote(seconds, monkeypatch):
    """Each may take some seconds; the others are compared as ever."""
    clock = Clock(monkeypatch)
    spent = collections.Counter()

    def agree(answer, other):
        for text in {answer, other}:
            if text.startswith("slow"):
                spent[text] += seconds
                clock.now += seconds
        return is_equiv(answer, other)

    answers = ["slow first"]
    for k, answer in enumerate(["1/2", "0.5", r"\frac12", "3"] * 25):
        answers += [answer, f"slow {k}"]
    winner, share = scores.majority(answers, scores.Agreement(agree))
    assert (winner, share) == ("1/2", 75 / 201)
    assert max(spent.values()) <= 4 * max(seconds, 3)

    # The same text is the same answer, however long it takes.
    assert scores.majority(["slow"] * 3 + ["1"] * 2, scores.Agreement(agree)) == ("slow", 0.6)


def test_answers_that_are_slow_only_together_do_not_hold_up_a_vote(monkeypatch):
    clock = Clock(monkeypatch)

    def agree(answer, other):
        if "0" not in (answer, other):
            clock.now += 5
        return False

    scores.majority([f"x{k}" for k in range(100)], scores.Agreement(agree))
    assert clock.now <= 5 * 100


def test_notebook_vote_by_hand():
    vote = scores.notebook_vote
    assert vote(["1003", "3.4", "5"]) == 3
    # Halves go to the even number; modulo 1000; a tie to the first seen.
    assert vote(["2.5", "3"]) == 2
    assert vote(["1e3", "7"]) == 0
    assert vote(["9", "4", "4", "9"]) == 9
    # Negative numbers and what is no number are dropped; 0 without a vote.
    assert vote(["-1", "-1", "6"]) == 6
    assert vote(["x", None, "inf", "nan"]) == 0
    assert vote([]) == 0


def test_mcnemar_by_counting_signs():
    rng = random.Random(0)
    for _ in range(20):
        a = [rng.random() < 0.5 for _ in range(12)]
        b = [rng.random() < 0.5 for _ in range(12)]
        differ = sum(x != y for x, y in zip(a, b))
        lead = abs(sum(a) - sum(b))

        # Under the null hypothesis each difference falls either way.
        outcomes = list(itertools.product((-1, 1), repeat=differ))
        chance = sum(abs(sum(signs)) >= lead for signs in outcomes) / len(outcomes)
        assert scores.mcnemar(a, b) == pytest.approx(chance)
        assert scores.mcnemar(b, a) == scores.mcnemar(a, b)
    assert scores.mcnemar([1, 0], [1, 0]) == 1.0


# ----------------------------------------------------------------------------------------------
# summaries


def test_summary_by_hand():
    problems = []
    for number, level in enumerate(["level 1", "level 1", "level 2", "level 2"]):
        problems.append(make_problem(number, group=[level]))
    verdicts = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    answers = [["5", "5.0", "6", "6"], [None] * 4, ["1", "2", "2", "2"], ["9"] * 4]
    rows = make_rows(verdicts, answers)

    # The order of the file does not matter.
    summary = scores.summarize(rows[::-1], problems, is_equiv)
    score = summary["score"]
    assert score["sampled"] == scores.accuracy([0.5, 0, 0.25, 1])
    assert score["pass@1"] == pytest.approx(score["sampled"])
    assert score["pass@2"] == pytest.approx(scores.accuracy([5 / 6, 0, 1 / 2, 1]))
    assert score["pass@4"] == scores.accuracy([1, 0, 1, 1])
    assert score["maj@4"] == scores.accuracy([1, 0, 0, 1])
    assert summary["vote_confidence"] == pytest.approx((0.5 + 0 + 0.75 + 1) / 4)
    assert summary["by_group"] == {
        "level 1": (*scores.accuracy([0.5, 0]), 2),
        "level 2": (*scores.accuracy([0.25, 1]), 2),
    }
    assert summary["tokens"] == 25
    assert summary["tokens_p95"] == 40
    assert summary["truncated"] == 0.25
    assert summary["no_box"] == 0.25
    assert summary["given_up"] == {}
    assert summary["endings"] == {"stop": 12, "length": 4}

    # A problem without rows, because its prompt was too long, counts as wrong.
    missing = scores.summarize(rows[:12], problems, is_equiv)
    assert missing["score"]["sampled"] == scores.accuracy([0.5, 0, 0.25, 0])

    both = scores.average([summary, missing])
    mean, error = both["score"]["sampled"]
    assert mean == pytest.approx((1.75 + 0.75) / 8)
    errors = (score["sampled"][1], missing["score"]["sampled"][1])
    assert error == pytest.approx(math.hypot(*errors) / 2)


def test_failures_of_the_grader_are_counted():
    rows = make_rows([[0] * 4] * 4)
    kinds = ["timeouts", None, "unparsed", "timeouts"]
    for row in rows:
        row["failure"] = kinds[row["problem_id"]]
    problems = [make_problem(number) for number in range(4)]
    summary = scores.summarize(rows, problems, is_equiv)
    assert summary["given_up"] == {"timeouts": 8, "unparsed": 4}


def test_scores_of_an_own_reward_are_averaged():
    """pass@k counts what is entirely right. No votes, and no count of missing boxes."""
    rows = make_rows([[0, 1], [0, 0]])
    for row, score in zip(rows, [0.5, 1.0, 0.25, 0.0]):
        row["score"] = score
        row["answer"] = None
    problems = [make_problem(0, own_reward=True), make_problem(1, own_reward=True)]
    summary = scores.summarize(rows, problems, is_equiv)
    assert summary["values"] == {"sampled": [0.75, 0.125], "pass@1": [0.5, 0], "pass@2": [1, 0]}
    assert "no_box" not in summary
    assert "vote_confidence" not in summary

    average = scores.average([summary, summary])
    assert average["score"]["sampled"][0] == pytest.approx(0.4375)
    results = {"model": {"a": summary, "b": summary, "average": average}}
    table = tables.tables(results, {}, samples=2)
    assert "| avg@2 |" in table
    assert "no box" not in table
    assert "maj@2" not in table


def test_without_a_vote_nothing_is_right():
    (rows,) = scores.by_problem(make_rows([[1, 1]], [[None, None]]), [make_problem(0)], "sampled")
    assert scores.vote(rows, make_problem(0), is_equiv) == (False, 0.0)


def test_votes_are_of_mathematics_whatever_the_order():
    """A program among the problems: no vote, wherever it is."""
    problems = [make_problem(0), make_problem(1, ability="code")]
    rows = make_rows([[True, True], [True, True]])
    for order in (problems, problems[::-1]):
        summary = scores.summarize(rows, order, is_equiv)
        assert set(summary["values"]) == {"sampled", "pass@1", "pass@2"}


def test_votes_of_conversations_with_the_tool():
    """Those that lost their way have no vote; the notebook's votes are modulo 1000."""
    golds = ["1003", "1/2", "7"]
    problems = [make_problem(i, ground_truth=gold) for i, gold in enumerate(golds)]
    answers = [["3", "3", "1003"], ["0.5", "\\frac12", "3"], ["7", "8", "8"]]
    rows = make_rows([[0, 0, 1], [1, 1, 0], [1, 0, 0]], answers)
    for row in rows:
        lost = row["problem_id"] == 2 and row["sample"] > 0
        row["finish_reason"] = "malformed" if lost else "stop"

    # Not the first problem: 3 is not 1003. For the notebook not the second: 1/2 is no integer.
    for numina, right in ((False, [0, 1, 1]), (True, [1, 0, 1])):
        summary = scores.summarize(rows, problems, is_equiv, numina=numina)
        assert summary["values"]["maj@3"] == right
        assert summary["score"]["maj@3"][0] == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------
# tables


def make_summary(**values):
    """A summary with these values per problem."""
    score = {metric: scores.accuracy(own) for metric, own in values.items()}
    problems = len(next(iter(values.values())))
    return dict(problems=problems, values=values, score=score)


def test_differences_by_hand():
    # As on the model card: the errors are 8.21 each, 1.96 * 8.21 * sqrt(2) = 22.8.
    right = [1] * 8 + [0] * 22
    old = make_summary(greedy=right, sampled=[0.5] * 30)
    new = make_summary(greedy=[1] * 16 + [0] * 14, sampled=[0.5] * 21 + [1] * 9)
    published = {"Card": {"b": 26.7}, "None": {"b": 0.0, "missing": 5.0}}
    lines = tables.differences({"old": {"b": old}, "new": {"b": new}}, published)
    assert lines == [
        "b: old -0.0 against Card as published, within the noise of two runs (± 22.8)",
        # 16 of 30 have the error 9.26, none of 30 has 4.03.
        "b: new +53.3 against None as published, beyond the noise of two runs (± 19.8)",
        # 8 differ, all in favour of new: 2 / 2^8. Then 9: 2 / 2^9.
        "b, greedy: new +26.7 against old, p = 0.0078",
        "b, sampled: new +15.0 against old, p = 0.0039",
    ]

    old = make_summary(greedy=[1, 1, 0, 0])
    new = make_summary(greedy=[1, 0, 1, 1])
    lines = tables.differences({"old": {"b": old}, "new": {"b": new}}, {})
    assert lines == ["b, greedy: new +25.0 against old, p = 1: within noise"]

    # What only one of the models has is not compared.
    new = make_summary(greedy=[1, 1, 1, 1], sampled=[0.5] * 4)
    assert len(tables.differences({"old": {"b": old}, "new": {"b": new}}, {})) == 1


def test_markdown_leaves_out_empty_columns():
    rows = [
        {"model": "a", "benchmark": "b", "empty": "", "greedy": (0.5, 0.25), "N": 7},
        {"model": "c", "benchmark": "d", "empty": "", "greedy": "", "N": 8},
    ]
    assert tables.markdown(rows) == (
        "| model | benchmark | greedy | N |\n"
        "| --- | --- | --: | --: |\n"
        "| a | b | 50.0 ± 25.0 | 7 |\n"
        "| c | d |  | 8 |\n"
    )


def test_a_name_stays_in_its_cell():
    rows = [{"model": "a|b\nc", "N": 1}]
    assert tables.markdown(rows).splitlines()[2] == r"| a\|b c | 1 |"


def test_averages_over_other_benchmarks_are_not_comparable():
    published = {"Card": {"a": 1.0, "b": 2.0, "b maj@4": 5.0, "average": 1.5}}
    assert tables.comparable(published, {"a": [], "b": []}) == published
    kept = tables.comparable(published, {"a": [], "b": [], "c": []})
    assert kept == {"Card": {"a": 1.0, "b": 2.0, "b maj@4": 5.0}}
    assert "average" in published["Card"]
