"""A causal language model, sharded by FSDP2, that maps packed rows of tokens to log-probabilities.

    rank, world_size = setup_distributed(device)
    model = load_model("Qwen/Qwen2.5-Math-7B", device, torch.bfloat16)
    optimizer = make_optimizer(model, 1e-6)
    batch = pack([(tokens, scored), ...], device)
    loss = -token_logprobs(model, batch).mean()
    loss.backward()
    optimizer_step(model, optimizer, 1e-6, grad_clip=1.0)
    save_model(model, tokenizer, "out/model", torch.bfloat16, source="Qwen/Qwen2.5-Math-7B")

There is no padding: the rows of a batch are concatenated, and attention stays inside a row. The
answers to one prompt share it (see pack()).
Weights and Adam's state are fp32 and sharded over all processes; passes compute in `dtype`.
"""

import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from lib.finite import NotFinite, check_finite, names_not_finite, row_list
from lib.packing import micro_batches, rows_by_prompt
from lib.pretrained import model_config, save_tokenizer, stop_tokens
from lib.rollouts import Batch
from lib.run import on_first_rank, print0
from lib.safe_checkpoint import (
    checksums,
    damaged_file,
    load_checkpoint_files,
    metadata_trouble,
    names_in_checkpoint,
    read_checksums,
    write_checksums,
)
from lib.weights import KINDS, check_fit, empty_model, read_files, weight_files

# Tokens whose logits exist at a time.
CHUNK = 2048

GB = 2**30


# --------------------------------------------------------------------------------------------------
# rows -> batches


def pack(rows: list, device: torch.device, prompts: list[int] | None = None) -> dict:
    """One packed batch of rows, each (tokens [t], scored [t]: which tokens get a log-probability).

    pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], device) holds
        input_ids      [1, T]  5 6 7 8 9      all tokens
        position_ids   [1, T]  0 1 2 0 1
        predict        [n]     0 1 3          where a scored token is predicted: one position before
        targets        [n]     6 7 9          the scored tokens
        cu_seq_lens_q  [B+1]   0 3 5          where rows begin and end
        max_length_q           3              a Python number
    The first token of a row is never scored: nothing predicts it.

    prompts: the first so many tokens of each row are its prompt. Rows with one prompt that stand
    next to each other share it: only the first of them has its tokens. Two answers [7 8] and [9]
    to the prompt [5 6] become
        input_ids      [1, T]  5 6 7 8 9
        position_ids   [1, T]  0 1 2 3 2
        predict        [n]     1 2 1          the prompt's end predicts both answers' first tokens
        targets        [n]     7 8 9
        cu_seq_lens_q  [B+1]   0 4 7          where whole rows begin and end
        max_length_q           4
        whole          [S]     0 1 2 3 0 1 4  the tokens of whole rows: what attention works on
        own            [T]     0 1 2 3 6      where the T tokens are among them
    """
    tokens = torch.cat([torch.as_tensor(tokens, dtype=torch.long) for tokens, _ in rows])  # [S]
    scored = torch.cat([torch.as_tensor(scored, dtype=torch.bool) for _, scored in rows])
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    starts = lengths.cumsum(0) - lengths
    scored[starts] = False
    where = scored.nonzero().squeeze(-1)

    # Which tokens a row has for itself, and the place of each of its tokens in the batch.
    first, shared = shared_prompts(rows, prompts)
    position = torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
    own = position >= shared.repeat_interleave(lengths)
    place = own.cumsum(0) - 1
    same_in_first = starts[first].repeat_interleave(lengths) + position
    place = torch.where(own, place, place[torch.where(own, 0, same_in_first)])

    batch = dict(
        input_ids=tokens[own][None],
        position_ids=position[own][None],
        predict=place[where - 1],
        targets=tokens[where],
        cu_seq_lens_q=F.pad(lengths.cumsum(0), (1, 0)).int(),
    )
    if shared.any():
        batch["whole"] = place
        batch["own"] = own.nonzero().squeeze(-1)

    # Copies from pinned memory do not wait for what the GPU is still doing.
    for name, tensor in batch.items():
        if torch.device(device).type == "cuda":
            tensor = tensor.pin_memory()
        batch[name] = tensor.to(device, non_blocking=True)
    batch["max_length_q"] = lengths.max().item()
    return batch


def shared_prompts(rows: list, prompts: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] the row that has the tokens of a row's prompt, [B] how many of them a row leaves out).

    See pack(). A row that has its prompt itself is its own first one, and leaves out none.
    """
    first = list(range(len(rows)))
    shared = [0] * len(rows)
    for row in range(1, len(rows) if prompts else 0):
        before, _ = rows[first[row - 1]]
        tokens, _ = rows[row]
        n = prompts[row]
        if n == prompts[row - 1] and tokens[:n] == before[:n]:
            first[row] = first[row - 1]
            shared[row] = n
    return torch.tensor(first), torch.tensor(shared)


def my_micro_batches(lengths: list[int], budget: int) -> tuple[list[list[int]], int]:
    """(the micro-batches of this process, idle), for rows of which every process knows the lengths.

    idle: passes that other processes make beyond these. idle_passes() takes part in them:

        batches, idle = my_micro_batches(lengths, budget)
        for rows in batches:
            ...
        idle_passes(model, idle, device)
    """
    return my_share([[row] for row in range(len(lengths))], lengths, budget)


def my_shared_batches(
    batch: Batch, budget: int, rows: list[int] | None = None
) -> tuple[list[list[int]], int]:
    """my_micro_batches() of rows of a Batch (None: all), in which answers to one prompt share it.

    The prompt counts once for the rows of a micro-batch that share it.
    """
    if rows is None:
        rows = list(range(len(batch.lengths)))
    groups, tokens = rows_by_prompt(
        rows, batch.prompts, batch.prompt_lengths, batch.lengths, budget, dist.get_world_size()
    )
    return my_share(groups, tokens, budget)


def my_share(groups: list[list[int]], tokens: list[int], budget: int):
    """What my_micro_batches() returns, for groups of rows that stay together; tokens: of each."""
    dealt = micro_batches(tokens, budget, dist.get_world_size())
    mine = dealt[dist.get_rank()]
    batches = []
    for members in mine:
        if members:
            of_each = [groups[i] for i in members]
            batches.append(list(itertools.chain.from_iterable(of_each)))
    return batches, len(mine) - len(batches)


def idle_passes(model: torch.nn.Module, count: int, device: torch.device) -> None:
    """Take part in `count` passes of the other processes without rows of one's own. Collective.

    Every pass gathers weights and, with gradients on, reduces gradients over all processes. A
    process that has no row left sends a dummy through, whose gradients are zero.
    """
    dummy = [([0, 0], [False, True])]
    for _ in range(count):
        logprobs = token_logprobs(model, pack(dummy, device))
        if torch.is_grad_enabled():
            (0.0 * logprobs.sum()).backward()


# --------------------------------------------------------------------------------------------------
# batches -> log-probabilities


def token_logprobs(
    model: torch.nn.Module,
    batch: dict,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
):
    """fp32 log-probabilities [n] of the scored tokens of a packed batch. Every loss starts here.

    With entropy=True (log-probabilities [n], entropies [n] of the distributions). Ask for entropies
    only if the loss uses them: an unused output keeps its logits in memory. Logits of all tokens
    never exist at once, only those of `chunk` tokens. Collective: all processes make a pass.
    """
    return model(**batch, temperature=temperature, entropy=entropy, chunk=chunk)


def replace_forward(model: torch.nn.Module, compile: bool = False) -> None:
    """Make model(**batch) return log-probabilities instead of logits.

    FSDP2 gathers the parameters of the root (embeddings, last norm, head) in hooks that run around
    the root's forward() alone. Whatever needs them must therefore happen inside of it, and calling
    model.model(...) or model.lm_head(...) from elsewhere fails.
    """
    head = chunk_logprobs
    if compile:
        head = torch.compile(chunk_logprobs, dynamic=True)
    model.forward = functools.partial(logprob_forward, model, head=head)


def logprob_forward(
    model, input_ids, predict, targets, temperature, entropy, chunk, head, **about_rows
):
    """The forward() of the models of this file: see token_logprobs()."""
    output = model.model(input_ids=input_ids, use_cache=False, **about_rows)
    hidden = output.last_hidden_state[0][predict]  # [n, D]

    # Each chunk's logits are made again in the backward pass, so that none are kept for it.
    logprobs = []
    entropies = []
    for hidden_chunk, target_chunk in zip(hidden.split(chunk), targets.split(chunk)):
        weight = model.lm_head.weight
        values = checkpoint(
            head, hidden_chunk, weight, target_chunk, temperature, entropy, use_reentrant=False
        )
        logprobs.append(values[0])
        entropies.append(values[1])

    if not entropy:
        return torch.cat(logprobs)
    return torch.cat(logprobs), torch.cat(entropies)


def chunk_logprobs(hidden, weight, targets, temperature, entropy):
    """(log-probabilities [t], entropies [t] or None); hidden states [t, D], head weight [V, D]."""
    # One name for logits and log-probabilities, because only one of them may stay in memory.
    logp = (hidden @ weight.T).float()  # [t, V]
    if temperature != 1:
        logp = logp.div_(temperature)
    logp = logp.log_softmax(-1)

    # Not gather(): its gradient is one more tensor [t, V] when it is compiled.
    logprobs = -F.nll_loss(logp, targets, reduction="none")
    if not entropy:
        return logprobs, None
    return logprobs, -(logp.exp() * logp).sum(-1)


def row_logprobs(
    model: torch.nn.Module,
    batch: Batch,
    rows: list[int],
    temperature: float = 1.0,
    entropy: bool = False,
):
    """(log-probabilities [n, T], entropies [n, T] or None) of the responses of n rows of a batch.

    Both are 0 outside batch.mask. This is token_logprobs() for rows that are padded to T tokens,
    and share the prompts of rows that stand next to each other.
    """
    pairs = [(batch.tokens[i], batch.scored[i]) for i in rows]
    prompts = [batch.prompt_lengths[i] for i in rows]
    packed = pack(pairs, batch.mask.device, prompts)
    mask = batch.mask[rows]
    if not entropy:
        return unpack(token_logprobs(model, packed, temperature), mask), None
    logprobs, entropies = token_logprobs(model, packed, temperature, entropy=True)
    return unpack(logprobs, mask), unpack(entropies, mask)


def unpack(values, mask):
    """Values [n] of the tokens that mask [B, T] names, row after row, as [B, T], 0 elsewhere."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out


@torch.no_grad()
def score(
    model: torch.nn.Module,
    batch: Batch,
    micro_batch_tokens: int,
    temperature: float = 1.0,
    entropy: bool = False,
):
    """row_logprobs() of all N rows, the same on every rank: ([N, T], [N, T] or None). Collective.

    Each rank runs its micro-batches and leaves the other rows 0; the sum over ranks has them all.
    Raises NotFinite if a log-probability or an entropy is not finite.
    """
    logprobs = torch.zeros(batch.mask.shape, device=batch.mask.device)
    entropies = torch.zeros_like(logprobs) if entropy else None
    mine, idle = my_shared_batches(batch, micro_batch_tokens)
    for rows in mine:
        values = row_logprobs(model, batch, rows, temperature, entropy)
        logprobs[rows] = values[0]
        if entropy:
            entropies[rows] = values[1]
    idle_passes(model, idle, batch.mask.device)
    model.reshard()  # FSDP frees embeddings and head only in a backward pass: free them here

    dist.all_reduce(logprobs)
    check_finite("log-probabilities", logprobs)
    if entropy:
        dist.all_reduce(entropies)
        check_finite("entropies", entropies)
    return logprobs, entropies


# --------------------------------------------------------------------------------------------------
# attention inside the rows of a packed batch


# Its shapes depend on the rows: compiled layers call it as it is.
@torch.compiler.disable
def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    whole=None,
    own=None,
    kernel="padded",
    **_,
):
    """Causal attention inside each row of a packed batch, in the form that transformers calls.

    query [1, H, T, D]; key, value [1, G, T, D] with G heads for groups of queries -> [1, T, H, D].
    The rest is what pack() says of the rows.
    """
    q = query[0].transpose(0, 1)  # [T, H, D]
    k = key[0].transpose(0, 1)
    v = value[0].transpose(0, 1)
    if whole is not None:
        # Copies of the prompts make rows whole again: [S, H or G, D]. That attention is computed
        # for each copy costs little beside the rest of a layer, which is not.
        q = q.index_select(0, whole)
        k = k.index_select(0, whole)
        v = v.index_select(0, whole)

    kernels = dict(flash_attn=flash_attention, varlen=varlen_attention, padded=padded_attention)
    out = kernels[kernel](q, k, v, cu_seq_lens_q, max_length_q, scaling)
    if own is not None:
        out = out.index_select(0, own)
    return out[None], None


def flash_attention(q, k, v, cu_seq_lens, max_length, scale):
    """The kernel of the flash-attn package: q [T, H, D]; k, v [T, G, D] -> [T, H, D]."""
    from flash_attn import flash_attn_varlen_func

    rows = (cu_seq_lens, cu_seq_lens, max_length, max_length)
    return flash_attn_varlen_func(q, k, v, *rows, softmax_scale=scale, causal=True)


def varlen_attention(q, k, v, cu_seq_lens, max_length, scale):
    """The same by the kernel that comes with torch."""
    from torch.nn.attention.varlen import varlen_attn

    # A window of everything before and nothing after is what torch calls causal here.
    rows = (cu_seq_lens, cu_seq_lens, max_length, max_length)
    return varlen_attn(q, k, v, *rows, scale=scale, window_size=(-1, 0), enable_gqa=True)


def padded_attention(q, k, v, cu_seq_lens, max_length, scale):
    """The same on any device: rows are padded on the right, in groups of similar length.

    At most half of what is computed is padding: one long row does not make all others long.
    """
    lengths = cu_seq_lens.diff().tolist()
    groups = similar_lengths(lengths)
    if len(groups) == 1:
        return padded_rows(q, k, v, lengths, scale)

    # The numbers of the tokens of each group.
    tokens = torch.arange(len(q), device=q.device).split(lengths)
    order = [torch.cat([tokens[row] for row in rows]) for rows in groups]
    parts = []
    for rows, where in zip(groups, order):
        of_group = (x.index_select(0, where) for x in (q, k, v))
        parts.append(padded_rows(*of_group, [lengths[row] for row in rows], scale))

    # Back into the order of the batch.
    return torch.cat(parts).index_select(0, torch.cat(order).argsort())


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Row numbers in groups: padded to its longest row, a group at most doubles its tokens.

    >>> similar_lengths([2, 9, 3, 8]), similar_lengths([2, 90, 3, 2])
    ([[0, 1, 2, 3]], [[1, 2], [0, 3]])
    """
    groups = []
    longest = 0
    tokens = 0  # of the rows in the last group
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        # The longest row opens a group; shorter ones join it as long as it is half full.
        tokens += lengths[row]
        if not groups or (len(groups[-1]) + 1) * longest > 2 * tokens:
            groups.append([])
            longest = lengths[row]
            tokens = longest
        groups[-1].append(row)
    return [sorted(rows) for rows in groups]


def padded_rows(q, k, v, lengths: list[int], scale):
    """Attention inside rows of these lengths, all padded to the longest: [T, H, D].

    The causal mask alone keeps the padding, which lies behind a row, out of every valid token.
    """
    longest = max(lengths)
    lengths = torch.tensor(lengths, device=q.device)  # [B]
    row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)  # [T]
    starts = lengths.cumsum(0) - lengths
    column = torch.arange(len(q), device=q.device) - starts[row]  # [T]

    def pad(x):
        empty = x.new_zeros(len(lengths), longest, *x.shape[1:])
        return empty.index_put((row, column), x).transpose(1, 2)  # [B, H or G, L, D]

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[row, column]  # [T, H, D]


# --------------------------------------------------------------------------------------------------
# loading


def load_model(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    trained: bool = True,
    checkpointing: bool = False,
    attention: str = "auto",
    shard: int | None = None,
    compile: bool = False,
) -> torch.nn.Module:
    """The causal language model of a folder or hub id, sharded over all processes. Collective.

    A trained model has fp32 weights and computes in `dtype`; another one holds its weights in
    `dtype`. checkpointing: activations are computed again in the backward pass. shard: so many
    processes share one copy of the weights, see make_mesh().
    Raises UserError if there is no such model, if it is of an unknown kind, if the attention
    kernel is not there, and if shard does not divide the number of processes.
    """
    config = model_config(path)
    check_kind(path, config)
    folder = weights_folder(path)
    files = on_first_rank(lambda: weight_files(folder))
    kernel = pick_attention(attention, device, dtype)
    mesh = make_mesh(device, shard)

    # On the meta device a model has shapes and no memory.
    model = build_on_meta(path, config, kernel).to(torch.float32 if trained else dtype)
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)

    # FSDP2: a layer's weights are gathered only while it runs, the root's (embeddings, last norm,
    # head) for the whole pass. Gradients are averaged over all processes.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)

    # Now memory for the shards, and what belongs there.
    model.to_empty(device=device)
    read_weights(model, folder, files)

    # The rotary frequencies are in no file: to_empty() has left them undefined.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)

    replace_forward(model, compile)
    if checkpointing:
        model.gradient_checkpointing_enable()

    # Checkpointing works in training mode only.
    return model.train(trained)


def check_kind(path: str, config) -> None:
    """Raise UserError for a model that would be computed otherwise here than by transformers."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of rotary frequencies for a whole batch, whatever lengths its rows have.
    varying_positions = rope.get("rope_type") in ("dynamic", "longrope")
    window = getattr(config, "sliding_window", None)
    if config.model_type not in KINDS or window or varying_positions:
        raise UserError(
            f"{path}: a model of type {config.model_type}. Supported are {', '.join(KINDS)}, "
            "without sliding windows and without positions that change with the length"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path}: its weights are quantized: take the model it was made from")


def weights_folder(path: str) -> str:
    """The local folder of a model's safetensors files; a hub id is downloaded by rank 0."""
    from huggingface_hub import snapshot_download

    if not os.path.isdir(path):
        patterns = ["*.safetensors", "*.json"]
        return on_first_rank(lambda: snapshot_download(path, allow_patterns=patterns))
    return path


def pick_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention kernel that a setting names; "auto" is the first that this machine has.

    Raises UserError for one that it does not have.
    """
    kernels = []
    # Both fast kernels compute in 16 bits only.
    if device.type == "cuda" and dtype == torch.bfloat16:
        if importlib.util.find_spec("flash_attn_2_cuda"):
            kernels.append("flash_attn")
        kernels.append("varlen")
    kernels.append("padded")

    if attention == "auto":
        return kernels[0]
    if attention not in kernels:
        raise UserError(
            f"attention={attention!r}: on {device.type} one of {', '.join(['auto', *kernels])}"
        )
    return attention


def make_mesh(device: torch.device, shard: int | None) -> dist.DeviceMesh:
    """The device mesh that a model is sharded over: all processes, or groups of `shard`.

    With 4 processes and shard=2, ranks 0 and 1 share one copy of the weights, ranks 2 and 3
    another; FSDP2 keeps the copies equal (HSDP).
    Raises UserError if shard does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    sizes = (world_size,)
    names = ("shards",)
    if shard:
        if world_size % shard:
            raise UserError(f"shard={shard} does not divide the {world_size} processes")
        sizes = (world_size // shard, shard)
        names = ("copies", "shards")
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)

    # New process groups come with torch's own time-out. Give them that of the default group.
    timeout = dist.group.WORLD._get_backend(device).options._timeout
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh


def build_on_meta(path: str, config, kernel: str) -> torch.nn.Module:
    """The model of a transformers configuration, without memory, with packed_attention()."""
    from transformers import AttentionInterface

    # transformers makes no mask for an attention whose name it does not know: none of T x T, and
    # the host need not wait for the GPU to see what is packed.
    AttentionInterface.register("packed", functools.partial(packed_attention, kernel=kernel))
    return empty_model(path, config, attn_implementation="packed")


def read_weights(model: torch.nn.Module, folder: str, files: list[str]) -> None:
    """Read safetensors files straight into the shards; no process ever holds them all. Collective.

    Raises UserError if they are not this model's weights, or not finite.
    """
    weights = model.state_dict()
    tied = model.config.tie_word_embeddings
    if tied:
        # The head is the embedding matrix: the files need it once.
        weights.pop("lm_head.weight", None)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    on_first_rank(lambda: check_fit(folder, files, shapes, tied))
    read_files(weights, folder, files)
    check_weights(model, folder)


# --------------------------------------------------------------------------------------------------
# training


def make_optimizer(
    model: torch.nn.Module,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW on the fp32 shards; weight decay on matrices, not on biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-8, fused=True)


def optimizer_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    grad_clip: float,
    loss: torch.Tensor | float = 0.0,
    rows: list[int] | None = None,
) -> float:
    """Clip the gradients, step, drop the gradients. Returns their norm before clipping. Collective.

    grad_clip: the largest norm; 0: no clipping. loss: this process's part of the loss. rows: the
    numbers of the rows that the gradients are of, for the message.
    Raises NotFinite on all ranks if the norm or the loss is not finite on one of them. The weights
    and Adam's state are then what they were before.
    """
    largest = grad_clip if grad_clip else math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest).full_tensor()

    # The host waits for the GPU here, and nowhere else in an update: it has to know whether there
    # will be a step. If a number is not finite on one rank, the sums are finite on none.
    numbers = torch.stack([norm.double(), torch.as_tensor(loss, device=norm.device).double()])
    sums = numbers.detach().clone()
    dist.all_reduce(sums)
    norm, norm_sum, loss_sum = torch.cat([numbers[:1], sums]).tolist()

    if not math.isfinite(norm_sum) or not math.isfinite(loss_sum):
        optimizer.zero_grad(set_to_none=True)
        message = f"the norm of the gradient is {norm_sum}"
        if not math.isfinite(loss_sum):
            message = f"the loss is {loss_sum}"
        if rows:
            message += f" in a mini-batch of {row_list(rows)}"
        raise NotFinite(message, rows)

    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_weights(model: torch.nn.Module, what: str, dtype: torch.dtype | None = None) -> None:
    """Raise NotFinite if a weight is not finite, or would not be in `dtype`. Collective.

    what: names the model in the message.
    """
    bad = names_not_finite(model.state_dict(), dtype)
    if bad:
        raise NotFinite(f"{what} has weights that are not finite ({some_of(bad)})")


def check_trained(trained: dict) -> None:
    """Raise NotFinite if a weight, or a number of Adam's, is not finite. Collective.

    trained: as for save_checkpoint().
    """
    for name, (model, optimizer) in trained.items():
        check_weights(model, name)
        numbers = {}
        for parameter, state in enumerate(optimizer.state.values()):
            for kind, tensor in state.items():
                numbers[f"{kind} {parameter}"] = tensor
        bad = names_not_finite(numbers)
        if bad:
            raise NotFinite(f"Adam's state of {name} is not finite ({some_of(bad)})")


def some_of(names: list[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def move(device, *parts) -> None:
    """Move models and optimizers to a device, such as "cpu"; None is skipped.

    Each process moves its own shards: no collective.
    """
    for part in parts:
        if isinstance(part, torch.optim.Optimizer):
            for state in part.state.values():
                for name, tensor in state.items():
                    state[name] = tensor.to(device)
        elif part is not None:
            part.to(device)


@contextmanager
def on_device(device, offload: bool, *parts):
    """With offload, `parts` are on the device in this block, and in host memory outside of it."""
    if offload:
        move(device, *parts)
    yield
    if offload:
        move("cpu", *parts)


def full_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of all weights, named as vLLM and transformers name them.

    One whole tensor is in memory at a time. Collective: every process has to take all of them.
    """
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        yield name, tensor.full_tensor()


# --------------------------------------------------------------------------------------------------
# files


def save_model(
    model: torch.nn.Module, tokenizer, path: str, dtype: torch.dtype, source: str
) -> None:
    """Write a Hugging Face folder: safetensors in `dtype`, tokenizer, generation_config.

    Collective. The folder is complete or not there at all. source: the folder or hub id that the
    model came from; the end tokens of its generation_config join that of the tokenizer.
    Raises NotFinite, and writes nothing, if a weight is not finite in `dtype`. Raises UserError if
    the tokenizer is another one when it is opened again.
    """
    check_weights(model, path, dtype)

    # Rank 0 gets all weights, in the host's memory; the others get none.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    on_first_rank(lambda: write_model(model, weights, tokenizer, path, dtype, source))


def write_model(model, weights: dict, tokenizer, path: str, dtype: torch.dtype, source: str):
    """What rank 0 does in save_model()."""
    from transformers import GenerationConfig, logging

    # Where a link to another disk leads to: the link stays.
    path = os.path.realpath(path)
    unfinished = path + ".tmp"
    shutil.rmtree(unfinished, ignore_errors=True)

    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.generation_config = GenerationConfig(
        eos_token_id=stop_tokens(tokenizer, source), pad_token_id=tokenizer.pad_token_id
    )
    logging.disable_progress_bar()
    model.save_pretrained(unfinished, state_dict=weights)

    # save_pretrained() has written the dtype of the live model into config.json, float32.
    model.config.dtype = dtype
    model.config.save_pretrained(unfinished)

    # What was written is read back: the names and shapes of weights, and the ids of texts.
    save_tokenizer(tokenizer, unfinished)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    check_fit(unfinished, weight_files(unfinished), shapes, tied=False)
    put_in_place(path)


def put_in_place(path: str) -> None:
    """What was written to path.tmp is complete: it becomes path."""
    shutil.rmtree(path, ignore_errors=True)
    os.rename(path + ".tmp", path)


def save_checkpoint(folder: str, step: int, trained: dict, extra, keep: int) -> None:
    """Write all that a run needs to resume to folder/step_<step>. Collective.

    trained: {name: (model, optimizer)}; extra: anything JSON can hold. The checkpoint is complete
    or not there at all, and the newest `keep` stay.
    Raises NotFinite, and writes nothing, if a weight or a number of Adam's is not finite.
    """
    check_trained(trained)
    path = os.path.join(folder, f"step_{step:06d}")
    on_first_rank(lambda: remove_unfinished(folder))
    state = training_state(trained)
    state["extra"] = json.dumps(extra)
    unfinished = path + ".tmp"
    dcp.save(state, checkpoint_id=unfinished)
    sums = checksums(unfinished, on_first_rank(lambda: sorted(os.listdir(unfinished))))
    on_first_rank(lambda: write_checksums(unfinished, sums))
    on_first_rank(lambda: publish_checkpoint(path, keep))


def training_state(trained: dict) -> dict:
    """{name: {model, optimizer}}, sharded, in the form that torch's checkpoints take."""
    state = {}
    for name, (model, optimizer) in trained.items():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state[name] = dict(model=model_state, optimizer=optimizer_state)
    return state


def checkpoint_paths(folder: str) -> list[str]:
    """The complete checkpoints in a folder, oldest first."""
    # Digits: a copy that somebody has called step_backup is none.
    pattern = "step_" + 6 * "[0-9]"
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def remove_unfinished(folder: str) -> None:
    """Remove checkpoints that an earlier run could not finish."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)


def publish_checkpoint(path: str, keep: int) -> None:
    """Give a complete checkpoint its name and remove all but the newest `keep`.

    Checkpoints of later steps are left alone: they are damaged ones that a resume skipped.
    """
    put_in_place(path)
    so_far = [other for other in checkpoint_paths(os.path.dirname(path)) if other <= path]
    for old in so_far[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: str, trained: dict):
    """Go back to the newest checkpoint that can be read: (step, extra), or None. Collective.

    It may have been written by another number of processes.
    Raises UserError if there are checkpoints and none of them can be read, or if the checkpoint
    has a model that `trained` has not.
    """
    paths = on_first_rank(lambda: checkpoint_paths(folder))
    for path in reversed(paths):
        state = training_state(trained)
        state["extra"] = ""
        reason = read_checkpoint(path, state)
        if reason is not None:
            # Half deleted, or bytes were lost: this is what the one before it is for.
            print0(f"{path} cannot be read ({reason[:120]!r}): trying the one before it")
            continue

        check_nothing_is_lost(path, state)
        for name, (model, optimizer) in trained.items():
            restore(model, optimizer, state[name])
        try:
            check_trained(trained)
        except NotFinite as error:
            print0(f"{path}: {error}: trying the one before it")
            continue
        return int(path[-6:]), json.loads(state["extra"])

    if paths:
        raise UserError(
            f"no checkpoint in {folder} can be read: "
            "use the settings it was made with, choose another --out_dir, or delete it"
        )
    return None


def read_checkpoint(path: str, state: dict) -> str | None:
    """Fill `state` from a checkpoint. Returns why it cannot be read; None: it can. Collective."""
    reason = on_first_rank(functools.partial(metadata_trouble, path))
    if reason is not None:
        return reason
    sums = on_first_rank(functools.partial(read_checksums, path))
    damaged = damaged_file(path, sums)
    if damaged is not None:
        return f"{damaged} is not as it was written"
    try:
        load_checkpoint_files(state, path)
    except dcp.api.CheckpointException as error:
        return str(error).splitlines()[-1]
    return None


def check_nothing_is_lost(path: str, state: dict) -> None:
    """Raise UserError if a checkpoint has a model that is not part of `state`."""
    lost = names_in_checkpoint(path) - state.keys()
    if lost:
        raise UserError(
            f"{path} has a trained {', '.join(sorted(lost))}, which would be lost: "
            "choose another --out_dir"
        )


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put a loaded state into a model and its optimizer."""
    # Learning rate, betas and weight decay come from the current settings, not the checkpoint.
    settings = [dict(group) for group in optimizer.param_groups]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)


# --------------------------------------------------------------------------------------------------
# speed and memory


def flops(model: torch.nn.Module, tokens: int, pairs: int) -> int:
    """FLOPs of a training step over so many tokens, with nothing computed twice.

    6 per weight and token, and for causal attention 6 per layer, channel of its heads and pair;
    pairs: the sum of length^2 over the rows. Embeddings count only where they are the head as well.
    """
    weights = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name or model.config.tie_word_embeddings:
            weights += parameter.numel()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_attention_heads
    return 6 * weights * tokens + 6 * heads * head_dim * pairs


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of this device, measured: the fastest of nine products of two matrices."""
    size = 8192 if device.type == "cuda" else 1024
    make = f"a = torch.randn({size}, {size}, dtype={dtype}, device='{device}')"
    timers = [Timer("a @ a", make, num_threads=torch.get_num_threads()) for _ in range(9)]
    seconds = min(timer.timeit(1).mean for timer in timers)
    return 2 * size**3 / seconds


def longest_batch(
    models: list[tuple],
    tokens: int,
    device: torch.device,
    offload: bool = False,
    entropy: bool = False,
) -> None:
    """Make the largest passes there can be, of `tokens` tokens, and print what the GPU then holds.

    models: (model, optimizer), or (model, None) for one that is not trained. offload: optimizers
    and all models but the first wait in the host's memory while others work. entropy: the first
    model's loss has it. Weights stay as they are. Collective.
    """
    # The parts of each model that wait in the host's memory while another one works.
    waiting = []
    for number, (model, optimizer) in enumerate(models):
        waiting.append([optimizer] if number == 0 else [model, optimizer])
    if offload:
        for parts in waiting:
            move("cpu", *parts)

    # The first round makes Adam's state, the second runs beside that of all models.
    for _ in range(2):
        for number, (model, optimizer) in enumerate(models):
            if offload:
                move(device, *waiting[number])
            largest_pass(model, optimizer, tokens, device, entropy and number == 0)
            if offload:
                move("cpu", *waiting[number])

    line = f"the longest batch, {tokens} tokens, went through"
    if device.type == "cuda":
        line += f": {memory_of_fullest_gpu(device)}"
    print0(line)


def largest_pass(model, optimizer, tokens: int, device: torch.device, entropy: bool) -> None:
    """An update of a model on one row of `tokens` tokens; without an optimizer a scoring pass."""
    row = (torch.zeros(tokens), torch.ones(tokens))
    if optimizer is None:
        with torch.no_grad():
            token_logprobs(model, pack([row], device), entropy=entropy)
        # A pass without a backward one leaves embeddings and head gathered.
        model.reshard()
        return

    # The second pass runs beside the gradients of the first.
    for _ in range(2):
        values = token_logprobs(model, pack([row], device), entropy=entropy)
        if entropy:
            logprobs, entropies = values
            loss = logprobs.mean() + entropies.mean()
        else:
            loss = values.mean()
        loss.backward()
        del values, loss
    optimizer_step(model, optimizer, 0.0, 1.0)


def memory_of_fullest_gpu(device: torch.device) -> str:
    """How much of the fullest GPU of all processes is taken. Collective."""
    # Not torch's own count, which still has what a sleeping vLLM has given back.
    free, total = torch.cuda.mem_get_info(device)
    used = torch.tensor(total - free, dtype=torch.float64, device=device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return f"{used.item() / GB:.1f} of {total / GB:.1f} GB of the fullest GPU are taken"
