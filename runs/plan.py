"""
What the scripts share beside the model: the machine, the settings' limits, the files of a run, and by arithmetic what is asked of the
machine: --dry_run=True, sft.py's MFU, README's table of memory:

    python prime.py config/eurus2_prime.py --dry_run=True          # for as many cards as there are, or as torchrun starts
    python -m runs.plan                                            # the table

Of a model of P parameters, a card of W always holds P/W times 4 bytes (weights in fp32) and 8 (Adam's moments) while it is trained,
2 while it is frozen, and 4 more (gradients) in an update. A pass comes on top, and what counts is the largest of its moments:
embeddings and head are gathered throughout, a layer around its turn, logits exist a chunk at a time. The bytes a token were fitted
to the tensors of sft.py's own passes in bfloat16 (tests/test_plan.py counts them again). Not in them: CUDA and NCCL, the CUDA
graphs of a sleeping vLLM, and that a resume with offload holds everything once. GB are 2^30 bytes.
"""
import contextlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from configurator import UserError

GB = 2 ** 30
CARDS = (24, 80, 141)               # GB as they are sold (98.5 % of it in our GB): a consumer's, A100 or H100, H200
CHUNK = 2048                        # tokens whose logits exist at a time, in sft.py
PARTS = ("weights", "moments", "gradients", "gathered", "activations", "logits")

def pick_device(device, dtype):
    """(torch.device, torch dtype) of the settings; 'auto' is cuda and bfloat16 where there is a GPU, else cpu and float32.
    UserError: another name, cuda without a GPU."""
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"device={device!r}, dtype={dtype!r}: 'auto', 'cpu' or 'cuda'; 'auto', 'bfloat16' or 'float32'")
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device='cuda', but torch sees no GPU here: --device=cpu, or install a CUDA build of torch")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if cuda else "float32")

def announce_sandbox(sandbox, needed):
    """Say once what separates a model's programs from this machine, if there will be any. UserError: not what is required."""
    if sandbox not in ("auto", "required"):
        raise UserError(f"sandbox={sandbox!r}: 'auto' or 'required'")
    from grader import isolation
    try:
        if needed:
            print(f"programs run apart from this machine by: {isolation(sandbox)}", flush=True)
    except RuntimeError as e:
        raise UserError(f"{e}: install bubblewrap (Debian: apt install bubblewrap), or --sandbox=auto") from None

def catch_signals():
    """A list that SIGTERM and Ctrl-C put something in: the loop looks between steps, saves and ends. A Ctrl-C after that ends
    it at once (a SIGTERM does not: torchrun passes its own on, to processes that may have had one)."""
    received = []

    def handler(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)        # which raises KeyboardInterrupt
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return received

def join(cards_each):
    """(rank, processes, wait) under torchrun without a process group, each process with so many cards of its own; wait(word) returns
    when all have called it. UserError: too few cards."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda word: None
    store, rank, world = next(dist.rendezvous("env://"))     # no process group: the end of a vLLM would end it
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)    # or vLLM would look for its own group there
    cards = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first = int(os.environ["LOCAL_RANK"]) * cards_each
    if cards and first + cards_each > len(cards.split(",")):
        raise UserError(f"process {rank} finds no {cards_each} of the GPUs {cards}: fewer processes, or a smaller tensor_parallel", True)
    os.environ |= dict(CUDA_VISIBLE_DEVICES=",".join(cards.split(",")[first:first + cards_each]), LOCAL_RANK="0")
    sys.stdout = open(os.devnull, "w") if rank > 0 else sys.stdout
    def wait(word):
        store.set(f"{word} {rank}", "here")
        store.wait([f"{word} {r}" for r in range(world)], timedelta(days=7))
    return rank, world, wait

def check(settings, least, **choices):
    """UserError: a setting is less than its value in `least`, or none of its choices."""
    for name, values in choices.items():
        if settings[name] not in values:
            raise UserError(f"{name}={settings[name]!r}: one of {', '.join(map(repr, values))}")
    for name, value in least.items():
        if settings[name] is not None and settings[name] < value:
            raise UserError(f"{name}={settings[name]}: at least {value}")

def commit():
    """This repository's commit, or None."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() or None

def write_run_config(out_dir, settings):
    """config.json of a run: all settings, versions, command, git commit. Prints what differs from the one that is there."""
    os.makedirs(out_dir, exist_ok=True)
    file, world = Path(out_dir, "config.json"), int(os.environ.get("WORLD_SIZE", 1))
    about = dict(settings=settings, command=sys.argv, commit=commit(), world_size=world,
                 device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", python=sys.version.split()[0])
    for name in ("torch", "transformers", "datasets", "vllm", "flash_attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, ValueError, KeyError):
        for name, value in json.loads(file.read_text("utf-8"))["settings"].items():
            if json.dumps(value) != json.dumps(settings.get(name)):
                print(f"note: {out_dir} was begun with {name}={value!r}, now it is {settings.get(name)!r}", flush=True)
    file.write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")

def keep_lines(path, before):
    """Drop the rows of a .jsonl file whose `step` is `before` or later: they are made again after a resume."""
    if os.path.exists(path):
        lines = Path(path).read_text("utf-8", "ignore").split("\n")[:-1]      # a line that a full disk cut goes, too
        Path(path + ".tmp").write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < before), "utf-8")
        os.replace(path + ".tmp", path)

def model_config(path):
    """The transformers configuration of a model, folder or hub id; one is given back as it is. UserError: no such model."""
    from transformers import AutoConfig
    if not isinstance(path, str):
        return path
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:              # no such folder or hub id, no network
        raise UserError(f"cannot load {path!r}, folder or hub id: {str(e).partition(chr(10))[0]}") from None

def positions(config):
    """The longest sequence that a model was made for. config: as for shape()."""
    return getattr(model_config(config), "max_position_embeddings", None) or 2 ** 31

def spread(path, cards):
    """Over how many of so many cards an engine can spread a model: each takes as many attention heads."""
    return math.gcd(model_config(path).num_attention_heads, max(1, cards))

def shape(config):
    """The sizes of a model that memory depends on. config: a transformers configuration, or the folder or hub id of one."""
    from transformers import AutoModelForCausalLM
    config = model_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        P, L, D = sum(p.numel() for p in model.parameters()), config.num_hidden_layers, config.hidden_size
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
        head_dim = getattr(config, "head_dim", None) or D // config.num_attention_heads
        return SimpleNamespace(P=P, L=L, D=D, I=config.intermediate_size, layer=max(layers), root=P - sum(layers),
                               head=config.vocab_size * D, logits=13 * CHUNK * config.vocab_size,
                               cache=4 * L * config.num_key_value_heads * head_dim,
                               positions=positions(config))
    except AttributeError as e:
        raise UserError(f"runs/plan.py does not know models like {type(model).__name__}: {e}") from None

def state(m, cards, trained=True):
    """Bytes that a card always holds of a model: Counter(weights, moments)."""
    return Counter(weights=(4 if trained else 2) * m.P // cards, moments=8 * m.P // cards if trained else 0)

def scoring(m, tokens):
    """Bytes on top for a pass over `tokens` tokens without gradients, at its largest moment."""
    return max(Counter(gathered=2 * m.root, logits=m.logits),
               Counter(gathered=2 * m.root + 4 * m.layer, activations=tokens * (6 * m.I + 2 * m.D)), key=Counter.total)

def training(m, tokens, cards, checkpointing=True, entropy=False):
    """Bytes on top for forward and backward passes over `tokens` tokens each, at the largest moment."""
    in_layer = 8 * m.I + 21 * m.D                           # of a token, kept in a layer for its backward pass
    kept = tokens * m.L * (2 * m.D if checkpointing else in_layer)
    working = tokens * (4 * m.I + in_layer * checkpointing)
    largest = max(Counter(gathered=2 * m.root + 2 * m.head + 10 * m.layer, activations=kept + working),     # a layer's backward
                  Counter(gathered=2 * m.root + 2 * m.head, activations=kept, logits=m.logits * (21 if entropy else 13) // 13),
                  Counter(gathered=6 * m.root), key=Counter.total)      # the end: gradients of embeddings and head, also in fp32
    return largest + Counter(gradients=4 * m.P // cards)

def sft_phases(s, m, cards):
    """{phase: Counter of bytes a card} of sft.py with settings s."""
    return {"update": state(m, cards) + training(m, max(s.micro_batch_tokens, s.max_length), cards, s.checkpointing)}

def prime_phases(s, policy, prm, ref, cards):
    """{phase: Counter of bytes a card} of prime.py with settings s. With offload a phase has only what it needs."""
    tokens, update = max(s.micro_batch_tokens, s.max_prompt_tokens + s.max_tokens), s.prm_update != "none"
    own, second = state(policy, cards), state(prm, cards, trained=update)
    third = state(ref, cards, trained=False) if s.ref_type == "freeze" else Counter()
    idle = Counter(weights=own["weights"]) if s.offload else own + second + third       # in a rollout
    return {
        "rollout": idle,
        "old": idle + scoring(policy, tokens),
        "ref": idle + (third if s.offload else Counter()) + (scoring(ref, tokens) if third else Counter()),
        "prm": idle + (second if s.offload else Counter()) +
               (training(prm, tokens, cards, s.checkpointing) if update else scoring(prm, tokens)),
        "policy": (own if s.offload else idle) + training(policy, tokens, cards, s.checkpointing, s.entropy_coef != 0),
        "sync": idle + Counter(engine=2 * policy.P, gathered=8 * policy.head)}      # a whole tensor, its cast, vLLM's copy

def fits(phases, card, share=0.0):
    """Does every phase fit a card of so many GB, with 2 GB to spare, 4 beside an engine (its CUDA graphs, what it does not let
    go of asleep), and the rollout beside the engine's share of the card, if that holds the engine's weights?"""
    room = 0.985 * card
    if share and phases["sync"]["engine"] / GB >= share * room:
        return False
    spare = 4 if share else 2
    return all(parts.total() / GB + share * room * (name == "rollout") + spare <= room for name, parts in phases.items())

def dry_run(script, settings):
    """With the setting dry_run, print what a script does in a step and what of a card it takes, and exit; training scripts do
    not exit where there is a GPU, they go on to longest_batch(). settings: the script's globals()."""
    if not settings["dry_run"]:
        return
    cards = int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    if int(os.environ.get("RANK", 0)) == 0:
        predict(script, SimpleNamespace(**settings), cards)
    alone = cards > 1 and "RANK" not in os.environ                      # as one process it would fill one of the cards
    if alone and torch.cuda.is_available() and script in ("sft", "prime"):
        print("start it with torchrun, a process a card, to run the longest batch")
    if alone or script in ("generate", "evaluate") or settings["device"] == "cpu" or not torch.cuda.is_available():
        sys.exit(0)

def predict(script, s, cards):
    """What dry_run() prints, for settings s on so many cards. UserError: shard does not divide them."""
    if script in ("generate", "evaluate"):
        for path in [s.model] if script == "generate" else s.models:
            m = shape(path)
            print(f"\n{path}: {m.P / 1e6:.1f} M parameters, {m.L} layers; {cards} cards")
            engine(s, m, s.tensor_parallel or (spread(path, cards) if "WORLD_SIZE" not in os.environ else 1))
        return
    if cards % (s.shard or cards):
        raise UserError(f"shard={s.shard} does not divide the {cards} processes")
    m = shape(s.model)
    print(f"\n{m.P / 1e6:.1f} M parameters, {m.L} layers; {cards} cards")
    if s.dtype == "float32":
        print("counted for bfloat16: in float32 frozen models, activations and gathered layers take twice as much")
    if script == "sft":
        rows, longest, phases = s.batch_size, s.max_length, sft_phases(s, m, s.shard or cards)
        print(f"a step: {rows} rows, {rows / cards:g} a card, of at most {longest} tokens")
    else:
        rows, longest = s.prompts_per_step * s.samples_per_prompt, s.max_prompt_tokens + s.max_tokens
        prm = shape(s.prm_model) if s.prm_model else m
        ref = shape(s.ref_model) if s.ref_model else prm
        phases = prime_phases(s, m, prm, ref, s.shard or cards)
        updates = -(-s.ppo_epochs * rows // s.batch_rows), -(-rows // s.prm_batch_rows)
        print(f"a step: {s.prompts_per_step} prompts x {s.samples_per_prompt} samples = {rows} rows, {rows / cards:g} a card, of "
              f"at most {longest} tokens; {updates[0]} updates of the policy, {updates[1]} of the PRM")
        rows = min(rows, s.batch_rows)
    batches = -(-rows // (cards * max(1, s.micro_batch_tokens // longest)))
    print(f"an update accumulates over {batches} micro-batches of {s.micro_batch_tokens} tokens a card if rows are that long\n\n"
          f"GB a card {'total':>8}" + "".join(f"{part:>13}" for part in (*PARTS, "engine")))
    for name, parts in phases.items():
        cells = [f"{parts[part] / GB:.1f}" for part in (*PARTS, "engine")]
        cells[-1] = f"{s.gpu_memory:.0%} of all" if name == "rollout" else cells[-1]
        print(f"{name:<9} {parts.total() / GB:8.1f}" + "".join(f"{cell:>13}" for cell in cells))
    if script == "prime":
        engine(s, m, 1)
    if script == "prime" and s.offload:
        host = 8 * m.P + (12 if s.prm_update != "none" else 2) * prm.P + (2 * ref.P if s.ref_type == "freeze" else 0)
        print(f"in the host's memory, for each copy of the state: {host / GB:.0f} GB")
    share = s.gpu_memory if script == "prime" else 0.0
    print("fits cards of " + ", ".join(f"{card} GB: {'yes' if fits(phases, card, share) else 'no'}" for card in CARDS))

def engine(s, m, cards):
    """Print what vLLM holds: its weights, and in the rest of its share of a card the keys and values of so many answers."""
    longest = min(s.max_prompt_tokens + max([s.max_tokens, *getattr(s, "benchmark_tokens", {}).values()]), m.positions)
    answer = m.cache * longest
    room = {card: max(0, int((s.gpu_memory * 0.985 * card * GB * cards - 2 * m.P) // answer)) for card in CARDS}
    print(f"engine over {cards} cards: weights {2 * m.P / cards / GB:.1f} GB a card, {answer / GB:.2f} GB for an answer of "
          f"{longest} tokens; at a time on cards of " +
          ", ".join(f"{card} GB: {count}" for card, count in room.items()))

def flops(net, tokens, pairs):
    """FLOPs of a training step, nothing recomputed: 6 a weight and token, and of causal attention; pairs: the sum of length^2."""
    tied = net.config.tie_word_embeddings
    weights = sum(p.numel() for name, p in net.named_parameters() if tied or "embed_tokens" not in name)
    return 6 * weights * tokens + 6 * net.config.num_hidden_layers * net.config.hidden_size * pairs

def matmul_rate(device, dtype):
    """FLOP/s of this machine, measured: the fastest of nine products of two square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    make = f"a = torch.randn({size}, {size}, dtype={dtype}, device='{device}')"
    return 2 * size**3 / min(Timer("a @ a", make, num_threads=torch.get_num_threads()).timeit(1).mean for _ in range(9))

def longest_batch(nets, tokens, device, move=None, entropy=False):
    """The largest passes there can be, of each (model, optimizer) or (model, None); prints what the fullest card then holds.
    move: prime.py's if it offloads, all but the first model's weights; entropy: the first one's loss has it."""
    from sft import optimizer_step, pack
    away = [(net, optimizer) if i else (optimizer,) for i, (net, optimizer) in enumerate(nets)]
    for parts in away if move else ():
        move("cpu", *parts)
    for (net, optimizer), parts in 2 * list(zip(nets, away)):               # the second time beside everybody's moments
        if move:
            move(device, *parts)
        for _ in range(2 if optimizer else 1):                              # the second time beside gradients
            with torch.set_grad_enabled(optimizer is not None):
                values = net(**pack([(torch.zeros(tokens), torch.ones(tokens))], device), entropy=entropy and net is nets[0][0])
            if optimizer:
                sum(value.mean() for value in values).backward()
            del values
        if optimizer:
            optimizer_step(net, optimizer, 0.0, 1.0)
        else:
            net.reshard()                                   # a pass without backward leaves embeddings and head gathered
        if move:
            move("cpu", *parts)
    line = f"the longest batch, {tokens} tokens, went through"
    if device.type == "cuda":       # not torch's own count, which still has what a sleeping vLLM gave back
        free, total = torch.cuda.mem_get_info(device)
        used = torch.tensor(total - free, dtype=torch.float64, device=device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        line += f": {used.item() / GB:.1f} of {total / GB:.1f} GB of the fullest card are taken"
    print(line)

def main():
    """README's table: GB a card at the fullest moment, and the cards that it fits, for the default settings of both scripts."""
    import prime
    import sft
    from transformers import Qwen2Config
    qwen = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
            "7B": (3584, 28, 28, 4, 18944, 152064, False)}
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
            "tie_word_embeddings")
    print("| model | cards | `sft.py` | `prime.py` | `prime.py --offload=True` |\n| --- | --: | --- | --- | --- |")
    for name, values in qwen.items():
        m = shape(Qwen2Config(**dict(zip(keys, values))))
        for cards in (1, 2, 4, 8):
            cells = []
            for script, offload in ((sft, False), (prime, False), (prime, True)):
                s = SimpleNamespace(**vars(script) | dict(offload=offload))
                phases = sft_phases(s, m, cards) if script is sft else prime_phases(s, m, m, m, cards)
                share = 0.0 if script is sft else s.gpu_memory
                good = [str(card) for card in CARDS if fits(phases, card, share)]
                cells.append(f"{max(parts.total() for parts in phases.values()) / GB:.0f}: {', '.join(good) or 'none'}")
            print(f"| {name} | {cards} | " + " | ".join(cells) + " |")

if __name__ == "__main__":
    main()
