"""
Accuracy and speed of the grader, by file and category, beside math-verify where it is installed.

    python bench/grader.py FOLDER [name ...]

FOLDER holds cases.jsonl, near_misses.jsonl, ... (or .jsonl.gz), of which the names choose some.
A row has `gold`, `expected` (true, false, or null: not counted), and one of
    prediction          a bare answer, or free text if its `kind` is "response"
    response            free text
    prediction_parts    pairs of a string and a count, an attack
Free text is graded with fallback=True. math-verify gets golds and bare answers between dollars.

wrong+ are false accepts, wrong- false rejects. Times are milliseconds of wall clock per call in
this process, after one call to warm up.
"""

import gzip
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grader  # noqa: E402

FILES = [
    "cases",
    "near_misses",
    "latex_parse",
    "public_reports",
    "real_math",
    "real_gsm8k",
    "security",
]
WARM_UP = {"gold": r"\sqrt{2}", "prediction": "x", "expected": False}


@dataclass
class Result:
    """One call of a judge."""

    category: str
    expected: bool
    verdict: bool
    milliseconds: float


def read_rows(folder, name):
    path = Path(folder, name + ".jsonl")
    if path.exists():
        lines = path.read_text("utf-8").splitlines()
    else:
        with gzip.open(Path(folder, name + ".jsonl.gz"), "rt", encoding="utf-8") as file:
            lines = file.readlines()
    return [json.loads(line) for line in lines]


def text_of(row):
    """(text, is it free text, from which the answer must be extracted?)"""
    if "response" in row:
        return row["response"], True
    if "prediction_parts" in row:
        return "".join(part * count for part, count in row["prediction_parts"]), True
    return row["prediction"], row.get("kind") == "response"


def ours(row):
    text, is_free = text_of(row)
    if not is_free:
        return grader.is_equiv(text, row["gold"])
    return grader.grade_math(text, row["gold"], fallback="prediction_parts" not in row)


def math_verify(row):
    from math_verify import parse, verify

    text, is_free = text_of(row)
    gold = row["gold"]
    if row.get("gold_kind") != "solution":
        gold = f"${gold}$"
    if not is_free:
        text = f"${text}$"
    return verify(parse(gold), parse(text))


def available_judges():
    judges = {"ours": ours}
    if importlib.util.find_spec("math_verify"):
        judges["math-verify"] = math_verify
    return judges


def measure(rows, judge):
    judge(WARM_UP)
    results = []
    for row in rows:
        start = time.perf_counter()
        verdict = bool(judge(row))
        milliseconds = 1000 * (time.perf_counter() - start)
        category = row.get("category") or row.get("style") or ""
        results.append(Result(category, row["expected"], verdict, milliseconds))
    return results


def report(name, results, judge_name):
    """Prints one line."""
    total = len(results)
    accepts = sum(result.verdict and not result.expected for result in results)
    rejects = sum(not result.verdict and result.expected for result in results)
    right = 100 * (1 - (accepts + rejects) / total)
    times = sorted(result.milliseconds for result in results)
    p99 = times[min(total - 1, int(total * 0.99))]
    print(
        f"{name[:32]:32} {judge_name:12} {total:5} {right:7.2f} {accepts:7} {rejects:7} "
        f"{statistics.mean(times):9.3f} {statistics.median(times):9.3f} {p99:9.3f}",
        flush=True,
    )


def main(folder, names):
    print(
        f"{'file, category':32} {'grader':12} {'n':>5} {'right %':>7} {'wrong+':>7} {'wrong-':>7} "
        f"{'mean ms':>9} {'median':>9} {'p99':>9}"
    )
    for name in names:
        rows = [row for row in read_rows(folder, name) if row["expected"] is not None]
        for judge_name, judge in available_judges().items():
            results = measure(rows, judge)
            report(name, results, judge_name)
            categories = sorted({result.category for result in results})
            if len(categories) == 1:
                continue
            for category in categories:
                chosen = [result for result in results if result.category == category]
                report("  " + category, chosen, judge_name)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] or FILES)
