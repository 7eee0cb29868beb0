"""What a run asks of its GPUs, by arithmetic: --dry_run=True, and docs/memory.md.

    python prime.py config/eurus2_prime.py --dry_run=True    # for as many GPUs as there are,
                                                             # or as torchrun starts processes
    python bench/memory_table.py                             # the table

Of a model of P parameters that is sharded over W GPUs, each GPU always holds, in bytes,

    4 P/W    weights in fp32         while it is trained, and for each update 4 P/W for gradients
    8 P/W    Adam's state            while it is trained
    2 P/W    weights in bf16         while it is frozen

A pass comes on top, and what counts is its peak: embeddings and head are gathered throughout, a
layer's weights around its turn, logits exist for one chunk of tokens at a time. The bytes per token
are those of the tensors that the passes of model.py make in bfloat16; tests/test_memory.py counts
them again. Not included: CUDA and NCCL, the CUDA graphs of a sleeping vLLM, and that a resume with
offload holds everything on the GPU once. GB are 2^30 bytes; on disk, as disks are sold, 10^9.
"""

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError
from lib.pretrained import check_positions, model_config, positions, spread_gpus
from lib.run import gpu_count, print0

GB = 2**30
DISK_GB = 10**9

# GB as GPUs are sold, 98.5 % of which is usable, in our GB: a consumer's, A100 or H100, H200.
GPU_SIZES = (24, 80, 141)
USABLE = 0.985

# Tokens whose logits exist at a time: model.py's chunk.
CHUNK = 2048

# The kinds of memory that are told apart, and the heads of their columns.
KINDS = {
    "weights": "weights",
    "adam": "Adam's state",
    "gradients": "gradients",
    "gathered": "gathered",
    "activations": "activations",
    "logits": "logits",
    "engine": "engine",
}

NO_MEMORY = Counter()


# ----------------------------------------------------------------------------------------------
# one model


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that its memory depends on.

    All but the last three are counts of parameters or units, not bytes. layer: the largest layer.
    root: all that is in no layer, embeddings, last norm and head. cache: bytes of keys and values
    per token, in 16 bits. longest: tokens of the longest sequence that the model was made for.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    layer: int
    root: int
    cache: int
    longest: int

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.1f} M parameters, {self.layers} layers"


def model_size(path) -> ModelSize:
    """The size of a model: folder, hub id or transformers configuration. Weights are not needed.

    Raises UserError if there is no such model, or it is built in another way than those we know.
    """
    from transformers import AutoModelForCausalLM

    config = model_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    total = count_parameters(model)
    try:
        layers = [count_parameters(layer) for layer in model.model.layers]
        head_size = getattr(config, "head_dim", None)
        if head_size is None:
            head_size = config.hidden_size // config.num_attention_heads
        return ModelSize(
            parameters=total,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            layer=max(layers),
            root=total - sum(layers),
            # Keys and values, 2 bytes each.
            cache=2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size,
            longest=positions(config),
        )
    except AttributeError as error:
        kind = type(model).__name__
        raise UserError(f"lib/memory.py does not know models like {kind}: {error}") from None


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def held(size: ModelSize, gpus: int, trained: bool = True) -> Counter:
    """Bytes that each of the GPUs always holds of a model."""
    if not trained:
        return Counter(weights=2 * size.parameters // gpus)
    return Counter(
        weights=4 * size.parameters // gpus,
        adam=8 * size.parameters // gpus,
    )


def scoring_pass(size: ModelSize, tokens: int, whole: int = 0) -> Counter:
    """Bytes on top of held() for a pass over `tokens` tokens without gradients, at its peak.

    whole: tokens of all rows of a pass if they share prompts, each with a copy of its own; else 0.
    """
    in_attention = Counter(
        # The root in bf16; this layer and the next one, which is gathered ahead.
        gathered=2 * size.root + 2 * 2 * size.layer,
        # Per token: the residual stream, its norm, and what attention works on.
        activations=tokens * 2 * 2 * size.hidden + of_attention(size, tokens + whole),
    )
    in_a_layer = Counter(
        gathered=2 * size.root + 2 * 2 * size.layer,
        # Per token: gate, up and their product; the residual stream.
        activations=tokens * (3 * 2 * size.intermediate + 2 * size.hidden),
    )
    at_the_head = Counter(gathered=2 * size.root, logits=logits(size))
    return max(in_attention, in_a_layer, at_the_head, key=Counter.total)


def whole_tokens(tokens: int, prompt: int, answer: int, samples: int) -> int:
    """Tokens of whole rows in a pass of `tokens`, in which prompts are shared by `samples` answers.

    >>> whole_tokens(1000, prompt=200, answer=100, samples=8)
    2400
    """
    return tokens * samples * (prompt + answer) // (prompt + samples * answer)


def of_attention(size: ModelSize, tokens: int) -> int:
    """Bytes of a layer's queries, keys, values and attention's output for so many tokens."""
    return tokens * (2 * 2 * size.hidden + size.cache // size.layers)


def logits(size: ModelSize, entropy: bool = False) -> int:
    """Bytes of the logits of a chunk, with all that is made of them.

    At the peak there are three tensors in fp32 of a number per logit: the log-softmax, its gradient
    and that of the logits. 1 byte more is fitted, see tests/test_memory.py. The entropy needs two
    others, the probabilities and their products with the logarithms.
    """
    tensors = 5 if entropy else 3
    return (4 * tensors + 1) * CHUNK * size.vocabulary


def training_pass(
    size: ModelSize,
    tokens: int,
    gpus: int,
    checkpointing: bool = True,
    entropy: bool = False,
    whole: int = 0,
) -> Counter:
    """Bytes on top of held() for a forward and backward pass over `tokens` tokens, at its peak.

    It is the second pass or a later one of an update: there are gradients already. whole: as for
    scoring_pass().
    """
    # Kept per token in a layer for its backward pass: gate, silu(gate), up and their product in
    # bf16; two norms (fp32 input, normalized, output: 8 bytes each), queries (2), the output of
    # attention (2), keys and values of few heads (1).
    of_a_layer = 4 * 2 * size.intermediate + (2 * 8 + 2 + 2 + 1) * size.hidden

    # Per token in a layer's backward pass: the gradients of two of the intermediate tensors. With
    # checkpointing a layer keeps its input only, and one layer at a time is computed again.
    # What attention works on in whole rows is kept like the rest.
    working = tokens * 2 * 2 * size.intermediate
    of_all_tokens = tokens * of_a_layer + of_attention(size, whole)
    if checkpointing:
        kept = tokens * size.layers * 2 * size.hidden
        working += of_all_tokens
    else:
        kept = size.layers * of_all_tokens

    # In bf16 throughout: the root, and the gradient of the head, which waits for the embeddings'.
    # In a layer's backward pass: its weights and those of the next one in bf16 (2, 2), its gradient
    # in bf16 (2) and in fp32, to be summed over the GPUs (4).
    root = 2 * size.root + 2 * size.head
    peaks = [
        Counter(gathered=root + (2 + 2 + 2 + 4) * size.layer, activations=kept + working),
        Counter(gathered=root, activations=kept, logits=logits(size, entropy)),
        # The end: gradients of embeddings and head in bf16 (2) and in fp32 (4).
        Counter(gathered=(2 + 4) * size.root),
    ]
    gradients = Counter(gradients=4 * size.parameters // gpus)
    return max(peaks, key=Counter.total) + gradients


# ----------------------------------------------------------------------------------------------
# scripts


def sft_phases(size: ModelSize, gpus: int, *, tokens: int, checkpointing: bool) -> dict:
    """{phase: Counter of bytes per GPU} of sft.py, whose passes have up to `tokens` tokens."""
    return {"update": held(size, gpus) + training_pass(size, tokens, gpus, checkpointing)}


def prime_phases(
    policy: ModelSize,
    prm: ModelSize | None,
    ref: ModelSize | None,
    gpus: int,
    *,
    tokens: int,
    whole: int = 0,
    prm_trained: bool = True,
    ref_frozen: bool = True,
    checkpointing: bool = True,
    entropy: bool = False,
    offload: bool = False,
    updates_once: bool = False,
) -> dict:
    """{phase: Counter of bytes per GPU} of prime.py, whose passes have up to `tokens` tokens.

    whole: as for scoring_pass(). prm, ref: None where outcomes are the only rewards. ref_frozen:
    the reference is a model of its own. updates_once: no pass for the old log-probabilities. With
    offload a phase holds the policy's weights and what it
    needs itself; the rest is in the host's memory.
    """
    of_policy = held(policy, gpus)
    of_prm = held(prm, gpus, trained=prm_trained) if prm else NO_MEMORY
    of_ref = held(ref, gpus, trained=False) if ref and ref_frozen else NO_MEMORY

    everything = of_policy + of_prm + of_ref
    if offload:
        idle = Counter(weights=of_policy["weights"])
        with_policy = of_policy
        with_prm = idle + of_prm
        with_ref = idle + of_ref
    else:
        idle = everything
        with_policy = everything
        with_prm = everything
        with_ref = everything

    ref_pass = scoring_pass(ref, tokens, whole) if ref and ref_frozen else NO_MEMORY
    prm_pass = NO_MEMORY
    if prm and prm_trained:
        prm_pass = training_pass(prm, tokens, gpus, checkpointing, whole=whole)
    elif prm:
        prm_pass = scoring_pass(prm, tokens, whole)
    policy_pass = training_pass(policy, tokens, gpus, checkpointing, entropy, whole)

    # The weights on their way to the engine, at the largest tensor: gathered in fp32 (4), its cast
    # (2) and the copy that vLLM makes (2). The engine has all weights in bf16.
    sync = Counter(gathered=(4 + 2 + 2) * policy.head, engine=2 * policy.parameters)
    phases = {"rollout": idle}
    if not updates_once:
        phases["old"] = idle + scoring_pass(policy, tokens, whole)
    if prm:
        phases["ref"] = with_ref + ref_pass
        phases["prm"] = with_prm + prm_pass
    phases["policy"] = with_policy + policy_pass
    phases["sync"] = idle + sync
    return phases


def fits(phases: dict, gpu_size: float, engine_share: float = 0.0) -> bool:
    """Does every phase fit into GPUs of so many GB?

    2 GB are to be spared, and 4 beside an engine: its CUDA graphs, and what it does not let go of
    asleep. In the rollout the engine has its share of the GPU, which must hold its weights.
    """
    room = USABLE * gpu_size
    of_engine = engine_share * room
    spare = 2
    if engine_share:
        spare = 4
        if phases["sync"]["engine"] / GB >= of_engine:
            return False

    for name, memory in phases.items():
        needed = memory.total() / GB + spare
        if name == "rollout":
            needed += of_engine
        if needed > room:
            return False
    return True


def answers_at_once(size: ModelSize, gpus: int, gpu_size: float, share: float, longest: int) -> int:
    """How many answers of `longest` tokens an engine has room for, over so many GPUs of that size.

    Their keys and values take what the weights leave of the engine's share.
    """
    room = share * USABLE * gpu_size * GB * gpus - 2 * size.parameters
    return max(0, int(room // (size.cache * longest)))


# ----------------------------------------------------------------------------------------------
# --dry_run


def gpus_of_this_run() -> int:
    """The processes that torchrun started, or else the GPUs of this machine; at least 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(1, torch.cuda.device_count())


def runs_longest_batch(device: torch.device) -> bool:
    """Whether a training script goes on after its --dry_run lines, to run the longest batch.

    It does on GPUs, with one process per GPU: a single process would fill the first of several.
    """
    if device.type != "cuda":
        return False
    if gpus_of_this_run() > 1 and "RANK" not in os.environ:
        print0("start it with torchrun, one process per GPU, to run the longest batch")
        return False
    return True


def print_sft(
    path,
    gpus: int,
    *,
    batch_size: int,
    max_length: int,
    micro_batch_tokens: int,
    checkpointing: bool,
    shard: int | None,
    dtype: str,
    keep_checkpoints: int = 2,
) -> None:
    """Print what a step of sft.py is, and what it takes of each of the GPUs.

    The keywords are the script's settings. Raises UserError if shard does not divide the GPUs.
    """
    shards = gpus_of_a_copy(gpus, shard)
    size = model_size(path)
    print_model(size, gpus, dtype)
    print0(
        f"a step: {batch_size} rows, {batch_size / gpus:g} per GPU, of at most {max_length} tokens"
    )
    print_micro_batches(batch_size, gpus, micro_batch_tokens, max_length)

    tokens = max(micro_batch_tokens, max_length)
    phases = sft_phases(size, shards, tokens=tokens, checkpointing=checkpointing)
    print_phases(phases)
    print_fits(phases)
    print_disk([size], [size], dtype, keep_checkpoints)


@dataclass(frozen=True)
class PrimeRun:
    """The settings of prime.py that its memory depends on, under their names.

    entropy: its update computes one. uses_prm: outcomes are not the only rewards. updates_once: no
    pass for the old log-probabilities.
    """

    prm_model: str | None
    ref_model: str | None
    prompts_per_step: int
    samples_per_prompt: int
    max_prompt_tokens: int
    max_tokens: int
    micro_batch_tokens: int
    batch_rows: int
    prm_batch_rows: int
    ppo_epochs: int
    prm_update: str
    uses_prm: bool
    updates_once: bool
    ref_type: str
    checkpointing: bool
    entropy: bool
    offload: bool
    shard: int | None
    dtype: str
    gpu_memory: float
    keep_checkpoints: int = 2

    @property
    def prm_trained(self) -> bool:
        return self.prm_update != "none"

    @property
    def ref_frozen(self) -> bool:
        return self.ref_type == "freeze"

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.max_prompt_tokens + self.max_tokens

    def whole_tokens(self, tokens: int) -> int:
        """Tokens of whole rows in a pass of `tokens`, if prompts and answers are that long."""
        return whole_tokens(
            tokens, self.max_prompt_tokens, self.max_tokens, self.samples_per_prompt
        )


def print_prime(path, gpus: int, run: PrimeRun) -> None:
    """Print what a step of prime.py is, and what it takes of each of the GPUs.

    Raises UserError if shard does not divide the GPUs.
    """
    shards = gpus_of_a_copy(gpus, run.shard)
    policy = model_size(path)
    prm = None
    ref = None
    if run.uses_prm:
        prm = model_size(run.prm_model) if run.prm_model else policy
        ref = model_size(run.ref_model) if run.ref_model else prm

    print_model(policy, gpus, run.dtype)
    print_step(run, gpus)
    phases = phases_of_run(run, policy, prm, ref, shards)
    print_phases(phases, run.gpu_memory)
    print_room(policy, 1, run.gpu_memory, run.longest)
    if run.offload:
        host = offloaded(policy, prm, ref, run.prm_trained, run.ref_frozen)
        print0(f"in the host's memory, for each copy of the state: {host / GB:.0f} GB")
    print_fits(phases, run.gpu_memory)

    saved = [policy, prm] if run.uses_prm else [policy]
    trained = [policy, prm] if run.prm_trained else [policy]
    print_disk(trained, saved, run.dtype, run.keep_checkpoints)
    others = (run.prm_model, run.ref_model) if run.uses_prm else ()
    for chosen in filter(None, (path, *others)):
        print_positions(chosen, run.longest)


def print_step(run: PrimeRun, gpus: int) -> None:
    """Print the rows and the updates of a step of prime.py."""
    rows = run.prompts_per_step * run.samples_per_prompt
    policy_updates = -(-run.ppo_epochs * rows // run.batch_rows)
    prm_updates = -(-rows // run.prm_batch_rows) if run.prm_trained else 0
    print0(
        f"a step: {run.prompts_per_step} prompts x {run.samples_per_prompt} samples = {rows} rows, "
        f"{rows / gpus:g} per GPU, of at most {run.longest} tokens; "
        f"{policy_updates} updates of the policy, {prm_updates} of the PRM"
    )
    print_micro_batches(min(rows, run.batch_rows), gpus, run.micro_batch_tokens, run.longest)


def phases_of_run(run: PrimeRun, policy, prm, ref, gpus: int) -> dict:
    """prime_phases() of a run of these models' sizes on so many GPUs."""
    tokens = max(run.micro_batch_tokens, run.longest)
    return prime_phases(
        policy,
        prm,
        ref,
        gpus,
        tokens=tokens,
        whole=run.whole_tokens(tokens),
        prm_trained=run.prm_trained,
        ref_frozen=run.ref_frozen,
        checkpointing=run.checkpointing,
        entropy=run.entropy,
        offload=run.offload,
        updates_once=run.updates_once,
    )


def print_engine(
    path,
    gpus: int,
    *,
    gpu_memory: float,
    max_prompt_tokens: int,
    max_tokens: int,
    tensor_parallel: int | None = None,
) -> None:
    """Print what an engine takes of its GPUs, and how many answers it has room for at a time.

    gpus: those of the run, as gpus_of_this_run() says; tensor_parallel: those of the engine. None:
    as many as the model can be spread over; under torchrun each process has an engine on one GPU.
    """
    if tensor_parallel is None:
        tensor_parallel = 1 if "WORLD_SIZE" in os.environ else spread_gpus(path, gpus)
    size = model_size(path)
    print0(f"\n{path}: {size}; {gpu_count(gpus)}")
    print_room(size, tensor_parallel, gpu_memory, max_prompt_tokens + max_tokens)


def gpus_of_a_copy(gpus: int, shard: int | None) -> int:
    """The GPUs that share one copy of the state. Raises UserError if they do not divide all."""
    if shard is None:
        return gpus
    if gpus % shard != 0:
        raise UserError(f"shard={shard} does not divide the {gpus} processes")
    return shard


def offloaded(
    policy: ModelSize,
    prm: ModelSize | None,
    ref: ModelSize | None,
    prm_trained: bool,
    ref_frozen: bool,
) -> int:
    """Bytes that --offload=True keeps in the host's memory, for each copy of the state."""
    total = held(policy, 1)["adam"]
    if prm:
        total += held(prm, 1, trained=prm_trained).total()
    if ref and ref_frozen:
        total += held(ref, 1, trained=False).total()
    return total


def print_model(size: ModelSize, gpus: int, dtype: str) -> None:
    print0(f"\n{size}; {gpu_count(gpus)}")
    if dtype == "float32":
        print0(
            "counted for bfloat16: in float32 frozen models, activations and gathered layers "
            "take twice as much"
        )


def print_micro_batches(rows: int, gpus: int, micro_batch_tokens: int, longest: int) -> None:
    """Print how many passes an update of so many rows takes if each is as long as it may be."""
    rows_per_pass = max(1, micro_batch_tokens // longest)
    passes = -(-rows // (gpus * rows_per_pass))
    print0(
        f"an update accumulates over {passes} micro-batches of {micro_batch_tokens} tokens per GPU "
        "if rows are that long"
    )


def print_phases(phases: dict, engine_share: float | None = None) -> None:
    """Print the table of GB per GPU: a line per phase, a column per kind of memory."""
    heads = [f"{head:>13}" for head in KINDS.values()]
    print0(f"\nGB per GPU {'total':>8}" + "".join(heads))
    for name, memory in phases.items():
        cells = {kind: f"{memory[kind] / GB:.1f}" for kind in KINDS}
        if name == "rollout":
            cells["engine"] = f"{engine_share:.0%} of all"
        columns = [f"{cell:>13}" for cell in cells.values()]
        print0(f"{name:<10} {memory.total() / GB:8.1f}" + "".join(columns))


def print_room(size: ModelSize, gpus: int, share: float, longest: int) -> None:
    """Print an engine's weights and the answers of `longest` tokens that it has room for."""
    longest = min(longest, size.longest)
    counts = []
    for gpu_size in GPU_SIZES:
        count = answers_at_once(size, gpus, gpu_size, share, longest)
        counts.append(f"{gpu_size} GB: {count}")
    print0(
        f"engine over {gpu_count(gpus)}: weights {2 * size.parameters / gpus / GB:.1f} GB per GPU, "
        f"{size.cache * longest / GB:.2f} GB for an answer of {longest} tokens; "
        f"at a time on GPUs of {', '.join(counts)}"
    )


def print_fits(phases: dict, engine_share: float = 0.0) -> None:
    verdicts = []
    for gpu_size in GPU_SIZES:
        verdict = "yes" if fits(phases, gpu_size, engine_share) else "no"
        verdicts.append(f"{gpu_size} GB: {verdict}")
    print0(f"fits GPUs of {', '.join(verdicts)}")


def print_positions(path, tokens: int) -> None:
    """Say if a run would stop because its texts may be longer than a model was made for."""
    try:
        check_positions(path, tokens)
    except UserError as error:
        print0(f"such a run would stop: {error}")


def print_disk(trained: list, saved: list, dtype: str, keep_checkpoints: int) -> None:
    """Print what a run takes of the disk. trained, saved: as for check_disk(), but their sizes."""
    checkpoint = sum(map(checkpoint_bytes, trained)) / DISK_GB
    models = sum(model_bytes(size, getattr(torch, dtype, torch.bfloat16)) for size in saved)
    print0(
        f"on disk: a checkpoint {checkpoint:.1f} GB, {keep_checkpoints + 1} of them while one is "
        f"written {(keep_checkpoints + 1) * checkpoint:.1f} GB; models at the end "
        f"{models / DISK_GB:.1f} GB"
    )


# ----------------------------------------------------------------------------------------------
# the disk


def checkpoint_bytes(size: ModelSize) -> int:
    """Bytes of a trained model in a checkpoint: weights and Adam's two averages in fp32."""
    # A tied head, which is no parameter of its own, is written a second time.
    is_tied = size.root < 2 * size.head
    return 12 * size.parameters + (4 * size.head if is_tied else 0)


def model_bytes(size: ModelSize, dtype: torch.dtype) -> int:
    """Bytes of a model's folder."""
    return size.parameters * dtype.itemsize


def check_disk(
    out_dir: str,
    dtype: torch.dtype,
    trained: list[str],
    saved: list[str],
    keep_checkpoints: int,
    save_interval: int,
) -> None:
    """Compare the free space of out_dir's disk with what the run will write there, on rank 0.

    trained: the models whose state checkpoints have; saved: those whose folders are written, in
    `dtype`. A line is printed if not all will fit that is kept at a time.
    Raises UserError if not even one checkpoint and the models do.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    try:
        sizes = {path: model_size(path) for path in {*trained, *saved}}
    except UserError:
        # There is no such model, or it is of an unknown kind: who loads it says so.
        return
    checkpoint = sum(checkpoint_bytes(sizes[path]) for path in trained)
    if not save_interval:
        checkpoint = 0
    models = sum(model_bytes(sizes[path], dtype) for path in saved)

    # Checkpoints that are there will be replaced, but only after the next one is written.
    there = folder_bytes(Path(out_dir, "checkpoints"))
    free = shutil.disk_usage(out_dir).free
    everything = (keep_checkpoints + 1) * checkpoint + models
    fits_once = free >= checkpoint and free + there >= checkpoint + models
    if free + there >= everything and fits_once:
        return

    words = (
        f"{out_dir} has {disk_gb(free)} GB free; a checkpoint takes {disk_gb(checkpoint)} GB, "
        f"the models at the end {disk_gb(models)} GB"
    )
    if not fits_once:
        raise UserError(f"{words}: free some space, choose another --out_dir or --save_interval=0")
    print0(
        f"note: {words}, and {keep_checkpoints + 1} checkpoints with them {disk_gb(everything)} GB "
        "(--keep_checkpoints): free some space before the disk is full"
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def disk_gb(size: int) -> str:
    """Bytes in GB of the disk's, to three figures: "183", "0.00385"."""
    return f"{float(f'{size / DISK_GB:.3g}'):g}"
