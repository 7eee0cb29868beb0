"""What it is worth that the answers to one prompt share it: passes with and without, in one run.

    python bench/shared_prompt.py                      # three shapes of prompts and answers
    python bench/shared_prompt.py --shape=60,20,16     # prompt, answer, answers per prompt
    python bench/shared_prompt.py --model=out/words/init    # a model's folder

A scoring pass and an update of the same rows, by a model of random weights unless one is named, in
turns; seconds are medians over the rounds. The two ways must give the same log-probabilities.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import make_model
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.run import leave_distributed, setup_distributed
from model import load_model, make_optimizer, optimizer_step, pack, token_logprobs

CPU = torch.device("cpu")


def make_rows(prompts, prompt, answer, samples):
    """Rows of random tokens, `samples` to each prompt, and the length of each row's prompt."""
    rows = []
    for _ in range(prompts):
        question = torch.randint(20, 200, (prompt,)).tolist()
        for _ in range(samples):
            # Answers differ in length, as real ones do.
            length = int(torch.randint(answer // 2, answer * 3 // 2, ()))
            words = torch.randint(20, 200, (length,)).tolist()
            rows.append((question + words, [0] * prompt + [1] * length))
    return rows, [prompt] * len(rows)


def passes(model, optimizer, batches):
    """(seconds of a scoring pass, seconds of an update, log-probabilities) over all batches."""
    start = time.time()
    with torch.no_grad():
        logprobs = torch.cat([token_logprobs(model, batch) for batch in batches])
    model.reshard()
    scored = time.time()
    for batch in batches:
        token_logprobs(model, batch).mean().backward()
    # The weights stay as they are: the learning rate is 0.
    optimizer_step(model, optimizer, 0.0, grad_clip=1.0)
    return scored - start, time.time() - scored, logprobs


def compare(model, optimizer, shape, rows_per_pass, rounds):
    """Print the seconds of both ways for one shape, and their ratios."""
    prompt, answer, samples = shape
    rows, prompts = make_rows(2 * rows_per_pass // samples, prompt, answer, samples)
    alone = []
    shared = []
    for low in range(0, len(rows), rows_per_pass):
        part = slice(low, low + rows_per_pass)
        alone.append(pack(rows[part], CPU))
        shared.append(pack(rows[part], CPU, prompts[part]))

    seconds = {"score alone": [], "score shared": [], "update alone": [], "update shared": []}
    for _ in range(rounds):
        score_alone, update_alone, expected = passes(model, optimizer, alone)
        score_shared, update_shared, logprobs = passes(model, optimizer, shared)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
        seconds["score alone"].append(score_alone)
        seconds["score shared"].append(score_shared)
        seconds["update alone"].append(update_alone)
        seconds["update shared"].append(update_shared)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(batch["input_ids"].numel() for batch in alone)
    fewer = sum(batch["input_ids"].numel() for batch in shared)
    print(f"prompts of {prompt}, {samples} answers of some {answer}:")
    print(f"    tokens  {tokens:6} -> {fewer:6}: {tokens / fewer:.2f} times fewer")
    for kind in ("score", "update"):
        before = median[f"{kind} alone"]
        after = median[f"{kind} shared"]
        print(f"    {kind:<7} {before:6.2f} s -> {after:6.2f} s: {before / after:.2f} times")


def write_model(folder):
    """A model of 20 M random weights in folder/model."""
    make_model(
        folder,
        Qwen2Config,
        vocab=16384,
        hidden=384,
        intermediate=1024,
        layers=9,
        heads=6,
        groups=2,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="prompt,answer,answers per prompt")
    parser.add_argument("--model", help="a model's folder; without it, random weights")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shapes = [(80, 128, 8), (45, 22, 8), (300, 1400, 4)]
    if arguments.shape:
        shapes = [tuple(map(int, text.split(","))) for text in arguments.shape]

    torch.manual_seed(0)
    setup_distributed(CPU)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if path is None:
            path = f"{folder}/model"
            write_model(folder)
        model = load_model(path, CPU, torch.float32)
    optimizer = make_optimizer(model, 1e-6)
    print(f"on {torch.get_num_threads()} threads")
    for shape in shapes:
        prompt, answer, samples = shape
        # Passes of some 4,096 tokens, and at least one prompt with all of its answers.
        whole_prompts = max(1, 4096 // (samples * (prompt + answer)))
        compare(model, optimizer, shape, whole_prompts * samples, arguments.rounds)
    leave_distributed()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # see leave_distributed()
