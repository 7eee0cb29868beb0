r"""
Does a long run stay flat? Memory, open files, processes and seconds per step of prime.py.

    python tests/long_run.py                 # 2,000 small steps
    python tests/long_run.py --steps=100

Trains on guessing problems (tests/small_pipeline.py), with an evaluation and a checkpoint now and
then, and looks into /proc after every step. Prints for each quantity its mean over the last half of
the steps and its slope per 1,000 steps, a least-squares fit with its standard error, of the steps
after the first tenth. Fails if a process is left at the end.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from small_pipeline import make_data, processes_of, run_to_its_end, stages, start

SETTINGS = [
    "--prompts_per_step=4",
    "--batch_rows=8",
    "--eval_problems=8",
    "--eval_samples=1",
    "--eval_interval=50",
    "--save_interval=50",
    "--learning_rate=1e-6",
    "--prm_learning_rate=1e-5",
    "--samples_steps=100",
]


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, as far as they are there."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def resident_mb(pids: list[int]) -> float:
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def zombies(pids: list[int]) -> int:
    count = 0
    for pid in pids:
        try:
            count += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
    return count


def look(pid: int) -> dict:
    """What a run holds now."""
    pids = descendants(pid)
    return {
        "resident memory, MB": resident_mb(pids[:1]),
        "with its children's, MB": resident_mb(pids),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "processes": len(pids),
        "zombies": zombies(pids),
    }


def watch(process, metrics: Path) -> list[dict]:
    """A row per step of a run, until it ends."""
    rows = []
    while process.poll() is None:
        time.sleep(0.02)
        if not metrics.exists():
            continue
        steps = metrics.read_bytes().count(b"\n")
        if rows and rows[-1]["step"] == steps:
            continue
        try:
            rows.append(dict(step=steps, **look(process.pid)))
        except OSError:
            # It has just ended.
            continue
    return rows


def slope(x, y) -> tuple[float, float]:
    """Slope of a least-squares line through points, and its standard error."""
    x = np.asarray(x, float) - np.mean(x)
    y = np.asarray(y, float) - np.mean(y)
    b = (x @ y) / (x @ x)
    rest = y - b * x
    return b, np.sqrt(rest @ rest / (len(x) - 2) / (x @ x))


def print_slope(name: str, steps, values) -> None:
    b, error = slope(steps, values)
    level = np.mean(values[len(values) // 2 :])
    print(f"{name:<28}{level:>12.3f}{1000 * b:>14.4f} ± {1000 * error:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        commands = stages(folder)
        run_to_its_end(commands["sft"], folder / "guesser")

        out = folder / "out"
        more = [f"--max_steps={steps}", f"--eval_data={folder}/problems.jsonl"]
        began = time.time()
        process = start([*commands["prime"], *SETTINGS, *more], out, folder / "log")
        rows = watch(process, out / "metrics.jsonl")
        assert process.wait() == 0, (folder / "log").read_text()[-3000:]
        print(f"{steps} steps in {time.time() - began:.0f} s")

        left = processes_of(out)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        samples = (out / "samples.jsonl").stat().st_size / 2**20

    rows = [row for row in rows if row["step"] > steps // 10]
    print(f"{'':<28}{'level':>12}{'slope per 1,000 steps':>24}")
    for name in rows[0]:
        if name != "step":
            print_slope(name, [row["step"] for row in rows], [row[name] for row in rows])
    metrics = [row for row in metrics if row["step"] > steps // 10]
    seconds = [row["seconds"]["step"] - row["seconds"].get("eval", 0) for row in metrics]
    print_slope("seconds per step", [row["step"] for row in metrics], seconds)
    print(f"samples.jsonl {samples:.2f} MB; processes left: {len(left)}")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
