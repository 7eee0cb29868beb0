r"""
What a step of prime.py costs beside its models, at the published size, with made-up answers.

    torchrun --nproc_per_node 8 bench/full_size.py           # 1,024 rows, then 4,096
    python bench/full_size.py --rows=1024 --tokens=3072      # on one process

Everything is the code of a run but the engine, the judge and the passes of the models: answers are
drawn at random, all are graded by their first token, and log-probabilities are random numbers.
Prints seconds per phase, which are those of the slowest process, and what processes exchange.
On fewer cores than processes the seconds are longer than those of a real machine.
"""

import argparse
import os
import pickle
import random
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prime
from grader import Score
from lib.answers import Answer
from lib.problems import Problem
from lib.report import RunLog
from lib.rollouts import PromptStream, batch_metrics, make_batch, rollout
from lib.run import leave_distributed, print0, setup_distributed
from lib.samples import rows_for_log
from model import my_shared_batches, pack

CPU = torch.device("cpu")
VOCABULARY = 152_064
SAMPLES = 4
# A published step, on 8 GPUs.
STEP_SECONDS = 680


class MadeUpEngine:
    """Answers of random tokens, drawn before the clock starts."""

    def __init__(self, requests: int, tokens: int):
        draw = random.Random(dist.get_rank())
        self.answers = []
        for _ in range(requests):
            length = draw.randint(tokens // 4, tokens)
            ids = [draw.randrange(VOCABULARY) for _ in range(length)]
            logprobs = [-draw.random() for _ in range(length)]
            self.answers.append(Answer(ids, logprobs, "stop"))

    def sample(self, requests):
        yield from enumerate(self.answers[: len(requests)])


def make_tokenizer():
    """As many words as a Qwen2.5 has tokens."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


class MadeUpGrader:
    """Half of the answers are right."""

    def __init__(self):
        self.count = 0

    def submit(self, text, reference):
        future = Future()
        self.count += 1
        future.set_result(Score(self.count % 2))
        return future


class Clock:
    """Seconds of each phase, of the process that takes longest."""

    def __init__(self):
        self.seconds = {}
        self.began = time.perf_counter()

    def stop(self, phase: str):
        """The phase ends here; the next one begins when all processes have come here."""
        seconds = torch.tensor(time.perf_counter() - self.began)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.seconds[phase] = seconds.item()
        self.began = time.perf_counter()


def make_problems(count: int, prompt: int):
    """(problems, prompts) with prompts of `prompt` tokens."""
    draw = random.Random(0)
    problems = []
    prompts = []
    for number in range(count):
        problem = Problem(
            id=number,
            text="What is x?",
            messages=[dict(role="user", content="What is x?")],
            ability="math",
            ground_truth="1",
        )
        problems.append(problem)
        prompts.append((number, [draw.randrange(VOCABULARY) for _ in range(prompt)]))
    return problems, prompts


def step(rows: int, prompt: int, tokens: int, micro_batch_tokens: int, folder: str) -> dict:
    """Seconds of each phase of a step, and bytes."""
    problems, prompts = make_problems(rows // SAMPLES, prompt)
    engine = MadeUpEngine(rows // dist.get_world_size() + SAMPLES, tokens)
    grader = MadeUpGrader()
    tokenizer = make_tokenizer()
    log = RunLog(folder, 0, dist.get_rank(), None, {})
    dist.barrier()
    clock = Clock()

    groups = rollout(
        engine,
        grader,
        tokenizer,
        problems,
        prompts,
        SAMPLES,
        seed_words=(0,),
        temperature=1.0,
        max_tokens=tokens,
    )
    clock.stop("texts, answers to all processes")
    batch = make_batch(groups, CPU)
    clock.stop("batch")

    # What score() does around its passes: micro-batches are dealt and packed, results are summed.
    logprobs = torch.randn(batch.mask.shape)
    for _ in ("policy", "reference", "PRM", "update"):
        mine, _ = my_shared_batches(batch, micro_batch_tokens)
        for members in mine:
            pairs = [(batch.tokens[i], batch.scored[i]) for i in members]
            pack(pairs, CPU, [batch.prompt_lengths[i] for i in members])
    clock.stop("micro-batches of four passes")
    for _ in ("policy", "entropies", "reference", "PRM"):
        dist.all_reduce(torch.zeros_like(logprobs))
    clock.stop("log-probabilities to all processes")

    metrics = batch_metrics(batch, logprobs, -logprobs)
    clock.stop("metrics of the batch")
    process = prime.process_rewards_in_chunks(logprobs, -logprobs, batch.mask)
    clock.stop("process rewards")
    returns, A, stats = prime.batch_advantages(batch, process)
    clock.stop("advantages")
    metrics |= stats
    metrics |= prime.rollout_metrics(groups, problems, prime.extract_answer)
    metrics["prompts_kept"] = len(groups)
    clock.stop("metrics of the answers")
    log.write(dict(metrics, step=0, seconds={"step": 1.0}), 1, 0.0)
    stream = PromptStream(problems, tokenizer, prompt, seed=0)
    numbers = dict(process_rewards=process, returns=returns, advantages=A)
    rows = rows_for_log(0, groups, stream, numbers, prime.samples_logged)
    log.write_samples(0, rows, prime.samples_steps)
    log.close(finished=True)
    clock.stop("log")

    sent = len(pickle.dumps(groups)) + 4 * logprobs.numel() * logprobs.element_size()
    return dict(clock.seconds, megabytes=sent / 1e6)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=3072, help="of the longest answer")
    parser.add_argument("--micro_batch_tokens", type=int, default=prime.micro_batch_tokens)
    arguments = parser.parse_args()
    setup_distributed(CPU)
    prime.samples_per_prompt = SAMPLES

    found = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(
                step(
                    rows,
                    arguments.prompt,
                    arguments.tokens,
                    arguments.micro_batch_tokens,
                    folder,
                )
            )

    heads = "".join(f"{rows:>12} rows" for rows in arguments.rows)
    print0(f"{dist.get_world_size()} processes{'':<24}{heads}")
    for phase in found[0]:
        cells = "".join(f"{result[phase]:>17.3f}" for result in found)
        print0(f"{phase:<36}{cells}")
    for rows, result in zip(arguments.rows, found):
        total = sum(result.values()) - result["megabytes"]
        share = total / STEP_SECONDS
        print0(f"{rows} rows: {total:.1f} s, {share:.1%} of a published step's {STEP_SECONDS} s")
    leave_distributed()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # see leave_distributed()
