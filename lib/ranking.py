"""Answers ranked by an implicit PRM: its log-ratio to its reference, per token of an answer."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError
from lib.answers import Answer
from lib.own_reward import short_hash
from lib.pretrained import (
    check_same_tokenizer,
    load_tokenizer,
    positions,
    top_token,
    vocabulary_size,
)
from lib.prm_folder import read_prm_file
from lib.problems import Problem
from lib.run import print0
from lib.stored_answers import tokenize_stored
from lib.weights import check_model_folder

# Tokens per pass, padding included; a longer answer goes alone.
PASS_TOKENS = 8192


def find_reference(prm: str, reference: str | None) -> str:
    """The PRM's reference: what is given, or else what its prm.json names.

    Raises UserError if there is neither.
    """
    found = read_prm_file(prm)
    if reference is None and found is None:
        raise UserError(
            f"{prm} has no prm.json that names its reference: --prm_ref= the model it started from"
        )
    return reference or found["reference"]


def check_models(prm: str, reference: str) -> None:
    """Raise UserError if one of the two cannot be loaded, or reads other tokens than the other.

    Ranking comes after hours of sampling: this is for before. Weights are not read here.
    """
    tokenizer = load_tokenizer(prm)
    check_same_tokenizer(prm, reference)
    for path in (prm, reference):
        check_model_folder(path, finite=False)
        if vocabulary_size(path) <= top_token(tokenizer):
            raise UserError(f"{path} has fewer tokens than the tokenizer of {prm}")


def version(path: str) -> str | None:
    """What changes when a model's folder is written again; None for a hub id."""
    if not Path(path).is_dir():
        return None
    files = []
    for file in sorted(Path(path).iterdir()):
        about = file.stat()
        files.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    return short_hash("\n".join(files).encode("utf-8", "surrogateescape"))


def rank_answers(
    pairs: list[tuple[dict, Problem]], prm: str, reference: str, device, dtype
) -> None:
    """Give each row of (row, problem) pairs a column `prm`: {prm, reference, versions, mean, min}.

    mean and min are those of the log-ratios of the answer's tokens, log pi_prm - log pi_ref; null
    where prompt and answer are longer than the models' context. A row that has them from the same
    two models keeps them, unless one of the folders was written again since. prm, reference:
    folders or hub ids that check_models() accepts.
    Raises UserError if a log-ratio is not finite.
    """
    versions = [version(prm), version(reference)]
    identity = dict(prm=prm, reference=reference, versions=versions)
    missing = []
    for row, problem in pairs:
        stored = row.get("prm") or {}
        if {name: stored.get(name) for name in identity} != identity:
            missing.append((row, problem))
    if not missing:
        return

    tokenizer = load_tokenizer(prm)
    longest = min(positions(prm), positions(reference))
    todo = []
    for row, problem in missing:
        row["prm"] = identity | dict(mean=None, min=None)
        prompt, answer = tokenize_answer_of(tokenizer, row, problem)
        if answer is not None and len(prompt) + len(answer.tokens) <= longest:
            todo.append((row, prompt, answer))
    print0(f"{prm} ranks {len(todo)} answers; {len(missing) - len(todo)} cannot be ranked")

    texts = [(prompt, answer) for _, prompt, answer in todo]
    prm_logprobs = answer_logprobs(prm, texts, device, dtype)
    ref_logprobs = answer_logprobs(reference, texts, device, dtype)
    for (row, _, answer), ours, theirs in zip(todo, prm_logprobs, ref_logprobs):
        own_words = torch.tensor(answer.mask, dtype=torch.bool)
        log_ratio = (ours - theirs)[own_words]
        mean = log_ratio.mean().item()
        if not math.isfinite(mean):
            # Nothing can be compared to such a rank: it would be the best or the worst by chance.
            raise UserError(
                f"{prm} or its reference {reference} gives log-probabilities that are not finite: "
                "take another PRM; the responses are kept"
            )
        row["prm"] |= dict(mean=mean, min=log_ratio.min().item())


def tokenize_answer_of(tokenizer, row: dict, problem: Problem):
    """(prompt ids, Answer) in the tokens and the chat template of the PRM; no answer: (_, None)."""
    asked = dict(row, messages=problem.messages)
    try:
        return tokenize_stored(tokenizer, asked)
    except ValueError:
        return [], None


@torch.no_grad()
def answer_logprobs(
    path: str, texts: list[tuple[list[int], Answer]], device, dtype
) -> list[torch.Tensor]:
    """log-probabilities of the tokens of each answer after its prompt, float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    found = [None] * len(texts)
    for numbers in tqdm(batches_of(texts), desc=path, unit="pass", disable=None):
        rows = [torch.tensor(texts[n][0] + texts[n][1].tokens) for n in numbers]
        # Padding is on the right, where no token sees it: it needs no mask.
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logits = model(tokens).logits  # [B, T, V]
        for row, n in enumerate(numbers):
            prompt, answer = texts[n]
            first = len(prompt)
            end = first + len(answer.tokens)
            logprobs = F.log_softmax(logits[row, first - 1 : end - 1].float(), dim=-1)
            targets = tokens[row, first:end, None]
            found[n] = logprobs.gather(-1, targets)[:, 0].cpu()
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def batches_of(texts: list[tuple[list[int], Answer]]) -> list[list[int]]:
    """Numbers of texts of similar length, as many per batch as PASS_TOKENS allows."""
    lengths = [len(prompt) + len(answer.tokens) for prompt, answer in texts]
    batches = []
    for number in sorted(range(len(texts)), key=lambda number: -lengths[number]):
        # The first one of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= PASS_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
