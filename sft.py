"""
Supervised fine-tuning with FSDP2 on packed sequences.

    torchrun --nproc_per_node 8 sft.py                             # INTELLECT-MATH-SFT: Qwen2.5-Math-7B, 8 GPUs
    torchrun --nproc_per_node 2 sft.py config/toy_sft.py           # a laptop: the built-in world

Loss on the assistant's tokens, weighted by token over the whole global batch, so that neither the number of processes nor
the packing changes it. Out comes a Hugging Face folder. prime.py imports from here what concerns a sharded model.
What is left out on purpose: padding, LoRA, tensor and sequence parallelism, several nodes.
"""
import functools
import glob
import heapq
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from datetime import timedelta
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import configurator
from configurator import UserError
from generate import encode, load_tokenizer, check_model, pick_device, read_rows, report_bad

# --- data
data = 'PrimeIntellect/INTELLECT-MATH-SFT-Data'  # hub id or .jsonl/.json/.parquet file with `messages` rows
data_config = None                  # the hub data set's configuration
split = 'train'                     # the hub data set's split
val_data = None                     # the same for validation; None: the last val_rows of the shuffled data
val_rows = 128                      # rows held out for validation (0: none)
max_rows = None                     # only the first so many
max_length = 5000                   # published: tokens a row
overlong = 'truncate'               # rows beyond max_length: 'truncate' (published: the end token is lost) or 'drop'
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
# --- model
model = 'Qwen/Qwen2.5-Math-7B'      # hub id or folder
tokenizer = 'Qwen/Qwen2.5-Math-7B-Instruct'  # None: the model's own. Published: the Instruct model's; the base has no chat template
chat_template = None                # .jinja file; None: the tokenizer's own. The published run may have used config/tulu.jinja
attention = 'auto'                  # 'flash_attn', 'varlen' (torch's own kernel), 'padded', 'auto': the first there is
# --- optimisation: the published run's, github.com/PrimeIntellect-ai/INTELLECT-MATH, sft/
epochs = 5
max_steps = None                    # stops earlier than the epochs do
batch_size = 128                    # rows an optimizer step, over all processes: published 1 x 16 accumulation x 8 GPUs
learning_rate = 5e-6
schedule = 'linear'                 # to 0: 'linear', 'cosine', or 'constant'
warmup = 0.03                       # share of the steps
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0                  # on matrices only
grad_clip = 1.0                     # norm; 0: no clipping. Published: DeepSpeed's 'auto', that is the Trainer's 1.0
seed = 42
# --- system
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # compute: 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu. Weights are fp32
micro_batch_tokens = 16384          # tokens a forward pass and process; a longer row goes alone
checkpointing = True                # recompute activations in the backward pass: a third more time, far less memory
timeout_minutes = 60                # a collective that waits longer ends the run
# --- output
out_dir = 'out/intellect_math_sft'  # the model at the end; metrics.jsonl, config.json, checkpoints/
log_interval = 1                    # steps
val_interval = 300                  # steps
save_interval = 300                 # steps between checkpoints to resume from (published: 300); 0: none
keep_checkpoints = 2                # the newest so many stay


# ---------------------------------------------------------------------------------------------------------------------
# processes

def setup_distributed(device, timeout_minutes=60):
    """Join the process group that torchrun describes, or make one of a single process. Returns (rank, world size)."""
    if "RANK" not in os.environ:
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=timeout_minutes),
                            device_id=device if cuda else None)
    return dist.get_rank(), dist.get_world_size()


def all_sum(value, device):
    """The sum of a number over all processes."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def catch_signals():
    """A list that SIGTERM and Ctrl-C put something in: the loop looks between steps, saves and ends. Asked twice: at once."""
    received = []

    def handler(*_):
        if received:
            raise KeyboardInterrupt
        received.append(True)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return received


# ---------------------------------------------------------------------------------------------------------------------
# a sharded model that maps packed rows to log-probabilities

def pack(rows, device):
    """One packed batch of rows, each (tokens [t], scored [t] bool: which tokens get a log-probability).

    pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]) holds
        input_ids    [1, 5]  5 6 7 8 9          position_ids [1, 5]  0 1 2 0 1       cu_seq_lens_q [3]  0 3 5
        predict      [3]     0 1 3              targets      [3]     6 7 9
    (the token at position p is predicted from position p - 1; the first token of a row is never scored)."""
    tokens = torch.cat([torch.as_tensor(t, dtype=torch.long) for t, _ in rows])
    lengths = torch.tensor([len(t) for t, _ in rows])
    starts = lengths.cumsum(0) - lengths
    scored = torch.cat([torch.as_tensor(s, dtype=torch.bool) for _, s in rows])
    scored[starts] = False
    where = scored.nonzero().squeeze(-1)
    cu = torch.cat([starts, lengths.sum()[None]]).int().to(device)
    position = torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
    longest = int(lengths.max())
    return dict(input_ids=tokens[None].to(device), position_ids=position[None].to(device), predict=(where - 1).to(device),
                targets=tokens[where].to(device), cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest)


def micro_batches(lengths, budget, world):
    """Deal rows to micro-batches of at most `budget` tokens: the same number for each of `world` processes, balanced.

    Returns one list per process of lists of row numbers; some may be empty (the process then runs a dummy row, because
    every forward and backward pass is a collective). Longest row first into the emptiest bin; a row beyond the budget
    has a bin of its own.    micro_batches([4, 3, 2, 1], 5, 1) = [[[0, 3], [1, 2]]]"""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * world)))
    while True:
        bins = [(0, i, []) for i in range(count * world)]           # (tokens, number, rows): a heap, emptiest first
        fits = True
        for i in order:
            tokens, number, rows = bins[0]
            fits &= not rows or tokens + lengths[i] <= budget
            heapq.heapreplace(bins, (tokens + lengths[i], number, rows + [i]))
        if fits:
            break
        count += 1
    bins = [rows for _, _, rows in sorted(bins, key=lambda b: b[1])]
    return [bins[rank::world] for rank in range(world)]


def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     kernel="padded", **_):
    """Causal attention inside each sequence of a packed row. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                              # [T, H or G, D]
    if kernel == "flash_attn":
        from flash_attn import flash_attn_varlen_func
        out = flash_attn_varlen_func(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
                                     softmax_scale=scaling, causal=True)
    elif kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                          window_size=(-1, 0), enable_gqa=True)
    else:                           # padded on the right: causal masking alone keeps the padding out of every valid token
        lengths = cu_seq_lens_q.diff().long()                                                  # [S]
        row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)    # [T]
        col = torch.arange(len(q), device=q.device) - cu_seq_lens_q[row]
        q, k, v = (x.new_zeros(len(lengths), max_length_q, *x.shape[1:]).index_put((row, col), x).transpose(1, 2)
                   for x in (q, k, v))                                                         # [S, H or G, L, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        out = out.transpose(1, 2)[row, col]                                                    # [T, H, D]
    return out[None], None


def _chunk_logprobs(hidden, weight, targets, temperature):
    logits = (hidden @ weight.T).float() / temperature                                         # [t, V], here only
    lse = logits.logsumexp(-1)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - lse, lse - (logits.softmax(-1) * logits).sum(-1)


def _logprob_forward(self, input_ids, predict, targets, temperature=1.0, chunk=2048, **kwargs):
    """forward() of the models that load_model makes: a pack() -> (log-probabilities [n], entropies [n]) of its n targets.

    Logits of all tokens never exist at once: they are made, and in the backward pass made again, `chunk` tokens at a time."""
    hidden = self.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state[0][predict]       # [n, D]
    weight = self.lm_head.weight
    parts = [checkpoint(_chunk_logprobs, h, weight, t, temperature, use_reentrant=False) if torch.is_grad_enabled() else
             _chunk_logprobs(h, weight, t, temperature) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs, entropies = zip(*parts) if parts else ([hidden.sum(-1).float()], [hidden.sum(-1).float()])
    return torch.cat(logprobs), torch.cat(entropies)


def load_model(path, device, dtype, trained=True, checkpointing=False, attention="auto"):
    """A causal language model of a folder or hub id, sharded over all processes, its forward replaced (_logprob_forward).

    Weights go from the safetensors files straight into the shards; no process holds them all. A trained model has fp32
    weights and computes in `dtype`; one that is not trained holds `dtype`. Raises UserError for a model that is not there
    or an attention kernel that is not installed."""
    from huggingface_hub import snapshot_download
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    check_model(path)
    if not os.path.isdir(path):
        path = on_first_rank(lambda: snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    if not glob.glob(os.path.join(path, "*.safetensors")):
        raise UserError(f"{path} has no *.safetensors file")
    kernels = (["flash_attn"] if find_spec("flash_attn") else []) + ["varlen"] if device.type == "cuda" else []
    if attention not in ("auto", "padded", *kernels):
        raise UserError(f"attention={attention!r}: here it can be 'auto', {', '.join(map(repr, [*kernels, 'padded']))}")
    kernel = [*kernels, "padded"][0] if attention == "auto" else attention
    AttentionInterface.register("packed", functools.partial(packed_attention, kernel=kernel))
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)                    # no T x T mask
    config = AutoConfig.from_pretrained(path)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(f"{path} uses sliding-window attention, which packed_attention does not do")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if trained else dtype, attn_implementation="packed")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)                # the root: embeddings, last norm, head
    model.to_empty(device=device)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")                   # not in the file
        assert model.lm_head.weight is model.model.embed_tokens.weight, "tied embeddings came apart"
    dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(path))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)                          # to_empty left it undefined
    model.forward = types.MethodType(_logprob_forward, model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(trained)                         # checkpointing works in train mode only


def on_first_rank(function):
    """Call function() on rank 0, give its result (or its exception) to all."""
    result, error = [None, None], None
    if dist.get_rank() == 0:
        try:
            result[0] = function()
        except Exception as e:
            error, result[1] = e, f"{e}"
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise error or UserError(result[1])
    return result[0]


def make_optimizer(model, learning_rate, beta1=0.9, beta2=0.999, weight_decay=0.0):
    """AdamW on fp32 shards; no decay on biases and norms."""
    groups = [dict(params=[p for p in model.parameters() if (p.dim() >= 2) == matrix],
                   weight_decay=weight_decay if matrix else 0.0) for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-8, fused=True)


def optimizer_step(model, optimizer, learning_rate, grad_clip):
    """Clip, step, forget the gradients. Returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).full_tensor().item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def save_model(model, tokenizer, path, dtype, source):
    """Write a Hugging Face folder (safetensors in `dtype`, tokenizer, generation_config) to path, complete or not at all.

    source: the folder or hub id the model came from (its generation_config is kept; its end tokens join ours)."""
    from generate import stop_tokens
    from transformers import GenerationConfig, logging
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        logging.disable_progress_bar()
        tied = model.config.tie_word_embeddings
        model.generation_config = GenerationConfig(eos_token_id=stop_tokens(tokenizer, source), pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(path + ".tmp", state_dict={
            name: w.to(dtype) for name, w in weights.items() if not (tied and name == "lm_head.weight")})
        with open(path + ".tmp/config.json", "r+", encoding="utf-8") as f:
            config = json.load(f) | dict(dtype=str(dtype).removeprefix("torch."))       # it says float32, the live model's
            f.seek(0), f.truncate(), json.dump(config, f, indent=1)
        tokenizer.save_pretrained(path + ".tmp")
        put_in_place(path)

    on_first_rank(write)


def put_in_place(path):
    """path.tmp, now complete, becomes path."""
    shutil.rmtree(path, ignore_errors=True)
    os.rename(path + ".tmp", path)


def save_checkpoint(folder, step, trained, extra, keep):
    """Write everything a run needs to go on to folder/step_<step>. trained: {name: (model, optimizer)}; extra: JSON-able.

    Complete or not at all: written under another name, then renamed. The newest `keep` stay."""
    path = os.path.join(folder, f"step_{step:06d}")
    on_first_rank(lambda: (shutil.rmtree(path + ".tmp", ignore_errors=True), os.makedirs(folder, exist_ok=True)) and None)
    state = {name: dict(zip(("model", "optimizer"), get_state_dict(*pair))) for name, pair in trained.items()}
    dcp.save(state | dict(extra=json.dumps(extra)), checkpoint_id=path + ".tmp")

    def finish():
        put_in_place(path)
        for old in sorted(glob.glob(os.path.join(folder, "step_??????")))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    on_first_rank(finish)


def load_checkpoint(folder, trained):
    """Go back to the newest complete checkpoint in folder, on any number of processes. Returns (step, extra) or None."""
    paths = on_first_rank(lambda: sorted(glob.glob(os.path.join(folder, "step_??????")), reverse=True))
    for path in paths:
        state = {name: dict(zip(("model", "optimizer"), get_state_dict(*pair))) for name, pair in trained.items()} | dict(extra="")
        try:
            dcp.load(state, checkpoint_id=path)
        except (Exception, CheckpointException) as e:   # half-deleted, or lost bytes: the one before is there for that
            if dist.get_rank() == 0:
                print(f"{path} cannot be read ({str(e).splitlines()[0][:120]}): trying the checkpoint before it", flush=True)
            continue
        for name, (model, optimizer) in trained.items():
            set_state_dict(model, optimizer, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optimizer"])
        return int(re.search(r"(\d+)$", path)[1]), json.loads(state["extra"])
    return None


def write_run_config(out_dir, settings):
    """config.json of a run: all settings, versions, command, git commit."""
    import datasets
    import transformers
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    about = dict(settings=settings, command=sys.argv, commit=git.stdout.strip() or None, world_size=dist.get_world_size(),
                 python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__,
                 datasets=datasets.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    with open(os.path.join(out_dir, "config.json"), "w", encoding="utf-8") as f:
        json.dump(about, f, indent=1, ensure_ascii=False)


def keep_lines(path, before):
    """Drop the rows of a .jsonl file whose `step` is `before` or later: they are made again after a resume."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < before]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# data

def tokenize_messages(tokenizer, messages):
    """A conversation -> (tokens, scored): the assistant's words and end token are scored, all else is context.

    Prompt and answer are tokenized apart, as prime.py and evaluate.py see them. Where the template writes no end token
    after an answer one is added, or the model never learns to stop. Raises ValueError for a row that cannot be used."""
    def render(messages, prompt):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)

    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no assistant message")
    tokens, scored, text = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, full = render(messages[:i], True), render(messages[:i + 1], False)
        if not (prompt.startswith(text) and full.startswith(prompt)):
            raise ValueError("the chat template does not render a conversation as the beginning of a longer one")
        context = encode(tokenizer, prompt) if not tokens else tokenizer(prompt[len(text):], add_special_tokens=False).input_ids
        answer, end, after = full[len(prompt):].rpartition(tokenizer.eos_token)
        answer = answer if end else after
        text = full[:len(full) - len(after)] if end else full
        answer = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        tokens += context + answer
        scored += [False] * len(context) + [True] * len(answer)
    return tokens, scored


def load_sft_rows(source, split, config, tokenizer, max_length, overlong, max_rows=None, max_bad_share=0.01):
    """List of (tokens int32 [t], scored bool [t]) of the `messages` rows of a file or hub data set. UserError: unusable data."""
    table = read_rows(source, split, config, max_bad_share)[:max_rows]
    if "messages" not in table[0][1]:
        raise UserError(f"{source} has no column 'messages'; it has {', '.join(sorted(table[0][1]))}")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, parts = [], [None] * world
    for _, row in table[rank::world]:                       # each process tokenizes its share
        try:
            mine.append(tuple(map(np.array, tokenize_messages(tokenizer, row["messages"]), (np.int32, bool))))
        except (ValueError, KeyError, TypeError) as e:
            mine.append(str(e))
    dist.all_gather_object(parts, mine)
    rows = [parts[i % world][i // world] for i in range(len(table))]                           # in the order of the table
    bad = [(where, row) for (where, _), row in zip(table, rows) if isinstance(row, str)]
    report_bad([where for where, _ in bad], len(table), max_bad_share, f"has unusable messages ({bad[0][1] if bad else ''})")
    rows = [row for row in rows if not isinstance(row, str)]
    long = sum(len(t) > max_length for t, _ in rows)
    rows = [tuple(torch.from_numpy(x[:max_length]) for x in row) for row in rows
            if len(row[0]) <= max_length or overlong == "truncate" and row[1][:max_length].any()]
    if not rows:
        raise UserError(f"{source}: no row is left (max_length={max_length}, overlong={overlong!r})")
    if rank == 0:
        print(f"{source}: {len(rows)} rows, {sum(len(t) for t, _ in rows)} tokens, {sum(int(s.sum()) for _, s in rows)} with loss; "
              f"{long} rows beyond {max_length} tokens ({overlong})", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------

def learning_rate_at(step, steps, peak, schedule, warmup_steps):
    """The learning rate of step 0 .. steps-1: linear warm-up, then `schedule` down to 0 (transformers' get_scheduler)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[schedule]


def matmul_rate(device, dtype, size=1024):
    """Measured FLOP/s of a matrix product: what MFU is a share of."""
    a = torch.randn(size if device.type == "cpu" else 8 * size, size if device.type == "cpu" else 8 * size, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()        # .item() waits for the GPU
        times.append(time.perf_counter() - start)
    return 2 * len(a) ** 3 / min(times)


def model_flops(model, lengths):
    """FLOPs of forward and backward over rows of these lengths: 6 a weight and token, and causal attention."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name or config.tie_word_embeddings)
    return 6 * weights * sum(lengths) + 6 * config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths)


def main():
    if schedule not in ("linear", "cosine", "constant"):
        raise UserError(f"schedule={schedule!r}: 'linear', 'cosine' or 'constant'")
    if overlong not in ("truncate", "drop"):
        raise UserError(f"overlong={overlong!r}: 'truncate' or 'drop'")
    torch_device, torch_dtype = pick_device(device, dtype)
    tok = load_tokenizer(tokenizer or model, chat_template)
    rank, world = setup_distributed(torch_device, timeout_minutes)
    first = rank == 0
    os.makedirs(out_dir, exist_ok=True)
    stopped = catch_signals()

    rows = load_sft_rows(data, split, data_config, tok, max_length, overlong, max_rows, max_bad_share)
    if val_data:
        val = load_sft_rows(val_data, split, data_config, tok, max_length, overlong, None, max_bad_share)
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held = min(val_rows, len(rows) // 10)
        val, rows = [rows[i] for i in order[len(rows) - held:]], [rows[i] for i in order[:len(rows) - held]]
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    steps = min(max_steps or math.inf, math.ceil(epochs * steps_per_epoch))

    net = load_model(model, torch_device, torch_dtype, checkpointing=checkpointing, attention=attention)
    optimizer = make_optimizer(net, learning_rate, beta1, beta2, weight_decay)
    if first:
        write_run_config(out_dir, configurator.values(globals()))
        print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters on {world} x {torch_device.type}, {torch_dtype}; "
              f"{steps} steps of {batch_size} rows, {steps_per_epoch} an epoch; {batch_size / world:g} rows a process and step")
        print("first row: " + repr(tok.decode(rows[0][0].tolist())[:500]), flush=True)
    resumed = load_checkpoint(os.path.join(out_dir, "checkpoints"), dict(model=(net, optimizer)))
    start = resumed[0] if resumed else 0
    if first and resumed:
        print(f"resumed after step {start}", flush=True)
    metrics_path = os.path.join(out_dir, "metrics.jsonl")
    if first:
        keep_lines(metrics_path, start)
    peak = matmul_rate(torch_device, torch_dtype)

    def loss_over(batch, backward):
        """Mean loss a scored token over the rows of all processes; with backward, its gradient."""
        total = sum(int(s[1:].sum()) for _, s in batch)
        value = 0.0
        for members in micro_batches([len(t) for t, _ in batch], micro_batch_tokens, world)[rank]:
            chosen = [batch[i] for i in members] or [(torch.zeros(2), torch.tensor([False, True]))]    # a dummy row keeps
            logprobs, _ = net(**pack(chosen, torch_device))                                            # the ranks in step
            loss = -logprobs.sum() * (len(members) > 0) / total
            if backward:
                (loss * world).backward()                       # FSDP averages gradients over processes; this sums them
            value += loss.item()
        return all_sum(value, torch_device)

    t0, tokens_seen, began = time.time(), 0, time.time()
    for step in range(start, steps):
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1 + epoch)).tolist()
        batch = [rows[i] for i in order[position * batch_size:(position + 1) * batch_size]]
        lr = learning_rate_at(step, steps, learning_rate, schedule, math.ceil(warmup * steps))
        loss = loss_over(batch, backward=True)
        norm = optimizer_step(net, optimizer, lr, grad_clip)
        row = dict(step=step, epoch=step / steps_per_epoch, loss=loss, lr=lr, grad_norm=norm)
        if val and ((step + 1) % val_interval == 0 or step + 1 == steps):
            with torch.no_grad():
                row["val_loss"] = loss_over(val, backward=False)
            net.reshard()                                       # a forward without backward leaves the root gathered
        lengths = [len(t) for t, _ in batch]
        tokens_seen, dt, t0 = tokens_seen + sum(lengths), time.time() - t0, time.time()
        row |= dict(tokens_per_s=sum(lengths) / dt, mfu=model_flops(net, lengths) / dt / (peak * world))
        if first:
            with open(metrics_path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        if first and ((step + 1) % log_interval == 0 or step == start or "val_loss" in row):
            eta = (time.time() - began) / (step - start + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {loss:.4f}" + (f" val {row['val_loss']:.4f}" if "val_loss" in row else "") +
                  f" lr {lr:.2e} norm {norm:.2f} | {row['tokens_per_s']:.0f} tok/s mfu {row['mfu']:.1%} "
                  f"eta {timedelta(seconds=round(eta))}", flush=True)
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {step} is {loss}: lower the learning rate, or look at the data")
        ended = all_sum(len(stopped), torch_device) > 0
        if ended or save_interval and ((step + 1) % save_interval == 0 or step + 1 == steps):
            save_checkpoint(os.path.join(out_dir, "checkpoints"), step + 1, dict(model=(net, optimizer)), {}, keep_checkpoints)
        if ended:
            if first:
                print(f"stopped after step {step + 1}: start again with the same command to go on")
            return dist.destroy_process_group()
    save_model(net, tok, os.path.join(out_dir, "model"), torch_dtype, model)
    if first:
        print(f"wrote {os.path.join(out_dir, 'model')} after {timedelta(seconds=round(time.time() - began))}, "
              f"{tokens_seen / max(1e-9, time.time() - began):.0f} tok/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    configurator.run(main, globals())
