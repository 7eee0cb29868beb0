"""What only a GPU can show, in some minutes on one GPU, with random weights and no download.

    python bench/check_gpu.py              # a Qwen2 of 0.3 B parameters
    python bench/check_gpu.py --hidden 1536 --layers 28 --vocab 151936 --intermediate 8960 \
        --heads 12 --groups 2              # the shape of Qwen2.5-1.5B

Attention: values and gradients of each kernel against float32 on one sequence at a time, and its
time. Memory: the peak of the largest passes of sft.py's and of prime.py's models against what
--dry_run predicts. Engine: two steps of prime.py with vLLM, if it is installed, on the same GPU;
the engine's log-probabilities against the trainer's after each update of its weights, and seconds
by phase. On a CPU the same is run as far as it goes. We have not had a GPU to run it on.
"""

import argparse
import gc
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from lib.memory import GB, model_size, prime_phases, sft_phases
from lib.run import pick_device, setup_distributed
from model import load_model, longest_batch, make_optimizer, packed_attention

ROOT = Path(__file__).resolve().parent.parent

# Arguments and their defaults. tokens: of a row; rows: prompts of a step of prime.py.
SHAPE = dict(hidden=1024, layers=16, vocab=65536, intermediate=2816, heads=8, groups=2)
SIZES = dict(tokens=1024, rows=16)


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
    """Each kernel on rows of a quarter to twice args.tokens, 14.5 x args.tokens in all."""
    torch.manual_seed(0)
    lengths = [args.tokens // 4, 2 * args.tokens] * 7 + [args.tokens // 4]
    total = sum(lengths)
    head_size = args.hidden // args.heads
    cu_seq_lens = torch.tensor([0, *lengths], device=device).cumsum(0).int()

    def random_heads(heads):
        shape = (1, heads, total, head_size)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    query = random_heads(args.heads)
    key = random_heads(args.groups)
    value = random_heads(args.groups)
    gradient = torch.randn(1, args.heads, total, head_size, device=device, dtype=dtype)
    expected = exact_attention(query, key, value, gradient, lengths)

    for kernel in kernels_of(device):
        rows = dict(
            scaling=head_size**-0.5,
            cu_seq_lens_q=cu_seq_lens,
            max_length_q=max(lengths),
            kernel=kernel,
        )
        times = []
        for _ in range(3):
            started = clock(device)
            out, _ = packed_attention(None, query, key, value, None, **rows)
            out = out.transpose(1, 2)
            gradients = torch.autograd.grad(out, (query, key, value), gradient)
            times.append(clock(device) - started)

        milliseconds = 1000 * min(times)
        errors = largest_errors([out, *gradients], expected)
        print(
            f"attention, {kernel}: {total} tokens, forward and backward {milliseconds:.1f} ms; "
            f"largest error, as a share of the largest value: {errors}"
        )


def largest_errors(got, expected):
    """In words, for the output and the gradients of query, key and value."""
    words = []
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected):
        error = (x.float() - y).abs().max() / y.abs().max()
        words.append(f"{name} {error.item():.1e}")
    return ", ".join(words)


def kernels_of(device):
    if device.type == "cpu":
        return ["padded"]
    if has_package("flash_attn_2_cuda"):
        return ["flash_attn", "varlen", "padded"]
    return ["varlen", "padded"]


def exact_attention(query, key, value, gradient, lengths):
    """Attention's output and the gradients of its inputs in float32, one sequence at a time."""
    inputs = [x.detach().float().requires_grad_() for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5
    pieces = [x.split(lengths, dim=2) for x in inputs]
    outputs = []
    for q, k, v in zip(*pieces):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out)
    out = torch.cat(outputs, dim=2)
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
        print(
            f"memory, {name}: peak {peak / GB:.2f} GB, predicted {predicted / GB:.2f} "
            f"({predicted / peak - 1:+.0%})"
        )

    # A model refers to itself, by its forward(); and what comes next needs the room.
    del models, model, optimizer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------
# engine


def check_engine(args, folder):
    """Two steps of prime.py in a process of its own."""
    command = [
        sys.executable,
        "prime.py",
        f"--data={folder}/problems.jsonl",
        f"--model={folder}/model",
        f"--out_dir={folder}/out",
        f"--max_tokens={args.tokens}",
        f"--prompts_per_step={args.rows}",
        "--samples_per_prompt=4",
        "--max_steps=2",
        # Random weights solve nothing, and are to be trained all the same.
        "--filter_low=0",
        "--filter_high=1",
        "--save_interval=0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_words = done.stderr.strip()[-2000:]
        print(f"engine: prime.py ended with {done.returncode}: {last_words}")
        return

    name = "vllm" if has_package("vllm") else "hf"
    for line in Path(folder, "out/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        print(
            f"engine {name}, step {row['step'] + 1}: engine and trainer differ by "
            f"{row['mismatch']:.1e} nats per token, KL {row['mismatch_kl']:.1e}; "
            f"peak {row['peak_memory_gb']:.2f} GB; seconds {row['seconds']}"
        )


# ----------------------------------------------------------------------------------------------
# a model and problems


def make_model(args, folder):
    """A Qwen2 of random weights, with the tokenizer of the built-in world."""
    world = f"{folder}/world"
    command = [
        sys.executable,
        "data/arithmetic/prepare.py",
        f"--out_dir={world}",
        "--web_solutions=50",
        "--web_val_solutions=10",
        "--train_problems=50",
        "--rl_problems=50",
        "--test_problems=50",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/init")

    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters")


def make_problems(args, folder):
    """Problems of random digits, about args.tokens / 3 each."""
    draw = random.Random(0)
    with open(f"{folder}/problems.jsonl", "w") as file:
        for number in range(8 * args.rows):
            length = draw.randint(args.tokens // 6 + 1, args.tokens // 2 + 1)
            digits = "".join(draw.choice("0123456789") for _ in range(length))
            problem = dict(problem=digits, ground_truth="7", problem_id=number)
            file.write(json.dumps(problem) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (SHAPE | SIZES).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    device, dtype = pick_device("auto", "auto")
    setup_distributed(device)
    check_attention(args, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        make_model(args, folder)
        make_problems(args, folder)
        check_memory(args, folder, device, dtype)
        check_engine(args, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
