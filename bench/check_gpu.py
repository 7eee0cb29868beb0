"""What only a GPU can show, in some ten minutes on one GPU, with random weights and no download.

    python bench/check_gpu.py                          # a Qwen2 of 0.3 B parameters
    python bench/check_gpu.py --only attention memory  # some of its parts
    python bench/check_gpu.py --hidden 1536 --layers 28 --vocab 151936 --intermediate 8960 \
        --heads 12 --groups 2                          # the shape of Qwen2.5-1.5B

Each line says ok or FAIL, what was found and what was expected; the last one counts, and the exit
code is 1 if something failed. The parts:

attention   values and gradients of each kernel against float32, one sequence at a time; its time
memory      the peak of the largest passes of sft.py's and prime.py's models against --dry_run's
engine      vLLM, if it is installed: what it keeps of the GPU while it sleeps
prime       two steps, a third one after a resume, one with --offload: log-probabilities of the
            engine against the trainer's after each update of its weights, and seconds by phase
evaluate    an engine in a process of its own
sft         three steps, and the same compiled
processes   one process more than there are GPUs is refused in a line

On a CPU the same is run as far as it goes. We have not had a GPU to run it on.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_model import make_model
from transformers import AutoTokenizer, Qwen2Config

from configurator import UserError
from engine import make_engine
from lib.memory import GB, model_size, prime_phases, sft_phases
from lib.run import leave_distributed, pick_device, setup_distributed
from model import load_model, longest_batch, make_optimizer, pack, packed_attention

ROOT = Path(__file__).resolve().parent.parent

# Arguments and their defaults. tokens: of a row; rows: prompts of a step of prime.py.
SHAPE = dict(hidden=1024, layers=16, vocab=65536, intermediate=2816, heads=8, groups=2)
SIZES = dict(tokens=1024, rows=16)

# What is expected. Errors are shares of the largest value; bfloat16 has 8 bits: 2 ** -8 is 0.004.
LARGEST_ERROR = 0.02
# Nats per token between engine and trainer in bfloat16; prime.py stops at 0.1.
LARGEST_MISMATCH = 0.05
# Of the prediction of memory, either way.
MEMORY_MARGIN = 0.15
# GB: what lib/memory.py spares for a sleeping vLLM, and for CUDA and NCCL.
ASLEEP_GB = 2
CUDA_GB = 2

# "ok" or "FAIL" for each line.
VERDICTS = []


def tell(name, found, expected=None, good=True):
    """Print a line about a part, and count it unless nothing is expected of it."""
    if expected is None:
        print(f"     {name}: {found}", flush=True)
        return
    VERDICTS.append("ok" if good else "FAIL")
    print(f"{VERDICTS[-1]:<4} {name}: {found}; expected: {expected}", flush=True)


def clock(device):
    """Seconds, after all that the GPU was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def has_package(name):
    return importlib.util.find_spec(name) is not None


# ----------------------------------------------------------------------------------------------
# attention


def check_attention(args, device, dtype):
    """Each kernel on rows of a quarter to twice args.tokens, and on answers that share prompts."""
    torch.manual_seed(0)
    lengths = [args.tokens // 4, 2 * args.tokens] * 7 + [args.tokens // 4]
    rows = [([0] * length, [1] * length) for length in lengths]
    check_kernels("attention", pack(rows, device), lengths, args, device, dtype)

    # Three answers of args.tokens / 4 to each of four prompts of args.tokens.
    answer = args.tokens // 4
    lengths = [args.tokens + answer] * 12
    rows = []
    for number in range(12):
        prompt = [number // 3] * args.tokens
        rows.append((prompt + [0] * answer, [0] * args.tokens + [1] * answer))
    batch = pack(rows, device, [args.tokens] * 12)
    check_kernels("attention with shared prompts", batch, lengths, args, device, dtype)


def check_kernels(name, batch, lengths, args, device, dtype):
    """Values, gradients and time of each kernel on a packed batch whose rows are so long."""
    total = batch["input_ids"].numel()
    head_size = args.hidden // args.heads

    def random_heads(heads):
        shape = (1, heads, total, head_size)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    query = random_heads(args.heads)
    key = random_heads(args.groups)
    value = random_heads(args.groups)
    gradient = torch.randn(1, args.heads, total, head_size, device=device, dtype=dtype)
    tokens = torch.arange(total, device=device)
    whole = batch.get("whole", tokens)
    own = batch.get("own", tokens)
    expected = exact_attention(query, key, value, gradient, lengths, whole, own)

    names = ("cu_seq_lens_q", "max_length_q", "whole", "own")
    about_rows = {name: batch.get(name) for name in names}
    for kernel in kernels_of(device):
        times = []
        for _ in range(3):
            started = clock(device)
            out, _ = packed_attention(
                None, query, key, value, None, head_size**-0.5, kernel=kernel, **about_rows
            )
            out = out.transpose(1, 2)
            gradients = torch.autograd.grad(out, (query, key, value), gradient)
            times.append(clock(device) - started)

        milliseconds = 1000 * min(times)
        errors = largest_errors([out, *gradients], expected)
        words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        tell(
            f"{name}, {kernel}",
            f"{total} tokens, {milliseconds:.1f} ms, largest errors {words}",
            f"errors below {LARGEST_ERROR}",
            max(errors.values()) < LARGEST_ERROR,
        )


def largest_errors(got, expected):
    """As shares of the largest value: of the output and the gradients of query, key and value."""
    errors = {}
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected):
        error = (x.float() - y).abs().max() / y.abs().max()
        errors[name] = error.item()
    return errors


def kernels_of(device):
    if device.type == "cpu":
        return ["padded"]
    if has_package("flash_attn_2_cuda"):
        return ["flash_attn", "varlen", "padded"]
    return ["varlen", "padded"]


def exact_attention(query, key, value, gradient, lengths, whole, own):
    """Attention's output and the gradients of its inputs in float32, one sequence at a time.

    whole [S]: the tokens of all sequences, one after the other; own [T]: where each token is among
    them.
    """
    inputs = [x.detach().float().requires_grad_() for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5
    pieces = [x[:, :, whole].split(lengths, dim=2) for x in inputs]
    outputs = []
    for q, k, v in zip(*pieces):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out)
    out = torch.cat(outputs, dim=2)[:, :, own]
    return [out, *torch.autograd.grad(out, inputs, gradient.detach().float())]


# ----------------------------------------------------------------------------------------------
# memory


def check_memory(args, folder, device, dtype):
    """The longest batch of both scripts against its prediction."""
    tokens = 16 * args.tokens
    path = f"{folder}/model"
    size = model_size(path)
    of_sft = sft_phases(size, 1, tokens=tokens, checkpointing=True)
    of_prime = prime_phases(size, size, size, 1, tokens=tokens)

    # No engine is here that could take new weights.
    del of_prime["sync"]
    check_peak("sft", of_sft, path, [True], tokens, device, dtype)
    check_peak("prime", of_prime, path, [True, True, False], tokens, device, dtype)


def check_peak(name, phases, path, trained, tokens, device, dtype):
    """trained: of each model, whether it is."""
    models = []
    for is_trained in trained:
        model = load_model(path, device, dtype, is_trained, checkpointing=True)
        optimizer = make_optimizer(model, 1e-6) if is_trained else None
        models.append((model, optimizer))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    longest_batch(models, tokens, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        predicted = max(memory.total() for memory in phases.values())
        tell(
            f"memory, {name}",
            f"peak {peak / GB:.2f} GB",
            f"the prediction {predicted / GB:.2f} GB, within {MEMORY_MARGIN:.0%}",
            abs(predicted / peak - 1) < MEMORY_MARGIN,
        )

    # A model refers to itself, by its forward(); and what comes next needs the room.
    del models, model, optimizer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------
# engine


def check_engine(folder):
    """What vLLM holds before it is there, awake, asleep and woken, in a process of its own."""
    if not has_package("vllm"):
        tell("engine", "vLLM is not installed")
        return
    done = start("bench/check_gpu.py", "--engine_memory", f"{folder}/model")
    if done.returncode != 0:
        tell("engine", last_words(done), "exit code 0", False)
        return
    taken = json.loads(done.stdout.strip().splitlines()[-1])
    kept = taken["asleep"] - taken["before"]
    tell(
        "engine, GB taken",
        ", ".join(f"{when} {amount:.2f}" for when, amount in taken.items()),
        f"asleep at most {ASLEEP_GB} more than before",
        kept <= ASLEEP_GB,
    )


def engine_memory(path):
    """Print GB taken of the GPU as JSON: before a colocated engine of a model, awake, asleep."""
    device, dtype = pick_device("auto", "auto")
    setup_distributed(device)
    taken = {}

    def look(when):
        free, total = torch.cuda.mem_get_info(device)
        taken[when] = (total - free) / GB

    look("before")
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = make_engine(
        "vllm", path, tokenizer, device, dtype, 2048, gpu_memory=0.5, colocated=True
    )
    look("awake")
    engine.sleep()
    look("asleep")
    print(json.dumps(taken), flush=True)
    engine.close()


# ----------------------------------------------------------------------------------------------
# scripts


def start(*command):
    """Run a script in a process of its own."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def last_words(done):
    """Of a script that has failed: its exit code and the end of what it said."""
    return f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"


def check_prime(args, folder, device, dtype):
    """Two steps of prime.py, a third one after a resume, and one step with --offload=True."""
    settings = [
        f"--data={folder}/problems.jsonl",
        f"--model={folder}/model",
        f"--max_tokens={args.tokens}",
        f"--prompts_per_step={args.rows}",
        "--samples_per_prompt=4",
        f"--micro_batch_tokens={16 * args.tokens}",
        # Random weights solve nothing, and are to be trained all the same: by the rewards of a PRM
        # that has been trained, and so fast that an engine with the weights of the step before
        # would differ by more than 0.1 nats.
        "--filter_low=0",
        "--filter_high=1",
        "--prm_update=before",
        "--prm_learning_rate=1e-4",
        "--learning_rate=1e-4",
        "--save_interval=1",
        "--keep_checkpoints=1",
    ]
    size = model_size(f"{folder}/model")
    phases = prime_phases(size, size, size, 1, tokens=16 * args.tokens)
    most = max(memory.total() for name, memory in phases.items() if name != "sync") / GB
    most += ASLEEP_GB + CUDA_GB

    runs = {
        "prime": ("--max_steps=2", "out"),
        "prime, resumed": ("--max_steps=3", "out"),
        "prime, offload": ("--max_steps=1", "out_offload", "--offload=True"),
    }
    for name, (steps, out, *more) in runs.items():
        done = start("prime.py", *settings, steps, f"--out_dir={folder}/{out}", *more)
        if done.returncode != 0:
            tell(name, last_words(done), "exit code 0", False)
            continue
        if name == "prime, resumed":
            resumed = "resumed after step 2" in done.stdout
            tell(name, "went on" if resumed else "began again", "resumed after step 2", resumed)
        rows = Path(folder, out, "metrics.jsonl").read_text().splitlines()
        if name == "prime, resumed":
            # The other steps have been told of.
            rows = rows[2:]
        for row in map(json.loads, rows):
            tell_step(name, row, device, dtype, most)


def tell_step(name, row, device, dtype, most):
    """The lines about a step of prime.py. most: GB that its updates may take."""
    bound = LARGEST_MISMATCH if dtype == torch.bfloat16 else 1e-3
    tell(
        f"{name}, step {row['step'] + 1}, engine against trainer",
        f"{row['mismatch']:.1e} nats per token, KL {row['mismatch_kl']:.1e}",
        f"below {bound}",
        row["mismatch"] < bound,
    )
    if device.type == "cuda":
        taken = row["peak_memory_gb"]
        tell(
            f"{name}, step {row['step'] + 1}, GPU after the updates",
            f"{taken:.2f} GB",
            f"at most {most:.2f}",
            taken <= most,
        )
    tell(f"{name}, step {row['step'] + 1}, seconds", row["seconds"])


def check_evaluate(args, folder):
    """Eight problems, with an engine in a process of its own."""
    done = start(
        "evaluate.py",
        f"--models=['{folder}/model']",
        f"--benchmarks=['{folder}/problems.jsonl']",
        "--max_problems=8",
        f"--max_tokens={args.tokens}",
        f"--out_dir={folder}/evaluate",
    )
    good = done.returncode == 0
    tell("evaluate", "it ran" if good else last_words(done), "exit code 0", good)


def check_sft(folder):
    """Three steps of sft.py, and the same compiled: their losses are the same but for rounding."""
    losses = {}
    for compiled in (False, True):
        name = "sft, compiled" if compiled else "sft"
        done = start(
            "sft.py",
            f"--data={folder}/world/web.jsonl",
            f"--model={folder}/model",
            "--tokenizer=None",
            "--max_length=256",
            "--batch_size=16",
            "--val_rows=0",
            "--max_steps=3",
            "--schedule=constant",
            "--warmup=0",
            "--save_interval=0",
            f"--compile={compiled}",
            f"--out_dir={folder}/{name.replace(', ', '_')}",
        )
        if done.returncode != 0:
            tell(name, last_words(done), "exit code 0", False)
            return
        metrics = Path(folder, name.replace(", ", "_"), "metrics.jsonl").read_text()
        rows = list(map(json.loads, metrics.splitlines()))
        losses[name] = rows[-1]["loss"]
        rate = (
            f"{rows[-1]['tokens_per_s']:.0f} tokens/s, mfu {rows[-1]['mfu']:.1%} in the last step"
        )
        tell(name, rate)

    difference = abs(losses["sft, compiled"] / losses["sft"] - 1)
    found = f"losses {losses['sft']:.4f} and {losses['sft, compiled']:.4f}"
    tell("sft, compiled", found, "the same within 1 %", difference < 0.01)


def check_processes(folder, device):
    """One process more than there are GPUs."""
    if device.type != "cuda":
        return
    processes = torch.cuda.device_count() + 1
    done = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "prime.py",
        f"--model={folder}/model",
        f"--out_dir={folder}/too_many",
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    good = len(lines) == 1 and "one process per GPU" in lines[0]
    tell("processes", lines[0] if lines else last_words(done), "one line with what to do", good)


# ----------------------------------------------------------------------------------------------
# a model and problems


def write_model(args, folder):
    """A Qwen2 of random weights in folder/model."""
    make_model(
        folder,
        Qwen2Config,
        vocab=args.vocab,
        hidden=args.hidden,
        intermediate=args.intermediate,
        layers=args.layers,
        heads=args.heads,
        groups=args.groups,
    )


def make_problems(args, folder):
    """Problems of random digits, about args.tokens / 3 each."""
    draw = random.Random(0)
    with open(f"{folder}/problems.jsonl", "w") as file:
        for number in range(8 * args.rows):
            length = draw.randint(args.tokens // 6 + 1, args.tokens // 2 + 1)
            digits = "".join(draw.choice("0123456789") for _ in range(length))
            problem = dict(problem=digits, ground_truth="7", problem_id=number)
            file.write(json.dumps(problem) + "\n")


PARTS = ("attention", "memory", "engine", "prime", "evaluate", "sft", "processes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (SHAPE | SIZES).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    # This script starts itself with it.
    parser.add_argument("--engine_memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine_memory:
        engine_memory(args.engine_memory)
        return

    try:
        device, dtype = pick_device("auto", "auto")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    setup_distributed(device)
    print_machine(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, folder)
        make_problems(args, folder)
        checks = dict(
            attention=lambda: check_attention(args, device, dtype),
            memory=lambda: check_memory(args, folder, device, dtype),
            engine=lambda: check_engine(folder),
            prime=lambda: check_prime(args, folder, device, dtype),
            evaluate=lambda: check_evaluate(args, folder),
            sft=lambda: check_sft(folder),
            processes=lambda: check_processes(folder, device),
        )
        for part in args.only:
            began = time.time()
            checks[part]()
            tell(part, f"{time.time() - began:.0f} s")
    leave_distributed()

    failed = VERDICTS.count("FAIL")
    print(f"{len(VERDICTS) - failed} of {len(VERDICTS)} as expected", flush=True)
    os._exit(1 if failed else 0)  # see leave_distributed()


def print_machine(device, dtype):
    """What all this was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = [f"torch {torch.__version__}"]
    for package in ("transformers", "vllm", "flash_attn"):
        if has_package(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"{name}, {dtype}; {', '.join(versions)}", flush=True)


if __name__ == "__main__":
    main()
