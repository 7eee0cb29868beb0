"""runs/plan.py: predicted memory against the tensors of sft.py's own passes, and what --dry_run prints."""
import functools
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

import evaluate
import generate
import prime
import sft
from conftest import call, run
from runs import plan

MODELS = {"0.5B": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                       vocab_size=151936, tie_word_embeddings=True),
          "1.5B": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
                       vocab_size=151936, tie_word_embeddings=True),
          "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
                     vocab_size=152064, tie_word_embeddings=False)}


class Meter(TorchDispatchMode):
    """Bytes of all tensors that live, and their peak; FSDP frees and refills storages by resizing them."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes, self.seen, self.resize = {}, weakref.WeakSet(), torch.UntypedStorage.resize_

    def __enter__(self):
        torch.UntypedStorage.resize_ = lambda storage, size: self.resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented                       # it comes again with the local tensors
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is FakeTensor and tensor.device.type != "meta" and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.add(id(storage), storage.nbytes())
                weakref.finalize(storage, self.add, id(storage), 0)
        return out

    def add(self, number, size):
        self.now += size - self.sizes.pop(number, 0)
        if size:
            self.sizes[number] = size
        self.peak = max(self.peak, self.now)

    def resized(self, storage, size):
        self.resize(storage, size)
        if id(storage) in self.sizes or size:
            self.add(id(storage), size)


@pytest.mark.parametrize("name, cards, tokens, checkpointing, entropy", [
    ("0.5B", 2, 4096, False, True), ("1.5B", 1, 8192, True, False), ("7B", 8, 16384, True, False)])
def test_predicted_memory_is_that_of_the_real_pass(name, cards, tokens, checkpointing, entropy):
    """sft.py's forward, in FSDP2 over so many cards, on tensors without storage: the second of two micro-batches, gradients kept."""
    config = Qwen2Config(**MODELS[name], max_position_embeddings=tokens)

    def attention(module, query, key, value, mask, scaling=None, **_):              # a single sequence needs no packing
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    AttentionInterface.register("one", attention)
    batch = sft.pack([([5] * tokens, [1] * tokens)], "cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=cards)
    try:
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config, attn_implementation="one").float()
        for part in [*net.model.layers, net]:
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        fake, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
        with fake, meter:
            net.to_empty(device="cpu")
            net.forward = functools.partial(sft._logprob_forward, net)
            with torch.device("cpu"):
                net.model.rotary_emb = type(net.model.rotary_emb)(config)
            if checkpointing:
                net.gradient_checkpointing_enable()
            net.train()
            batch = {key: fake.from_tensor(value) if torch.is_tensor(value) else value for key, value in batch.items()}
            weights = meter.now
            with torch.no_grad():
                meter.peak = 0
                net(**batch, entropy=True)
                scoring = meter.peak
            net.reshard()
            for _ in range(2):
                meter.peak = 0
                values = net(**batch, entropy=entropy)
                sum(value.sum() for value in values).backward()
                del values
    finally:
        dist.destroy_process_group()
    m = plan.shape(config)
    own = plan.state(m, cards)
    assert weights == pytest.approx(own["weights"], rel=0.01)
    assert scoring == pytest.approx(weights + plan.scoring(m, tokens).total(), rel=0.1)
    # With Adam's moments, which are not made here: what a card holds at its fullest.
    predicted = (own + plan.training(m, tokens, cards, checkpointing, entropy)).total()
    assert meter.peak + own["moments"] == pytest.approx(predicted, rel=0.1)


def test_shape_by_hand():
    """Qwen2.5-7B: 7.6 billion parameters; 56 KB of keys and values a token: 28 layers x 2 x 4 heads x 128 x 2 bytes."""
    m = plan.shape(Qwen2Config(**MODELS["7B"]))
    assert m.P == 7_615_616_512 and m.cache == 28 * 2 * 4 * 128 * 2 and m.root == 2 * 152064 * 3584 + 3584


@pytest.fixture
def model(tmp_path):
    Qwen2Config(**MODELS["7B"], max_position_embeddings=4096).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_dry_run_needs_no_gpu_and_no_weights(model, tmp_path):
    out = run("prime.py", "--dry_run=True", f"--model={model}", f"--out_dir={tmp_path}/o", env=dict(WORLD_SIZE="8", CUDA_VISIBLE_DEVICES="")).stdout
    assert "7615.6 M parameters" in out and "8 cards" in out and "256 prompts x 4 samples = 1024 rows, 128 a card" in out
    total = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if re.match("(rollout|old|ref|prm|policy|sync) ", line)}
    assert list(total) == ["rollout", "old", "ref", "prm", "policy", "sync"]
    # Two trained models and a frozen one, 12 + 12 + 2 bytes a parameter over 8 cards, whatever else there is.
    assert total["rollout"] == pytest.approx(26 * 7_615_616_512 / 8 / 2**30, abs=0.06) and total["rollout"] == min(total.values())
    offload = run("prime.py", "--dry_run=True", f"--model={model}", "--offload=True", env=dict(WORLD_SIZE="8", CUDA_VISIBLE_DEVICES="")).stdout
    less = float(re.search(r"rollout +([\d.]+)", offload)[1])
    assert less == pytest.approx(4 * 7_615_616_512 / 8 / 2**30, abs=0.06)
    assert not (tmp_path / "o").exists()


def test_the_longest_batch_leaves_the_weights(tmp_path, capsys):
    """What --dry_run does after the prediction where there is a GPU, here on a CPU."""
    config = Qwen2Config(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    sft.setup_distributed(torch.device("cpu"))
    try:
        nets = [sft.load_model(str(tmp_path / "m"), torch.device("cpu"), torch.float32, trained) for trained in (True, False)]
        before = [p.full_tensor().clone() for net in nets for p in net.parameters()]
        optimizer, moves = sft.make_optimizer(nets[0], 1e-3), []
        plan.longest_batch([(nets[0], optimizer), (nets[1], None)], 50, torch.device("cpu"), lambda *what: moves.append(what), True)
        assert moves[:3] == [("cpu", optimizer), ("cpu", nets[1], None), (torch.device("cpu"), optimizer)] and len(optimizer.state) > 0
        assert all(torch.equal(p.full_tensor(), b) for p, b in zip([p for net in nets for p in net.parameters()], before))
    finally:
        dist.destroy_process_group()
    assert "the longest batch, 50 tokens, went through" in capsys.readouterr().out


def test_dry_run_of_the_others(model, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)      # also where there is a GPU

    def dry_run(script, cards, *settings):
        monkeypatch.setenv("WORLD_SIZE", str(cards))
        with pytest.raises(SystemExit) as e:
            call(script, "--dry_run=True", *settings)
        assert e.value.code == 0
        return capsys.readouterr().out

    out = dry_run(sft, 4, f"--model={model}", "--batch_size=64")
    assert "64 rows, 16 a card" in out and "fits cards of 24 GB: no, 80 GB: yes" in out
    for script, setting in ((generate, f"--model={model}"), (evaluate, f"--models=['{model}']")):
        out = dry_run(script, 1, setting, "--tensor_parallel=2", "--max_tokens=2048")
        assert "engine over 2 cards: weights 7.1 GB a card" in out and "of 4096 tokens" in out
        # 0.9 x 2 x 78.8 GB without 14.2 GB of weights, over 4096 x 57344 bytes
        assert f"80 GB: {int((0.9 * 0.985 * 160 * 2**30 - 2 * 7_615_616_512) // (4096 * 57344))}" in out
    out = dry_run(prime, 16, f"--model={model}", "--offload=True")
    assert "fits cards of 24 GB: no" in out and "24 GB: 0" in out       # half of such a card does not hold the engine's weights
    with pytest.raises(sft.UserError, match="shard=3 does not divide"):
        call(sft, "--dry_run=True", f"--model={model}", "--shard=3")
    with pytest.raises(sft.UserError, match="^cannot load '/no/such/model'"):
        call(sft, "--dry_run=True", "--model=/no/such/model")
