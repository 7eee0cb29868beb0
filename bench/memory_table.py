"""The tables of docs/memory.md: what sft.py and prime.py take of each GPU, by their defaults.

    python bench/memory_table.py

GB per GPU at the peak of a step, and whether that fits GPUs of 24, 80 and 141 GB, for the shapes of
Qwen2.5. Predicted by lib/memory.py, not measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import Qwen2Config

import prime
import sft
from lib.memory import (
    GB,
    GPU_SIZES,
    fits,
    model_size,
    prime_phases,
    sft_phases,
    whole_tokens,
)

MODELS = {
    "0.5B": dict(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "1.5B": dict(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "7B": dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}


def phases_of_sft(size, gpus):
    tokens = max(sft.micro_batch_tokens, sft.max_length)
    return sft_phases(size, gpus, tokens=tokens, checkpointing=sft.checkpointing)


def phases_of_prime(size, gpus, offload=False):
    longest = prime.max_prompt_tokens + prime.max_tokens
    tokens = max(prime.micro_batch_tokens, longest)
    return prime_phases(
        size,
        size,
        size,
        gpus,
        tokens=tokens,
        whole=whole_tokens(
            tokens, prime.max_prompt_tokens, prime.max_tokens, prime.samples_per_prompt
        ),
        prm_trained=prime.prm_update != "none",
        ref_frozen=prime.ref_type == "freeze",
        checkpointing=prime.checkpointing,
        entropy=prime.entropy_coef != 0,
        offload=offload,
    )


def phases_of_prime_offload(size, gpus):
    return phases_of_prime(size, gpus, offload=True)


def print_table(title, phases_of, engine_share=0.0):
    """phases_of(size, gpus) -> the phases of a step."""
    sizes = " | ".join(f"{gpu_size} GB" for gpu_size in GPU_SIZES)
    print(f"**`{title}`**\n")
    print(f"| model | GPUs | GB per GPU | {sizes} |")
    print("| --- | --: | --: | :-: | :-: | :-: |")
    for name, shape in MODELS.items():
        size = model_size(Qwen2Config(**shape))
        for gpus in (1, 2, 4, 8):
            phases = phases_of(size, gpus)
            fullest = max(memory.total() for memory in phases.values())
            cells = [name, f"{gpus}", f"{fullest / GB:.0f}"]
            for gpu_size in GPU_SIZES:
                cells.append("✓" if fits(phases, gpu_size, engine_share) else "–")
            print(f"| {' | '.join(cells)} |")


def main():
    print_table("sft.py", phases_of_sft)
    print()
    print_table("prime.py", phases_of_prime, prime.gpu_memory)
    print()
    print_table("prime.py --offload=True", phases_of_prime_offload, prime.gpu_memory)


if __name__ == "__main__":
    main()
