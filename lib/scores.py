"""From stored responses to numbers: metrics of a model on a benchmark, and the statistics in them.

A row is a stored response (a dict); a metric is a value per problem, and its mean with an error.
"""

import collections
import contextlib
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from lib.problems import Problem

# Stored responses, and one value per problem.
Rows = list[dict]
Values = Sequence[float]

# Of two answers: is the first right if the second is the gold? grader.is_equiv, for example.
Agree = Callable[[str, str], bool]

# Seconds that an answer may hold up a vote, beyond those that any comparison may take on a busy
# machine.
VOTE_SECONDS = 3.0
USUAL_SECONDS = 0.1


# ----------------------------------------------------------------------------------------------
# metrics of a benchmark


def summarize_sets(
    rows: Rows,
    sets: dict[str, list[Problem]],
    agree: Agree,
    numina: bool = False,
    ranked: bool = False,
) -> dict[str, dict]:
    """{benchmark: summary} of one model's rows, and their "average" if there are several."""
    summaries = {}
    for name, problems in sets.items():
        own = [row for row in rows if row["benchmark"] == name]
        summaries[name] = summarize(own, problems, agree, numina, ranked)
    if len(sets) > 1:
        summaries["average"] = average(list(summaries.values()))
    return summaries


def summarize(
    rows: Rows,
    problems: list[Problem],
    agree: Agree,
    numina: bool = False,
    ranked: bool = False,
) -> dict:
    """The metrics of one model on one benchmark.

    values: {metric: a value per problem}, 0 for a problem without a row (its prompt was too long).
    score: {metric: (mean, standard error)}. by_group: {group: (mean, standard error, problems)} of
    the first metric. agree: as for majority(). numina: votes are those of NuminaMath's notebook.
    ranked: with best_metrics(). Without it ranks of an earlier run, by any PRM, do not count.
    """
    values = {}
    summary = describe(rows, problems)
    summary["values"] = values

    greedy = by_problem(rows, problems, "greedy")
    if any(greedy):
        values |= share_metrics("greedy", greedy)
    sampled = by_problem(rows, problems, "sampled")
    if any(sampled):
        values |= share_metrics("sampled", sampled)
        values |= pass_metrics(sampled)
        if ranked:
            values |= best_metrics(sampled)
        # Programs do not vote, nor do answers of which only an own reward knows what is alike.
        if all(problem.ability == "math" and not problem.own_reward for problem in problems):
            right, confidence = votes(sampled, problems, agree, numina)
            values[f"maj@{count_samples(sampled)}"] = right
            summary["vote_confidence"] = share(confidence)

    first = next(iter(values.values()), [0] * len(problems))
    summary["by_group"] = score_groups(first, problems)
    summary["score"] = {metric: accuracy(own) for metric, own in values.items()}
    return summary


def describe(rows: Rows, problems: list[Problem]) -> dict:
    """How many responses there are, how long they are, how they end, and what the grader missed.

    truncated, no_box: shares of the responses. endings, given_up: {reason: number of responses}.
    An own reward may want no box: then there is no no_box.
    """
    lengths = []
    no_answer = []
    endings = collections.Counter()
    given_up = collections.Counter()
    for row in rows:
        lengths.append(row["n_tokens"])
        no_answer.append(row["answer"] is None)
        endings[row["finish_reason"]] += 1
        if row.get("failure"):
            given_up[row["failure"]] += 1

    summary = dict(
        problems=len(problems),
        responses=len(rows),
        tokens=share(lengths),
        tokens_p95=np.percentile(lengths or [0], 95),
        truncated=endings["length"] / max(1, len(rows)),
        no_box=share(no_answer),
        given_up=given_up,
        endings=endings,
    )
    if any(problem.own_reward for problem in problems):
        del summary["no_box"]
    return summary


def share(values: Values) -> float:
    """The mean; 0 if there are none."""
    return sum(values) / max(1, len(values))


def average(summaries: Rows) -> dict:
    """The plain mean over benchmarks, as on the model cards, of the metrics that they all have."""
    score = {}
    for metric in summaries[0]["score"]:
        pairs = [summary["score"].get(metric) for summary in summaries]
        if None in pairs:
            continue
        means, errors = zip(*pairs)
        score[metric] = (np.mean(means), math.hypot(*errors) / len(pairs))

    result = dict(score=score)
    result["problems"] = sum(summary["problems"] for summary in summaries)
    for key in ("tokens", "truncated", "no_box"):
        if all(key in summary for summary in summaries):
            result[key] = np.mean([summary[key] for summary in summaries])
    return result


def by_problem(rows: Rows, problems: list[Problem], mode: str) -> list[Rows]:
    """The rows of one mode, "greedy" or "sampled", of each problem, in the order of the samples."""
    found = {str(problem.id): [] for problem in problems}
    for row in sorted(rows, key=lambda row: row["sample"]):
        if row["mode"] == mode:
            found[str(row["problem_id"])].append(row)
    return list(found.values())


def count_samples(answers: list[Rows]) -> int:
    """Answers per problem; a problem whose prompt was too long has none."""
    return max(len(own) for own in answers)


def share_metrics(mode: str, answers: list[Rows]) -> dict[str, list[float]]:
    """{mode: the share of a problem's answers that are right}, also by the published rules.

    In place of 0 and 1 an answer counts with the score of an own reward, if it has one.
    """
    shares = []
    for own in answers:
        scores = [row.get("score", row["correct"]) for row in own]
        shares.append(share(scores))
    metrics = {mode: shares}

    if all("parity" in row for row in itertools.chain(*answers)):
        shares = []
        for own in answers:
            verdicts = [row["parity"] for row in own]
            shares.append(share(verdicts))
        metrics[f"{mode}_parity"] = shares
    return metrics


def pass_metrics(answers: list[Rows]) -> dict[str, list[float]]:
    """pass@1, pass@2, pass@4 and so on, up to the number of samples."""
    samples = count_samples(answers)
    right = []
    for own in answers:
        right.append(sum(row["correct"] for row in own))

    metrics = {}
    k = 1
    while k <= samples:
        metrics[f"pass@{k}"] = [pass_at_k(samples, c, k) for c in right]
        k *= 2
    return metrics


def best_metrics(answers: list[Rows]) -> dict[str, list[float]]:
    """bon@1, bon@2, bon@4 and so on by the PRM's mean log-ratio, bon_min@k by the smallest one.

    Also for k = all samples, which the table shows. None where an answer has no ranking
    (lib/ranking.py).
    """
    if not all("prm" in row for row in itertools.chain(*answers)):
        return {}
    samples = count_samples(answers)
    counts = []
    k = 1
    while k < samples:
        counts.append(k)
        k *= 2
    counts.append(samples)

    metrics = {}
    for name, column in (("bon", "mean"), ("bon_min", "min")):
        for k in counts:
            metrics[f"{name}@{k}"] = [best_answer(own, column, k) for own in answers]
    return metrics


def best_answer(rows: Rows, column: str, k: int) -> float:
    """best_of_k() of a problem's rows, all of them if there are fewer than k; 0 if there are none.

    Rows without a rank come last.
    """
    if not rows:
        return 0.0
    ranks = []
    for row in rows:
        value = row["prm"][column]
        ranks.append(-math.inf if value is None else value)
    right = [float(row.get("score", row["correct"])) for row in rows]
    return best_of_k(ranks, right, min(k, len(rows)))


def votes(
    answers: list[Rows], problems: list[Problem], agree: Agree, numina: bool
) -> tuple[list[bool], list[float]]:
    """The two results of vote() for each problem."""
    verdicts = []
    shares = []
    for own, problem in zip(answers, problems):
        right, confidence = vote(own, problem, agree, numina)
        verdicts.append(right)
        shares.append(confidence)
    return verdicts, shares


def vote(rows: Rows, problem: Problem, agree: Agree, numina: bool = False) -> tuple[bool, float]:
    """(is the answer that most of a problem's rows agree on right?, its share of the rows).

    A conversation with the tool that was malformed or ran out of rounds has no vote.
    """
    answers = []
    for row in rows:
        if row["finish_reason"] in ("rounds", "malformed"):
            answers.append(None)
        else:
            answers.append(row["answer"])
    winner, confidence = majority(answers, Agreement(agree))

    if not numina:
        # Without a vote there is no winner.
        right = any(row["correct"] and row["answer"] == winner for row in rows)
        return winner is not None and right, confidence
    gold = str(problem.ground_truth)
    if re.fullmatch(r"-?\d+", gold) is None:
        return False, confidence
    return notebook_vote(answers) == int(gold) % 1000, confidence


def score_groups(values: list[float], problems: list[Problem]) -> dict[str, tuple]:
    """{group: (mean, standard error, number of problems)}, groups in alphabetical order."""
    members = collections.defaultdict(list)
    for value, problem in zip(values, problems):
        for group in set(problem.group):
            members[group].append(value)

    scores = {}
    for group in sorted(members):
        mean, error = accuracy(members[group])
        scores[group] = (mean, error, len(members[group]))
    return scores


# ----------------------------------------------------------------------------------------------
# statistics


def accuracy(values: Values) -> tuple[float, float]:
    """The mean of one value in [0, 1] per problem, and its standard error.

    >>> accuracy([1, 0])
    (0.5, 0.5)

    Values that are all the same would have the error 0. Theirs is the error of a proportion with
    two successes and two failures more (Agresti and Coull, The American Statistician 52, 1998):
    accuracy([0] * 30) = (0.0, 0.040), which is sqrt(p (1 - p) / 34) with p = 2/34.
    """
    n = len(values)
    mean = sum(values) / n
    if min(values) == max(values):
        p = (sum(values) + 2) / (n + 4)
        return mean, math.sqrt(p * (1 - p) / (n + 4))
    squares = sum((x - mean) ** 2 for x in values)
    return mean, math.sqrt(squares / (n * (n - 1)))


def best_of_k(ranks: list[float], right: list[float], k: int) -> float:
    """Expected `right` of the highest-ranked of k answers, drawn without replacement.

    Exact, over all subsets of k of the n answers: the highest is among those of one rank with
    probability (C(m + t, k) - C(m, k)) / C(n, k), for m answers of lower ranks and t of this one,
    and each of these t is taken equally often.

    >>> best_of_k([0.1, 0.5, 0.9], [1, 1, 0], 2)
    0.3333333333333333
    """
    n = len(ranks)
    expected = 0.0
    for rank in set(ranks):
        tied = [value for value, other in zip(right, ranks) if other == rank]
        lower = sum(other < rank for other in ranks)
        ways = math.comb(lower + len(tied), k) - math.comb(lower, k)
        expected += ways / math.comb(n, k) * share(tied)
    return expected


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones.

    >>> pass_at_k(4, 1, 2)
    0.5

    The unbiased estimate of Chen et al., Evaluating Large Language Models Trained on Code, 2021.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[str | None], agree: Agree) -> tuple[str | None, float]:
    """The answer that most of `answers` agree on, and its share of all of them.

    Answers that agree in both directions vote together, under the name of the first; a tie goes
    to the one seen first. None is no vote, but lowers the share.

    >>> majority(["1/2", None, "0.5", "3"], is_equiv)
    ('1/2', 0.5)
    """
    votes = collections.Counter()
    names = {}
    for answer in answers:
        if answer is None:
            continue
        # A text that has voted before votes as it did.
        if answer not in names:
            names[answer] = answer
            for other in votes:
                if agree(answer, other) and agree(other, answer):
                    names[answer] = other
                    break
        votes[names[answer]] += 1

    winner = max(votes, key=votes.get, default=None)
    return winner, votes[winner] / max(1, len(answers))


class Agreement:
    """An Agree that costs a bounded time, however hostile the answers are.

    An answer that has held up a vote, and takes long also beside a plain number, agrees with its
    own text alone from then on.
    """

    def __init__(self, agree: Agree):
        self.agree = agree
        self.lost = collections.Counter()
        self.slow = set()

    def __call__(self, answer: str, other: str) -> bool:
        if answer in self.slow or other in self.slow:
            return answer == other
        same, long = self.timed(answer, other)
        for text in (answer, other):
            self.lost[text] += long
            if self.lost[text] > VOTE_SECONDS:
                self.lost[text] = 0.0
                _, alone = self.timed(text, "0")
                if alone > 0:
                    self.slow.add(text)
        # Only the two together are slow. There may be many such pairs.
        if long > VOTE_SECONDS and not {answer, other} & self.slow:
            self.slow.add(answer)
        return same

    def timed(self, answer: str, other: str) -> tuple[bool, float]:
        """(agree(answer, other), seconds that it took beyond the usual)."""
        began = time.monotonic()
        same = self.agree(answer, other)
        seconds = time.monotonic() - began
        return same, max(0.0, seconds - USUAL_SECONDS)


def notebook_vote(answers: list[str | None]) -> int:
    """The vote of NuminaMath's notebook (cell 18), which is for answers like AIME's only.

    Answers are rounded to integers; those that are no numbers or negative are dropped; the most
    frequent value modulo 1000 wins, a tie goes to the first; without a vote it is 0.

    >>> notebook_vote(["1003", "3.4", "5"])
    3
    """
    votes = []
    for answer in answers:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = round(float(answer))
            if number >= 0:
                votes.append(number % 1000)
    if not votes:
        return 0
    return statistics.mode(votes)


def mcnemar(a: Values, b: Values) -> float:
    """The exact two-sided p-value of two models' verdicts on the same problems.

    Only the problems on which they differ count. For shares of right samples in place of
    verdicts it is the sign test. In the example two differ, both in favour of a: 2 (1/2)^2.

    >>> mcnemar([1, 1, 1, 0], [0, 0, 1, 0])
    0.5
    """
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(x < y for x, y in zip(a, b))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)
