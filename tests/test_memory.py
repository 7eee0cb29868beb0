"""lib/memory.py: predicted memory against the tensors of real passes, and what is printed."""

import importlib
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, call
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, Qwen2Config

import model
from bench import memory_table
from configurator import UserError
from lib import memory
from lib.run import setup_distributed

GB = 2**30

# ----------------------------------------------------------------------------------------------
# the prediction against real passes, on tensors without storage


class Meter(TorchDispatchMode):
    """Bytes of all tensors that exist, and their peak.

    FSDP frees and refills storages by resizing them, which no operator shows.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes = {}
        self.seen = weakref.WeakSet()
        self.resize = torch.UntypedStorage.resize_

    def __enter__(self):
        def resized(storage, size):
            self.resize(storage, size)
            if id(storage) in self.sizes or size:
                self.set_size(id(storage), size)

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A sharded tensor comes here a second time, as this process's part of it.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented

        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is FakeTensor and tensor.device.type != "meta":
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.set_size(id(storage), storage.nbytes())
        weakref.finalize(storage, self.set_size, id(storage), 0)

    def set_size(self, number, size):
        self.now += size - self.sizes.pop(number, 0)
        if size:
            self.sizes[number] = size
        self.peak = max(self.peak, self.now)


def one_sequence(module, query, key, value, mask, scaling=None, whole=None, own=None, **_):
    """Attention of a single sequence, which needs no packing; with `whole`, of so many tokens."""
    if whole is not None:
        query = query.index_select(2, whole)
        key = key.index_select(2, whole)
        value = value.index_select(2, whole)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    if own is not None:
        out = out.index_select(2, own)
    return out.transpose(1, 2), None


@pytest.fixture
def fake_gpus():
    """fake_gpus(count): a process group of so many processes, of which one exists."""

    def start(count):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield start
    dist.destroy_process_group()


def rows_of_a_prompt(tokens, samples):
    """A batch of so many tokens: one row, or a prompt of half of them with several answers."""
    if samples == 1:
        return model.pack([([5] * tokens, [1] * tokens)], "cpu")
    prompt = tokens // 2
    answer = (tokens - prompt) // samples
    row = ([5] * (prompt + answer), [0] * prompt + [1] * answer)
    return model.pack([row] * samples, "cpu", [prompt] * samples)


def measure_passes(config, batch, checkpointing, entropy):
    """Bytes of (weights, scoring pass at its peak, training pass at its peak) of the first GPU.

    They are the passes of model.py, the weights included; the training pass is the second one of
    an update, beside the gradients of the first.
    """
    AttentionInterface.register("one_sequence", one_sequence)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, attn_implementation="one_sequence").float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in [*net.model.layers, net]:
        fully_shard(part, mp_policy=policy)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    meter = Meter()
    with fake, meter:
        net.to_empty(device="cpu")
        model.replace_forward(net)
        with torch.device("cpu"):
            net.model.rotary_emb = type(net.model.rotary_emb)(config)
        if checkpointing:
            net.gradient_checkpointing_enable()
        net.train()
        for name, value in batch.items():
            if torch.is_tensor(value):
                batch[name] = fake.from_tensor(value)
        weights = meter.now

        meter.peak = 0
        with torch.no_grad():
            model.token_logprobs(net, batch, entropy=True)
        scoring = meter.peak
        net.reshard()

        for _ in range(2):
            meter.peak = 0
            values = model.token_logprobs(net, batch, entropy=entropy)
            loss = sum(value.sum() for value in values) if entropy else values.sum()
            loss.backward()
            del values, loss
    return weights, scoring, meter.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, gpus, tokens, samples, checkpointing, entropy",
    [
        ("0.5B", 2, 4096, 1, False, True),
        ("0.5B", 2, 4096, 16, False, False),
        ("1.5B", 1, 8192, 1, True, False),
        ("1.5B", 1, 8192, 64, True, False),
        ("7B", 8, 16384, 1, True, False),
    ],
)
def test_predicted_memory_is_that_of_real_passes(
    fake_gpus, name, gpus, tokens, samples, checkpointing, entropy
):
    fake_gpus(gpus)
    config = Qwen2Config(**memory_table.MODELS[name], max_position_embeddings=tokens)
    batch = rows_of_a_prompt(tokens, samples)
    assert batch["input_ids"].numel() == tokens
    whole = len(batch.get("whole", []))
    weights, scoring, training = measure_passes(config, batch, checkpointing, entropy)

    size = memory.model_size(config)
    held = memory.held(size, gpus)
    assert weights == pytest.approx(held["weights"], rel=0.01)

    predicted = weights + memory.scoring_pass(size, tokens, whole).total()
    assert scoring == pytest.approx(predicted, rel=0.1)

    # Adam's state was not made above: with it this is the most that a GPU holds.
    on_top = memory.training_pass(size, tokens, gpus, checkpointing, entropy, whole)
    predicted = held.total() + on_top.total()
    assert training + held["adam"] == pytest.approx(predicted, rel=0.1)


# ----------------------------------------------------------------------------------------------
# the arithmetic


@pytest.fixture(scope="module")
def config_7b():
    return Qwen2Config(**memory_table.MODELS["7B"], max_position_embeddings=4096)


@pytest.fixture(scope="module")
def size_7b(config_7b):
    return memory.model_size(config_7b)


def test_size_of_qwen_7b_by_hand(size_7b):
    assert size_7b.parameters == 7_615_616_512
    assert size_7b.root == 2 * 152064 * 3584 + 3584
    assert size_7b.head == 152064 * 3584
    # 56 KB per token: keys and values of 28 layers with 4 heads of 128, 2 bytes each.
    assert size_7b.cache == 2 * 28 * 4 * 128 * 2
    assert size_7b.longest == 4096
    assert str(size_7b) == "7615.6 M parameters, 28 layers"


def test_logits_exist_for_as_many_tokens_as_model_says():
    assert memory.CHUNK == model.CHUNK


def test_models_of_another_kind_are_refused():
    with pytest.raises(UserError, match="does not know models like GPT2LMHeadModel"):
        memory.model_size(GPT2Config())
    with pytest.raises(UserError, match="^cannot load '/no/such/model'"):
        memory.model_size("/no/such/model")


def test_what_is_held_by_hand(size_7b):
    trained = memory.held(size_7b, 8)
    frozen = memory.held(size_7b, 8, trained=False)
    assert trained.total() == pytest.approx(12 * size_7b.parameters / 8, abs=2)
    assert frozen.total() == pytest.approx(2 * size_7b.parameters / 8, abs=1)


def phases_of(size, **changes):
    return memory.prime_phases(size, size, size, 8, tokens=4096, **changes)


def test_copies_of_prompts_by_hand(size_7b):
    """7B: 28 heads of queries and of output, 4 of keys and of values, of 128 numbers of 2 bytes."""
    of_a_token = (28 + 28 + 4 + 4) * 128 * 2
    for checkpointing, layers in ((True, 1), (False, 28)):
        without = memory.training_pass(size_7b, 16384, 8, checkpointing)
        shared = memory.training_pass(size_7b, 16384, 8, checkpointing, whole=1000)
        assert (shared - without).total() == layers * 1000 * of_a_token

    # 8 answers of 100 to a prompt of 200: 1,000 tokens in place of 2,400.
    assert memory.whole_tokens(1000, 200, 100, 8) == 2400


def test_phases_of_prime(size_7b):
    phases = phases_of(size_7b)
    assert list(phases) == ["rollout", "old", "ref", "prm", "policy", "sync"]

    # Two trained models and a frozen one, whatever else there is in a phase.
    assert phases["rollout"].total() == pytest.approx(26 * size_7b.parameters / 8, abs=5)
    assert min(phases.values(), key=lambda memory: memory.total()) == phases["rollout"]

    # A PRM that stays as it is has neither gradients nor Adam's state.
    fixed = phases_of(size_7b, prm_trained=False)
    assert fixed["rollout"].total() == pytest.approx(16 * size_7b.parameters / 8, abs=5)
    assert fixed["prm"]["gradients"] == 0

    # With outcomes alone there is the policy, and nothing else.
    alone = memory.prime_phases(size_7b, None, None, 8, tokens=4096, prm_trained=False)
    assert list(alone) == ["rollout", "old", "policy", "sync"]
    assert alone["rollout"].total() == pytest.approx(12 * size_7b.parameters / 8, abs=5)
    assert memory.offloaded(size_7b, None, None, False, True) == 8 * size_7b.parameters

    # A single update takes no pass before it.
    assert "old" not in phases_of(size_7b, updates_once=True)

    # Without a model of its own the reference takes no pass.
    without = phases_of(size_7b, ref_frozen=False)
    assert without["ref"] == without["rollout"]


def test_offload_leaves_the_weights_of_the_policy(size_7b):
    phases = phases_of(size_7b, offload=True)
    assert phases["rollout"].total() == pytest.approx(4 * size_7b.parameters / 8, abs=1)
    # The PRM's update does not hold the reference, the policy's neither of the two.
    all_there = phases_of(size_7b)
    less = all_there["prm"].total() - phases["prm"].total()
    assert less == pytest.approx((8 + 2) * size_7b.parameters / 8, abs=5)
    less = all_there["policy"].total() - phases["policy"].total()
    assert less == pytest.approx((12 + 2) * size_7b.parameters / 8, abs=5)
    # In the host's memory: what is missing, of one copy of the state.
    host = memory.offloaded(size_7b, size_7b, size_7b, prm_trained=True, ref_frozen=True)
    assert host == (8 + 12 + 2) * size_7b.parameters


def test_fits(size_7b):
    phases = {"update": memory.Counter(weights=77 * GB)}
    # 80 GB as they are sold are 78.8 of ours; 2 are to be spared.
    assert not memory.fits(phases, 80)
    phases = {"update": memory.Counter(weights=76 * GB)}
    assert memory.fits(phases, 80)

    # Half of a GPU of 24 GB does not hold the weights of an engine of 7 B parameters.
    phases = {name: memory.Counter() for name in phases_of(size_7b)}
    phases["sync"]["engine"] = 2 * size_7b.parameters
    assert not memory.fits(phases, 24, engine_share=0.5)
    assert memory.fits(phases, 80, engine_share=0.5)


def test_answers_at_once(size_7b):
    # 0.9 x 2 x 78.8 GB without 14.2 GB of weights, over 4096 x 57344 bytes
    count = memory.answers_at_once(size_7b, 2, 80, 0.9, 4096)
    assert count == int((0.9 * 0.985 * 160 * GB - 2 * 7_615_616_512) // (4096 * 57344))
    assert memory.answers_at_once(size_7b, 1, 24, 0.5, 4096) == 0


# ----------------------------------------------------------------------------------------------
# GPUs of this run


def test_gpus_of_this_run(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert memory.gpus_of_this_run() == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert memory.gpus_of_this_run() == 4
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert memory.gpus_of_this_run() == 16


def test_longest_batch_runs_on_gpus_with_a_process_for_each(monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert memory.runs_longest_batch(gpu)
    assert not memory.runs_longest_batch(torch.device("cpu"))

    # One process for several GPUs would fill the first of them.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert capsys.readouterr().out == ""
    assert not memory.runs_longest_batch(gpu)
    assert "start it with torchrun" in capsys.readouterr().out

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert memory.runs_longest_batch(gpu)


# ----------------------------------------------------------------------------------------------
# what is printed

SFT = dict(
    batch_size=64,
    max_length=5000,
    micro_batch_tokens=16384,
    checkpointing=True,
    shard=None,
    dtype="auto",
)
PRIME = dict(
    prm_model=None,
    ref_model=None,
    prompts_per_step=256,
    samples_per_prompt=4,
    max_prompt_tokens=1024,
    max_tokens=3072,
    micro_batch_tokens=16384,
    batch_rows=256,
    prm_batch_rows=256,
    ppo_epochs=1,
    prm_update="after",
    uses_prm=True,
    updates_once=False,
    ref_type="freeze",
    checkpointing=True,
    entropy=False,
    offload=False,
    shard=None,
    dtype="auto",
    gpu_memory=0.5,
)


def print_prime(path, gpus, **changes):
    memory.print_prime(path, gpus, memory.PrimeRun(**PRIME | changes))


def test_print_sft(config_7b, capsys):
    memory.print_sft(config_7b, 4, **SFT)
    out = capsys.readouterr().out
    assert "7615.6 M parameters, 28 layers; 4 GPUs" in out
    assert "a step: 64 rows, 16 per GPU, of at most 5000 tokens" in out
    # 3 rows per pass and GPU
    assert "accumulates over 6 micro-batches of 16384 tokens per GPU" in out
    assert "fits GPUs of 24 GB: no, 80 GB: yes" in out
    assert "float32" not in out

    memory.print_sft(config_7b, 4, **SFT | dict(dtype="float32"))
    assert "in float32 frozen models" in capsys.readouterr().out


def test_print_prime(config_7b, capsys):
    print_prime(config_7b, 8)
    out = capsys.readouterr().out
    assert "256 prompts x 4 samples = 1024 rows, 128 per GPU, of at most 4096 tokens" in out
    assert "4 updates of the policy, 4 of the PRM" in out
    assert "50% of all" in out
    assert "engine over 1 GPU: weights 14.2 GB per GPU" in out
    assert "24 GB: 0, 80 GB:" in out
    assert "host's memory" not in out
    assert totals(out)["rollout"] == pytest.approx(26 * 7_615_616_512 / 8 / GB, abs=0.06)

    print_prime(config_7b, 8, offload=True)
    out = capsys.readouterr().out
    assert "in the host's memory, for each copy of the state: 156 GB" in out
    assert totals(out)["rollout"] == pytest.approx(4 * 7_615_616_512 / 8 / GB, abs=0.06)


def totals(out):
    """{phase: GB per GPU} of what print_prime() has printed."""
    rows = re.findall(r"^(rollout|old|ref|prm|policy|sync) +([\d.]+)", out, re.MULTILINE)
    return {name: float(total) for name, total in rows}


def test_shard_must_divide_the_processes(config_7b):
    with pytest.raises(UserError, match="shard=3 does not divide the 4 processes"):
        memory.print_sft(config_7b, 4, **SFT | dict(shard=3))
    with pytest.raises(UserError, match="shard=3 does not divide the 4 processes"):
        print_prime(config_7b, 4, shard=3)


def test_copies_of_the_state(config_7b, capsys):
    """With --shard=2 each pair of GPUs has a copy, so each GPU holds what one of two would."""
    print_prime(config_7b, 8, shard=2)
    rollout = totals(capsys.readouterr().out)["rollout"]
    assert rollout == pytest.approx(26 * 7_615_616_512 / 2 / GB, abs=0.06)


def test_print_engine(config_7b, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = dict(gpu_memory=0.9, max_prompt_tokens=2048, max_tokens=2048)
    memory.print_engine(config_7b, 8, **settings, tensor_parallel=2)
    out = capsys.readouterr().out
    assert "engine over 2 GPUs: weights 7.1 GB per GPU" in out
    assert "0.22 GB for an answer of 4096 tokens" in out
    assert "80 GB: 583" in out

    # By default over as many GPUs as divide the 28 heads; under torchrun each process has its own.
    memory.print_engine(config_7b, 8, **settings)
    assert "engine over 4 GPUs" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "8")
    memory.print_engine(config_7b, 8, **settings | dict(max_tokens=9999))
    out = capsys.readouterr().out
    assert "engine over 1 GPU:" in out
    assert "for an answer of 4096 tokens" in out


def test_tables_in_the_docs(capsys):
    memory_table.main()
    tables = capsys.readouterr().out.strip()
    assert tables.count("✓") > 50
    assert tables in (ROOT / "docs/memory.md").read_text("utf-8")


# ----------------------------------------------------------------------------------------------
# the scripts' --dry_run


@pytest.fixture(scope="module")
def folder_7b(config_7b, tmp_path_factory):
    """A model without weights: a configuration alone."""
    folder = tmp_path_factory.mktemp("models") / "7b"
    config_7b.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", ["generate", "sft", "prime", "evaluate"])
def test_dry_run_needs_no_gpu_and_no_weights(script, folder_7b, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    gpus = "1 GPU"
    if script != "generate":
        # As torchrun starts them. generate.py is started with python only.
        monkeypatch.setenv("WORLD_SIZE", "8")
        gpus = "8 GPUs"

    chosen = f"--model={folder_7b}"
    if script == "evaluate":
        chosen = f"--models=['{folder_7b}']"
    call(importlib.import_module(script), "--dry_run=True", chosen, f"--out_dir={tmp_path}/out")
    out = capsys.readouterr().out
    assert f"7615.6 M parameters, 28 layers; {gpus}" in out
    assert not (tmp_path / "out").exists()
    if script in ("generate", "evaluate"):
        assert "engine over 1 GPU" in out
    elif script == "prime":
        assert "256 prompts x 4 samples = 1024 rows, 128 per GPU" in out
        assert list(totals(out)) == ["rollout", "old", "ref", "prm", "policy", "sync"]


# ----------------------------------------------------------------------------------------------
# the disk


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def small_model(request, tmp_path_factory):
    """The folder of a model of 1.4 M or 2.4 M parameters."""
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
    )
    folder = tmp_path_factory.mktemp("small")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_size_of_a_checkpoint_and_of_a_folder(small_model, tmp_path):
    """Against real files, of which some 2 KB per tensor are names and the like."""
    size = memory.model_size(small_model)
    weights = memory.folder_bytes(Path(small_model))
    assert weights == pytest.approx(memory.model_bytes(size, torch.float32), rel=0.02)

    setup_distributed(torch.device("cpu"))
    net = model.load_model(small_model, torch.device("cpu"), torch.float32)
    optimizer = model.make_optimizer(net, 1e-3)
    model.save_checkpoint(str(tmp_path), 1, dict(model=(net, optimizer)), {}, keep=1)
    dist.destroy_process_group()
    written = memory.folder_bytes(tmp_path)
    tensors = 4 * len(list(net.parameters()))
    assert 0 < written - memory.checkpoint_bytes(size) < 4000 * tensors


def test_disk_in_the_dry_run(config_7b, capsys):
    """Of 7.6 B parameters: 12 bytes each in a checkpoint, 2 in a folder."""
    memory.print_sft(config_7b, 8, **SFT, keep_checkpoints=2)
    out = capsys.readouterr().out
    assert "a checkpoint 91.4 GB, 3 of them while one is written 274.2 GB" in out
    assert "models at the end 15.2 GB" in out
    print_prime(config_7b, 8, keep_checkpoints=2)
    out = capsys.readouterr().out
    assert "a checkpoint 182.8 GB, 3 of them while one is written 548.3 GB" in out
    assert "models at the end 30.5 GB" in out
    print_prime(config_7b, 8, prm_update="none", keep_checkpoints=1)
    assert "a checkpoint 91.4 GB, 2 of them" in capsys.readouterr().out
    alone = dict(prm_update="none", uses_prm=False)
    print_prime(config_7b, 8, **alone, keep_checkpoints=1)
    out = capsys.readouterr().out
    assert "0 of the PRM" in out
    assert "models at the end 15.2 GB" in out


@pytest.fixture
def disk(small_model, tmp_path, monkeypatch):
    """disk(free, there): checks a run's space if so many checkpoints' worth is free.

    there: how many checkpoints the run has already.
    """
    checkpoint = memory.checkpoint_bytes(memory.model_size(small_model))

    def check(free, there=0, keep=2, interval=1):
        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        with open(folder / "step_000001", "wb") as file:
            file.truncate(int(there * checkpoint))
        usage = shutil._ntuple_diskusage(10**12, 0, int(free * checkpoint))
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
        models = [small_model]
        memory.check_disk(str(tmp_path), torch.float32, models, models, keep, interval)

    return check


def test_free_space(disk, capsys):
    """A model's folder in float32 is a third of a checkpoint, or less."""
    disk(3.4)
    disk(1.4, there=2)
    disk(0.4, interval=0)
    assert capsys.readouterr().out == ""

    # Not all at a time, but a first checkpoint and the models.
    disk(2.9)
    out = capsys.readouterr().out
    assert out.startswith("note: ") and out.count("\n") == 1
    assert "3 checkpoints" in out

    for arguments in (dict(free=1.1), dict(free=0.9, there=2), dict(free=0.1, interval=0)):
        with pytest.raises(UserError, match="GB free; a checkpoint takes .*--out_dir"):
            disk(**arguments)


def test_only_the_first_process_looks(disk, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    disk(0.0)


def test_texts_longer_than_a_model_was_made_for(config_7b, folder_7b, tmp_path, capsys):
    """Neither the policy nor the PRM: rotary positions would be new to it."""
    print_prime(str(folder_7b), 8)
    assert "would stop" not in capsys.readouterr().out
    print_prime(str(folder_7b), 8, max_tokens=7168)
    assert f"= 8192, but {folder_7b} has 4096 positions: lower" in capsys.readouterr().out
    short = Qwen2Config(**config_7b.to_dict() | dict(max_position_embeddings=2048))
    short.save_pretrained(tmp_path)
    print_prime(str(folder_7b), 8, prm_model=str(tmp_path))
    assert f"= 4096, but {tmp_path} has 2048 positions" in capsys.readouterr().out
