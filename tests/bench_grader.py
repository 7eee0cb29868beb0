"""
Accuracy and speed of the grader by file and category, next to math-verify where that is installed:

    python tests/bench_grader.py folder [file ...]        folder with cases.jsonl, near_misses.jsonl, ... (or .jsonl.gz)

Rows have gold, expected (true, false, null = not counted), and prediction (a bare answer, or free text if kind is "response"), response, or
prediction_parts ([string, count] pairs). Free text is graded with fallback=True, and golds and bare answers go to math-verify between dollars.
Times are wall-clock milliseconds of one call in this process, after one call to warm up. wrong+ are false accepts, wrong- false rejects.
"""
import gzip
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import grader

FILES = ("cases", "near_misses", "latex_parse", "real_math", "real_gsm8k", "security")


def read_rows(folder, name):
    plain, packed = pathlib.Path(folder, name + ".jsonl"), pathlib.Path(folder, name + ".jsonl.gz")
    with open(plain, encoding="utf-8") if plain.exists() else gzip.open(packed, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def text_of(row):
    "(text, is it free text from which the answer must be extracted?)"
    if "response" in row:
        return row["response"], True
    if "prediction_parts" in row:
        return "".join(part * count for part, count in row["prediction_parts"]), True
    return row["prediction"], row.get("kind") == "response"


def ours(row):
    text, free = text_of(row)
    return grader.grade_math(text, row["gold"], fallback="prediction_parts" not in row) if free else grader.is_equiv(text, row["gold"])


def math_verify_or_none():
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def judge(row):
        text, free = text_of(row)
        gold = row["gold"] if row.get("gold_kind") == "solution" else f"${row['gold']}$"
        return verify(parse(gold), parse(text if free else f"${text}$"))
    return judge


def measure(rows, judge):
    "a list of (category, expected, verdict, ms)"
    out = []
    for row in rows:
        start = time.perf_counter()
        verdict = bool(judge(row))
        out.append((row.get("category") or row.get("style") or "", row["expected"], verdict, 1000 * (time.perf_counter() - start)))
    return out


def report(name, results, label):
    n, ms = len(results), sorted(r[3] for r in results)
    accepts = sum(v and e is False for _, e, v, _ in results)
    rejects = sum(not v and e is True for _, e, v, _ in results)
    print(f"{name[:32]:32} {label:12} {n:5} {100 * (1 - (accepts + rejects) / n):7.2f} {accepts:7} {rejects:7} "
          f"{statistics.mean(ms):9.3f} {statistics.median(ms):9.3f} {ms[min(n - 1, int(n * 0.99))]:9.3f}", flush=True)


def main(folder, names=FILES):
    judges = {"ours": ours} | ({"math-verify": judge} if (judge := math_verify_or_none()) else {})
    print(f"{'file, category':32} {'grader':12} {'n':>5} {'right %':>7} {'wrong+':>7} {'wrong-':>7} {'mean ms':>9} {'median':>9} {'p99':>9}")
    for name in names:
        rows = [row for row in read_rows(folder, name) if row["expected"] is not None]
        for label, judge in judges.items():
            judge({"gold": r"\sqrt{2}", "prediction": "x", "expected": False})
            results = measure(rows, judge)
            report(name, results, label)
            categories = sorted({r[0] for r in results})
            for category in categories if len(categories) > 1 else ():
                report("  " + category, [r for r in results if r[0] == category], label)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] or FILES)
