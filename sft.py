"""
Supervised fine-tuning with FSDP2 on packed sequences.

    torchrun --nproc_per_node 8 sft.py                             # INTELLECT-MATH-SFT: Qwen2.5-Math-7B, 8 GPUs
    torchrun --nproc_per_node 2 sft.py config/toy_sft.py           # a laptop: the built-in world

Loss on the assistant's tokens, weighted by token over the whole global batch: neither the number of processes nor the packing
changes it. Out comes a Hugging Face folder. Left out on purpose: padding, LoRA, tensor and sequence parallelism.
"""
import faulthandler, functools, glob, heapq, importlib.util, json, math, os, re, shutil, sys, time
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import configurator
from configurator import UserError
from generate import TOOL_STOP, encode, load_tokenizer, read_rows, report_bad, stop_tokens
from runs import plan

# --- data
data = 'PrimeIntellect/INTELLECT-MATH-SFT-Data'  # hub id or .jsonl/.json/.parquet file with `messages` rows
split = 'train'                     # the hub data set's split
val_data: str = None                # the same for validation; None: the last val_rows of the shuffled data
val_split = 'validation'            # its split, of a hub data set
val_rows = 128                      # rows held out for validation, a tenth of them at most (0: none)
max_length = 5000                   # published: tokens a row
overlong = 'truncate'               # rows beyond max_length: 'truncate' (published: the end token is lost) or 'drop'
mask_prompt = True                  # no loss on what is not the assistant's
mask_output = True                  # nor on what a tool said (```output ... ```), which is never the model's to write
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
# --- model
model = 'Qwen/Qwen2.5-Math-7B'      # hub id or folder
tokenizer = 'Qwen/Qwen2.5-Math-7B-Instruct'  # None: the model's own. Published: the Instruct model's, for its chat template
chat_template: str = None           # .jinja file; None: the tokenizer's own. The published run may have used config/tulu.jinja
attention = 'auto'                  # 'flash_attn', 'varlen' (torch's own kernel), 'padded', 'auto': the first there is
# --- optimisation: the published run's, github.com/PrimeIntellect-ai/INTELLECT-MATH, sft/
epochs = 5
max_steps: int = None               # stops earlier than the epochs do
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
compile = False                     # torch.compile layers and head: meant for GPUs; the first step takes a minute
shard: int = None                   # processes that share a copy of a model's state (HSDP; with --nnodes: a node's); None: all
timeout_minutes = 60.0              # a collective that waits longer ends the run
dry_run = False                     # print what a step and a card hold; where there is a GPU run the longest batch; and end
# --- output
out_dir = 'out/intellect_math_sft'  # the model at the end; metrics.jsonl, config.json, checkpoints/
log_interval = 1                    # steps
val_interval = 300                  # steps
save_interval = 300                 # steps between checkpoints to resume from (published: 300); 0: none
keep_checkpoints = 2                # the newest so many stay

def setup_distributed(device, minutes=60):
    """Join the process group that torchrun describes, or make one of a single process. Returns (rank, world size)."""
    if "RANK" not in os.environ:
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    faulthandler.enable(2)                              # NCCL's watchdog aborts a process that hangs: then say where it was
    if dist.get_rank() > 0:                             # from here on only rank 0 prints; stderr stays open to all
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()

@contextmanager
def waiting_for(phase, minutes):
    """Names the phase in which a process did not come: UserError, of a collective of gloo's (NCCL ends the process itself)."""
    try:
        yield
    except RuntimeError as e:
        if dist.get_world_size() > 1 and "imed out" in str(e):
            raise UserError(f"{phase}: a process did not come within timeout_minutes={minutes}", rank_local=True) from e
        raise

def all_sum(value, device):
    """The sum of a number over all processes."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()

# ------------------------------------------------------------ a sharded model that maps packed rows to log-probabilities
def pack(rows, device):
    """One packed batch of rows, each (tokens [t], scored [t] bool: which tokens get a log-probability).
    pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]) holds
        input_ids    [1, 5]  5 6 7 8 9          position_ids [1, 5]  0 1 2 0 1       cu_seq_lens_q [3]  0 3 5
        predict      [3]     0 1 3              targets      [3]     6 7 9
    (the token at position p is predicted from position p - 1; the first token of a row is never scored)."""
    tokens = torch.cat([torch.as_tensor(t, dtype=torch.long) for t, _ in rows])
    scored = torch.cat([torch.as_tensor(s, dtype=torch.bool) for _, s in rows])
    lengths = torch.tensor([len(t) for t, _ in rows])
    starts = lengths.cumsum(0) - lengths
    scored[starts] = False
    where, position = scored.nonzero().squeeze(-1), torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
    batch = dict(input_ids=tokens[None], position_ids=position[None], predict=where - 1, targets=tokens[where],
                 cu_seq_lens_q=F.pad(lengths.cumsum(0), (1, 0)).int())
    cuda = torch.device(device).type == "cuda"              # copies from pinned memory do not wait for what the card still does
    batch = {name: (x.pin_memory() if cuda else x).to(device, non_blocking=True) for name, x in batch.items()}
    return batch | dict(max_length_q=lengths.max().item())

def micro_batches(lengths, budget, world):
    """Deal rows to micro-batches of at most `budget` tokens (a longer row goes alone), the same number for each process.
    Returns one list per process of lists of row numbers; some may be empty: the process then runs a dummy row, because
    every pass is a collective. Longest row first into the emptiest.   micro_batches([4, 3, 2, 1], 5, 1) = [[[0, 3], [1, 2]]]"""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for count in range(max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * world))), len(lengths) + 2):
        bins = [(0, number, []) for number in range(count * world)]         # (tokens, number, rows): a heap, emptiest first
        for i in order:
            tokens, number, rows = bins[0]
            heapq.heapreplace(bins, (tokens + lengths[i], number, rows + [i]))
        if all(tokens <= budget or len(rows) == 1 for tokens, _, rows in bins):
            bins = [rows for _, _, rows in sorted(bins, key=lambda b: b[1])]
            return [bins[rank::world] for rank in range(world)]

@torch.compiler.disable             # its shapes depend on the rows: compiled layers go around it
def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     kernel="padded", **_):
    """Causal attention inside each sequence of a packed row: query [1, H, T, D], key, value [1, G, T, D] -> [1, T, H, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                              # [T, H or G, D]
    packed = q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    if kernel == "flash_attn":
        from flash_attn import flash_attn_varlen_func
        out = flash_attn_varlen_func(*packed, softmax_scale=scaling, causal=True)
    elif kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn
        out = varlen_attn(*packed, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    else:                           # padded on the right: causal masking alone keeps the padding out of every valid token
        lengths = cu_seq_lens_q.diff().long()                                                  # [S]
        row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)    # [T]
        col = torch.arange(len(q), device=q.device) - cu_seq_lens_q[row]
        q, k, v = (x.new_zeros(len(lengths), max_length_q, *x.shape[1:]).index_put((row, col), x).transpose(1, 2)
                   for x in (q, k, v))                                                         # [S, H or G, L, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        out = out.transpose(1, 2)[row, col]                                                    # [T, H, D]
    return out[None], None

def _head(hidden, weight, targets, temperature, entropy):
    """What _logprob_forward gives, from the hidden states [t, D] of a chunk of tokens."""
    logp = (hidden @ weight.T).float()                                                         # [t, V], here only
    logp = (logp if temperature == 1 else logp.div_(temperature)).log_softmax(-1)
    logprobs = -F.nll_loss(logp, targets, reduction="none")    # not gather(), whose gradient is another [t, V] when compiled
    return (logprobs, -(logp.exp() * logp).sum(-1)) if entropy else (logprobs,)

def _logprob_forward(self, input_ids, predict, targets, temperature=1.0, entropy=False, chunk=2048, head=_head, **kwargs):
    """forward() of the models that load_model makes: a pack() -> (log-probabilities [n] of its n targets,), or with entropy
    (log-probabilities, entropies [n]): ask only if the loss uses them, because an unused output keeps its logits alive.
    Logits of all tokens never exist at once: they are made, and in the backward pass made again, `chunk` tokens at a time."""
    hidden = self.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state[0][predict]       # [n, D]
    parts = [checkpoint(head, h, self.lm_head.weight, t, temperature, entropy, use_reentrant=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return tuple(map(torch.cat, zip(*parts)))

def load_model(path, device, dtype, trained=True, checkpointing=False, attention="auto", shard=None, compile=False):
    """A causal language model of a folder or hub id, sharded over all processes, its forward replaced (_logprob_forward).
    Weights go from the safetensors files straight into the shards; no process holds them all. A trained model has fp32
    weights and computes in `dtype`; one that is not trained holds `dtype`. shard: processes that share one copy, consecutive
    ranks; the groups hold equal copies (HSDP). UserError: no such model, or kind, or kernel; shard does not divide."""
    from huggingface_hub import snapshot_download
    from transformers import AttentionInterface, AutoModelForCausalLM
    config = plan.model_config(path)
    if config.model_type not in ("llama", "mistral", "olmo", "qwen2", "qwen3") or getattr(config, "sliding_window", None) or (
            (config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope")):    # one for each length of a batch
        raise UserError(f"{path}: no {config.model_type}, sliding windows or positions that change with length are known here")
    if not os.path.isdir(path):
        path = on_first_rank(lambda: snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    if not glob.glob(os.path.join(path, "*.safetensors")):
        raise UserError(f"{path} has no *.safetensors file: convert it with from_pretrained(...).save_pretrained(folder)")
    kernels = ["flash_attn"] * bool(importlib.util.find_spec("flash_attn_2_cuda")) + ["varlen"]
    kernels *= device.type == "cuda" and dtype == torch.bfloat16                                # they know 16 bits only
    if attention not in ("auto", *kernels, "padded"):
        raise UserError(f"attention={attention!r}: on {device.type} one of {', '.join(['auto', *kernels, 'padded'])}")
    kernel = [*kernels, "padded"][0] if attention == "auto" else attention
    # To the masks of transformers this name is unknown: none is made, of T x T, nor does the host wait to see what is packed.
    AttentionInterface.register("packed", functools.partial(packed_attention, kernel=kernel))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed").to(torch.float32 if trained else dtype)
    world = dist.get_world_size()
    if world % (shard or world):
        raise UserError(f"shard={shard} does not divide the {world} processes")
    sizes, names = ((world // shard, shard), ("copies", "shards")) if shard else ((world,), ("shards",))
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)
    for group in mesh.get_all_groups():                 # new ones come with torch's own time-out
        dist.distributed_c10d._set_pg_timeout(dist.group.WORLD._get_backend(device).options._timeout, group)
    for layer in model.model.layers if compile else ():
        layer.compile(dynamic=True)
    for part in [*model.model.layers, model]:           # the root last: embeddings, last norm, head
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    model.to_empty(device=device)
    weights = {k: w for k, w in model.state_dict().items() if not (config.tie_word_embeddings and k == "lm_head.weight")}
    dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(path))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)                   # to_empty left it undefined
    model.forward = functools.partial(_logprob_forward, model, head=torch.compile(_head, dynamic=True) if compile else _head)
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
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.full_tensor().item()                            # here, and not before, the host waits for the card

def save_model(model, tokenizer, path, dtype, source):
    """Write a Hugging Face folder (safetensors in `dtype`, tokenizer, generation_config) to path, complete or not at all.
    source: the folder or hub id the model came from (the end tokens of its generation_config join the tokenizer's)."""
    from transformers import GenerationConfig, logging
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        logging.disable_progress_bar()
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        ends = stop_tokens(tokenizer, source)
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(path + ".tmp", state_dict={name: w.to(dtype) for name, w in weights.items()})
        model.config.dtype = dtype                      # save_pretrained writes the live model's, float32
        model.config.save_pretrained(path + ".tmp")
        tokenizer.save_pretrained(path + ".tmp")
        put_in_place(path)
    on_first_rank(write)

def put_in_place(path):
    """path.tmp, now complete, becomes path."""
    shutil.rmtree(path, ignore_errors=True)
    os.rename(path + ".tmp", path)

def training_state(trained):
    """{name: {model, optimizer}} of {name: (model, optimizer)}: what dcp saves and loads, sharded."""
    return {name: dict(zip(("model", "optimizer"), get_state_dict(*pair))) for name, pair in trained.items()}

def save_checkpoint(folder, step, trained, extra, keep, submit=lambda write: write(), group=None):
    """Write everything a run needs to go on to folder/step_<step>. trained: {name: (model, optimizer)}; extra: JSON-able.
    Complete or not at all: written under another name, then renamed. The newest `keep` stay. With submit, an executor's, it
    returns a Future and writes while others read what is trained; group: the gloo group of these writers."""
    path = os.path.join(folder, f"step_{step:06d}")
    on_first_rank(lambda: [shutil.rmtree(old, ignore_errors=True) for old in glob.glob(os.path.join(folder, "*.tmp"))])
    state = training_state(trained) | dict(extra=json.dumps(extra))

    def write():
        dcp.save(state, checkpoint_id=path + ".tmp", process_group=group)      # rank 0 returns when all have written
        if dist.get_rank() == 0:
            put_in_place(path)
            for old in sorted(old for old in glob.glob(os.path.join(folder, "step_??????")) if old <= path)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    return submit(write)

def load_checkpoint(folder, trained):
    """Go back to the newest complete checkpoint, on any number of processes: (step, extra), or None. UserError: none fits."""
    paths = on_first_rank(lambda: sorted(glob.glob(os.path.join(folder, "step_??????")), reverse=True))
    for path in paths:
        state = training_state(trained) | dict(extra="")
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.api.CheckpointException as e:        # half-deleted, or lost bytes: the one before is there for that
            print(f"{path} cannot be read ({str(e).splitlines()[-1][:120]!r}): trying the one before it", flush=True)
            continue
        there = {key.partition(".")[0] for key in dcp.FileSystemReader(path).read_metadata().state_dict_metadata}
        if there - state.keys():
            raise UserError(f"{path} has a trained {', '.join(there - state.keys())}, which would be lost: another --out_dir")
        for name, (model, optimizer) in trained.items():
            groups = [dict(group) for group in optimizer.param_groups]              # the settings of now, not of then
            set_state_dict(model, optimizer, model_state_dict=state[name]["model"], optim_state_dict=state[name]["optimizer"])
            for group, own in zip(optimizer.param_groups, groups):
                group |= own
        return int(path[-6:]), json.loads(state["extra"])
    if paths:
        raise UserError(f"no checkpoint in {folder} can be read: the settings of before, another --out_dir, or remove it")

def tokenize_messages(tokenizer, messages, mask_prompt=True, mask_output=True):
    """A conversation -> (tokens, scored): the assistant's words and end token are scored (one is added where the template has
    none), not the prompt and a tool's words, if masked. They are tokenized apart, as in the loop. ValueError: a useless row."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    tokens, scored, text, eos = [], [], "", tokenizer.eos_token
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt, full = render(messages[:i], add_generation_prompt=True), render(messages[:i + 1])
        if not (prompt.startswith(text) and full.startswith(prompt)):
            raise ValueError("the chat template does not render a conversation as the beginning of a longer one")
        context = encode(tokenizer, prompt) if not tokens else tokenizer(prompt[len(text):], add_special_tokens=False).input_ids
        end = full.rfind(eos, len(prompt))
        text = full if end < 0 else full[:end + len(eos)]
        pieces = re.split(f"(?<={TOOL_STOP})((?:.*?\n)??```)", text[len(prompt):].removesuffix(eos), flags=re.S)
        parts = [context] + [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
        parts[-1] = parts[-1] + [tokenizer.eos_token_id]
        for k, part in enumerate(parts):                        # the prompt, then by turns the model's words and its tool's
            tokens += part
            scored += [k % 2 == 1 or not (mask_output if k else mask_prompt)] * len(part)
    if not tokens:
        raise ValueError("no assistant message")
    return tokens, scored

def load_sft_rows(source, split, tokenizer):
    """List of (tokens int32 [t], scored bool [t]) of the `messages` rows of a file or hub data set. UserError: no usable."""
    table = read_rows(source, split, max_bad_share=max_bad_share)
    if "messages" not in table[0][1]:
        raise UserError(f"{source} has no column 'messages'; it has {', '.join(sorted(table[0][1]))}")
    rank, world, mine = dist.get_rank(), dist.get_world_size(), []
    for _, row in table[rank::world]:                       # each process tokenizes its share
        try:
            talk = [dict(message, content="" + message["content"]) for message in row["messages"]]      # a text, not None
            pair = tokenize_messages(tokenizer, talk, mask_prompt, mask_output)
            mine.append(tuple(map(np.array, pair, (np.int32, bool))))
        except Exception as e:                              # of ours or the template's
            mine.append(str(e))
    dist.all_gather_object(parts := [None] * world, mine)
    rows = [parts[i % world][i // world] for i in range(len(table))]                           # in the order of the table
    bad = [f"{where}: {row}" for (where, _), row in zip(table, rows) if isinstance(row, str)]
    report_bad(bad, len(table), max_bad_share, "unusable messages")
    good = [row for row in rows if not isinstance(row, str)]
    rows = [(t[:max_length], s[:max_length]) for t, s in good
            if len(t) <= max_length or overlong == "truncate" and s[:max_length].any()]
    if not rows:
        raise UserError(f"{source}: no row is left (max_length={max_length}, overlong={overlong!r})")
    print(f"{source}: {len(rows)} rows, {sum(len(t) for t, _ in rows)} tokens, {sum(int(s.sum()) for _, s in rows)} with loss; "
          f"{sum(len(t) > max_length for t, _ in good)} rows beyond {max_length} tokens ({overlong}), of which "
          f"{len(good) - len(rows)} dropped", flush=True)
    return rows

def learning_rate_at(step, steps, peak, schedule, warmup_steps):
    """The learning rate of step 0 .. steps-1: linear warm-up, then `schedule` down to 0 (transformers' get_scheduler)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[schedule]

def main():
    least = dict.fromkeys(("batch_size", "micro_batch_tokens", "log_interval", "val_interval", "keep_checkpoints"), 1)
    plan.check(globals(), least, schedule=("linear", "cosine", "constant"), overlong=("truncate", "drop"))
    torch_device, torch_dtype = plan.pick_device(device, dtype)
    plan.dry_run("sft", globals())                              # if asked for: ends here where there is no GPU
    tok = load_tokenizer(tokenizer or model, chat_template)
    rank, world = setup_distributed(torch_device, timeout_minutes)
    os.makedirs(out_dir, exist_ok=True)
    stopped = plan.catch_signals()
    with waiting_for("loading", timeout_minutes):
        rows = [] if dry_run else load_sft_rows(data, split, tok)
        net = load_model(model, torch_device, torch_dtype, True, checkpointing, attention, shard, compile)
    optimizer = make_optimizer(net, learning_rate, beta1, beta2, weight_decay)
    if dry_run:
        return plan.longest_batch([(net, optimizer)], max(micro_batch_tokens, max_length), torch_device)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = len(rows) - (0 if val_data else min(val_rows, len(rows) // 10))
    rows, val = [rows[i] for i in order[:kept]], [rows[i] for i in order[kept:]]
    val = load_sft_rows(val_data, val_split, tok) if val_data else val
    if (last := max(t.max() for t, _ in rows + val)) >= net.config.vocab_size:
        raise UserError(f"the tokenizer of {tokenizer or model} has a token {last}, {model} {net.config.vocab_size} in all")
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    steps = min(math.inf if max_steps is None else max_steps, math.ceil(epochs * steps_per_epoch))
    checkpoints, metrics, result = (os.path.join(out_dir, name) for name in ("checkpoints", "metrics.jsonl", "model"))
    with waiting_for("loading the checkpoint", timeout_minutes):
        start, _ = load_checkpoint(checkpoints, dict(model=(net, optimizer))) or (0, None)
    if rank == 0:
        plan.write_run_config(out_dir, configurator.values(globals()))
        plan.keep_lines(metrics, start)
    log = open(metrics if rank == 0 else os.devnull, "a", encoding="utf-8")
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters on {world} x {torch_device.type}, {torch_dtype}; "
          f"{steps} steps of {batch_size} rows, {steps_per_epoch} an epoch; {batch_size / world:g} rows a process and step")
    print(f"first row: {tok.decode(rows[0][0].tolist())[:500]!r}" + f"\nresumed after step {start}" * (start > 0), flush=True)
    peak, began = world * plan.matmul_rate(torch_device, torch_dtype), time.time()

    def loss_over(batch, backward):
        """This process's part of the mean loss a scored token over the rows of all; with backward, its gradient."""
        total, value = sum(int(s[1:].sum()) for _, s in batch), 0.0
        for members in micro_batches([len(t) for t, _ in batch], micro_batch_tokens, world)[rank]:
            chosen = [batch[i] for i in members] or [(torch.zeros(2), torch.tensor([False, True]))]     # a dummy row
            loss = -net(**pack(chosen, torch_device))[0].sum() * (len(members) > 0) / total
            if backward:
                (loss * world).backward()                       # FSDP averages gradients over processes; this sums them
            value = value + loss.detach().double()
        return value
    for step in range(start, steps):
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1 + epoch)).tolist()
        batch = [rows[i] for i in order[position * batch_size:(position + 1) * batch_size]]
        lr = learning_rate_at(step, steps, learning_rate, schedule, math.ceil(warmup * steps))
        with waiting_for(f"step {step + 1}, update", timeout_minutes):
            t0 = time.time()
            loss = loss_over(batch, backward=True)
            norm = optimizer_step(net, optimizer, lr, grad_clip)
            loss, dt = all_sum(loss, torch_device), time.time() - t0
        tokens, pairs = sum(len(t) for t, _ in batch), sum(len(t)**2 for t, _ in batch)
        row = dict(step=step, epoch=step / steps_per_epoch, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=tokens / dt,
                   mfu=plan.flops(net, tokens, pairs) / dt / peak)
        if val and ((step + 1) % val_interval == 0 or step + 1 == steps):
            with waiting_for(f"step {step + 1}, validation", timeout_minutes), torch.no_grad():
                row["val_loss"] = all_sum(loss_over(val, backward=False), torch_device)
            net.reshard()                                       # a forward without backward leaves the root gathered
        print(json.dumps(row), file=log, flush=True)
        if (step + 1) % log_interval == 0 or step == start or "val_loss" in row:
            eta = timedelta(seconds=round((time.time() - began) / (step - start + 1) * (steps - step - 1)))
            print(f"step {step + 1}/{steps} loss {loss:.4f}" + (f" val {row['val_loss']:.4f}" if "val_loss" in row else "") +
                  f" lr {lr:.2e} norm {norm:.2f} | {row['tokens_per_s']:.0f} tok/s mfu {row['mfu']:.1%} eta {eta}", flush=True)
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {step + 1} is {loss}: lower the learning rate, or look at the data")
        with waiting_for(f"step {step + 1}, checkpoint", timeout_minutes):
            ended = all_sum(len(stopped), torch_device) > 0
            if ended or save_interval and ((step + 1) % save_interval == 0 or step + 1 == steps):
                save_checkpoint(checkpoints, step + 1, dict(model=(net, optimizer)), {}, keep_checkpoints)
        if ended:
            print(f"stopped after step {step + 1}: start again with the same command to go on")
            break
    else:                                                       # a finished run that is started again comes here at once
        with waiting_for("the model's files", timeout_minutes):
            save_model(net, tok, result, torch_dtype, model)
        print(f"wrote {result} after {timedelta(seconds=round(time.time() - began))}")
    dist.destroy_process_group()

if __name__ == "__main__":
    configurator.run(main, globals())
