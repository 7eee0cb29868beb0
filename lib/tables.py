"""What a report of evaluate.py shows: Markdown tables, comparisons and a chart.

`results` is {model: {benchmark: summary}}, with the summaries of lib/scores.py, and `published` is
{column: {benchmark: percent}}. The first column belongs to the first model, and so on.
"""

import itertools
import math

import numpy as np

from lib.scores import accuracy, mcnemar

# ----------------------------------------------------------------------------------------------
# tables


def markdown(rows: list[dict]) -> str:
    """A Markdown table of dicts {column: cell}, without the columns that are empty everywhere.

    The first two columns are aligned to the left. A cell that is a pair is a mean and its
    standard error: (0.5, 0.25) becomes "50.0 ± 25.0".
    """
    columns = []
    for column in rows[0]:
        if any(row[column] != "" for row in rows):
            columns.append(column)

    alignment = ["---", "---"]
    alignment += ["--:"] * (len(columns) - 2)
    table = [columns, alignment]
    for row in rows:
        cells = [show(row[column]) for column in columns]
        table.append(cells)

    lines = []
    for cells in table:
        line = " | ".join(cells)
        lines.append(f"| {line} |\n")
    return "".join(lines)


def show(cell) -> str:
    if isinstance(cell, tuple):
        mean, error = cell
        return f"{100 * mean:.1f} ± {100 * error:.1f}"
    # A name may have what ends a cell or a line.
    return " ".join(str(cell).split()).replace("|", "\\|")


def tables(results: dict, published: dict, samples: int) -> str:
    """Markdown of the scores, and of the accuracy by subject and level with a column per model."""
    text = markdown(score_rows(results, published, samples))
    groups = group_rows(results)
    if groups:
        text += "\n" + markdown(groups)
    return text


def score_rows(results: dict, published: dict, samples: int) -> list[dict]:
    """A row per model and benchmark: scores, published numbers, lengths, missing answers."""
    # The largest pass@k with k up to half of the samples: k = samples is as noisy as one draw.
    k = 2 ** max(0, samples.bit_length() - 2)
    metrics = {
        "greedy": "greedy",
        "by their rules": "greedy_parity",
        f"avg@{samples}": "sampled",
        f"pass@{k}": f"pass@{k}",
        f"maj@{samples}": f"maj@{samples}",
        f"bon@{samples}": f"bon@{samples}",
        f"bon@{samples}, minimum": f"bon_min@{samples}",
    }
    numbers_of = dict(zip(results, published.values()))

    rows = []
    for model, scores in results.items():
        numbers = numbers_of.get(model, {})
        for name, summary in scores.items():
            row = {"model": model, "benchmark": name, "N": summary["problems"]}
            for column, metric in metrics.items():
                row[column] = summary["score"].get(metric, "")
            row["published"] = numbers.get(name, "")
            row[f"published maj@{samples}"] = numbers.get(f"{name} maj@{samples}", "")
            row |= answer_cells(summary)
            rows.append(row)
    return rows


def answer_cells(summary: dict) -> dict:
    """How long the answers are, and how many of them lack something."""
    no_box = ""
    if "no_box" in summary:
        no_box = f"{summary['no_box']:.1%}"
    reasons = summary.get("given_up", {})
    given_up = [f"{count} {reason}" for reason, count in reasons.items()]
    return {
        "tokens": f"{summary['tokens']:.0f}",
        "truncated": f"{summary['truncated']:.1%}",
        "no box": no_box,
        "given up": ", ".join(given_up),
    }


def group_rows(results: dict) -> list[dict]:
    """A row per benchmark and group, with the accuracy of each model."""
    rows = {}
    for model, scores in results.items():
        for name, summary in scores.items():
            groups = summary.get("by_group", {})
            for group, (mean, error, count) in groups.items():
                key = (name, group)
                if key not in rows:
                    rows[key] = {"benchmark": name, "group": group, "N": count}
                    rows[key] |= dict.fromkeys(results, "")
                rows[key][model] = (mean, error)
    return list(rows.values())


# ----------------------------------------------------------------------------------------------
# comparisons


def comparable(published: dict, sets) -> dict:
    """The published numbers, without averages over other benchmarks than those in `sets`."""
    result = {}
    for column, numbers in published.items():
        names = {name for name in numbers if " maj@" not in name}
        kept = dict(numbers)
        if names != {*sets, "average"}:
            kept.pop("average", None)
        result[column] = kept
    return result


def differences(results: dict, published: dict) -> list[str]:
    """Lines: is a model's difference from its published column, or the model before it, noise?"""
    lines = []
    for model, column in zip(results, published):
        lines += differences_from_published(model, results[model], column, published[column])
    for old, new in itertools.pairwise(results):
        for mode in ("greedy", "sampled"):
            lines += differences_from_model(new, results[new], old, results[old], mode)
    return lines


def differences_from_published(model: str, scores: dict, column: str, numbers: dict) -> list[str]:
    """A line per benchmark of which a number is published. scores: {benchmark: summary}."""
    lines = []
    for name, summary in scores.items():
        if name not in numbers or "greedy" not in summary["score"]:
            continue
        lead, noise = against_published(summary, numbers[name], name == "average")
        inside = "within" if abs(lead) <= noise else "beyond"
        lines.append(
            f"{name}: {model} {lead:+.1f} against {column} as published, "
            f"{inside} the noise of two runs (± {noise:.1f})"
        )
    return lines


def differences_from_model(new: str, scores: dict, old: str, before: dict, mode: str) -> list[str]:
    """A line per benchmark that both models have answered in this mode."""
    lines = []
    for name, summary in scores.items():
        a = summary.get("values", {})
        b = before[name].get("values", {})
        # An average has no values, and one of the models may have no answers.
        if mode in a and mode in b:
            difference = against_model(a[mode], b[mode], old)
            lines.append(f"{name}, {mode}: {new} {difference}")
    return lines


def against_model(a: list[float], b: list[float], old: str) -> str:
    """By how much the values of a are larger than those of the model `old`, and whether by chance.

    >>> against_model([1, 0, 1, 1], [1, 1, 0, 0], "old")
    '+25.0 against old, p = 1: within noise'
    """
    lead = 100 * (np.mean(a) - np.mean(b))
    p = mcnemar(a, b)
    text = f"{lead:+.1f} against {old}, p = {p:.2g}"
    if p > 0.05:
        text += ": within noise"
    return text


def against_published(summary: dict, number: float, is_average: bool) -> tuple[float, float]:
    """(difference from a published number, 95% of the noise of two runs), both in percent.

    By the published scripts' rules, if there are such verdicts. The published run's standard
    error is that of the number of right answers; of an average it is taken to be ours.
    """
    score = summary["score"]
    mean, error = score.get("greedy_parity", score["greedy"])
    if is_average:
        their_error = error
    else:
        right = round(number / 100 * summary["problems"])
        wrong = summary["problems"] - right
        _, their_error = accuracy([1] * right + [0] * wrong)
    return 100 * mean - number, 196 * math.hypot(error, their_error)


# ----------------------------------------------------------------------------------------------
# chart


def chart(results: dict, published: dict, mode: str, path: str) -> None:
    """Bars of accuracy with standard errors beside the published numbers, a group per benchmark."""
    from matplotlib.figure import Figure

    names = list(next(iter(results.values())))
    missing = (math.nan, math.nan)
    bars = []
    for model, scores in results.items():
        pairs = [scores[name]["score"].get(mode, missing) for name in names]
        heights = [100 * mean for mean, _ in pairs]
        errors = [100 * error for _, error in pairs]
        bars.append((drawn(model), heights, errors))
    for _, (column, numbers) in zip(results, published.items()):
        heights = [numbers.get(name, math.nan) for name in names]
        bars.append((f"{drawn(column)}, published", heights, None))

    figure = Figure((9, 4))
    ax = figure.subplots()
    width = 0.8 / len(bars)
    for i, (label, heights, errors) in enumerate(bars):
        offset = (i - (len(bars) - 1) / 2) * width
        places = [group + offset for group in range(len(names))]
        ax.bar(places, heights, width, yerr=errors, capsize=3, label=label)

    ax.set_xticks(range(len(names)), [drawn(name) for name in names], rotation=20)
    ax.set_ylabel(f"{mode}, % right")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight", format="png")


def drawn(name: str) -> str:
    """A name as matplotlib draws it: no formula, and bytes of a path that are no text as escapes.

    >>> drawn("a$b"), drawn("rl\\udcff")
    ('a\\\\$b', 'rl\\\\udcff')
    """
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
