"""
PRIME: reinforcement learning with an implicit process reward model (PRM) that learns online, from
outcomes alone.

    torchrun --nproc_per_node 8 prime.py config/intellect_math_prime.py    # 8 GPUs, 7B
    torchrun --nproc_per_node 2 prime.py config/toy_prime.py               # a laptop, a toy task

One step, in the order of main():
  1. sample K answers per prompt and grade them, until enough prompts have mixed outcomes
  2. log-probabilities of the answers under the policy and under the reference, a frozen model
  3. train the PRM to tell right from wrong; the reward of a token is log pi_prm - log pi_ref
  4. leave-one-out returns of outcomes and of process rewards, separately; their sum, whitened
  5. PPO
  6. copy the new weights to the engine, vLLM say, which samples the next step

Paper: Cui et al., Process Reinforcement through Implicit Rewards, arXiv 2502.01456. Reference code:
github.com/PRIME-RL/PRIME, training/verl/ (called "original" below), and the `prime` recipe of
github.com/verl-project/verl-recipe (called "recipe").

Shapes: N rows (prompts x K samples, the K rows of a prompt next to each other), T tokens of a
response, padded on the right. mask [N, T] is True on the tokens that the model wrote, the end token
included. Left out on purpose: a value model, a KL penalty, asynchronous rollouts.

Where to start: the first 20 settings, the formulas, then main() at the end of the file; its helpers
stand above it. In the scripts the setting `model` is the name of a model; loaded ones are `net`,
`models.policy` and so on. "Collective" in a docstring: every process has to call the function, or
the run hangs.
"""

import math
import os
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import configurator
from configurator import UserError
from engine import make_engine
from grader import Grader, extract_answer
from lib import memory
from lib.answers import sample_seed
from lib.estimators import check_groups, dr_grpo, grpo, reinforce, suffix_sum
from lib.finite import stops_if_not_finite
from lib.pretrained import (
    check_positions,
    check_same_tokenizer,
    load_tokenizer,
    top_token,
    vocabulary_size,
)
from lib.prm_folder import read_prm_file, write_prm_file
from lib.problems import load_problems
from lib.report import RowMeans, RunLog, Stopwatch, check_wandb
from lib.rollouts import (
    Batch,
    Group,
    PromptStream,
    batch_metrics,
    check_mismatch,
    check_tokens,
    end_of_problems,
    make_batch,
    pair_accuracy,
    rollout,
    rollout_metrics,
)
from lib.run import (
    all_sum,
    announce_sandbox,
    catch_signals,
    check_limits,
    cores,
    is_due,
    leave_distributed,
    local_processes,
    machine_words,
    make_run_folder,
    on_first_rank,
    peak_memory_gb,
    pick_device,
    print0,
    setup_distributed,
    waiting_for,
)
from lib.samples import rows_for_log
from lib.step_rewards import wrong_step_metrics
from lib.stored_answers import read_groups
from lib.tools import Tool
from model import (
    full_tensors,
    idle_passes,
    load_checkpoint,
    load_model,
    longest_batch,
    make_optimizer,
    move,
    my_shared_batches,
    on_device,
    optimizer_step,
    row_logprobs,
    save_checkpoint,
    save_model,
    score,
)

# --- the algorithm: what defines a PRIME run
prompts_per_step = 256  # prompts that pass the filter; times K: 1,024 rows per step
samples_per_prompt = 4  # K
temperature = 1.0  # of the rollouts
max_tokens = 3072  # per response; 4096 with the prompt, Qwen2.5-Math's context
filter_low = 0.2  # a prompt is kept if low <= mean outcome <= high
filter_high = 0.8
# when the PRM is trained: 'after': each mini-batch is scored by the pass that then trains on it
# (published); 'before' it scores the batch, at the price of one more pass (recipe); 'none': never
prm_update = "after"
# PRM logit = beta * sum of log-ratios, which grows with the answer's length: 0.05 suits answers of
# 1,400 tokens, 1 answers of 35 (by a small model; a pretrained one needs less)
beta = 0.05
prm_learning_rate = 1e-6
prm_batch_rows = 256  # rows per optimizer step of the PRM: 4 steps for 1,024 rows
granularity = "token"  # process reward per 'token', or 'whole': the row's sum on its last token
# divide process rewards by the largest |suffix sum|; None: do not, and put the paper's factor beta
# into process_coef
normalize = "batch"
estimator = "rloo"  # 'rloo' (published); with 'grpo', 'dr_grpo' or 'reinforce' set whiten=False
outcome_coef = 1.0  # weight of the outcome's returns; 0 switches this source off
# weight of the process returns; with whiten only the ratio matters. 0 with prm_update='none':
# outcomes alone, without PRM and reference
process_coef = 1.0
whiten = True  # advantages to mean 0 and variance 1 over all tokens of the batch
learning_rate = 5e-7  # of the policy, constant
batch_rows = 256  # rows per optimizer step of the policy: 4 steps for 1,024 rows
clip = 0.2  # PPO's
max_steps = 256  # INTELLECT-MATH's best checkpoint is its 256th step; 592 for Eurus-2
# --- data
# hub id, a .jsonl, .json, .csv or .parquet file, or a folder of .parquet files
data = "PRIME-RL/Eurus-2-RL-Data"
data_config: str = None  # the hub data set's configuration
split = "train"  # the hub data set's split
problem_column: str = None  # None: prompt (messages), problem, question or instruction
answer_column: str = None  # None: ground_truth, reward_model, answer, final_answer or solution
system_prompt: str = (
    None  # None: the row's own (Eurus-2-RL-Data's names actions, as [ASSESS]); '': none
)
user_suffix = ""  # appended to every problem (Eurus-2-RL-Data has it in the prompt)
code_suffix: str = None  # appended to problems of ability 'code'; None: user_suffix
max_bad_share = 0.01  # malformed rows are counted and reported; more than this share is an error
reward: str = None  # your_file.py with reward(response, problem) -> float; None: grader.py's judges
eval_data: str = None  # held-out problems, the same formats; None: no evaluation
eval_split = "validation"
eval_problems = 256  # only the first ones
eval_samples = 4  # answers per problem, always at temperature 1, besides the greedy one
# --- models
model = "PrimeIntellect/INTELLECT-MATH-SFT"  # policy at the start: hub id or folder
prm_model: str = None  # implicit PRM at the start; None: the same as the policy (published)
# reference of the log-ratio, frozen; None: what the PRM's folder names in its prm.json, or else the
# PRM's start (published)
ref_model: str = None
ref_type = "freeze"  # 'freeze' (published), or 'policy': the policy before its update is reference
chat_template: str = None  # .jinja file; None: the tokenizer's own
attention = "auto"  # 'flash_attn', 'varlen' (torch's own kernel), 'padded'; 'auto': the first found
# --- more on rollouts
engine = "auto"  # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
max_prompt_tokens = 1024  # longer prompts are left out, not cut
gpu_memory = 0.5  # share of each GPU for the engine (original: 0.7)
oversample = 1.0  # prompts per draw = oversample * prompts_per_step (recipe: 4.0)
# 'until_full': draw until enough prompts pass (original); 'once': one draw, filled up with prompts
# that fail the filter (recipe)
collect = "until_full"
filter_truncated = False  # reject a prompt if one of its answers was cut (recipe: True)
max_draws = 50  # draws per step before the run gives up: too few prompts pass the filter
tir = False  # answers may call Python, as NuminaMath-7B-TIR does: see lib/tools.py
tir_rounds = 4  # turns of the model at most; a program runs between two turns
tir_timeout = 5.0  # seconds per program
# isolation of programs: 'auto' (the best installed, printed at start), 'required' (bubblewrap)
sandbox = "auto"
grade_workers: int = None  # grading processes per rank; None: cores / ranks
grade_timeout = 5.0  # seconds per answer
# mean |log-prob of engine - of trainer| that stops the run; None: 0.1 in bf16, 1e-3 in fp32
max_mismatch: float = None
# --- more on the PRM
# the batch in so many consecutive chunks, each with its own divisor. Original: one per GPU (8)
normalize_chunks = 1
last_token_reward = True  # False: no process reward on the last token (recipe)
# a samples.jsonl of generate.py, or responses of evaluate.py: train the PRM on these answers, each
# once, and nothing else (Yuan et al., arXiv 2412.01981)
rollouts: str = None
prm_grad_clip = 10.0
prm_weight_decay = 0.0
# --- more on the policy
outcome_gamma = 1.0  # discount of outcome returns
process_gamma = 1.0  # discount of process returns
warmup_steps = 0  # linear; of both models; unlike in sft.py the first step's rate is not 0
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
ppo_epochs = 1
# weigh each token by min(p_trainer / p_engine, this) of its rollout; None: do not (published)
importance_cap: float = None
entropy_coef = 0.0  # bonus (recipe's yaml: 0.001)
# --- run
seed = 0
eval_interval = 16  # steps (published: 16)
save_interval = 16  # steps between checkpoints to resume from; 0: none
keep_checkpoints = 2
# policy/ and prm/ at the end; metrics.jsonl, samples.jsonl, curves.png, tokens.html, checkpoints/
out_dir = "out/intellect_math"
# rows of each step that go to samples.jsonl and tokens.html, at least: all K answers of a prompt do
samples_logged = 8
# samples.jsonl keeps those of the last so many steps, at most twice as many; None: all
samples_steps: int = None
wandb_project: str = None  # also log to Weights & Biases, if it is installed
# --- system
device = "auto"  # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = "auto"  # of passes and engine: 'bfloat16', 'float32', 'auto': bfloat16 on cuda
micro_batch_tokens = 16384  # tokens per forward pass and process; a longer row goes alone
checkpointing = True  # recompute activations in the backward pass
compile = False  # torch.compile layers and head: meant for GPUs; the first step takes a minute
# processes that share a copy of a model's state (HSDP; with --nnodes: a node's); None: all
shard: int = None
offload = False  # PRM, reference and Adam's state wait in host memory while they are not needed
timeout_minutes = 60.0  # a collective that waits longer ends the run
# print what a step and a GPU hold; where there is a GPU run the longest batch; and end
dry_run = False

# ----------------------------------------------------------------------------------------------
# The algorithm's formulas. They read no settings.


def keep_group(outcomes, low: float = 0.2, high: float = 0.8) -> bool:
    """Does a prompt stay in the batch? outcomes: its K outcomes in [0, 1].

    The mean, in float32, must lie between low and high, both included (paper, section 3.2;
    original trainer/ppo/ray_trainer.py, filter).

    >>> keep_group([1, 0, 0, 0]), keep_group([1, 1, 1, 1])
    (True, False)
    """
    mean = torch.as_tensor(outcomes, dtype=torch.float32).mean()
    return bool((mean >= low) & (mean <= high))


def last_token(mask):
    """[N, T] mask -> [N, T] bool, True on the last valid token of each row."""
    mask = mask.bool()
    tokens_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (tokens_from_here == 1)


def process_rewards(
    prm_logprobs, ref_logprobs, mask, granularity="token", normalize="batch", divisor=None
):
    """Implicit process rewards [N, T]: r_t = log pi_prm(y_t) - log pi_ref(y_t), 0 outside mask.

    Paper, Eq. 3, without its factor beta, which the division cancels (original core_algos.py,
    dp_prime.py; with normalize=None it is missing). granularity "whole" puts the row's sum on its
    last token. normalize "batch" divides by the largest |suffix sum| of the rows given + 1e-6, so
    that no suffix sum exceeds 1, the outcome of a right answer; None does not divide. divisor:
    divide by this instead.
    Raises ValueError for another granularity.
    """
    rewards = torch.where(mask.bool(), prm_logprobs - ref_logprobs, 0.0)
    if granularity == "whole":
        rewards = torch.where(last_token(mask), rewards.sum(-1, keepdim=True), 0.0)
    elif granularity != "token":
        raise ValueError(f"granularity={granularity!r}: 'token' or 'whole'")

    if divisor is None and normalize == "batch":
        divisor = suffix_sum(rewards).abs().max() + 1e-6
    if divisor is None:
        return rewards
    return rewards / divisor


def prm_loss(prm_logprobs, ref_logprobs, mask, outcomes, beta: float = 0.05):
    """Cross-entropy of sigmoid(beta * sum over t of the log-ratio) against outcomes [N], a scalar.

    Paper, Eq. 4; original core_algos.py, compute_ce_dpo_loss_rm. The mean over rows; outcomes in
    [0, 1] may be fractions. It starts at ln 2, when PRM and reference are equal.
    """
    log_ratio = torch.where(mask.bool(), prm_logprobs - ref_logprobs, 0.0)
    logit = beta * log_ratio.sum(-1)  # [N]
    return F.binary_cross_entropy_with_logits(logit, outcomes.to(logit.dtype))


def rloo(rewards, mask, n_samples: int, gamma: float = 1.0):
    """Leave-one-out returns [N, T] of one source of rewards (paper, Eq. 5; original core_algos.py).

    mask [N, T] says where this source pays: every valid token for process rewards, the last one
    for the outcome. With rbar_j the token mean of row j, and j over the K rows of a prompt, the
    reward of token t in row i becomes

        K/(K-1) r_it - 1/(K-1) sum_j rbar_j  =  [r_it - mean of rbar_j over j != i]
                                                + (r_it - rbar_i) / (K-1)

    For an outcome the second term is 0: what is left is o_i minus the mean of the others. For
    process rewards the paper's text has the first term alone; the published code has both, and
    so have we. The return of a token is the discounted sum of these from the token on.
    Raises ValueError for n_samples < 2, for N not a multiple of it, for a row with an empty mask.

    Outcomes 1 0 0 1 of one prompt, one token each, become 2/3 -2/3 -2/3 2/3.
    """
    mask = check_groups(rewards, mask, n_samples)
    rewards = torch.where(mask, rewards, 0.0)
    row_mean = rewards.sum(-1) / mask.sum(-1)  # [N]
    group_sum = row_mean.view(-1, n_samples).sum(-1).repeat_interleave(n_samples)  # [N]
    left_out = (n_samples * rewards - group_sum[:, None]) / (n_samples - 1)
    return suffix_sum(torch.where(mask, left_out, 0.0), gamma)


# The others are in lib/estimators.py.
ESTIMATORS = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "reinforce": reinforce}


def advantages(
    outcomes,
    process,
    mask,
    n_samples: int,
    outcome_coef=1.0,
    process_coef=1.0,
    outcome_gamma=1.0,
    process_gamma=1.0,
    whiten=True,
    estimator=rloo,
    stats=None,
):
    """Advantages [N, T], 0 outside mask: the returns of both sources, added, then whitened.

    outcomes [N] in [0, 1]; process [N, T] process rewards, or None. Whitening is over all valid
    tokens of the batch: unbiased variance, + 1e-8 under the root. estimator: rloo() or a function
    like it. stats: a dict that receives the mean |return| of each source.
    Original core_algos.py (its two coefficients are equal, so that whitening cancels them),
    utils/torch_functional.py, masked_whiten.
    """
    mask = mask.bool()
    end = last_token(mask)
    dtype = torch.get_default_dtype() if process is None else process.dtype
    outcome_rewards = torch.where(end, outcomes[:, None].to(dtype), 0.0)

    outcome_returns = estimator(outcome_rewards, end, n_samples, outcome_gamma)
    returns = outcome_coef * outcome_returns
    if process is not None:
        process_returns = estimator(process, mask, n_samples, process_gamma)
        returns = returns + process_coef * process_returns

    if stats is not None:
        stats["outcome_return"] = outcome_returns[mask].abs().mean().item()
        if process is not None:
            stats["process_return"] = process_returns[mask].abs().mean().item()

    if whiten:
        return whitened(returns, mask)
    return torch.where(mask, returns, 0.0)


def whitened(returns, mask):
    """Returns [N, T] with mean 0 and variance 1 over all valid tokens, 0 outside mask."""
    valid = returns[mask]
    returns = (returns - valid.mean()) * torch.rsqrt(valid.var() + 1e-8)
    return torch.where(mask, returns, 0.0)


def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip: float = 0.2):
    """(loss, stats) of PPO's clipped surrogate, max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)).

    The mean over rows of the mean over a row's tokens. Original core_algos.py,
    compute_policy_loss: it averages over micro-batches, and those of the published runs have one
    row each.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0.0)  # [N, T]
    ratio = log_ratio.exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)

    def mean(x):
        row_mean = torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1)  # [N]
        return row_mean.mean()

    stats = dict(
        clipfrac=mean((clipped > surrogate).to(ratio.dtype)).detach(),
        approx_kl=mean(-log_ratio).detach(),
        ratio_max=ratio.max().detach(),
    )
    return mean(torch.maximum(surrogate, clipped)), stats


# ----------------------------------------------------------------------------------------------
# Rollouts. From here on functions read this script's settings.


def sample_groups(
    rollout_engine, grader, source, prompts, n_samples, seed_words, other_temperature=None
) -> list[Group]:
    """rollout() with this script's settings. source: a PromptStream."""
    return rollout(
        rollout_engine,
        grader,
        source.tokenizer,
        source.problems,
        prompts,
        n_samples,
        seed_words=seed_words,
        temperature=temperature if other_temperature is None else other_temperature,
        max_tokens=max_tokens,
        tool=Tool(tir_rounds, tir_timeout) if tir else None,
    )


def passes_filter(group: Group) -> bool:
    """Is a prompt's mean outcome inside the filter, and, if that matters, no answer cut?"""
    if filter_truncated and any(a.finish_reason == "length" for a in group.answers):
        return False
    return keep_group(group.outcomes, filter_low, filter_high)


def collect_groups(rollout_engine, grader, stream, step: int) -> tuple[list[Group], list[Group]]:
    """Draw prompts, sample, grade, filter. Returns (prompts_per_step groups to keep, all drawn).

    Draws until enough prompts pass (too few are kept if max_draws draws were not enough), or with
    collect="once" a single time, filled up with prompts that fail. Surplus prompts are put back,
    to be sampled again by the next policy; their answers are thrown away (original).
    """
    kept = []
    failed = []
    drawn = []
    for draw in range(1 if collect == "once" else max_draws):
        # Prompts that the last step put back come first, at most a batch of them, so that each draw
        # has fresh ones.
        fresh = max(1, int(prompts_per_step * oversample))
        put_back = min(len(stream.buffer), prompts_per_step) if draw == 0 else 0
        prompts = stream.draw(fresh + put_back)

        seed_words = (seed, step, draw)
        groups = sample_groups(
            rollout_engine, grader, stream, prompts, samples_per_prompt, seed_words
        )
        for group in groups:
            if passes_filter(group):
                kept.append(group)
            else:
                failed.append(group)
        drawn += groups
        if len(kept) >= prompts_per_step:
            break

    if collect == "once":
        # The recipe draws once, and fills up with prompts that fail the filter.
        missing = max(0, prompts_per_step - len(kept))
        kept += failed[:missing]
    else:
        stream.put_back(kept[prompts_per_step:])
    return kept[:prompts_per_step], drawn


def sampling_metrics(kept: list[Group], drawn: list[Group], stream: PromptStream) -> dict:
    """Metrics of all groups that were drawn, of which some were kept."""
    metrics = rollout_metrics(drawn, stream.problems, extract_answer)
    metrics["prompts_kept"] = len(kept)
    metrics["kept_share"] = sum(map(passes_filter, drawn)) / len(drawn)
    metrics["too_long"] = stream.too_long
    return metrics


def evaluate(rollout_engine, grader, held_out: PromptStream) -> dict[str, float]:
    """Accuracy on held-out problems: greedy, and the mean of eval_samples at temperature 1.

    Problems whose prompt is too long count as wrong.
    """
    prompts = held_out.all_that_fit()
    greedy = sample_groups(rollout_engine, grader, held_out, prompts, 1, (seed, "greedy"), 0.0)
    sampled = sample_groups(
        rollout_engine, grader, held_out, prompts, eval_samples, (seed, "eval"), 1.0
    )
    total = len(held_out.problems)
    return dict(
        eval_greedy=sum(sum(group.outcomes) for group in greedy) / total,
        eval_sampled=sum(sum(g.outcomes) / len(g.outcomes) for g in sampled) / total,
    )


# ----------------------------------------------------------------------------------------------
# The models


@dataclass
class Models:
    """Policy, PRM, reference, and optimizers.

    ref is None where the policy is the reference. Where outcomes are the only rewards there is
    neither PRM nor reference, and no policy where a PRM is trained on stored answers.
    """

    policy: torch.nn.Module | None
    optimizer: torch.optim.Optimizer | None
    prm: torch.nn.Module | None
    prm_optimizer: torch.optim.Optimizer | None
    ref: torch.nn.Module | None

    @property
    def trained(self) -> dict:
        """{name: (model, optimizer)} that checkpoints contain."""
        pairs = {}
        if self.policy is not None:
            pairs["policy"] = (self.policy, self.optimizer)
        if prm_update != "none":
            pairs["prm"] = (self.prm, self.prm_optimizer)
        return pairs


def uses_prm() -> bool:
    """Are there process rewards, or is a PRM trained to give some later?"""
    return process_coef != 0 or prm_update != "none"


def reference_logprobs(models: Models, batch: Batch, old):
    """Log-probabilities [N, T] of the reference, at temperature 1 like the PRM's.

    old: as in train_policy().
    """
    check_tokens(batch, [models.prm, models.ref])
    if ref_type == "policy" and temperature == 1:
        old_logprobs, _ = old
        return old_logprobs
    net = models.policy if ref_type == "policy" else models.ref
    with on_device(batch.mask.device, offload, models.ref):
        logprobs, _ = score(net, batch, micro_batch_tokens)
    return logprobs


# ----------------------------------------------------------------------------------------------
# The updates


def train_prm(models: Models, batch: Batch, ref_logprobs, step: int):
    """A cross-entropy step per mini-batch of rows. Returns (log-probabilities [N, T], stats).

    The log-probabilities are those of the passes that trained: each row is scored by weights that
    have not seen its outcome (PRIME's `update: after`).
    """
    N = len(batch.lengths)
    world_size = dist.get_world_size()
    torch_device = batch.mask.device
    lr = warmed_up(prm_learning_rate, step)
    logprobs_of_all = torch.zeros_like(ref_logprobs)  # [N, T]
    losses = []
    norms = []

    for low in range(0, N, prm_batch_rows):
        minibatch = list(range(low, min(low + prm_batch_rows, N)))
        loss_sum = torch.zeros((), dtype=torch.float64, device=torch_device)
        mine, idle = my_shared_batches(batch, micro_batch_tokens, minibatch)

        for rows in mine:
            logprobs, _ = row_logprobs(models.prm, batch, rows)
            loss = prm_loss(
                logprobs, ref_logprobs[rows], batch.mask[rows], batch.outcomes[rows], beta
            )
            loss = loss * len(rows) / len(minibatch)  # the mean over the mini-batch's rows
            (loss * world_size).backward()  # FSDP divides gradients by world_size
            logprobs_of_all[rows] = logprobs.detach()
            loss_sum += loss.detach()
        idle_passes(models.prm, idle, torch_device)

        norm = optimizer_step(
            models.prm, models.prm_optimizer, lr, prm_grad_clip, loss_sum, minibatch
        )
        norms.append(norm)
        losses.append(all_sum(loss_sum, torch_device))

    dist.all_reduce(logprobs_of_all)
    stats = dict(prm_loss=sum(losses) / len(losses), prm_grad_norm=max(norms))
    return logprobs_of_all, stats


def update_prm(models: Models, batch: Batch, ref_logprobs, step: int):
    """The PRM's log-probabilities [N, T] that rewards are made of, and what to report.

    One branch per prm_update. `unseen` are log-probabilities by weights that have not seen these
    outcomes: what the PRM's accuracy is measured on.
    """
    if prm_update == "after":
        # Published: the pass that trains also scores.
        unseen, stats = train_prm(models, batch, ref_logprobs, step)
        prm_logprobs = unseen
    elif prm_update == "before":
        # Recipe: train, then score with the new weights.
        unseen, stats = train_prm(models, batch, ref_logprobs, step)
        prm_logprobs, _ = score(models.prm, batch, micro_batch_tokens)
    else:
        # The PRM stays as it is.
        unseen, _ = score(models.prm, batch, micro_batch_tokens)
        prm_logprobs = unseen
        loss = prm_loss(unseen, ref_logprobs, batch.mask, batch.outcomes, beta)
        stats = dict(prm_loss=loss.item(), prm_grad_norm=0.0)

    stats["prm_pair_accuracy"] = prm_accuracy(unseen, ref_logprobs, batch)
    return prm_logprobs, stats


def prm_accuracy(prm_logprobs, ref_logprobs, batch: Batch) -> float:
    """Share of a prompt's pairs of answers that the PRM orders as their outcomes do."""
    scores = torch.where(batch.mask, prm_logprobs - ref_logprobs, 0.0).sum(-1)  # [N]
    return pair_accuracy(scores, batch.outcomes, samples_per_prompt).item()


def updates_once() -> bool:
    """Is there a single update of the policy per step?

    Then its passes say what the policy was before it, unless that is needed earlier.
    """
    rows = prompts_per_step * samples_per_prompt
    return ppo_epochs * rows <= batch_rows and ref_type != "policy"


def train_policy(models: Models, batch: Batch, old, A, step: int):
    """PPO over mini-batches of rows. Returns (old, stats).

    old: log-probabilities and entropies [N, T] of the policy before its update. None with a single
    update: its passes are of that policy, and what they find is returned. A [N, T]: advantages.
    stats: means over all rows, but grad_norm the largest.
    """
    single = old is None
    if single:
        old = torch.zeros_like(batch.engine_logprobs), torch.zeros_like(batch.engine_logprobs)
    old_logprobs, old_entropies = old
    policy = models.policy
    lr = warmed_up(learning_rate, step)
    N = len(batch.lengths)
    world_size = dist.get_world_size()
    torch_device = batch.mask.device
    means = RowMeans(total_rows=ppo_epochs * N)
    norms = []

    for minibatch in minibatches(N, step):
        loss_sum = torch.zeros((), dtype=torch.float64, device=torch_device)
        mine, idle = my_shared_batches(batch, micro_batch_tokens, minibatch)
        for rows in mine:
            mask = batch.mask[rows]
            wants_entropy = single or entropy_coef != 0
            logprobs, entropies = row_logprobs(policy, batch, rows, temperature, wants_entropy)
            if single:
                old_logprobs[rows] = logprobs.detach()
                old_entropies[rows] = entropies.detach()

            weights = importance_weights(old_logprobs[rows], batch.engine_logprobs[rows])
            loss, stats = ppo_loss(logprobs, old_logprobs[rows], A[rows] * weights, mask, clip)
            if entropy_coef:
                loss = loss - entropy_coef * (entropies.sum(-1) / mask.sum(-1)).mean()

            # The mean over the mini-batch's rows. FSDP divides gradients by world_size: undo that.
            part = loss * len(rows) / len(minibatch)
            (part * world_size).backward()
            loss_sum += part.detach()
            stats["policy_loss"] = loss.detach()
            means.add(stats, len(rows))
        idle_passes(policy, idle, torch_device)
        norm = optimizer_step(policy, models.optimizer, lr, grad_clip, loss_sum, minibatch)
        norms.append(norm)

    if single:
        for values in old:
            dist.all_reduce(values)
    return old, dict(means.over_ranks(), grad_norm=max(norms), lr=lr)


def minibatches(N: int, step: int) -> list[list[int]]:
    """Row numbers 0 .. N-1, shuffled again for every epoch, cut into mini-batches."""
    order = []
    for epoch in range(ppo_epochs):
        generator = torch.Generator().manual_seed(sample_seed(seed, step, epoch))
        order += torch.randperm(N, generator=generator).tolist()
    return [order[low : low + batch_rows] for low in range(0, len(order), batch_rows)]


def warmed_up(rate: float, step: int) -> float:
    """A learning rate, linear over the first warmup_steps, then constant."""
    return rate * min(1.0, (step + 1) / (warmup_steps + 1))


def process_rewards_in_chunks(prm_logprobs, ref_logprobs, mask):
    """Process rewards [N, T], each of normalize_chunks consecutive chunks with its own divisor."""
    if not last_token_reward:
        # Equal log-probabilities: a reward of 0 on the last token.
        prm_logprobs = torch.where(last_token(mask), ref_logprobs, prm_logprobs)
    chunks = zip(
        prm_logprobs.chunk(normalize_chunks),
        ref_logprobs.chunk(normalize_chunks),
        mask.chunk(normalize_chunks),
    )
    return torch.cat([process_rewards(*chunk, granularity, normalize) for chunk in chunks])


def batch_advantages(batch: Batch, process):
    """(returns [N, T], advantages [N, T], stats) of outcomes and process rewards [N, T].

    The advantages are the returns, whitened if `whiten` says so.
    """
    stats = {}
    returns = advantages(
        batch.outcomes,
        process,
        batch.mask,
        samples_per_prompt,
        outcome_coef,
        process_coef,
        outcome_gamma,
        process_gamma,
        False,
        ESTIMATORS[estimator],
        stats,
    )
    A = whitened(returns, batch.mask) if whiten else returns
    stats["advantage_std"] = A[batch.mask].std().item()
    return returns, A, stats


def importance_weights(old_logprobs, engine_logprobs):
    """Truncated importance weights [B, T]: the tokens were drawn from the engine's distribution."""
    if importance_cap is None:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - engine_logprobs).exp().clamp(max=importance_cap)


# ----------------------------------------------------------------------------------------------
# Set-up


def check_settings() -> None:
    """Raise UserError for values that cannot work, before anything is loaded."""
    at_least_one = (
        "prompts_per_step max_draws batch_rows prm_batch_rows ppo_epochs micro_batch_tokens "
        "eval_problems eval_samples eval_interval keep_checkpoints normalize_chunks samples_steps"
    )
    least = dict.fromkeys(at_least_one.split(), 1)
    least["samples_per_prompt"] = 2
    not_negative = (
        "learning_rate prm_learning_rate weight_decay prm_weight_decay grad_clip prm_grad_clip "
        "warmup_steps save_interval samples_logged max_bad_share clip"
    )
    least |= dict.fromkeys(not_negative.split(), 0)
    least["oversample"] = 1.0 if collect == "once" else 0.0  # one draw must be enough there
    check_limits(
        globals(),
        least,
        prm_update=("after", "before", "none"),
        collect=("until_full", "once"),
        ref_type=("freeze", "policy"),
        granularity=("token", "whole"),
        normalize=("batch", None),
        estimator=tuple(ESTIMATORS),
    )
    check_wandb(wandb_project)
    for name in ("learning_rate", "prm_learning_rate"):
        if not math.isfinite(globals()[name]):
            raise UserError(f"{name}={globals()[name]}: a finite number")
    if not 0 < temperature <= 2:
        raise UserError(f"temperature={temperature}: rollouts need 0 < temperature <= 2")
    if not (outcome_coef or process_coef):
        raise UserError("outcome_coef and process_coef are both 0: no source of rewards is left")
    if rollouts and (prm_update == "none" or ref_type == "policy"):
        raise UserError(
            f"rollouts={rollouts!r} trains a PRM on stored answers, with a frozen reference: "
            "not with prm_update='none' or ref_type='policy'"
        )
    rows = prompts_per_step * samples_per_prompt
    if rows % normalize_chunks:
        raise UserError(
            f"normalize_chunks={normalize_chunks} does not divide the {rows} rows of a step"
        )


def make_folder(torch_dtype) -> None:
    """The run's folder. Raises UserError if its disk has no room for what the run writes."""
    make_run_folder(out_dir, "checkpoints", "policy", "prm")
    saved = [model, prm_model or model] if uses_prm() else [model]
    if rollouts:
        saved = [prm_model or model]
    trained = saved if prm_update != "none" else [model]
    memory.check_disk(out_dir, torch_dtype, trained, saved, keep_checkpoints, save_interval)


def load_data(tokenizer) -> tuple[PromptStream, PromptStream]:
    """The problems to learn from and the held-out ones, as streams of prompts."""
    columns = dict(
        problem_column=problem_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        user_suffix=user_suffix,
        code_suffix=code_suffix,
        max_bad_share=max_bad_share,
        own_reward=reward is not None,
        tokenizer=tokenizer,
        vocabulary=vocabulary_size(model),
    )
    problems = load_problems(data, split, data_config, **columns)
    held_out = []
    if eval_data:
        held_out = load_problems(eval_data, eval_split, max_problems=eval_problems, **columns)

    code = any(problem.ability == "code" for problem in problems + held_out)
    announce_sandbox(sandbox, needed=tir or (code and reward is None))
    return (
        PromptStream(problems, tokenizer, max_prompt_tokens, seed),
        PromptStream(held_out, tokenizer, max_prompt_tokens, seed),
    )


def check_other_models(tokenizer) -> None:
    """Raise UserError if PRM or reference cannot read what the policy will write."""
    for path in (prm_model, reference_path()):
        if path in (None, model) or not uses_prm():
            continue
        check_same_tokenizer(model, path)
        check_positions(path, max_prompt_tokens + max_tokens)
        if vocabulary_size(path) <= top_token(tokenizer):
            raise UserError(f"{path} has fewer tokens than the tokenizer of {model}")


def reference_path() -> str:
    """The reference's folder or hub id."""
    if ref_model:
        return ref_model
    start = prm_model or model
    found = read_prm_file(start)
    return found["reference"] if found else start


def open_engine(tokenizer, torch_device, torch_dtype):
    """The engine, asleep."""
    opened = make_engine(
        engine,
        model,
        tokenizer,
        torch_device,
        torch_dtype,
        max_prompt_tokens + max_tokens,
        gpu_memory=gpu_memory,
        colocated=True,
    )
    opened.sleep()
    return opened


def load_models(torch_device, torch_dtype) -> Models:
    """The models, sharded over all ranks, and AdamW for those that are trained.

    Without a policy where a PRM is trained on stored answers.
    """
    sharding = dict(
        device=torch_device, dtype=torch_dtype, attention=attention, shard=shard, compile=compile
    )
    models = Models(None, None, None, None, None)
    if not rollouts:
        models.policy = load_model(model, checkpointing=checkpointing, **sharding)
        models.optimizer = make_optimizer(models.policy, learning_rate, beta1, beta2, weight_decay)
    if not uses_prm():
        return models

    models.prm = load_model(
        prm_model or model,
        trained=prm_update != "none",
        checkpointing=checkpointing,
        **sharding,
    )
    models.prm_optimizer = make_optimizer(
        models.prm, prm_learning_rate, weight_decay=prm_weight_decay
    )
    if ref_type == "freeze":
        models.ref = load_model(reference_path(), trained=False, **sharding)
    return models


def print_memory() -> None:
    """What a step and a GPU hold, by arithmetic."""
    names = """prm_model ref_model prompts_per_step samples_per_prompt max_prompt_tokens max_tokens
        micro_batch_tokens batch_rows prm_batch_rows ppo_epochs prm_update ref_type checkpointing
        offload shard dtype gpu_memory keep_checkpoints"""
    own = {name: globals()[name] for name in names.split()}
    if uses_prm():
        own["ref_model"] = reference_path()
    more = dict(
        uses_prm=uses_prm(),
        updates_once=updates_once(),
        entropy=entropy_coef != 0 or updates_once(),
    )
    memory.print_prime(model, memory.gpus_of_this_run(), memory.PrimeRun(**own, **more))


def run_longest_batch(models: Models, rollout_engine, torch_device) -> None:
    """The largest passes there can be, of all models: what --dry_run=True does on a GPU."""
    pairs = list(models.trained.values())
    if uses_prm():
        pairs.append((models.ref or models.prm, None))
    tokens = max(micro_batch_tokens, max_prompt_tokens + max_tokens)
    entropy = entropy_coef != 0 or updates_once()
    longest_batch(pairs, tokens, torch_device, offload, entropy)
    rollout_engine.wake_up(full_tensors(models.policy))  # does it fit beside Adam's state?


def resume(models: Models, rollout_engine, stream: PromptStream) -> tuple[int, dict]:
    """Go on after the newest checkpoint, if there is one. Returns (steps done, state).

    With offload the models wait in the host's memory from here on, and the engine, which was asleep
    while they were loaded, gets the policy's weights.
    """
    with waiting_for("loading the checkpoint", timeout_minutes):
        found = load_checkpoint(os.path.join(out_dir, "checkpoints"), models.trained)
        if offload:
            move("cpu", models.prm, models.prm_optimizer, models.ref, models.optimizer)
        rollout_engine.wake_up(full_tensors(models.policy))
    if found is None:
        return 0, dict(stream.state(), samples=0)
    steps_done, state = found
    stream.load_state(state)
    return steps_done, state


def print_start(models: Models, rollout_engine, stream, held_out, start, torch_dtype) -> None:
    """The sizes that follow from the settings."""
    N = prompts_per_step * samples_per_prompt
    prm_updates = math.ceil(N / prm_batch_rows) if prm_update != "none" else 0
    size = sum(p.numel() for p in models.policy.parameters()) / 1e6
    machine = machine_words(next(models.policy.parameters()).device)
    resumed = f"; resumed after step {start}" if start else ""
    print0(
        f"{size:.1f} M parameters on {machine}, {torch_dtype}, "
        f"engine {rollout_engine.name}; "
        f"{len(stream.problems)} problems, {len(held_out.problems)} held out\n"
        f"a step: {prompts_per_step} prompts x {samples_per_prompt} samples = {N} rows, "
        f"{prm_updates} PRM and {math.ceil(ppo_epochs * N / batch_rows)} "
        f"policy updates{resumed}"
    )


def save_run(models: Models, steps_done: int, state: dict) -> None:
    """A checkpoint to resume from."""
    folder = os.path.join(out_dir, "checkpoints")
    save_checkpoint(folder, steps_done, models.trained, state, keep_checkpoints)


def save_before_the_end(models: Models, step: int, start: int, state: dict) -> None:
    """Save what was trained up to `step`, unless it is saved: a run that began at `start` ends."""
    is_saved = step == start or is_due(save_interval, step, max_steps)
    if save_interval and not is_saved:
        save_run(models, step, state)


def save_models(models: Models, tokenizer, torch_device, torch_dtype) -> list[str]:
    """Policy and PRM, if there is one, as Hugging Face folders. Returns their paths."""
    if offload:
        move(torch_device, models.prm)
    policy_path = os.path.join(out_dir, "policy")
    prm_path = os.path.join(out_dir, "prm")
    paths = []
    with waiting_for("the models' files", timeout_minutes):
        if models.policy is not None:
            save_model(models.policy, tokenizer, policy_path, torch_dtype, model)
            paths.append(policy_path)
        if models.prm is not None:
            save_model(models.prm, tokenizer, prm_path, torch_dtype, prm_model or model)
            # What makes rewards of it: who ranks answers with this PRM needs both.
            reference = policy_path if ref_type == "policy" else reference_path()
            on_first_rank(lambda: write_prm_file(prm_path, reference, beta))
            paths.append(prm_path)
    return paths


# ----------------------------------------------------------------------------------------------
# A PRM without reinforcement learning


def stored_batches(tokenizer) -> list[list[Group]]:
    """The groups of `rollouts` that pass the filter, shuffled, as many per step as in training."""
    limits = (max_prompt_tokens, max_tokens)
    groups = read_groups(rollouts, tokenizer, samples_per_prompt, *limits, max_bad_share)
    kept = [group for group in groups if passes_filter(group)]
    print0(f"{len(kept)} of {len(groups)} prompts pass the filter")
    if not kept:
        raise UserError(
            f"{rollouts}: no prompt has a mean outcome from filter_low={filter_low} "
            f"to filter_high={filter_high}"
        )
    random.Random(seed).shuffle(kept)
    starts = range(0, len(kept), prompts_per_step)
    return [kept[start : start + prompts_per_step] for start in starts][:max_steps]


def train_offline(tokenizer, rank: int, torch_device, torch_dtype) -> None:
    """Train the PRM on the stored answers of `rollouts`, each once, and save it.

    What trains a row has scored it before: the pair accuracy is that of answers never seen.
    """
    stop_signals = catch_signals()
    batches = stored_batches(tokenizer)
    with waiting_for("loading", timeout_minutes):
        models = load_models(torch_device, torch_dtype)
        folder = os.path.join(out_dir, "checkpoints")
        start, state = load_checkpoint(folder, models.trained) or (0, {})
    log = RunLog(out_dir, start, rank, wandb_project, configurator.values(globals()))
    clock = Stopwatch()
    stopped = False

    with waiting_for(clock, timeout_minutes):
        for step in range(start, len(batches)):
            clock.start("ref", step)
            batch = make_batch(batches[step], torch_device)
            with stops_if_not_finite(out_dir, clock, batch.describe):
                ref_logprobs = reference_logprobs(models, batch, None)  # [N, T]
                clock.start("prm")
                prm_logprobs, metrics = train_prm(models, batch, ref_logprobs, step)
            metrics["prm_pair_accuracy"] = prm_accuracy(prm_logprobs, ref_logprobs, batch)
            metrics |= dict(step=step, outcome_kept=batch.outcomes.mean().item())
            metrics["seconds"] = clock.end_step()
            log.write(metrics, len(batches), clock.seconds_left(len(batches) - step - 1))

            clock.start("save")
            stopped = all_sum(len(stop_signals), torch_device) > 0
            if stopped or is_due(save_interval, step + 1, len(batches)):
                save_run(models, step + 1, state)
            if stopped:
                break

    if stopped:
        print0(f"stopped after step {step + 1}: start again with the same command to resume")
    else:
        (path,) = save_models(models, tokenizer, torch_device, torch_dtype)
        print0(f"wrote {path} after {clock.elapsed()}")
    log.close(finished=not stopped)
    leave_distributed()


# ----------------------------------------------------------------------------------------------


def main():
    check_settings()
    torch_device, torch_dtype = pick_device(device, dtype, dry_run)
    if dry_run:
        print_memory()
        if not memory.runs_longest_batch(torch_device):
            return

    # Processes, problems, engine, models. The engine comes before the models: what it may take is
    # a share of a GPU that is still empty.
    tokenizer = load_tokenizer(model, chat_template)
    check_other_models(tokenizer)
    rank, world_size = setup_distributed(torch_device, timeout_minutes)
    make_folder(torch_dtype)
    if rollouts:
        train_offline(tokenizer, rank, torch_device, torch_dtype)
        return
    stop_signals = catch_signals()
    stream, held_out = load_data(tokenizer)
    workers = grade_workers or max(1, cores() // local_processes())
    grader = Grader(workers=workers, timeout=grade_timeout, reward=reward)
    rollout_engine = open_engine(tokenizer, torch_device, torch_dtype)
    with waiting_for("loading", timeout_minutes):
        models = load_models(torch_device, torch_dtype)
    if dry_run:
        run_longest_batch(models, rollout_engine, torch_device)
        leave_distributed()
        return

    start, state = resume(models, rollout_engine, stream)
    log = RunLog(out_dir, start, rank, wandb_project, configurator.values(globals()))
    print_start(models, rollout_engine, stream, held_out, start, torch_dtype)
    clock = Stopwatch()
    stopped = False

    with grader, waiting_for(clock, timeout_minutes):
        if held_out.problems and start == 0:
            clock.start("evaluation")
            log.write_first(evaluate(rollout_engine, grader, held_out))
            clock.reset()

        for step in range(start, max_steps):
            # 1. Sample K answers per prompt until enough prompts have mixed outcomes (section 3.2).
            clock.start("rollout", step)
            kept, drawn = collect_groups(rollout_engine, grader, stream, step)
            if len(kept) < prompts_per_step:
                save_before_the_end(models, step, start, state)
                end_of_problems(kept, drawn, prompts_per_step, filter_low, filter_high, step)
                break
            rollout_engine.sleep()
            batch = make_batch(kept, torch_device)

            with stops_if_not_finite(out_dir, clock, batch.describe):
                # 2. Log-probabilities of the policy before its update; if there is a single one,
                # its passes give them. A number that is not finite ends the run before it reaches
                # a weight.
                old = None
                if not updates_once():
                    clock.start("old")
                    old = score(models.policy, batch, micro_batch_tokens, temperature, entropy=True)

                # 3. The implicit PRM: its log-ratio to the reference is the reward of a token
                # (Eq. 3), learned from outcomes alone (Eq. 4).
                metrics = {}
                process = None
                numbers = {}  # of each token, [N, T], for samples.jsonl
                if uses_prm():
                    clock.start("ref")
                    ref_logprobs = reference_logprobs(models, batch, old)  # [N, T]
                    clock.start("prm")
                    with on_device(torch_device, offload, models.prm, models.prm_optimizer):
                        prm_logprobs, stats = update_prm(models, batch, ref_logprobs, step)
                    metrics |= stats
                    process = process_rewards_in_chunks(prm_logprobs, ref_logprobs, batch.mask)
                    numbers |= dict(prm_logprobs=prm_logprobs, ref_logprobs=ref_logprobs)
                    numbers["process_rewards"] = process

                # 4. Leave-one-out returns of outcome and process rewards, added and whitened
                # (Eq. 5).
                returns, A, stats = batch_advantages(batch, process)  # [N, T]
                metrics |= stats
                numbers |= dict(returns=returns, advantages=A)

                # 5. PPO.
                clock.start("policy")
                with on_device(torch_device, offload, models.optimizer):
                    old, stats = train_policy(models, batch, old, A, step)
                metrics |= stats | batch_metrics(batch, *old)
                check_mismatch(metrics["mismatch"], max_mismatch, step, torch_dtype)

            # 6. The new weights go to the engine, which takes its share of the GPU again when it
            # wakes up: the trainer's peak is read before.
            metrics["peak_memory_gb"] = peak_memory_gb(torch_device)
            clock.start("sync")
            rollout_engine.wake_up(full_tensors(models.policy))

            # Report. A metric that is added to `metrics` reaches the file, the line and the curves.
            samples = state["samples"] + len(drawn) * samples_per_prompt
            metrics |= dict(step=step, samples=samples)
            metrics |= sampling_metrics(kept, drawn, stream)
            metrics |= wrong_step_metrics(kept, stream, process)
            if held_out.problems and is_due(eval_interval, step + 1, max_steps):
                clock.start("eval")
                metrics |= evaluate(rollout_engine, grader, held_out)
            metrics["seconds"] = clock.end_step()
            log.write(metrics, max_steps, clock.seconds_left(max_steps - step - 1))
            rows = rows_for_log(step, kept, stream, numbers, samples_logged)
            log.write_samples(step, rows, samples_steps)

            # Save. If one rank was asked to stop, all stop.
            clock.start("save")
            state = dict(stream.state(), samples=samples)
            stopped = all_sum(len(stop_signals), torch_device) > 0
            if stopped or is_due(save_interval, step + 1, max_steps):
                with stops_if_not_finite(out_dir, clock, batch.describe):
                    save_run(models, step + 1, state)
            if stopped:
                break

    # The models' folders, unless the run is to go on later.
    if stopped:
        print0(f"stopped after step {step + 1}: start again with the same command to resume")
    else:
        paths = save_models(models, tokenizer, torch_device, torch_dtype)
        print0(f"wrote {' and '.join(paths)} after {clock.elapsed()}")
    log.close(finished=not stopped)
    rollout_engine.close()
    leave_distributed()


if __name__ == "__main__":
    configurator.run(main, globals())
