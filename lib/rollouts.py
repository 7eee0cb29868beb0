"""From prompts to groups of graded answers, and to a batch of tensors; the same on all ranks."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError
from lib.answers import TOOL_STOP, Answer, Request, sample_seed
from lib.pretrained import render_prompt
from lib.problems import Problem
from lib.run import print0
from lib.tools import Tool, sample


@dataclass
class Group:
    """A prompt and its K answers. index: of the problem; prompt: token ids."""

    index: int
    prompt: list[int]
    answers: list[Answer]

    @property
    def outcomes(self) -> list[float]:
        return [answer.outcome for answer in self.answers]


class PromptStream:
    """Prompts in a seeded order, epoch after epoch; those that are put back come first.

    drawn counts the prompts of all epochs, too_long those that did not fit; buffer has the
    problem numbers that were put back. state() is what a resume needs.
    """

    def __init__(self, problems: list[Problem], tokenizer, max_prompt_tokens: int, seed: int):
        self.problems = problems
        self.tokenizer = tokenizer
        self.limit = max_prompt_tokens
        self.seed = seed
        self.order = None
        self.drawn = 0
        self.too_long = 0
        self.buffer = []

    def draw(self, count: int) -> list[tuple[int, list[int]]]:
        """The next `count` (problem number, prompt ids).

        Raises UserError when every prompt is too long.
        """
        found = []
        tried = 0
        while len(found) < count:
            index = self.buffer.pop(0) if self.buffer else self.next_in_order()
            ids = render_prompt(self.tokenizer, self.problems[index].messages)
            tried += 1
            if len(ids) <= self.limit:
                found.append((index, ids))
                continue

            # Within two epochs every prompt is tried, in whatever order they come; before them come
            # those that were put back, at most `count`.
            self.too_long += 1
            if not found and tried > 2 * len(self.problems) + count:
                raise UserError(f"every prompt is longer than max_prompt_tokens={self.limit}")
        return found

    def all_that_fit(self) -> list[tuple[int, list[int]]]:
        """(problem number, prompt ids) of every problem whose prompt is short enough."""
        found = []
        for index, problem in enumerate(self.problems):
            ids = render_prompt(self.tokenizer, problem.messages)
            if len(ids) <= self.limit:
                found.append((index, ids))
        return found

    def next_in_order(self) -> int:
        """The next problem number; each epoch has an order of its own."""
        epoch, position = divmod(self.drawn, len(self.problems))
        if position == 0 or self.order is None:
            self.order = list(range(len(self.problems)))
            random.Random(f"{self.seed} {epoch}").shuffle(self.order)
        self.drawn += 1
        return self.order[position]

    def put_back(self, groups: list[Group]) -> None:
        """These prompts come first in the next draw."""
        self.buffer += [group.index for group in groups]

    def state(self) -> dict:
        return dict(drawn=self.drawn, buffer=list(self.buffer), too_long=self.too_long)

    def load_state(self, state: dict) -> None:
        self.drawn = state["drawn"]
        self.too_long = state["too_long"]
        # The data may be other data by now.
        self.buffer = [index for index in state["buffer"] if index < len(self.problems)]


def rollout(
    engine,
    grader,
    tokenizer,
    problems: list[Problem],
    prompts: list[tuple[int, list[int]]],
    n_samples: int,
    *,
    seed_words: tuple,
    temperature: float,
    max_tokens: int,
    tool: Tool | None = None,
) -> list[Group]:
    """Sample and grade n_samples answers to each of `prompts`, (problem number, ids). Collective.

    Each rank does its share; all ranks get all groups, in the order of the prompts. Sample k of
    the i-th prompt has the seed sample_seed(*seed_words, i, k), so what is sampled does not depend
    on the number of ranks. An answer that did not end by itself has outcome 0.
    """
    mine = list(enumerate(prompts))[dist.get_rank() :: dist.get_world_size()]

    # The K requests of a prompt stand next to each other.
    groups = {}
    requests = []
    places = []
    for i, (index, ids) in mine:
        groups[i] = Group(index, ids, [None] * n_samples)
        for k in range(n_samples):
            seed = sample_seed(*seed_words, i, k)
            requests.append(Request(ids, seed, temperature, max_tokens=max_tokens))
            places.append((i, k))

    # Other processes grade while sampling goes on.
    pending = []
    for number, answer in sample(engine, tokenizer, requests, tool):
        i, k = places[number]
        groups[i].answers[k] = answer
        if answer.finish_reason == "stop":
            reference = problems[groups[i].index].reference
            pending.append((answer, grader.submit(answer.text, reference)))
    for answer, future in pending:
        score = future.result()
        answer.outcome = float(score)
        answer.failure = score.failure
    return of_all_ranks(groups, len(prompts))


def of_all_ranks(groups: dict[int, Group], count: int) -> list[Group]:
    """The groups of all ranks by their numbers, 0 to count - 1. Collective."""
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, groups)
    merged = {}
    for part in by_rank:
        merged.update(part)
    return [merged[i] for i in range(count)]


@dataclass
class Batch:
    """The N rows of a step, the same on every rank.

    tokens: ids of prompt and response. scored: 1 for each of them that the model wrote, else 0
    (the prompt, a tool's output); only tokens with 1 get log-probabilities, rewards and losses.
    mask [N, T] bool is `scored` of the response alone, padded. lengths: tokens per row;
    prompt_lengths: those of its prompt. prompts: the number of its prompt, the same for K rows.
    outcomes [N]; engine_logprobs [N, T]: what the engine reported while sampling.
    """

    tokens: list[list[int]]
    scored: list[list[int]]
    lengths: list[int]
    prompt_lengths: list[int]
    prompts: list[int]
    mask: torch.Tensor
    outcomes: torch.Tensor
    engine_logprobs: torch.Tensor

    def describe(self) -> Iterator[dict]:
        """What is written of each row of a step that went wrong."""
        for i, tokens in enumerate(self.tokens):
            valid = self.mask[i]
            yield dict(
                tokens=tokens,
                scored=self.scored[i],
                outcome=self.outcomes[i].item(),
                engine_logprobs=self.engine_logprobs[i][valid].tolist(),
            )


def make_batch(groups: list[Group], device: torch.device) -> Batch:
    """Groups of graded answers as a Batch.

    Two answers [7 8] and [9] to the prompt [5 6] become the tokens [[5 6 7 8] [5 6 9]], scored
    [[0 0 1 1] [0 0 1]], lengths [4 3], prompt_lengths [2 2], prompts [0 0], mask [[1 1] [1 0]].
    """
    tokens = []
    scored = []
    prompt_lengths = []
    prompts = []
    answers = []
    for number, group in enumerate(groups):
        for answer in group.answers:
            prompt_lengths.append(len(group.prompt))
            prompts.append(number)
            tokens.append(group.prompt + answer.tokens)
            scored.append([0] * len(group.prompt) + answer.mask)
            answers.append(answer)

    N = len(answers)
    T = max(len(answer.tokens) for answer in answers)
    mask = torch.zeros(N, T, dtype=torch.bool)
    engine_logprobs = torch.zeros(N, T)
    for i, answer in enumerate(answers):
        n = len(answer.tokens)
        mask[i, :n] = torch.tensor(answer.mask, dtype=torch.bool)
        engine_logprobs[i, :n] = torch.tensor(answer.logprobs)

    return Batch(
        tokens=tokens,
        scored=scored,
        lengths=[len(row) for row in tokens],
        prompt_lengths=prompt_lengths,
        prompts=prompts,
        mask=mask.to(device),
        outcomes=torch.tensor([answer.outcome for answer in answers], device=device),
        engine_logprobs=engine_logprobs.to(device),
    )


def check_tokens(batch: Batch, nets: list) -> None:
    """Raise UserError if the policy has written a token that one of these models lacks.

    nets: PRM and reference; None is skipped. Models of one family have the same tokenizer and
    matrices that are padded to different sizes.
    """
    known = min(net.config.vocab_size for net in nets if net is not None)
    last = max(max(tokens) for tokens in batch.tokens)
    if last >= known:
        raise UserError(
            f"the policy wrote token {last}, and its PRM or reference knows {known} tokens: "
            "take models of one size of vocabulary"
        )


def mean_outcome(groups: list[Group]) -> float:
    """The mean outcome of all answers."""
    total = sum(sum(group.outcomes) for group in groups)
    return total / (len(groups) * len(groups[0].answers))


def pair_accuracy(scores, outcomes, n_samples: int):
    """Share of a prompt's pairs that the scores [N] order as the outcomes [N] do, a scalar.

    Pairs weigh as much as their outcomes differ; a prompt whose outcomes are all equal counts 0.5.
    Equal scores count as "the first is not greater": right for half of the pairs on average.
    The mean over prompts (original core_algos.py).
    """
    score = scores.view(-1, n_samples)
    outcome = outcomes.view(-1, n_samples).to(scores.dtype)
    score_gap = score[:, :, None] - score[:, None, :]  # [prompts, K, K]
    outcome_gap = outcome[:, :, None] - outcome[:, None, :]

    each_pair_once = torch.ones(n_samples, n_samples, device=scores.device).triu(1)
    weight = outcome_gap.abs() * each_pair_once
    agree = (score_gap > 0) == (outcome_gap > 0)
    right = (weight * agree).sum((1, 2))
    total = weight.sum((1, 2))
    return torch.where(total > 0, right / total.clamp(min=1e-12), 0.5).mean()


def batch_metrics(batch: Batch, old_logprobs, entropies) -> dict:
    """Mean outcome, entropy, and how far engine and trainer disagree: nats per token, and a KL.

    old_logprobs, entropies [N, T]: the trainer's, of the policy that the engine sampled from.
    """
    difference = (old_logprobs - batch.engine_logprobs)[batch.mask]
    return dict(
        outcome_kept=batch.outcomes.mean().item(),
        entropy=(entropies.sum() / batch.mask.sum()).item(),
        mismatch=difference.abs().mean().item(),
        mismatch_kl=(difference.exp() - 1 - difference).mean().item(),
    )


def check_mismatch(mismatch: float, bound: float | None, step: int, dtype: torch.dtype) -> None:
    """Raise UserError if the engine's log-probabilities are not those of the trainer.

    mismatch: nats per token. bound: the most that is accepted; None: what rounding explains.
    """
    if bound is None:
        bound = 1e-3 if dtype == torch.float32 else 0.1
    if not math.isfinite(mismatch) or mismatch > bound:
        raise UserError(
            f"step {step + 1}: engine and trainer disagree by {mismatch:.4f} nats per token on "
            f"average, more than max_mismatch={bound}: the engine has other weights or another "
            "precision"
        )


def end_of_problems(
    kept: list[Group], drawn: list[Group], wanted: int, low: float, high: float, step: int
) -> None:
    """Too few prompts passed the filter: print that the problems are solved, else raise UserError.

    Solved: the mean outcome is above the filter's upper end, and this is not the first step.
    """
    mean = mean_outcome(drawn)
    message = (
        f"step {step + 1}: {len(kept)} of {len(drawn)} prompts passed the filter "
        f"{low}-{high}, {wanted} are needed (mean outcome {mean:.3f})"
    )
    failures = 0
    for group in drawn:
        failures += sum(answer.failure is not None for answer in group.answers)
    if failures and mean == 0:
        raise UserError(f"{message}: {failures} answers could not be graded, as told above")
    if step == 0 or mean <= high:
        raise UserError(
            f"{message}: take easier or harder problems, a wider filter, or more max_draws"
        )
    print0(f"{message}: these problems are solved, the run ends here")


def rollout_metrics(groups: list[Group], problems: list[Problem], find_answer: Callable) -> dict:
    """Metrics of the answers that were drawn. find_answer(text): the answer of a text, or None."""
    answers = list(itertools.chain.from_iterable(group.answers for group in groups))
    rows = len(answers)

    # Only maths problems want a boxed answer.
    no_box = 0
    for group in groups:
        problem = problems[group.index]
        if problem.ability == "math" and not problem.own_reward:
            no_box += sum(find_answer(answer.text) is None for answer in group.answers)

    metrics = dict(
        outcome=mean_outcome(groups),
        prompts_drawn=len(groups),
        response_tokens=sum(sum(answer.mask) for answer in answers) / rows,
        truncated=sum(answer.finish_reason == "length" for answer in answers) / rows,
        no_box=no_box / rows,
        given_up=sum(answer.failure is not None for answer in answers) / rows,
        tool_calls=sum(answer.text.count(TOOL_STOP) for answer in answers) / rows,
    )

    # Outcomes by ability, where there are several.
    by_ability = {}
    for group in groups:
        by_ability.setdefault(problems[group.index].ability, []).extend(group.outcomes)
    if len(by_ability) > 1:
        for ability in sorted(by_ability):
            own = by_ability[ability]
            metrics[f"outcome_{ability}"] = sum(own) / len(own)
    return metrics
