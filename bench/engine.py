r"""
Speed of the engines: tokens per second of sampling, on random weights of SmolLM2-135M's shape.

    python bench/engine.py                             # transformers' engine in fp32 and bf16
    python bench/engine.py --vllm=.venv-vllm/bin/python    # and vLLM, in that environment
    python bench/engine.py --against=../other          # this checkout beside another one

Each prompt gets --samples answers of --tokens tokens: random weights do not end one. What is
compared runs in turns, `--rounds` times, in processes of their own. Numbers are medians over the
rounds; loading and a first short batch are not counted. OMP_NUM_THREADS says how many threads.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from random_model import make_model
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent

# Runs in the folder of a checkout, which may be another one than ours.
MEASURE = """
import json, sys, time
import torch
from engine import make_engine
from lib.answers import Request
from lib.pretrained import load_tokenizer

folder, kind, dtype, tokens, samples, device = sys.argv[1:]
prompts = json.load(open(folder + "/prompts.json"))
longest = max(len(prompt) for prompt in prompts) + int(tokens)
tokenizer = load_tokenizer(folder + "/model")
place = torch.device(device)
engine = make_engine(kind, folder + "/model", tokenizer, place, getattr(torch, dtype), longest)

def requests(prompts):
    for prompt in prompts:
        for seed in range(int(samples)):
            yield Request(prompt, seed, max_tokens=int(tokens))

# vLLM and torch prepare some things in their first pass. Its prompt is none of the others.
list(engine.sample(list(requests([prompts[0][::-1]]))))
start = time.time()
answers = [answer for _, answer in engine.sample(list(requests(prompts)))]
seconds = time.time() - start
written = sum(len(answer.tokens) for answer in answers)
print("RATE", written / seconds)
engine.close()
"""


def write_model(folder, shape):
    """A model of random weights in folder/model."""
    make_model(
        folder,
        LlamaConfig,
        vocab=shape.vocab,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        groups=shape.groups,
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{os.cpu_count()} cores, threads: {threads}")


def make_prompts(folder, shape):
    """Prompts of random tokens in prompts.json; their lengths differ by a fifth at most."""
    draw = random.Random(0)
    prompts = []
    for _ in range(shape.prompts):
        length = draw.randint(shape.prompt * 9 // 10, shape.prompt * 11 // 10)
        prompts.append([draw.randrange(20, 200) for _ in range(length)])
    Path(folder, "prompts.json").write_text(json.dumps(prompts))
    print(
        f"{shape.prompts} prompts of some {shape.prompt} tokens, "
        f"{shape.samples} answers of {shape.tokens} tokens to each"
    )


def rate(folder, shape, kind, dtype, python=sys.executable, checkout=ROOT):
    """Tokens per second of one engine, measured in a process of its own."""
    arguments = [folder, kind, dtype, str(shape.tokens), str(shape.samples), shape.device]
    done = subprocess.run(
        [python, "-c", MEASURE, *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # What vLLM prints at its end may follow.
    return float(done.stdout.rpartition("RATE")[2].split()[0])


def cases(shape):
    """{what is measured: the arguments of rate()}; the first one is what others are divided by."""
    found = {}
    if shape.against:
        other = Path(shape.against).resolve()
        for dtype in ("float32", "bfloat16"):
            found[f"hf, {dtype}, other checkout"] = dict(kind="hf", dtype=dtype, checkout=other)
            found[f"hf, {dtype}"] = dict(kind="hf", dtype=dtype)
        return found
    for dtype in ("float32", "bfloat16"):
        found[f"hf, {dtype}"] = dict(kind="hf", dtype=dtype)
        if shape.vllm:
            # Not resolved: an environment's interpreter is a link.
            python = str(Path(shape.vllm).absolute())
            found[f"vllm, {dtype}"] = dict(kind="vllm", dtype=dtype, python=python)
    return found


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = dict(hidden=576, layers=30, vocab=49152, intermediate=1536, heads=9, groups=3)
    sampling = dict(prompts=8, prompt=60, samples=8, tokens=20, rounds=3)
    for name, value in dict(shape, **sampling).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vllm", help="the interpreter of an environment with vLLM")
    parser.add_argument("--against", help="the folder of another checkout, and nothing else")
    return parser.parse_args()


def main():
    shape = arguments()
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, shape)
        make_prompts(folder, shape)
        rates = {}
        for _ in range(shape.rounds):
            for name, how in cases(shape).items():
                rates.setdefault(name, []).append(rate(folder, shape, **how))
        base = statistics.median(next(iter(rates.values())))
        for name, values in rates.items():
            middle = statistics.median(values)
            spread = f"{min(values):.0f} to {max(values):.0f}"
            print(f"{name:<32}{middle:8.0f} tokens/s ({spread}) {middle / base:6.2f}")


if __name__ == "__main__":
    main()
