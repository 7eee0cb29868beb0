"""
PRIME: reinforcement learning with an implicit process reward model that is trained online from outcomes alone.

    torchrun --nproc_per_node 8 prime.py                           # INTELLECT-MATH: 8 GPUs, 7B policy and 7B PRM
    torchrun --nproc_per_node 2 prime.py config/toy_prime.py       # a laptop: the built-in world

One step, top to bottom in main(): sample K answers a prompt until enough prompts have a mean outcome of 0.2 to 0.8;
token rewards = log-ratio of PRM to reference; one cross-entropy step of the PRM on the outcomes; leave-one-out returns of
outcome and process rewards, apart; PPO clip; the new weights go to the engine.

Paper: Cui et al., Process Reinforcement through Implicit Rewards, arXiv 2502.01456. Reference code: github.com/PRIME-RL/PRIME,
training/verl/ (called "original" below) and the `prime` recipe of github.com/verl-project/verl-recipe ("recipe").
Shapes: N rows (prompts x K samples, the K of a prompt contiguous), T response tokens, padded on the right; `mask` [N, T] is 1
on the response, its end token included. What is left out on purpose: value model, KL penalty, asynchronous rollouts.
"""
import json, math, os, random, resource, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F

import configurator
from configurator import UserError
from generate import TOOL_STOP, load_problems, load_tokenizer, make_engine, render_prompt, sample, sample_seed
from grader import Grader, extract_answer
from runs import plan
from sft import (all_sum, load_checkpoint, load_model, make_optimizer, micro_batches, optimizer_step, pack,
                 save_checkpoint, save_model, setup_distributed, waiting_for)

# --- data
data = 'PRIME-RL/Eurus-2-RL-Data'   # hub id, or a .jsonl / .json / .parquet file
data_config: str = None             # the hub data set's configuration
split = 'train'                     # the hub data set's split
problem_column: str = None          # None: prompt (messages), problem, question or instruction, whichever is there
answer_column: str = None           # None: ground_truth, reward_model, answer, final_answer or solution
system_prompt: str = None           # None: the row's own (Eurus-2-RL-Data brings the action prompt); '': none
user_suffix = ''                    # appended to every problem (Eurus-2-RL-Data has it in the prompt)
code_suffix: str = None             # appended to problems of ability 'code'; None: user_suffix
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
eval_data: str = None               # held-out problems, the same formats; None: no evaluation
eval_split = 'validation'
eval_problems = 256                 # only the first so many
eval_samples = 4                    # answers a problem at temperature 1, besides the greedy one
# --- models
model = 'PrimeIntellect/INTELLECT-MATH-SFT'  # policy at the start: hub id or folder
prm_model: str = None               # implicit PRM at the start; None: the same as the policy (published)
ref_model: str = None               # reference of the log-ratio, frozen; None: the PRM's start (published)
ref_type = 'freeze'                 # 'freeze' (published) or 'policy': the policy before its update is the reference
chat_template: str = None           # .jinja file; None: the tokenizer's own
attention = 'auto'                  # 'flash_attn', 'varlen' (torch's own kernel), 'padded', 'auto': the first there is
# --- rollouts
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
prompts_per_step = 256              # prompts kept for an update
samples_per_prompt = 4              # K
temperature = 1.0
max_prompt_tokens = 1024            # longer prompts are left out, not cut
max_tokens = 3072                   # of a response; 4096 together, Qwen2.5-Math's context
gpu_memory = 0.5                    # share of each card for the engine (original: 0.7)
oversample = 1.0                    # prompts drawn at a time, times prompts_per_step (recipe: 4.0)
collect = 'until_full'              # 'until_full': draw until enough prompts pass (original); 'once': one draw, filled up
                                    # with prompts that fail the filter (recipe)
filter_low = 0.2                    # prompts are kept if low <= mean outcome <= high
filter_high = 0.8
filter_truncated = False            # reject a prompt if one of its answers was cut (recipe: True)
max_draws = 50                      # draws a step before the run gives up: too few prompts pass the filter
tir = False                         # answers may call Python, as NuminaMath-7B-TIR does: see generate.sample()
tir_rounds = 4                      # times the model writes: one more than programs run
tir_timeout = 5.0                   # seconds a program
sandbox = 'auto'                    # of programs: 'auto' (the best there is, said at start) or 'required' (bubblewrap)
grade_workers: int = None           # processes a rank; None: cores / ranks
grade_timeout = 5.0                 # seconds an answer
max_mismatch: float = None          # mean |log-prob of engine - of trainer| that stops the run; None: 0.1 in bf16, 1e-3 in fp32
# --- process rewards
prm_update = 'after'                # 'after': rewards come from the forward pass that trains (published, single forward);
                                    # 'before': train, then score (recipe); 'none': the PRM stays as it is
granularity = 'token'               # 'token' or 'whole' (the row's sum on its last token)
normalize = 'batch'                 # divide by the largest absolute suffix sum; None: do not
normalize_chunks = 1                # the batch in so many consecutive chunks, each with its divisor. Original: one a GPU (8)
last_token_reward = True            # False: none on the last token (recipe)
beta = 0.05                         # scale of the PRM's logit. Belongs to answers of 1,400 tokens: take about 50 / length
prm_learning_rate = 1e-6
prm_grad_clip = 10.0
prm_batch_rows = 256                # rows an optimizer step of the PRM: 4 steps for 1,024 rows
prm_weight_decay = 0.0
# --- advantages
outcome_coef = 1.0                  # weight of the outcome's returns; 0 switches the source off
process_coef = 1.0                  # weight of the process returns (original: 1:1 in effect; recipe: 5 and 5)
outcome_gamma = 1.0                 # discount
process_gamma = 1.0
whiten = True
# --- policy update
learning_rate = 5e-7                # constant
warmup_steps = 0                    # linear; of both models
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
batch_rows = 256                    # rows an optimizer step of the policy: 4 steps for 1,024 rows
ppo_epochs = 1
clip = 0.2
importance_cap: float = None        # weigh each token by min(p_trainer / p_engine, this) of its rollout; None: no (published)
entropy_coef = 0.0                  # bonus (recipe's yaml: 0.001)
# --- run
max_steps = 256                     # INTELLECT-MATH's best checkpoint is its 256th step; 592 for Eurus-2
seed = 0
eval_interval = 16                  # steps (published: 16)
save_interval = 16                  # steps between checkpoints to resume from; 0: none
keep_checkpoints = 2
out_dir = 'out/intellect_math'      # policy/ and prm/ at the end; metrics.jsonl, samples.jsonl, curves.png, checkpoints/
samples_logged = 8                  # rows of each step that go to samples.jsonl
wandb_project: str = None           # also log to Weights & Biases, if it is installed
# --- system
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # compute and engine: 'bfloat16', 'float32', 'auto': bfloat16 on cuda. Weights are fp32
micro_batch_tokens = 16384          # tokens a forward pass and process; a longer row goes alone
checkpointing = True                # recompute activations in the backward pass
compile = False                     # torch.compile layers and head: meant for GPUs; the first step takes a minute
shard: int = None                   # processes that share a copy of a model's state (HSDP; with --nnodes: a node's); None: all
offload = False                     # PRM, reference and Adam's moments wait in host memory while they are not needed
timeout_minutes = 60.0              # a collective that waits longer ends the run
dry_run = False                     # print what a step and a card hold; where there is a GPU run the longest batch; and end

# ---------------------------------------------------------------------------------------------------------------------
# the algorithm's formulas, in the order of main()

def keep_group(outcomes, low=0.2, high=0.8):
    """Does a prompt stay? outcomes: its K outcomes in [0, 1]; both ends inclusive, in float32 (paper 3.2; original
    trainer/ppo/ray_trainer.py filter).    keep_group([1, 0, 0, 0]) is True, keep_group([1, 1, 1, 1]) is False."""
    mean = torch.as_tensor(outcomes, dtype=torch.float32).mean()
    return bool((mean >= low) & (mean <= high))

def suffix_sum(x, gamma=1.0):
    """R_t = sum over k >= t of gamma^(k-t) x_k along the last dimension."""
    if gamma == 1.0:
        return x.flip(-1).cumsum(-1).flip(-1)
    out, running = torch.empty_like(x), torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + gamma * running
        out[..., t] = running
    return out

def last_token(mask):
    """[N, T] mask -> [N, T] bool, True on the last valid token of each row."""
    mask = mask.bool()
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)

def process_rewards(prm_logprobs, ref_logprobs, mask, granularity="token", normalize="batch", divisor=None):
    """Implicit process rewards [N, T]: r_t = log pi_prm(y_t) - log pi_ref(y_t) on valid tokens, 0 elsewhere.

    Paper Eq. 3, without its factor beta, which normalisation cancels (original core_algos.py, dp_prime.py). "whole" puts
    the row's sum on its last token. normalize="batch" divides by the largest |suffix sum| of the rows given + 1e-6, so
    that the largest process return has the size of an outcome; divisor: divide by this instead. ValueError: granularity."""
    rewards = torch.where(mask.bool(), prm_logprobs - ref_logprobs, 0.0)
    if granularity == "whole":
        rewards = torch.where(last_token(mask), rewards.sum(-1, keepdim=True), 0.0)
    elif granularity != "token":
        raise ValueError(f"granularity={granularity!r}: 'token' or 'whole'")
    if divisor is None and normalize == "batch":
        divisor = suffix_sum(rewards).abs().max() + 1e-6
    return rewards if divisor is None else rewards / divisor

def rloo(rewards, mask, n_samples, gamma=1.0):
    """Discounted leave-one-out returns [N, T] of one source of rewards (paper Eq. 5; original core_algos.py).

    mask says where this source pays: all valid tokens for process rewards, the last one for the outcome. With rbar_j the
    token mean of row j, each token's reward becomes K/(K-1) r_it - 1/(K-1) sum_j rbar_j over the K rows of its prompt.
    For an outcome that is o_i minus the mean of the others; for process rewards it is the published code's form, which
    adds each token's deviation from its row's mean, weight 1/(K-1), to the textbook's.
    ValueError: n_samples < 2, N not a multiple of it, a row with an empty mask.

    Outcomes 1 0 0 1 of one prompt, one token each: 2/3, -2/3, -2/3, 2/3."""
    if n_samples < 2:
        raise ValueError("leave-one-out needs at least 2 samples a prompt")
    if len(rewards) % n_samples:
        raise ValueError(f"{len(rewards)} rows are not a multiple of {n_samples} samples")
    mask = mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row has no valid token")
    rewards = torch.where(mask, rewards, 0.0)
    row_mean = rewards.sum(-1) / mask.sum(-1)                                                   # [N]
    group_sum = row_mean.view(-1, n_samples).sum(-1).repeat_interleave(n_samples)               # [N]
    left_out = (n_samples * rewards - group_sum[:, None]) / (n_samples - 1)
    return suffix_sum(torch.where(mask, left_out, 0.0), gamma)

def advantages(outcomes, process, mask, n_samples, outcome_coef=1.0, process_coef=1.0, outcome_gamma=1.0, process_gamma=1.0,
               whiten=True):
    """Advantages [N, T], zero outside mask: the sources' returns added, then whitened over all valid tokens of the batch.

    outcomes [N] in [0, 1]; process [N, T] process rewards or None. Whitening: unbiased variance, + 1e-8 under the root.
    Original core_algos.py (coefficients 1:1 in effect) and utils/torch_functional.py masked_whiten."""
    mask = mask.bool()
    end = last_token(mask)
    returns = outcome_coef * rloo(torch.where(end, outcomes[:, None].to(torch.get_default_dtype() if process is None else
                                                                         process.dtype), 0.0), end, n_samples, outcome_gamma)
    if process is not None:
        returns = returns + process_coef * rloo(process, mask, n_samples, process_gamma)
    if whiten:
        valid = returns[mask]
        returns = (returns - valid.mean()) * torch.rsqrt(valid.var() + 1e-8)
    return torch.where(mask, returns, 0.0)

def prm_loss(prm_logprobs, ref_logprobs, mask, outcomes, beta=0.05):
    """Mean over rows of the cross-entropy of sigmoid(beta * sum_t log-ratio) against the outcomes [N] (soft labels allowed).

    Paper Eq. 4; original core_algos.py compute_ce_dpo_loss_rm. Starts at ln 2 when PRM and reference are equal."""
    logit = beta * torch.where(mask.bool(), prm_logprobs - ref_logprobs, 0.0).sum(-1)           # [N]
    return F.binary_cross_entropy_with_logits(logit, outcomes.to(logit.dtype))

def pair_accuracy(scores, outcomes, n_samples):
    """Share of a prompt's pairs that the PRM's scores [N] order as the outcomes [N] do, weighted by the difference of
    outcomes; 0.5 without contrast; mean over prompts (original core_algos.py)."""
    score, outcome = scores.view(-1, n_samples), outcomes.view(-1, n_samples).to(scores.dtype)
    ds, do = score[:, :, None] - score[:, None, :], outcome[:, :, None] - outcome[:, None, :]   # [prompts, K, K]
    upper = torch.ones(n_samples, n_samples, device=scores.device).triu(1)
    weight = do.abs() * upper
    right = (weight * ((ds > 0) == (do > 0))).sum((1, 2))
    total = weight.sum((1, 2))
    return torch.where(total > 0, right / total.clamp(min=1e-12), 0.5).mean()

def ppo_loss(new_logprobs, old_logprobs, advantages, mask, clip=0.2):
    """(loss, stats): mean over rows of the row's token mean of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)).

    Original core_algos.py compute_policy_loss with one row a micro-batch, as the published runs have it."""
    mask = mask.bool()
    logratio = torch.where(mask, new_logprobs - old_logprobs, 0.0)
    ratio = logratio.exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)

    def mean(x):                        # over rows, of the mean over the row's tokens
        return (torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1)).mean()

    stats = dict(clipfrac=mean((clipped > surrogate).to(ratio.dtype)).detach(), approx_kl=mean(-logratio).detach(),
                 ratio_max=ratio.max().detach())
    return mean(torch.maximum(surrogate, clipped)), stats

# ---------------------------------------------------------------------------------------------------------------------
# rollouts

def full_tensors(model):
    """Iterator of (name, whole tensor), one at a time, as vLLM and transformers name them. Collective: all ranks run it."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor.full_tensor()

def hand_over(model, sampler):
    """The engine takes the model's weights, one whole tensor in memory at a time. Collective: all ranks run it."""
    named = full_tensors(model)
    if sampler.name == "hf":
        for name, tensor in named:
            sampler.model.get_parameter(name).data.copy_(tensor)
        return
    cast = ((name, tensor.to(sampler.dtype)) for name, tensor in named)
    if sampler.device.type == "cuda":
        sampler.llm.wake_up(tags=["weights"])       # weights first, cache last: both and the trainer's copy do not fit
        sampler.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=cast))
        sampler.llm.wake_up(tags=["kv_cache"])
    else:                                           # eager kernels on plain weights: no post-processing to repeat
        sampler.llm.apply_model(lambda model: model.load_weights(cast) and None)
    sampler.llm.reset_prefix_cache()                # cached prefixes belong to the old weights

def put_to_sleep(sampler):
    """The engine leaves the card to the trainer: vLLM drops its weights and cache, hand_over() comes before the next sample."""
    if sampler.name == "vllm" and sampler.device.type == "cuda":
        sampler.llm.sleep(level=2)

def move(device, *parts):
    """Models and optimizers go to a device, the host's memory or the card: this process's shards, no collective."""
    for part in parts:
        if isinstance(part, torch.optim.Optimizer):
            for state in part.state.values():
                state.update({name: tensor.to(device) for name, tensor in state.items()})
        elif part is not None:
            part.to(device)

def to_rows(flat, mask):
    """[n] values of the valid tokens, row after row -> [N, T], zero elsewhere."""
    out = flat.new_zeros(mask.shape)
    out[mask] = flat
    return out

class PromptStream:
    """Prompts in a seeded order, epoch after epoch; prompts put back come first. Its state is what a resume needs."""
    def __init__(self, problems, tokenizer, max_prompt_tokens, seed):
        self.problems, self.tokenizer, self.limit, self.seed = problems, tokenizer, max_prompt_tokens, seed
        self.drawn, self.too_long, self.buffer = 0, 0, []           # drawn counts prompts of all epochs; buffer: indices

    def draw(self, count):
        """The next `count` (index, prompt ids), the buffer first. Raises UserError when every prompt is too long."""
        found, tried = [], 0
        while len(found) < count:
            index = self.buffer.pop(0) if self.buffer else self._next()
            ids = render_prompt(self.tokenizer, self.problems[index]["messages"])
            tried += 1
            if len(ids) <= self.limit:
                found.append((index, ids))
            else:
                self.too_long += 1
                if tried > 2 * len(self.problems) + count and not found:        # one that fits can be first, then last
                    raise UserError(f"every prompt is longer than max_prompt_tokens={self.limit}")
        return found

    def _next(self):
        epoch, position = divmod(self.drawn, len(self.problems))
        if position == 0 or not hasattr(self, "order"):
            self.order = list(range(len(self.problems)))
            random.Random(f"{self.seed} {epoch}").shuffle(self.order)
        self.drawn += 1
        return self.order[position]

def rollout(engine, grader, tokenizer, problems, prompts, n_samples, seed, sampling):
    """Sample and grade on every rank its share of `prompts` [(index, ids)]; all ranks get all groups, in the order given.

    A group: dict(index, prompt, tokens [K][t], logprobs [K][t] of the engine, mask [K][t] (0: a tool's words), outcomes [K],
    finish [K], texts [K], boxed [K]). An answer that did not end by itself has outcome 0. Sample k of a prompt has its own
    seed: what is sampled does not depend on the number of ranks. sampling: of sample()."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(enumerate(prompts))[rank::world]
    groups = {i: dict(index=index, prompt=ids, outcomes=[0.0] * n_samples) | {
        key: [None] * n_samples for key in ("tokens", "logprobs", "finish", "mask", "texts", "boxed")}
        for i, (index, ids) in mine}
    requests = [(i, k, ids, sample_seed(*seed, i, k)) for i, (_, ids) in mine for k in range(n_samples)]
    pending = []
    for number, answer in sample(engine, tokenizer, [(ids, s, sampling) for _, _, ids, s in requests]):
        i, k = requests[number][:2]
        group, problem = groups[i], problems[groups[i]["index"]]
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        answer = answer._replace(mask=answer.mask or [1] * len(answer.tokens))
        for key, value in zip(("tokens", "logprobs", "finish", "mask", "texts"), (*answer, text)):
            group[key][k] = value
        group["boxed"][k] = problem["ability"] != "math" or extract_answer(text) is not None
        if answer.finish_reason == "stop":      # graded by other processes while sampling goes on
            reference = dict(ability=problem["ability"], ground_truth=problem["ground_truth"])
            pending.append((group, k, grader.submit(text, reference)))
    for group, k, outcome in pending:
        group["outcomes"][k] = outcome.result()
    gathered = [None] * world
    dist.all_gather_object(gathered, groups)
    merged = {i: group for part in gathered for i, group in part.items()}
    return [merged[i] for i in sorted(merged)]

def evaluate(engine, grader, tokenizer, problems, sampling):
    """(greedy accuracy, mean accuracy of eval_samples at temperature 1) on held-out problems; too long ones count as wrong."""
    prompts = [(i, render_prompt(tokenizer, p["messages"])) for i, p in enumerate(problems)]
    prompts = [(i, ids) for i, ids in prompts if len(ids) <= max_prompt_tokens]
    groups = [rollout(engine, grader, tokenizer, problems, prompts, k, (seed, name), sampling | dict(temperature=temperature))
              for name, k, temperature in (("greedy", 1, 0.0), ("eval", eval_samples, 1.0))]
    return [sum(sum(g["outcomes"]) / len(g["outcomes"]) for g in part) / len(problems) for part in groups]

def log_samples(file, step, kept, problems, rewards, A):
    """A few rows of the step to samples.jsonl: what was written, how it was graded, what each token was paid."""
    K = len(kept[0]["texts"])
    for i in range(min(samples_logged, len(kept) * K)):
        group, k = kept[i // K], i % K
        n = len(group["tokens"][k])
        file.write(json.dumps(dict(
            step=step, problem=problems[group["index"]]["problem"], ground_truth=problems[group["index"]]["ground_truth"],
            response=group["texts"][k], outcome=group["outcomes"][k], finish_reason=group["finish"][k],
            tokens=group["tokens"][k],
            process_rewards=[round(x, 4) for x in rewards[i, :n].tolist()],
            advantages=[round(x, 3) for x in A[i, :n].tolist()]), ensure_ascii=False) + "\n")
    file.flush()

def plot_curves(metrics_path, path):
    """metrics.jsonl -> a figure of accuracy, PRM, policy and time."""
    import matplotlib.figure, pandas
    rows = pandas.read_json(metrics_path, lines=True)
    rows.index = rows.get("step", rows.index) + 1
    panels = {"accuracy": "outcome outcome_kept eval_greedy eval_sampled", "implicit PRM": "prm_loss prm_pair_accuracy",
              "mean |return|": "process_return outcome_return", "policy": "entropy clipfrac grad_norm",
              "tokens of a response": "response_tokens", "share": "kept_share truncated no_box"}
    figure = matplotlib.figure.Figure((13, 7), layout="tight")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels.items()):
        for name in [name for name in names.split() if name in rows]:
            rows[name].dropna().plot(ax=axis, title=title, style="o-" if name[:4] == "eval" else "-", markersize=3, grid=True)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)

def check_settings():
    """UserError for values that cannot work, before anything is loaded."""
    one = ("prompts_per_step max_draws batch_rows prm_batch_rows ppo_epochs micro_batch_tokens eval_problems eval_samples "
           "eval_interval keep_checkpoints normalize_chunks").split()
    least = dict.fromkeys(one, 1) | dict(samples_per_prompt=2, oversample=float(collect == "once"))    # one draw must be enough
    plan.check(globals(), least, prm_update=("after", "before", "none"), collect=("until_full", "once"),
               ref_type=("freeze", "policy"), granularity=("token", "whole"), normalize=("batch", None))
    if wandb_project and find_spec("wandb") is None:
        raise UserError("wandb_project is set, but wandb is not installed: pip install wandb, or --wandb_project=None")
    if not 0 < temperature <= 2:
        raise UserError(f"temperature={temperature}: rollouts need 0 < temperature <= 2")
    if not (outcome_coef or process_coef):
        raise UserError("outcome_coef and process_coef are both 0: no source of rewards is left")
    rows = prompts_per_step * samples_per_prompt
    if rows % normalize_chunks:
        raise UserError(f"normalize_chunks={normalize_chunks} does not divide the {rows} rows of a step")

# ---------------------------------------------------------------------------------------------------------------------

def main():
    N = prompts_per_step * samples_per_prompt
    check_settings()
    torch_device, torch_dtype = plan.pick_device(device, dtype)
    plan.dry_run("prime", globals())                # if asked for: ends here where there is no GPU
    tokenizer = load_tokenizer(model, chat_template)
    rank, world = setup_distributed(torch_device, timeout_minutes)
    first = rank == 0
    os.makedirs(out_dir, exist_ok=True)
    stopped = plan.catch_signals()
    columns = dict(problem_column=problem_column, answer_column=answer_column, system_prompt=system_prompt,
                   user_suffix=user_suffix, code_suffix=code_suffix, max_bad_share=max_bad_share)
    problems = load_problems(data, split, data_config, **columns)
    held_out = load_problems(eval_data, eval_split, max_problems=eval_problems, **columns) if eval_data else []
    plan.announce_sandbox(sandbox, tir or any(p["ability"] == "code" for p in problems + held_out))
    stream = PromptStream(problems, tokenizer, max_prompt_tokens, seed)

    # The engine first: what it may take is a share of a card that is still empty. Then policy, PRM and reference.
    sampler = make_engine(engine, model, tokenizer, torch_device, torch_dtype, max_prompt_tokens + max_tokens,
                          gpu_memory=gpu_memory, colocated=True)
    put_to_sleep(sampler)
    loading = dict(device=torch_device, dtype=torch_dtype, attention=attention, shard=shard, compile=compile)
    with waiting_for("loading", timeout_minutes):
        policy = load_model(model, checkpointing=checkpointing, **loading)
        prm = load_model(prm_model or model, trained=prm_update != "none", checkpointing=checkpointing, **loading)
        ref = load_model(ref_model or prm_model or model, trained=False, **loading) if ref_type == "freeze" else None
    optimizer = make_optimizer(policy, learning_rate, beta1, beta2, weight_decay)
    prm_optimizer = make_optimizer(prm, prm_learning_rate, weight_decay=prm_weight_decay)
    trained = dict(policy=(policy, optimizer)) | (dict(prm=(prm, prm_optimizer)) if prm_update != "none" else {})
    if dry_run:
        longest, nets = max(micro_batch_tokens, max_prompt_tokens + max_tokens), [*trained.values(), (ref or prm, None)]
        plan.longest_batch(nets, longest, torch_device, move if offload else None, entropy_coef != 0)
        return hand_over(policy, sampler)           # the engine wakes up beside everybody's moments

    checkpoints = os.path.join(out_dir, "checkpoints")
    with waiting_for("loading the checkpoint", timeout_minutes):
        start, state = load_checkpoint(checkpoints, trained) or (0, dict(drawn=0, buffer=[], too_long=0, samples=0))
        move("cpu", *(prm, prm_optimizer, ref, optimizer) * offload)
        hand_over(policy, sampler)
    stream.drawn, stream.too_long = state["drawn"], state["too_long"]
    stream.buffer = [index for index in state["buffer"] if index < len(problems)]           # the data may be other data now
    metrics_path, samples_path, wandb_run = os.path.join(out_dir, "metrics.jsonl"), os.path.join(out_dir, "samples.jsonl"), None
    if first:
        plan.keep_lines(metrics_path, start or -1)              # step -1: the evaluation before the first
        plan.keep_lines(samples_path, start)
        plan.write_run_config(out_dir, configurator.values(globals()))
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        updates, prm_updates = math.ceil(ppo_epochs * N / batch_rows), math.ceil(N / prm_batch_rows)
        print(f"{size:.1f} M parameters on {world} x {torch_device.type}, {torch_dtype}, engine {sampler.name}; "
              f"{len(problems)} problems, {len(held_out)} held out\n"
              f"a step: {prompts_per_step} prompts x {samples_per_prompt} samples = {N} rows, {prm_updates} PRM "
              f"and {updates} policy updates" + f"; resumed after step {start}" * (start > 0), flush=True)
        if wandb_project:
            import wandb
            wandb_run = wandb.init(project=wandb_project, dir=out_dir, resume="auto", config=configurator.values(globals()))

    # A checkpoint is written during the next rollout, which changes nothing of it, by threads with a group of their own.
    writers = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    saving, ended = None, False         # the Future of the last one; was the run asked to end?
    seconds = {}                        # of the step, by phase

    @contextmanager
    def phase(name, *needed):           # needed: models and optimizers that wait in host memory, if they are offloaded
        began = time.time()
        with waiting_for(f"step {step + 1}, {name}", timeout_minutes):
            move(torch_device, *needed * offload)
            yield
            move("cpu", *needed * offload)
        seconds[name] = seconds.get(name, 0.0) + time.time() - began

    def share(rows):
        """The micro-batches of this rank, from `rows` (row numbers): lists of row numbers."""
        mine = micro_batches([lengths[i] for i in rows], micro_batch_tokens, world)[rank]
        return [[rows[j] for j in members] for members in mine]

    def logprobs_of(net, members, temperature=1.0, entropy=False):
        """Log-probabilities [n, T] of the responses of some rows, and entropies if asked for, with gradient if it is on."""
        rows = [(prompts[i] + responses[i], [0] * len(prompts[i]) + written[i]) for i in members]
        rows = rows or [([0, 0], [0, 1])]       # a dummy keeps the ranks' collectives in step; its loss is multiplied by 0
        values = net(**pack(rows, torch_device), temperature=temperature, entropy=entropy)
        return [to_rows(x, mask[members]) if members else x[:, None] for x in values]

    @torch.no_grad()
    def score(net, temperature=1.0, entropy=False):
        """Log-probabilities [N, T] of all responses, and entropies if asked for, on every rank."""
        out = torch.zeros(1 + entropy, *mask.shape, device=torch_device)
        for members in share(list(range(len(responses)))):
            values = logprobs_of(net, members, temperature, entropy)
            if members:
                out[:, members] = torch.stack(values)
        net.reshard()                   # a forward without backward leaves the root's weights gathered
        dist.all_reduce(out)
        return out

    sampling = dict(temperature=temperature, max_tokens=max_tokens) | (
        dict(rounds=tir_rounds, tool_timeout=tir_timeout) if tir else {})
    with open(metrics_path if first else os.devnull, "a", encoding="utf-8") as metrics_file, \
            open(samples_path if first else os.devnull, "a", encoding="utf-8") as samples_file, \
            Grader(workers=grade_workers or max(1, os.cpu_count() // world), timeout=grade_timeout) as grader, \
            ThreadPoolExecutor(1, "writer", plan.pick_device, (device, dtype)) as writer:     # a thread's card is its own
        if held_out and start == 0:
            with waiting_for("the evaluation before step 1", timeout_minutes):
                greedy, sampled = evaluate(sampler, grader, tokenizer, held_out, sampling)
            print(f"before step 1: held-out accuracy greedy {greedy:.3f}, sampled {sampled:.3f}", flush=True)
            metrics_file.write(json.dumps(dict(step=-1, eval_greedy=greedy, eval_sampled=sampled)) + "\n")
        began = step_began = time.time()
        for step in range(start, max_steps):
            # 1. Rollouts: draw prompts until enough of them have a mean outcome inside the filter.
            with phase("rollout"):
                kept, failed, drawn_groups = [], [], []
                for draw in range(1 if collect == "once" else max_draws):
                    count = max(1, int(prompts_per_step * oversample)) + min(len(stream.buffer), prompts_per_step) * (draw == 0)
                    groups = rollout(sampler, grader, tokenizer, problems, stream.draw(count), samples_per_prompt,
                                     (seed, step, draw), sampling)
                    for group in groups:
                        passes = keep_group(group["outcomes"], filter_low, filter_high) and not (
                            filter_truncated and "length" in group["finish"])
                        (kept if passes else failed).append(group)
                    drawn_groups += groups
                    if len(kept) >= prompts_per_step:
                        break
                if collect == "once":
                    kept += failed[:max(0, prompts_per_step - len(kept))]
                if len(kept) < prompts_per_step:
                    mean = sum(sum(g["outcomes"]) for g in drawn_groups) / (len(drawn_groups) * samples_per_prompt)
                    passed = (f"step {step + 1}: {len(kept)} of {len(drawn_groups)} prompts passed the filter {filter_low}-"
                              f"{filter_high}, {prompts_per_step} are needed (mean outcome {mean:.3f})")
                    if step > start and save_interval and step % save_interval:
                        save_checkpoint(checkpoints, step, trained, state, keep_checkpoints)
                    if step and mean > filter_high:
                        print(f"{passed}: these problems are solved, the run ends here", flush=True)
                        break
                    raise UserError(f"{passed}: take easier or harder problems, a wider filter, or more max_draws")
                # Surplus prompts are sampled anew by the next policy; their answers are thrown away (original).
                stream.buffer += [g["index"] for g in kept[prompts_per_step:]] if collect == "until_full" else []
                kept = kept[:prompts_per_step]
                put_to_sleep(sampler)
            with phase("save"):
                saving = saving and saving.result()

            prompts = [g["prompt"] for g in kept for _ in range(samples_per_prompt)]
            responses, written = [tokens for g in kept for tokens in g["tokens"]], [m for g in kept for m in g["mask"]]
            lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
            # A tool's words are context: no log-probability, no reward, no loss, no place in a mean.
            mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(m, dtype=torch.bool) for m in written], batch_first=True)
            mask = mask.to(torch_device)                                                                     # [N, T] bool
            outcomes = torch.tensor([o for g in kept for o in g["outcomes"]], device=torch_device)           # [N]
            engine_logprobs = torch.tensor([x for g in kept for values, m in zip(g["logprobs"], g["mask"])
                                            for x, own in zip(values, m) if own], device=torch_device)

            # 2. Log-probabilities of the policy before its update, at the rollout's temperature, and of the reference.
            with phase("old"):
                old_logprobs, entropy = score(policy, temperature, entropy=True)
            difference = old_logprobs[mask] - engine_logprobs
            mismatch = difference.abs().mean().item()
            bound = max_mismatch if max_mismatch is not None else 1e-3 if torch_dtype == torch.float32 else 0.1
            if not mismatch <= bound:
                raise UserError(f"step {step + 1}: engine and trainer disagree by {mismatch:.4f} nats a token on average, more "
                                f"than max_mismatch={bound}: the engine has other weights or another precision")
            with phase("ref", ref):
                ref_logprobs = old_logprobs if ref is None and temperature == 1 else score(ref or policy)[0]

            # 3. PRM: token rewards are its log-ratio to the reference; one cross-entropy step on the outcomes a mini-batch.
            with phase("prm", prm, prm_optimizer):
                prm_lr = prm_learning_rate * min(1.0, (step + 1) / (warmup_steps + 1))
                prm_logprobs, prm_losses, prm_norms = torch.zeros_like(ref_logprobs), [], []
                for low in range(0, N, prm_batch_rows) if prm_update != "none" else []:
                    rows, loss_sum = list(range(low, min(low + prm_batch_rows, N))), 0.0
                    for members in share(rows):
                        logprobs, = logprobs_of(prm, members)
                        if members:
                            loss = prm_loss(logprobs, ref_logprobs[members], mask[members], outcomes[members], beta)
                            loss = loss * len(members) / len(rows)          # the mean over the mini-batch's rows
                            prm_logprobs[members] = logprobs.detach()       # scored by the weights before their update
                        else:
                            loss = 0.0 * logprobs.sum()
                        (loss * world).backward()                           # FSDP averages over ranks: this sums
                        loss_sum = loss_sum + loss.detach().double()
                    prm_norms.append(optimizer_step(prm, prm_optimizer, prm_lr, prm_grad_clip))
                    prm_losses.append(all_sum(loss_sum, torch_device))
                dist.all_reduce(prm_logprobs)                           # by weights that have not seen these outcomes
                scored = prm_logprobs if prm_update == "after" else score(prm)[0]
                if not prm_losses:                                      # prm_update = 'none'
                    prm_logprobs, prm_losses = scored, [prm_loss(scored, ref_logprobs, mask, outcomes, beta).item()]

            # 4. Rewards and advantages: every rank has the whole batch and computes the same numbers.
            scored = scored if last_token_reward else torch.where(last_token(mask), ref_logprobs, scored)
            rewards = torch.cat([process_rewards(p, r, m, granularity, normalize) for p, r, m in
                                 zip(*(x.chunk(normalize_chunks) for x in (scored, ref_logprobs, mask)))])      # [N, T]
            A = advantages(outcomes, rewards if process_coef else None, mask, samples_per_prompt, outcome_coef, process_coef,
                           outcome_gamma, process_gamma, whiten)
            if importance_cap:          # truncated importance sampling: the tokens were drawn from the engine's distribution
                A[mask] *= difference.exp().clamp(max=importance_cap)

            # 5. Policy: PPO clip over mini-batches of rows, in an order of the step's own.
            with phase("policy", optimizer):
                lr = learning_rate * min(1.0, (step + 1) / (warmup_steps + 1))
                order = torch.cat([torch.randperm(N, generator=torch.Generator().manual_seed(sample_seed(seed, step, e)))
                                   for e in range(ppo_epochs)]).tolist()
                totals, norms = torch.zeros(4, dtype=torch.float64, device=torch_device), []
                for low in range(0, len(order), batch_rows):
                    rows = order[low:low + batch_rows]
                    for members in share(rows):
                        logprobs, *entropies = logprobs_of(policy, members, temperature, entropy=entropy_coef != 0)
                        if members:
                            m = mask[members]
                            loss, stats = ppo_loss(logprobs, old_logprobs[members], A[members], m, clip)
                            if entropy_coef:
                                loss = loss - entropy_coef * (entropies[0].sum(-1) / m.sum(-1)).mean()
                            loss = loss * len(members) / len(rows)
                            totals[:3] += torch.stack([loss.detach() * len(rows), stats["clipfrac"] * len(members),
                                                       stats["approx_kl"] * len(members)]) / len(order)
                            totals[3] = torch.maximum(totals[3], stats["ratio_max"])
                        else:
                            loss = 0.0 * logprobs.sum()
                        (loss * world).backward()
                    norms.append(optimizer_step(policy, optimizer, lr, grad_clip))
                ratio_max = totals[3].clone()
                dist.all_reduce(totals)
                dist.all_reduce(ratio_max, op=dist.ReduceOp.MAX)

            # 6. The new weights go to the engine, before the next rollout.
            with phase("sync"):
                hand_over(policy, sampler)

            # What happened.
            drawn, drawn_rows = len(drawn_groups), len(drawn_groups) * samples_per_prompt
            end = last_token(mask)
            returns = [rloo(r, m, samples_per_prompt, g)[mask].abs().mean().item() for r, m, g in
                       ((rewards, mask, process_gamma), (torch.where(end, outcomes[:, None], 0.0), end, outcome_gamma))]
            row = dict(
                step=step, outcome=sum(sum(g["outcomes"]) for g in drawn_groups) / drawn_rows,
                outcome_kept=outcomes.mean().item(),
                prompts_drawn=drawn, prompts_kept=len(kept), kept_share=sum(g not in failed for g in drawn_groups) / drawn,
                samples=state["samples"] + drawn_rows,
                response_tokens=sum(sum(m) for g in drawn_groups for m in g["mask"]) / drawn_rows,
                truncated=sum(f == "length" for g in drawn_groups for f in g["finish"]) / drawn_rows,
                no_box=sum(not b for g in drawn_groups for b in g["boxed"]) / drawn_rows,
                given_up=sum(getattr(o, "failure", None) is not None for g in drawn_groups for o in g["outcomes"]) / drawn_rows,
                tool_calls=sum(text.count(TOOL_STOP) for g in drawn_groups for text in g["texts"]) / drawn_rows,
                prm_loss=sum(prm_losses) / len(prm_losses), prm_grad_norm=max(prm_norms, default=0.0),
                prm_pair_accuracy=pair_accuracy(torch.where(mask, prm_logprobs - ref_logprobs, 0.0).sum(-1), outcomes,
                                                samples_per_prompt).item(),
                process_return=returns[0], outcome_return=returns[1], advantage_std=A[mask].std().item(),
                policy_loss=totals[0].item(), clipfrac=totals[1].item(), approx_kl=totals[2].item(), ratio_max=ratio_max.item(),
                entropy=(entropy.sum() / mask.sum()).item(), grad_norm=max(norms), lr=lr,
                mismatch=mismatch, mismatch_kl=(difference.exp() - 1 - difference).mean().item(), too_long=stream.too_long,
                peak_memory_gb=(torch.cuda.max_memory_allocated() if torch_device.type == "cuda" else
                                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30)
            abilities = sorted({problems[g["index"]]["ability"] for g in drawn_groups})
            for ability in abilities if len(abilities) > 1 else ():
                own = [o for g in drawn_groups if problems[g["index"]]["ability"] == ability for o in g["outcomes"]]
                row[f"outcome_{ability}"] = sum(own) / len(own)
            if held_out and ((step + 1) % eval_interval == 0 or step + 1 == max_steps):
                with phase("eval"):
                    row["eval_greedy"], row["eval_sampled"] = evaluate(sampler, grader, tokenizer, held_out, sampling)
            row["seconds"] = {k: round(v, 3) for k, v in seconds.items()} | dict(step=round(time.time() - step_began, 3))
            step_began = time.time()        # what a checkpoint takes belongs to the next step
            seconds.clear()
            print(json.dumps(row), file=metrics_file, flush=True)
            log_samples(samples_file, step, kept, problems, rewards, A)
            eta = (time.time() - began) / (step - start + 1) * (max_steps - step - 1)
            held = ("" if "eval_greedy" not in row else
                    f" | held out: greedy {row['eval_greedy']:.3f} sampled {row['eval_sampled']:.3f}")
            print(f"step {step + 1}/{max_steps} outcome {row['outcome']:.3f} kept {len(kept)}/{drawn} "
                  f"len {row['response_tokens']:.0f} cut {row['truncated']:.1%} | "
                  f"prm {row['prm_loss']:.3f} pairs {row['prm_pair_accuracy']:.2f} | "
                  f"clip {row['clipfrac']:.3f} kl {row['approx_kl']:.1e} ent {row['entropy']:.2f} mis {mismatch:.0e} | " +
                  " ".join(f"{k} {v:.1f}" for k, v in row["seconds"].items()) +
                  f" s eta {timedelta(seconds=round(eta))}{held}", flush=True)
            if wandb_run:
                wandb_run.log(row, step=step)
            state = dict(drawn=stream.drawn, buffer=list(stream.buffer), too_long=stream.too_long, samples=row["samples"])
            with phase("save"):
                ended = all_sum(len(stopped), torch_device) > 0
                if ended or save_interval and ((step + 1) % save_interval == 0 or step + 1 == max_steps):
                    saving = save_checkpoint(checkpoints, step + 1, trained, state, keep_checkpoints, writer.submit, writers)
            if ended:
                break
        with waiting_for("the last checkpoint", timeout_minutes):
            saving and saving.result()
    if not ended:
        move(torch_device, prm)
        with waiting_for("the models' files", timeout_minutes):
            save_model(policy, tokenizer, os.path.join(out_dir, "policy"), torch_dtype, model)
            save_model(prm, tokenizer, os.path.join(out_dir, "prm"), torch_dtype, prm_model or model)
    if first:
        plot_curves(metrics_path, os.path.join(out_dir, "curves.png"))
        print(f"stopped after step {step + 1}: start again with the same command to go on" if ended else
              f"wrote {out_dir}/policy and {out_dir}/prm after {timedelta(seconds=round(time.time() - began))}", flush=True)
        if wandb_run:
            wandb_run.finish(exit_code=int(ended))          # 1: the same command goes on with this run
    sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    configurator.run(main, globals())
