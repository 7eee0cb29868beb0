"""
The statistics of evaluate.py: pure functions of verdicts, answers and texts, without settings.
"""
import collections
import math
import re

import numpy as np


def accuracy(values):
    """(mean, standard error of the mean) of a value of each problem.    accuracy([1, 0]) = (0.5, 0.5)"""
    n, mean = len(values), sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / (n * (n - 1))) ** 0.5 if n > 1 else float("nan")


def pass_at_k(n, c, k):
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones.   pass_at_k(4, 1, 2) = 0.5"""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers):
    """(the answer that most agree on, its share of all). Equivalent answers vote together, under the name of the first; a tie
    goes to those seen first; None is no vote, but lowers the share.    majority(["1/2", None, "0.5", "3"]) = ("1/2", 0.5)"""
    from grader import is_equiv
    votes, class_of = {}, {}
    for answer in answers:
        if answer is not None:
            text = re.sub(r"\\left|\\right|\\[,!;]|[\s$]", "", answer).replace("dfrac", "frac")      # this settles most
            if text not in class_of:
                class_of[text] = next((v for v in votes if is_equiv(answer, v) and is_equiv(v, answer)), answer)
            votes[class_of[text]] = votes.get(class_of[text], 0) + 1
    winner = max(votes, key=votes.get, default=None)
    return winner, votes.get(winner, 0) / max(1, len(answers))


def notebook_vote(answers):
    """The vote of NuminaMath's notebook (cell 18), for AIME-like answers only: rounded to integers, what is none or negative
    dropped, modulo 1000, the most frequent, ties to the first, 0 without a vote.   notebook_vote(["1003", "3.4", "5"]) = 3"""
    votes = {}
    for answer in answers:
        try:
            number = round(float(answer))
        except (TypeError, ValueError, OverflowError):
            number = -1
        if number >= 0:
            votes[number % 1000] = votes.get(number % 1000, 0) + 1
    return max(votes, key=votes.get, default=0)


def mcnemar(a, b):
    """Two-sided exact p-value of two models' verdicts on the same problems, from those where they differ.
    mcnemar([1, 1, 1, 0], [0, 0, 1, 0]) = 0.5: two differ, both in favour of a; 2 (1/2)^2"""
    only_a, only_b = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)


def paired_interval(a, b, resamples=10_000):
    """95 % interval of mean(a) - mean(b), of values of the same problems: percentiles over resampled problems."""
    d, rng = np.array(a, float) - np.array(b, float), np.random.default_rng(0)
    return [float(q) for q in np.percentile([d[rng.integers(0, len(d), len(d))].mean() for _ in range(resamples)], (2.5, 97.5))]


def by_problem(rows, problems, mode):
    """{id: its rows of a mode, in the order of the samples}"""
    out = {str(p["id"]): [] for p in problems}
    for row in sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["sample"]):
        out[str(row["problem_id"])].append(row)
    return out


def shares(answers, verdict="correct"):
    """Share of right ones of each problem's rows; without a row (its prompt was too long) it is 0."""
    return [sum(row[verdict] for row in rows) / max(1, len(rows)) for rows in answers.values()]


def summarize(rows, problems, tir_numina=False):
    """Metrics of one model on one benchmark; those in `score`, and by group, as (mean, standard error)."""
    n, lengths, score = max(1, len(rows)), sorted(row["n_tokens"] for row in rows) or [0], {}
    out = dict(problems=len(problems), responses=len(rows), tokens=sum(lengths) / n, tokens_p95=lengths[int(0.95 * (n - 1))],
               truncated=sum(row["finish_reason"] == "length" for row in rows) / n,
               no_box=sum(row["answer"] is None for row in rows) / n, score=score,
               endings={end: count / n for end, count in collections.Counter(row["finish_reason"] for row in rows).items()})
    for mode in ("greedy", "sampled"):
        answers = by_problem(rows, problems, mode)
        share, k = shares(answers), max(map(len, answers.values()))
        if not k:
            continue
        score[mode] = accuracy(share)
        if all("parity" in row for own in answers.values() for row in own):
            score[f"{mode}_parity"] = accuracy(shares(answers, "parity"))
        groups = collections.defaultdict(list)
        for p, s in zip(problems, share):
            for group in p["group"]:
                groups[group].append(s)
        out[f"{mode}_by_group"] = {group: (*accuracy(values), len(values)) for group, values in sorted(groups.items())}
        if mode == "sampled":
            right = [sum(row["correct"] for row in own) for own in answers.values()]
            for m in (2 ** i for i in range(k.bit_length())):
                score[f"pass@{m}"] = accuracy([pass_at_k(k, c, m) for c in right])
            if problems[0]["ability"] == "math":            # programs do not vote
                votes = [[row["answer"] if row["finish_reason"] in ("stop", "length") else None for row in own]
                         for own in answers.values()]       # no vote from a conversation with its tool that went astray
                winners, confidences = zip(*map(majority, votes))
                right = [any(row["correct"] for row in own if row["answer"] == winner)
                         for own, winner in zip(answers.values(), winners)]
                if tir_numina:
                    golds = [re.fullmatch(r"-?\d+", str(p["ground_truth"])) for p in problems]
                    right = [bool(gold) and notebook_vote(vote) == int(gold[0]) % 1000 for vote, gold in zip(votes, golds)]
                score[f"maj@{k}"] = accuracy(right)
                out["vote_confidence"] = sum(confidences) / len(confidences)
    return out


def average(scores):
    """Plain mean over benchmarks, as the model cards have it, of what all of them have."""
    n, score = len(scores), {}
    for metric in [m for m in scores[0]["score"] if all(m in s["score"] for s in scores)]:
        means, errors = zip(*(s["score"][metric] for s in scores))
        score[metric] = sum(means) / n, sum(se ** 2 for se in errors) ** 0.5 / n
    return dict(score=score, problems=sum(s["problems"] for s in scores)) | {
        k: sum(s[k] for s in scores) / n for k in ("tokens", "truncated", "no_box")}


def ngrams(text, ngram=10):
    """The set of a text's n-grams of words and numbers, lower case, without LaTeX's signs; all its words if there are fewer."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return {tuple(words[i:i + ngram]) for i in range(max(1, len(words) - ngram + 1))}
