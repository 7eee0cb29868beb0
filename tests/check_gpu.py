"""
What only a GPU can show, in some minutes on one card, with random weights and nothing downloaded (we have not had a card to run it on):

    python tests/check_gpu.py                                                       # a Qwen2 of 0.3 B parameters
    python tests/check_gpu.py --hidden 1536 --layers 28 --vocab 151936 --intermediate 8960 --heads 12 --groups 2    # Qwen2.5-1.5B's shape

Attention: each kernel's values, forward and backward, against float32 one sequence at a time, and its time. Memory: the peak of the
largest passes of sft.py and of prime.py's models against the prediction of --dry_run. Engine: two steps of prime.py with vLLM, if it is there,
on the same card, asleep during updates: its log-probabilities against the trainer's after each hand-over, and seconds by phase.
On a CPU the same is run as far as it goes.
"""
import argparse
import gc
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench_train
import sft
from runs import plan


def attention(a, device, dtype):
    """Rows of a quarter to twice a.tokens, 16 x a.tokens in all."""
    torch.manual_seed(0)
    lengths, size = [a.tokens // 4, 2 * a.tokens] * 7 + [a.tokens // 4], a.hidden // a.heads
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v, dout = (torch.randn(1, heads, sum(lengths), size, device=device, dtype=dtype).requires_grad_()
                     for heads in (a.heads, a.groups, a.groups, a.heads))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split(lengths, 2) for x in exact), strict=True)
    out = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=size ** -0.5, enable_gqa=True) for part in parts], 2)
    wanted = [out, *torch.autograd.grad(out, exact, dout.detach().float())]
    kernels = ["flash_attn"] * bool(importlib.util.find_spec("flash_attn_2_cuda")) + ["varlen"] if device.type == "cuda" else []
    for kernel in [*kernels, "padded"]:
        times = []
        for _ in range(3):
            started = clock(device)
            out = sft.packed_attention(None, q, k, v, None, size ** -0.5, cu, max(lengths), kernel)[0].transpose(1, 2)
            got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
            times.append(clock(device) - started)
        errors = [(x.float() - y).abs().max() / y.abs().max() for x, y in zip(got, wanted)]
        print(f"attention, {kernel}: {sum(lengths)} tokens, forward and backward {1000 * min(times):.1f} ms; largest error, as a share of "
              "the largest value: " + ", ".join(f"{name} {e.item():.1e}" for name, e in zip(("out", "dq", "dk", "dv"), errors)))


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(a, folder, device, dtype):
    tokens = 16 * a.tokens
    settings = SimpleNamespace(micro_batch_tokens=tokens, max_length=tokens, checkpointing=True, max_prompt_tokens=0, max_tokens=tokens,
                               prm_update="after", ref_type="freeze", offload=False, entropy_coef=0)
    m = plan.shape(f"{folder}/model")
    for script in ("sft", "prime"):
        phases = plan.sft_phases(settings, m, 1) if script == "sft" else plan.prime_phases(settings, m, m, m, 1)
        predicted = max(parts.total() for name, parts in phases.items() if name != "sync")
        nets = []
        for trained in [True] if script == "sft" else [True, True, False]:
            net = sft.load_model(f"{folder}/model", device, dtype, trained, checkpointing=True)
            nets.append((net, sft.make_optimizer(net, 1e-6) if trained else None))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        plan.longest_batch(nets, tokens, device)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            print(f"memory, {script}: peak {peak / plan.GB:.2f} GB, predicted {predicted / plan.GB:.2f} ({predicted / peak - 1:+.0%})")
        del nets, net
        gc.collect()                    # a model holds itself, by its forward(); and the engine below needs the room
        if device.type == "cuda":
            torch.cuda.empty_cache()


def engine(a, folder):
    done = subprocess.run([sys.executable, "prime.py", f"--data={folder}/problems.jsonl", f"--model={folder}/model", f"--out_dir={folder}/out",
                           f"--max_tokens={a.tokens}", "--max_steps=2", "--filter_low=0", "--filter_high=1", "--save_interval=0",
                           f"--prompts_per_step={a.rows}", "--samples_per_prompt=4"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"engine: prime.py ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return
    for row in map(json.loads, open(f"{folder}/out/metrics.jsonl")):
        print(f"engine {'vllm' if importlib.util.find_spec('vllm') else 'hf'}, step {row['step'] + 1}: engine and trainer differ by "
              f"{row['mismatch']:.1e} nats a token, KL {row['mismatch_kl']:.1e}; peak {row['peak_memory_gb']:.2f} GB; seconds {row['seconds']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = dict(hidden=1024, layers=16, vocab=65536, intermediate=2816, heads=8, groups=2)
    for name, value in dict(shape, tokens=1024, rows=16).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    device, dtype = plan.pick_device("auto", "auto")
    a.device, a.dtype = device.type, str(dtype)
    sft.setup_distributed(device)
    attention(a, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        bench_train.make(folder, a)
        memory(a, folder, device, dtype)
        engine(a, folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
