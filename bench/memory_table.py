"""README's table of memory: what sft.py and prime.py take of each GPU, by their default settings.

    python bench/memory_table.py

GB per GPU at the peak of a step, and the GPUs (of 24, 80 and 141 GB) that this fits, for
the shapes of Qwen2.5. Predicted by lib/memory.py, not measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import Qwen2Config

import prime
import sft
from lib.memory import GB, GPU_SIZES, fits, model_size, prime_phases, sft_phases

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


def phases_of_prime(size, gpus, offload):
    longest = prime.max_prompt_tokens + prime.max_tokens
    return prime_phases(
        size,
        size,
        size,
        gpus,
        tokens=max(prime.micro_batch_tokens, longest),
        prm_trained=prime.prm_update != "none",
        ref_frozen=prime.ref_type == "freeze",
        checkpointing=prime.checkpointing,
        entropy=prime.entropy_coef != 0,
        offload=offload,
    )


def cell(phases, engine_share=0.0):
    """The fullest phase, and the GPUs that fit: "27: 80, 141"."""
    fullest = max(memory.total() for memory in phases.values())
    good = [str(size) for size in GPU_SIZES if fits(phases, size, engine_share)]
    return f"{fullest / GB:.0f}: {', '.join(good) or 'none'}"


def main():
    print("| model | GPUs | `sft.py` | `prime.py` | `prime.py --offload=True` |")
    print("| --- | --: | --- | --- | --- |")
    for name, shape in MODELS.items():
        size = model_size(Qwen2Config(**shape))
        for gpus in (1, 2, 4, 8):
            cells = [
                cell(phases_of_sft(size, gpus)),
                cell(phases_of_prime(size, gpus, offload=False), prime.gpu_memory),
                cell(phases_of_prime(size, gpus, offload=True), prime.gpu_memory),
            ]
            print(f"| {name} | {gpus} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
