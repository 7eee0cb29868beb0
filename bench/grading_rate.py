"""
How many responses per second the judge grades in its child processes, as rollouts hand them over.

    python bench/grading_rate.py FILE          # problems whose column `solution` is graded
    python bench/grading_rate.py FILE --responses=1024 --workers 1 2 4

FILE: as for evaluate.py, the test set of MATH say, whose worked solutions end in a box. They are
graded against the ground truths of their problems, every second one against that of the next.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grader import Grader  # noqa: E402
from lib.problems import load_problems  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count()])
    arguments = parser.parse_args()

    problems = load_problems(arguments.file)
    responses = []
    references = []
    for number in range(arguments.responses):
        problem = problems[number % len(problems)]
        judge = problems[(number + number % 2) % len(problems)]
        responses.append(problem.row["solution"])
        references.append(judge.reference)

    print(
        f"{len(responses)} responses of {sum(map(len, responses)) / len(responses):.0f} characters"
    )
    for workers in arguments.workers:
        with Grader(workers=workers) as judge:
            # The children start with their first item.
            judge.grade(responses[: 8 * workers], references[: 8 * workers])
            began = time.perf_counter()
            scores = judge.grade(responses, references)
            seconds = time.perf_counter() - began
        print(
            f"{workers} processes: {len(responses) / seconds:.0f} responses per second, "
            f"{seconds:.2f} s in all; {sum(scores):.0f} right"
        )


if __name__ == "__main__":
    main()
