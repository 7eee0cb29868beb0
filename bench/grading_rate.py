"""
How many responses per second the judge grades in its child processes, as rollouts hand them over.

    python bench/grading_rate.py FILE          # problems whose column `solution` is graded
    python bench/grading_rate.py FILE --responses=1024 --workers 1 2 4
    python bench/grading_rate.py FILE --model=FOLDER    # while this process samples, as in a run

FILE: as for evaluate.py, the test set of MATH say, whose worked solutions end in a box. They are
graded against the ground truths of their problems, every second one against that of the next.
With --model, a thread of this process samples answers to the same problems at the same time.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import make_engine  # noqa: E402
from grader import Grader  # noqa: E402
from lib.answers import Request  # noqa: E402
from lib.pretrained import load_tokenizer, render_prompt  # noqa: E402
from lib.problems import load_problems  # noqa: E402


def sample_until(done, path, problems):
    """Answer problems, 16 at once, with transformers' engine until the event `done` is set."""
    tokenizer = load_tokenizer(path)
    cpu = torch.device("cpu")
    engine = make_engine("hf", path, tokenizer, cpu, torch.float32, max_model_len=512)
    prompts = [render_prompt(tokenizer, problem.messages) for problem in problems]
    prompts = [prompt for prompt in prompts if len(prompt) < 256][:16]
    requests = [Request(prompt, seed, max_tokens=32) for seed, prompt in enumerate(prompts)]
    while not done.is_set():
        list(engine.sample(requests))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--model", help="the folder of a model that samples meanwhile")
    arguments = parser.parse_args()

    problems = load_problems(arguments.file)
    responses = []
    references = []
    for number in range(arguments.responses):
        problem = problems[number % len(problems)]
        judge = problems[(number + number % 2) % len(problems)]
        responses.append(problem.row["solution"])
        references.append(judge.reference)

    characters = sum(map(len, responses)) / len(responses)
    print(f"{len(responses)} responses of {characters:.0f} characters")
    done = threading.Event()
    if arguments.model:
        sampling = (done, arguments.model, problems)
        threading.Thread(target=sample_until, args=sampling).start()
        # Until the model is loaded.
        time.sleep(20)
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
    done.set()


if __name__ == "__main__":
    main()
