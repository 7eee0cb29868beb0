"""Answers ranked by an implicit PRM: its log-ratio to its reference, per token of an answer."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError
from lib.answers import Answer
from lib.pretrained import check_same_tokenizer, load_tokenizer, positions
from lib.prm_folder import read_prm_file
from lib.problems import Problem
from lib.run import print0
from lib.stored_answers import tokenize_stored

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


def rank_answers(
    pairs: list[tuple[dict, Problem]], prm: str, reference: str, device, dtype
) -> None:
    """Give each row of (row, problem) pairs a column `prm`: {prm, reference, mean, min}.

    mean and min are those of the log-ratios of the answer's tokens, log pi_prm - log pi_ref; null
    where prompt and answer are longer than the models' context. A row that has them from the same
    two models keeps them. prm, reference: folders or hub ids, with the same tokenizer.
    """
    identity = dict(prm=prm, reference=reference)
    missing = []
    for row, problem in pairs:
        stored = row.get("prm") or {}
        if {name: stored.get(name) for name in identity} != identity:
            missing.append((row, problem))
    if not missing:
        return

    check_same_tokenizer(prm, reference)
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
        row["prm"] |= dict(mean=log_ratio.mean().item(), min=log_ratio.min().item())


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
