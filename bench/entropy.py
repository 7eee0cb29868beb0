"""
Where is a model uncertain? The entropy of each token of its answers, at temperature 1.

    python bench/entropy.py MODEL FILE [--answers 400]

FILE: samples.jsonl of generate.py or responses of evaluate.py. A token that the model is certain of
has nearly no gradient, whatever its advantage: so this says how many tokens of an answer can be
praised or blamed at all.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.pretrained import load_tokenizer  # noqa: E402
from lib.rows import read_rows  # noqa: E402
from lib.stored_answers import tokenize_stored  # noqa: E402


@torch.no_grad()
def token_entropies(model, prompt, tokens):
    """Entropy in nats of the distribution that each token of an answer was drawn from, [T]."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def main():
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--answers", type=int, default=400)
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    rows = read_rows(arguments.file)[: arguments.answers]
    tokens = 0
    uncertain = 0
    total = 0.0
    shares = []
    for _, row in rows:
        prompt, answer = tokenize_stored(tokenizer, row)
        entropies = token_entropies(model, prompt, answer.tokens)
        tokens += len(entropies)
        uncertain += (entropies > 0.1).sum().item()
        total += entropies.sum().item()
        largest = entropies.sort(descending=True).values[:3]
        shares.append((largest.sum() / entropies.sum()).item())

    print(
        f"{len(rows)} answers of {tokens / len(rows):.1f} tokens: "
        f"{total / tokens:.3f} nats per token, {total / len(rows):.2f} per answer; "
        f"{uncertain / len(rows):.2f} tokens per answer have more than 0.1 nats; "
        f"three have {sum(shares) / len(shares):.0%} of an answer's entropy"
    )


if __name__ == "__main__":
    main()
