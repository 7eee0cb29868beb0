"""model.py: packing, log-probabilities, sharded loading, training steps, folders, checkpoints."""

import io
import json
import os
import pathlib
import pickle
import shutil
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_pretrained import TEXT, byte_level
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import model
from configurator import UserError
from lib import packing
from lib.finite import NotFinite, check_finite, stops_if_not_finite
from lib.run import setup_distributed
from lib.safe_checkpoint import MetadataUnpickler
from lib.weights import weights_not_finite
from model import load_model, make_optimizer, pack, token_logprobs

CPU = torch.device("cpu")

# (tokens, scored)
ROWS = [
    ([5, 6, 7, 8, 9, 10, 3], [0, 0, 1, 1, 1, 1, 1]),
    ([11, 12], [0, 1]),
    (list(range(20, 50)), [0] * 10 + [1] * 20),
    ([4, 4, 4], [1, 0, 1]),
]


@pytest.fixture
def group():
    """A process group of this process alone."""
    setup_distributed(CPU)
    yield
    dist.destroy_process_group()


def small_model(folder, tied=True, kind=Qwen2Config, vocab=97, **more):
    """A model of random weights, by transformers, which is also in the folder."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **more,
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.save_pretrained(folder)
    return plain


def by_hand(plain, rows, temperature=1.0):
    """Log-probabilities and entropies of the scored tokens, row by row, from all logits."""
    logprobs = []
    entropies = []
    for tokens, scored in rows:
        logits = plain(torch.tensor([tokens])).logits[0].double()
        logp = (logits / temperature).log_softmax(-1)
        for t in range(1, len(tokens)):
            if scored[t]:
                logprobs.append(logp[t - 1, tokens[t]])
                entropies.append(-(logp[t - 1].exp() * logp[t - 1]).sum())
    return torch.stack(logprobs), torch.stack(entropies)


# --------------------------------------------------------------------------------------------------
# rows -> batches


def test_pack_example():
    """The example of its docstring."""
    batch = pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["predict"].tolist() == [0, 1, 3]
    assert batch["targets"].tolist() == [6, 7, 9]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == 3


def test_the_first_token_of_a_row_is_never_scored():
    batch = pack([([5, 6], [1, 1]), ([7, 8], [1, 0])], CPU)
    assert batch["targets"].tolist() == [6]


def test_micro_batches_example():
    assert packing.micro_batches([4, 3, 2, 1], budget=5, world_size=1) == [[[0, 3], [1, 2]]]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 80),
    st.sampled_from([1, 2, 4]),
)
def test_micro_batches(lengths, budget, world_size):
    ranks = packing.micro_batches(lengths, budget, world_size)
    assert len(ranks) == world_size

    # The same number of passes for each process, and no more than there are rows.
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) <= len(lengths)

    # Each row once, and within the budget unless it is alone.
    seen = []
    for batches in ranks:
        for rows in batches:
            seen += rows
            assert len(rows) <= 1 or sum(lengths[row] for row in rows) <= budget
    assert sorted(seen) == list(range(len(lengths)))


def one_more_at_a_time(lengths, budget, world_size):
    """The rule by itself: the fewest micro-batches for which the longest rows first, each to the
    emptiest, keep the budget."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    count = 0
    while True:
        count += 1
        bins = [[] for _ in range(count * world_size)]
        for row in order:
            min(bins, key=lambda rows: sum(lengths[i] for i in rows)).append(row)
        if all(len(rows) <= 1 or sum(lengths[i] for i in rows) <= budget for rows in bins):
            return [bins[rank::world_size] for rank in range(world_size)]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 80), st.sampled_from([1, 2, 3, 8]))
def test_micro_batches_are_the_fewest(lengths, budget, world_size):
    """For a few rows the number is found one by one, and the rows are dealt as the rule says."""
    ranks = packing.micro_batches(lengths, budget, world_size)
    assert ranks == one_more_at_a_time(lengths, budget, world_size)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 80))
def test_bounds_of_the_number_of_micro_batches(lengths, budget):
    """None below the first keeps the budget, and the last one does."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    fewest, enough = packing.bounds(lengths, order, budget)
    for count in range(1, fewest):
        assert packing.deal(lengths, order, budget, count) is None
    assert packing.deal(lengths, order, budget, enough)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shortest, longest, most",
    # No two fit together; two do; any lengths, of which the longer half is alone.
    [(8193, 16384, 20000), (5500, 6000, 10000), (1, 20000, 12500)],
)
def test_micro_batches_of_many_rows(shortest, longest, most):
    """20,000 rows of which few fit together take no minutes (one more at a time did)."""
    lengths = torch.randint(shortest, longest, (20000,), generator=torch.manual_seed(0)).tolist()
    began = time.process_time()
    (batches,) = packing.micro_batches(lengths, 16384, 1)
    assert time.process_time() - began < 6
    assert sorted(row for rows in batches for row in rows) == list(range(20000))
    for rows in batches:
        assert len(rows) <= 1 or sum(lengths[row] for row in rows) <= 16384
    assert all(batches)
    assert len(batches) <= most


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_idle_completes_the_passes_of_each_process(rows):
    """Each row is in one batch of one process, and batches and idle passes are the same sum."""
    lengths = [5] * rows
    passes = set()
    seen = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        batches, idle = model.my_micro_batches(lengths, budget=10)
        dist.destroy_process_group()
        assert all(batches)
        passes.add(len(batches) + idle)
        for batch in batches:
            seen += batch
    assert len(passes) == 1
    assert sorted(seen) == list(range(rows))


def test_idle_passes_change_no_gradient(tmp_path, group):
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    token_logprobs(net, pack(ROWS, CPU)).sum().backward()
    before = [p.grad.full_tensor().clone() for p in net.parameters()]
    model.idle_passes(net, 2, CPU)
    after = [p.grad.full_tensor() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_idle_passes_without_gradients(tmp_path, group):
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    with torch.no_grad():
        model.idle_passes(net, 2, CPU)
    net.reshard()
    assert all(p.grad is None for p in net.parameters())


FEWER_ROWS_THAN_PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
from lib.run import all_sum, leave_distributed, setup_distributed
from model import (
    full_tensors, idle_passes, load_model, make_optimizer, my_micro_batches, optimizer_step, pack,
    token_logprobs,
)

folder, path = sys.argv[1:]
device = torch.device("cpu")
rank, world_size = setup_distributed(device)
net = load_model(folder, device, torch.float32)
optimizer = make_optimizer(net, 1e-3)
rows = [([5, 6, 7, 8], [0, 1, 1, 1]), ([9, 10, 11], [0, 1, 1]), ([4, 3], [0, 1])]

# An update, then a scoring pass.
for train in (True, False):
    loss = 0.0
    with torch.set_grad_enabled(train):
        batches, idle = my_micro_batches([len(tokens) for tokens, _ in rows], budget=4)
        for members in batches:
            logprobs = token_logprobs(net, pack([rows[i] for i in members], device))
            part = -logprobs.sum() / 6
            loss += part.item()
            if train:
                (part * world_size).backward()
        idle_passes(net, idle, device)
    if train:
        norm = optimizer_step(net, optimizer, 1e-3, 1.0)
        loss_before = all_sum(loss, device)
net.reshard()
result = dict(full_tensors(net), norm=torch.tensor(norm), loss=torch.tensor(loss_before))
result["loss after"] = torch.tensor(all_sum(loss, device))
if rank == 0:
    torch.save(result, path)
leave_distributed()
os._exit(0)  # see configurator.run()
"""


@pytest.mark.slow
def test_fewer_rows_than_processes(tmp_path):
    """Three rows on 1, 2 and 4 processes: the same losses, gradient norm and weights."""
    small_model(tmp_path / "m")
    script = tmp_path / "script.py"
    script.write_text(FEWER_ROWS_THAN_PROCESSES)
    results = []
    for processes in (1, 2, 4):
        path = tmp_path / f"{processes}.pt"
        torchrun(processes, script, tmp_path / "m", path, env=dict(PYTHONPATH=str(ROOT)))
        results.append(torch.load(path))

    one = results[0]
    assert one["loss after"] < one["loss"]
    for other in results[1:]:
        assert other.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# batches -> log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_packed_logprobs_equal_transformers(tmp_path, group, tied, kind, temperature):
    """Packed = row by row = plain transformers, in chunks or not."""
    plain = small_model(tmp_path / "m", tied, kind)
    want, want_entropy = by_hand(plain, ROWS, temperature)
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    for chunk in (2048, 3):
        logprobs, entropies = token_logprobs(
            net, pack(ROWS, CPU), temperature, entropy=True, chunk=chunk
        )
        torch.testing.assert_close(logprobs, want.float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies, want_entropy.float(), atol=1e-5, rtol=0)

    row_by_row = [token_logprobs(net, pack([row], CPU), temperature) for row in ROWS]
    torch.testing.assert_close(torch.cat(row_by_row), want.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_gradients_equal_transformers(tmp_path, group, tied, kind, checkpointing):
    plain = small_model(tmp_path / "m", tied, kind)
    by_hand(plain, ROWS, 0.7)[0].exp().sum().backward()
    net = load_model(str(tmp_path / "m"), CPU, torch.float32, checkpointing=checkpointing)
    token_logprobs(net, pack(ROWS, CPU), 0.7, chunk=3).exp().sum().backward()

    want = dict(plain.named_parameters())
    got = dict(net.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in got.items():
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, want[name].grad, atol=1e-5, rtol=1e-4)


def test_frozen_and_trained_bf16_agree_exactly(tmp_path, group):
    """A PRM in fp32 that computes in bf16 and its frozen bf16 reference: equal log-probabilities.

    The log-ratio of a PRM that has learned nothing is 0, not noise.
    """
    small_model(tmp_path / "m")
    results = []
    for trained in (True, False):
        net = load_model(str(tmp_path / "m"), CPU, torch.bfloat16, trained)
        results.append(token_logprobs(net, pack(ROWS, CPU)))
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


# Kernel calls that ask the GPU for a number, and so wait for it.
WAITING = {"_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select"}


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


KINDS = [
    (LlamaConfig, {}),
    (MistralConfig, dict(sliding_window=None)),
    (OlmoConfig, {}),
    (Qwen2Config, {}),
    (Qwen3Config, {}),
]


@pytest.mark.parametrize("kind, more", KINDS)
def test_performance_guard_nothing_in_a_pass_waits_for_the_gpu(tmp_path, group, kind, more):
    """Forward and backward passes ask for no number and make no mask.

    No result shows it, so this looks at the operators. The attention kernel is left out: on a GPU
    it is one that does not wait.
    """
    small_model(tmp_path / "m", kind=kind, **more)
    net = load_model(str(tmp_path / "m"), CPU, torch.float32, checkpointing=True)
    masks = []

    def no_attention(module, query, key, value, attention_mask, **_):
        masks.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("packed", no_attention)
    batch = pack(ROWS, CPU)
    with Operators() as operators:
        logprobs, entropies = token_logprobs(net, batch, entropy=True)
        (logprobs.sum() + entropies.sum()).backward()
    assert "mm" in operators.names
    assert not operators.names & WAITING
    assert masks
    assert all(mask is None for mask in masks)


class Logits(TorchDispatchMode):
    """Counts the tensors [tokens, vocabulary] that are alive at a time."""

    def __init__(self, vocabulary, hidden):
        super().__init__()
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.tokens = set()
        self.storages = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.look_at(tensor)
        return out

    def look_at(self, tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            return
        tokens, width = tensor.shape
        # The head itself, transposed, has as many columns.
        if width == self.vocabulary and tokens != self.hidden:
            self.tokens.add(tokens)
            self.storages.add(tensor.untyped_storage())
            self.most = max(self.most, len(self.storages))


@pytest.mark.parametrize("entropy", [False, True])
def test_performance_guard_logits_never_exist_at_once(tmp_path, group, entropy):
    """Logits exist for one chunk of tokens at a time: at most five tensors of them are alive.

    Those of earlier chunks are gone, in the forward and in the backward pass.
    """
    small_model(tmp_path / "m", vocab=5000)
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    row = (torch.randint(0, 97, (200,)), torch.ones(200))
    with Logits(vocabulary=5000, hidden=64) as logits:
        values = token_logprobs(net, pack([row], CPU), entropy=entropy, chunk=16)
        loss = values[0].sum() + values[1].sum() if entropy else values.sum()
        # `values` stay alive, as in a training step.
        loss.backward()
    assert logits.tokens == {16, 199 % 16}
    assert 2 <= logits.most <= 5


# --------------------------------------------------------------------------------------------------
# attention on any device


def attention_by_hand(q, k, v, lengths, scale):
    """Softmax attention, row by row and head by head."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for first, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths):
        heads = []
        for head in range(q.shape[1]):
            part = slice(first, first + length)
            scores = q[part, head] @ k[part, head // group].T * scale
            later = torch.ones(length, length).triu(1).bool()
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            heads.append(weights @ v[part, head // group])
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", [[7], [3, 40, 2, 5], [1, 9, 80, 1, 30, 8, 3, 75], [6, 6, 6]])
def test_padded_attention_and_its_gradients(lengths):
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    results = []
    for out in (
        model.padded_attention(*tensors, offsets, max(lengths), 0.3),
        attention_by_hand(*tensors, lengths, 0.3),
    ):
        gradients = torch.autograd.grad(out.sin().sum(), tensors)
        results.append([out, *gradients])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_similar_lengths(lengths):
    """Each row once; no group is more than half padding; the groups are few."""
    groups = model.similar_lengths(lengths)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    for rows in groups:
        of_group = [lengths[row] for row in rows]
        assert len(rows) * max(of_group) <= 2 * sum(of_group)
    assert len(groups) <= 1 + torch.tensor(max(lengths)).log2()


def test_rows_of_one_length_are_one_group_in_their_order():
    assert model.similar_lengths([5, 5, 5]) == [[0, 1, 2]]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_a_long_row_does_not_make_the_others_long():
    """Forward and backward, no tensor has more than twice the elements of what is packed."""
    lengths = [10] * 100 + [1000]
    q = torch.randn(sum(lengths), 2, 4, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    with Largest() as largest:
        model.padded_attention(q, q, q, offsets, 1000, None).sum().backward()
    assert largest.elements <= 2 * q.numel()


# --------------------------------------------------------------------------------------------------
# loading


@pytest.mark.parametrize(
    "kind, more",
    [(MistralConfig, dict(sliding_window=None)), (Qwen3Config, dict(head_dim=16))],
)
def test_other_kinds_equal_transformers(tmp_path, group, kind, more):
    plain = small_model(tmp_path / "m", False, kind, **more)
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    got = token_logprobs(net, pack(ROWS, CPU))
    torch.testing.assert_close(got, by_hand(plain, ROWS)[0].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind, more",
    [
        # It looks back a few tokens only.
        (MistralConfig, dict(sliding_window=8)),
        # It scales its embeddings, and more.
        (GemmaConfig, dict(head_dim=16)),
        # Its positions depend on the longest row of a batch.
        (LlamaConfig, dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    ],
)
def test_models_that_are_not_known_are_refused(tmp_path, group, kind, more):
    small_model(tmp_path / "m", False, kind, **more)
    with pytest.raises(UserError, match=kind.model_type):
        load_model(str(tmp_path / "m"), CPU, torch.float32)


def test_a_folder_without_weights(tmp_path, group):
    Qwen2Config().save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"no \*.safetensors file"):
        load_model(str(tmp_path / "m"), CPU, torch.float32)


def save_as_shards(folder):
    """small_model() in several files. Returns its weights."""
    plain = small_model(folder, tied=False)
    (folder / "model.safetensors").unlink()
    plain.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return plain.state_dict()


def assert_loads(folder, weights):
    """What is loaded is what transformers loads, and these weights."""
    loaded = dict(model.full_tensors(load_model(str(folder), CPU, torch.float32)))
    by_transformers = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, weights[name]), name
        assert torch.equal(tensor, by_transformers[name]), name


def write_others(file, weights):
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file)


@pytest.mark.slow
@pytest.mark.parametrize("stray", ["zz_backup.safetensors", "0.safetensors"])
def test_a_backup_is_no_part_of_the_model(tmp_path, group, stray):
    """Beside shards and their index, and beside the one file."""
    weights = save_as_shards(tmp_path / "shards [1]")
    write_others(tmp_path / "shards [1]" / stray, weights)
    assert_loads(tmp_path / "shards [1]", weights)

    weights = small_model(tmp_path / "one*", tied=False).state_dict()
    write_others(tmp_path / "one*" / stray, weights)
    assert_loads(tmp_path / "one*", weights)


def test_the_one_file_comes_before_shards_of_an_earlier_save(tmp_path, group):
    weights = save_as_shards(tmp_path / "m")
    new = {name: tensor * 2 for name, tensor in weights.items()}
    save_file(new, tmp_path / "m/model.safetensors", dict(format="pt"))
    assert_loads(tmp_path / "m", new)


def refused(folder, words):
    with pytest.raises(UserError, match=words) as error:
        load_model(str(folder), CPU, torch.float32)
    assert "\n" not in str(error.value)


def test_shards_that_are_not_all_there(tmp_path, group):
    save_as_shards(tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    os.truncate(shard, 200)
    refused(tmp_path / "m", f"{shard.name} cannot be read")
    shard.unlink()
    refused(tmp_path / "m", f"{shard.name}, which .* names, is not there")
    (tmp_path / "m/model.safetensors.index.json").write_text("{")
    refused(tmp_path / "m", "is no index")


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_weights_of_another_model(tmp_path, group):
    folder = tmp_path / "m"
    weights = small_model(folder, tied=False).state_dict()
    change_config(folder, vocab_size=99)
    refused(folder, r"embed_tokens.weight has the shape \[97, 64\], .* \[99, 64\]")
    more = dict(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    change_config(folder, vocab_size=97, **more)
    refused(folder, "lacks 12 of 39 weights")
    change_config(folder, num_hidden_layers=2)
    refused(folder, "must be equal to the number of `layer_types`")
    more = dict(layer_types=["full_attention"] * 2)
    change_config(folder, **more, quantization_config=dict(quant_method="fp8"))
    refused(folder, "quantized")

    small_model(folder, tied=False)
    weights["model.embedding.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors")
    refused(folder, "such as model.embed_tokens.weight; 1 .* such as model.embedding.weight")


def test_a_head_beside_tied_embeddings(tmp_path, group):
    """The same matrix again is allowed, another one is not: transformers and vLLM would differ."""
    folder = tmp_path / "m"
    weights = small_model(folder, tied=True).state_dict()
    head = weights["lm_head.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", dict(format="pt"))
    assert_loads(folder, weights)
    head[5, 5] += 1
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", dict(format="pt"))
    refused(folder, "tie_word_embeddings=true, but lm_head.weight is another matrix")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, group, number):
    plain = small_model(tmp_path / "m")
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[3, 4] = number
    plain.save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", "not finite .*layers.1.mlp.up_proj.weight")
    assert weights_not_finite(str(tmp_path / "m")) == ["model.layers.1.mlp.up_proj.weight"]


def test_attention_kernels():
    gpu = torch.device("cuda")
    fast = model.pick_attention("auto", gpu, torch.bfloat16)
    assert fast in ("flash_attn", "varlen")
    assert model.pick_attention("varlen", gpu, torch.bfloat16) == "varlen"
    assert model.pick_attention("padded", gpu, torch.bfloat16) == "padded"

    # The fast ones know 16 bits on a GPU only.
    assert model.pick_attention("auto", gpu, torch.float32) == "padded"
    assert model.pick_attention("auto", CPU, torch.bfloat16) == "padded"
    with pytest.raises(UserError, match="attention='varlen': on cpu one of auto, padded"):
        model.pick_attention("varlen", CPU, torch.bfloat16)


def test_copies_of_the_weights():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        with pytest.raises(UserError, match="shard=3 does not divide the 4 processes"):
            model.make_mesh(CPU, 3)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler"
)
def test_compiled_layers_change_nothing(tmp_path, group):
    small_model(tmp_path / "m")
    results = []
    for compile, checkpointing in ((False, False), (True, False), (True, True)):
        net = load_model(
            str(tmp_path / "m"), CPU, torch.float32, checkpointing=checkpointing, compile=compile
        )
        for layer in net.model.layers:
            assert (layer._compiled_call_impl is not None) == compile

        # Two lengths, because compiled code may be made for one.
        all_rows = token_logprobs(net, pack(ROWS, CPU), 0.7)
        two_rows = token_logprobs(net, pack(ROWS[:2], CPU), 0.7)
        (all_rows.exp().sum() + two_rows.exp().sum()).backward()
        gradients = [p.grad.full_tensor() for p in net.parameters()]
        results.append([all_rows, two_rows, *gradients])

    for compiled in results[1:]:
        for got, want in zip(compiled, results[0]):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


LOAD_AND_MEASURE = """
import os, pathlib, sys
import torch, transformers
import torch.distributed as dist
from transformers import Qwen2ForCausalLM
from lib.run import leave_distributed, setup_distributed
from model import load_model

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

folder, out = sys.argv[1:]
device = torch.device("cpu")
rank, world_size = setup_distributed(device)
before = peak()
load_model(folder, device, torch.float32)
pathlib.Path(out, f"{rank}.peak").write_text(str(peak() - before))
leave_distributed()
os._exit(0)  # see configurator.run()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="Linux tells a process's peak memory"
)
def test_no_process_holds_a_whole_model(tmp_path):
    """Four processes load 276 M parameters.

    The peak of none grows by more than a third of the fp32 size and 256 MB.
    """
    config = Qwen2Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    large.to_empty(device="cpu")
    for parameter in large.parameters():
        torch.nn.init.ones_(parameter)  # what stood in the memory need not be finite
    large.save_pretrained(tmp_path / "m")
    size = 4 * sum(p.numel() for p in large.parameters())

    script = tmp_path / "load.py"
    script.write_text(LOAD_AND_MEASURE)
    torchrun(4, script, tmp_path / "m", tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    peaks = [int((tmp_path / f"{rank}.peak").read_text()) for rank in range(4)]
    assert min(peaks) > size / 4, (peaks, size)
    assert max(peaks) < size / 3 + 2**28, (peaks, size)


# --------------------------------------------------------------------------------------------------
# training


def test_only_matrices_decay(tmp_path, group):
    """A step with gradients of zero: what changes is what decays."""
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.full_tensors(net)}
    optimizer = make_optimizer(net, 1.0, weight_decay=0.5)
    model.idle_passes(net, 1, CPU)
    model.optimizer_step(net, optimizer, 0.1, 1.0)
    for name, tensor in model.full_tensors(net):
        want = before[name] * (1 - 0.1 * 0.5) if tensor.dim() >= 2 else before[name]
        torch.testing.assert_close(tensor, want)


def test_gradients_are_clipped_and_dropped(tmp_path, group):
    """The norm before clipping comes back. Adam forgets a factor, its state does not."""
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    squares = {}
    for grad_clip in (0, 0.5):
        optimizer = make_optimizer(net, 1e-3)
        token_logprobs(net, pack(ROWS, CPU)).sum().backward()
        gradients = [p.grad.full_tensor().clone() for p in net.parameters()]
        norm = model.optimizer_step(net, optimizer, 0.0, grad_clip)
        want = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert norm == pytest.approx(want, rel=1e-5)
        assert norm > 0.5
        assert all(p.grad is None for p in net.parameters())
        state = [s["exp_avg_sq"].full_tensor().sum().item() for s in optimizer.state.values()]
        squares[grad_clip] = sum(state)
    assert squares[0] == pytest.approx((1 - 0.999) * norm**2, rel=1e-3)
    assert squares[0.5] == pytest.approx((1 - 0.999) * 0.5**2, rel=1e-3)


def state_of(net, optimizer):
    """Copies of all weights and all of Adam's state."""
    tensors = [tensor.clone() for _, tensor in model.full_tensors(net)]
    for state in optimizer.state.values():
        tensors += [state[name].clone() for name in sorted(state)]
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grad_clip", [0, 1.0])
def test_a_gradient_that_is_not_finite(tmp_path, trained, number, grad_clip):
    """One entry of one gradient: no step, and the next one is as if nothing had been."""
    net, optimizer = trained["model"]
    before = state_of(net, optimizer)
    token_logprobs(net, pack(ROWS, CPU)).mean().backward()
    net.model.layers[1].mlp.up_proj.weight.grad.to_local()[3, 4] = number
    with pytest.raises(NotFinite, match="the norm of the gradient is (nan|inf)"):
        model.optimizer_step(net, optimizer, 1e-2, grad_clip, loss=torch.tensor(1.0))
    for got, want in zip(state_of(net, optimizer), before, strict=True):
        assert torch.equal(got, want)
    assert all(p.grad is None for p in net.parameters())
    train_a_step(net, optimizer)
    assert all(tensor.isfinite().all() for tensor in state_of(net, optimizer))


@pytest.mark.parametrize("loss", [torch.tensor(torch.nan), -torch.inf])
def test_a_loss_that_is_not_finite(tmp_path, trained, loss):
    """Its gradient may well be finite: that of the log-probability of a token with none is."""
    net, optimizer = trained["model"]
    before = state_of(net, optimizer)
    token_logprobs(net, pack(ROWS, CPU)).mean().backward()
    with pytest.raises(NotFinite, match="the loss is (nan|-inf)"):
        model.optimizer_step(net, optimizer, 1e-2, 1.0, loss)
    for got, want in zip(state_of(net, optimizer), before, strict=True):
        assert torch.equal(got, want)


def test_a_finite_gradient_whose_norm_is_not(tmp_path, trained):
    """Its square is no number of 32 bits, and it is not clipped to nothing."""
    net, optimizer = trained["model"]
    token_logprobs(net, pack(ROWS, CPU)).mean().backward()
    net.model.norm.weight.grad.to_local()[0] = 1e25
    with pytest.raises(NotFinite, match="the norm of the gradient is inf"):
        model.optimizer_step(net, optimizer, 1e-2, 1.0)


def test_rows_that_are_not_finite_are_named(group):
    values = torch.zeros(30, 4)
    check_finite("log-probabilities", values)
    values[7, 3] = torch.inf
    with pytest.raises(NotFinite, match="^log-probabilities are not finite in row 7 of 30$"):
        check_finite("log-probabilities", values)
    values[10:25, 0] = torch.nan
    with pytest.raises(NotFinite, match="in rows 7, 10, 11, .*, 18 and 6 more of 30$") as error:
        check_finite("log-probabilities", values)
    assert error.value.rows == [7, *range(10, 25)]
    with pytest.raises(NotFinite, match="losses are not finite in row 1 of 2"):
        check_finite("losses", torch.tensor([0.0, -torch.inf]))


def test_what_a_number_that_is_not_finite_leaves_behind(tmp_path, group):
    """One line with step, phase and file; in the file a line per row."""
    rows = [dict(text="a", tokens=[1, 2]), dict(text="\ud800", tokens=[3])]
    where = stops_if_not_finite(str(tmp_path), "step 3, policy", lambda: rows)
    with pytest.raises(UserError) as error, where:
        check_finite("losses", torch.tensor([0.0, torch.nan]))
    message = str(error.value)
    assert not isinstance(error.value, NotFinite)
    assert "\n" not in message
    for words in ("step 3, policy: losses are not finite in row 1 of 2", "not_finite.jsonl"):
        assert words in message

    lines = (tmp_path / "not_finite.jsonl").read_text().splitlines()
    first = dict(row=0, not_finite=False, **rows[0])
    second = dict(row=1, not_finite=True, **rows[1])
    assert [json.loads(line) for line in lines] == [first, second]


ON_ONE_RANK = """
import os, sys
import torch
import torch.distributed as dist
from lib.finite import NotFinite, check_finite
from lib.run import leave_distributed, setup_distributed
from model import (
    idle_passes, load_model, make_optimizer, optimizer_step, save_checkpoint, save_model,
)

folder, out = sys.argv[1:]
device = torch.device("cpu")
rank, world_size = setup_distributed(device)
net = load_model(folder, device, torch.float32)
optimizer = make_optimizer(net, 1e-3)
idle_passes(net, 1, device)
optimizer_step(net, optimizer, 1e-3, 1.0)
bad = torch.nan if rank == 1 else 1.0


def expect(function, *words):
    try:
        function()
    except NotFinite as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(f"rank {rank}: {words}")


# The loss, a gradient's shard, log-probabilities, a weight's shard.
idle_passes(net, 1, device)
expect(lambda: optimizer_step(net, optimizer, 1e-3, 1.0, bad), "loss")
idle_passes(net, 1, device)
net.model.norm.weight.grad.to_local()[0] = bad
expect(lambda: optimizer_step(net, optimizer, 1e-3, 1.0), "gradient")
expect(lambda: check_finite("log-probs", torch.tensor([[0.0], [bad]])), "row 1 of 2")
weight = net.model.norm.weight.to_local()
with torch.no_grad():
    before = weight[0].clone()
    weight[0] = bad
expect(lambda: save_checkpoint(out, 1, dict(policy=(net, optimizer)), {}, 2), "policy", "norm")
expect(lambda: save_model(net, None, out + "/m", torch.float32, folder), "norm.weight")
with torch.no_grad():
    weight[0] = before
save_checkpoint(out, 2, dict(policy=(net, optimizer)), {}, 2)
leave_distributed()
os._exit(0)  # see configurator.run()
"""


@pytest.mark.slow
def test_all_ranks_stop_for_what_is_not_finite_on_one(tmp_path):
    small_model(tmp_path / "m")
    script = tmp_path / "script.py"
    script.write_text(ON_ONE_RANK)
    out = tmp_path / "out"
    out.mkdir()
    torchrun(2, script, tmp_path / "m", out, env=dict(PYTHONPATH=str(ROOT)), timeout=100)
    assert names_in(out) == ["step_000002"]


def test_move(tmp_path, group):
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    optimizer = make_optimizer(net, 1e-3)
    model.idle_passes(net, 1, CPU)
    model.optimizer_step(net, optimizer, 0.0, 1.0)
    model.move("meta", net, None, optimizer)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    for state in optimizer.state.values():
        assert {tensor.device.type for tensor in state.values()} == {"meta"}


@pytest.mark.parametrize("offload", [False, True])
def test_the_longest_batch_leaves_the_weights(tmp_path, group, capsys, offload):
    small_model(tmp_path / "m")
    trained = load_model(str(tmp_path / "m"), CPU, torch.float32)
    frozen = load_model(str(tmp_path / "m"), CPU, torch.float32, trained=False)
    optimizer = make_optimizer(trained, 1e-3)
    before = dict(model.full_tensors(trained))

    pairs = [(trained, optimizer), (frozen, None)]
    model.longest_batch(pairs, 50, CPU, offload=offload, entropy=True)
    assert "the longest batch, 50 tokens, went through" in capsys.readouterr().out
    assert len(optimizer.state) == len(list(trained.parameters()))
    for net in (trained, frozen):
        for name, tensor in model.full_tensors(net):
            assert torch.equal(tensor, before[name])


def test_flops_by_hand(tmp_path, group):
    """Tied embeddings are the head and count once; untied ones are looked up, not multiplied."""
    for tied in (True, False):
        plain = small_model(tmp_path / "m", tied)
        net = load_model(str(tmp_path / "m"), CPU, torch.float32)
        weights = sum(p.numel() for p in plain.parameters())
        if not tied:
            weights -= 97 * 64
        # Rows of 3 and 5 tokens; 2 layers of 64.
        want = 6 * weights * 8 + 6 * 2 * 64 * (9 + 25)
        assert model.flops(net, tokens=8, pairs=9 + 25) == want


@pytest.mark.slow
def test_matmul_rate():
    assert model.matmul_rate(CPU, torch.float32) > 1e8


# --------------------------------------------------------------------------------------------------
# folders


@pytest.mark.parametrize("tied", [True, False])
def test_load_and_save_round_trip(tmp_path, group, tied, world):
    """Sharded loading is from_pretrained() bit for bit; transformers opens what is saved."""
    plain = small_model(tmp_path / "m", tied).state_dict()
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    loaded = dict(model.full_tensors(net))
    names = set(plain)
    if tied:
        names.remove("lm_head.weight")
    assert set(loaded) == names
    assert all(torch.equal(loaded[name], plain[name]) for name in loaded)

    # The second time over the first.
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    out = tmp_path / "out"
    for _ in range(2):
        model.save_model(net, tokenizer, str(out), torch.bfloat16, str(tmp_path / "m"))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    assert again.generation_config.eos_token_id is not None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, plain[name].bfloat16())
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_folder_that_is_a_link_stays_one(tmp_path, group, world):
    """The model is written where it leads, which may be another disk."""
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        model.save_model(net, tokenizer, str(out), torch.float32, str(tmp_path / "m"))
    assert out.is_symlink()
    assert (out / "model.safetensors").is_file()
    assert names_in(tmp_path / "disk") == ["model"]


def test_a_saved_model_opens_with_the_tokenizer_it_was_saved_with(tmp_path, group):
    """By its own rules transformers opens Qwen2's beside a Qwen2 model, which cuts digits apart."""
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>")
    assert len(tokenizer("12345").input_ids) == 3  # a begin token, 123, 45
    model.save_model(net, tokenizer, str(tmp_path / "out"), torch.float32, str(tmp_path / "m"))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again("12345").input_ids == tokenizer("12345").input_ids


# --------------------------------------------------------------------------------------------------
# checkpoints


def train_a_step(net, optimizer):
    token_logprobs(net, pack(ROWS, CPU)).mean().backward()
    model.optimizer_step(net, optimizer, 1e-2, 1.0)


@pytest.fixture
def trained(tmp_path, group):
    """{name: (model, optimizer)} after a step."""
    small_model(tmp_path / "m")
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    optimizer = make_optimizer(net, 1e-2, weight_decay=0.1)
    train_a_step(net, optimizer)
    return dict(model=(net, optimizer))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_brings_everything_back(tmp_path, trained):
    """The step after it is the same one, bit for bit."""
    folder = tmp_path / "checkpoints"
    net, optimizer = trained["model"]
    model.save_checkpoint(str(folder), 7, trained, dict(drawn=[1, 2]), keep=2)
    train_a_step(net, optimizer)
    want = {name: tensor.clone() for name, tensor in model.full_tensors(net)}

    train_a_step(net, optimizer)
    assert model.load_checkpoint(str(folder), trained) == (7, dict(drawn=[1, 2]))
    train_a_step(net, optimizer)
    for name, tensor in model.full_tensors(net):
        assert torch.equal(tensor, want[name])


def test_no_checkpoint_yet(tmp_path, trained):
    assert model.load_checkpoint(str(tmp_path / "nowhere"), trained) is None


def test_the_newest_checkpoints_stay(tmp_path, trained):
    """Unfinished ones are removed, and those of later steps are not counted."""
    folder = tmp_path / "checkpoints"
    (folder / "step_000005.tmp").mkdir(parents=True)
    (folder / "step_000009").mkdir()
    for step in (1, 2, 3):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    assert names_in(folder) == ["step_000002", "step_000003", "step_000009"]


@pytest.mark.slow
def test_a_copy_of_a_checkpoint_is_none(tmp_path, trained):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    shutil.copytree(folder / "step_000001", folder / "step_backup")
    assert model.load_checkpoint(str(folder), trained) == (2, {})
    model.save_checkpoint(str(folder), 3, trained, {}, keep=2)
    assert names_in(folder) == ["step_000002", "step_000003", "step_backup"]


def test_a_damaged_checkpoint(tmp_path, trained, capsys):
    """The one before it is taken. If none can be read, the run does not start from nothing."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    (folder / "step_000002/.metadata").unlink()
    assert model.load_checkpoint(str(folder), trained) == (1, {})
    assert "step_000002 cannot be read" in capsys.readouterr().out

    os.truncate(next((folder / "step_000001").glob("*.distcp")), 1000)
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        model.load_checkpoint(str(folder), trained)


def flip_a_bit(path):
    """In the middle of a file, where a checkpoint has its numbers."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "checksums.json"])
def test_a_bit_in_a_checkpoint_that_is_another(name, tmp_path, trained, capsys):
    """torch would read most of them and go on with another number."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    damaged = next((folder / "step_000002").glob(name))
    flip_a_bit(damaged)
    assert model.load_checkpoint(str(folder), trained) == (1, {})
    out = capsys.readouterr().out
    assert "step_000002 cannot be read" in out
    if name == "*.distcp":
        assert f"{damaged.name} is not as it was written" in out


def test_a_checkpoint_without_checksums_is_taken(tmp_path, trained):
    """Those of earlier versions have none."""
    folder = tmp_path / "checkpoints"
    model.save_checkpoint(str(folder), 1, trained, {}, keep=2)
    (folder / "step_000001/checksums.json").unlink()
    assert model.load_checkpoint(str(folder), trained) == (1, {})


def test_a_broken_connection_is_no_damage(tmp_path, trained, monkeypatch):
    folder = tmp_path / "checkpoints"
    model.save_checkpoint(str(folder), 1, trained, {}, keep=2)

    def broken(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(model.dcp, "load", broken)
    with pytest.raises(ConnectionError):
        model.load_checkpoint(str(folder), trained)


@pytest.mark.slow
def test_a_trained_model_is_not_lost(tmp_path, trained):
    """The checkpoint of a run that trained two models, in a run that trains one."""
    folder = tmp_path / "checkpoints"
    net = load_model(str(tmp_path / "m"), CPU, torch.float32)
    both = trained | dict(prm=(net, make_optimizer(net, 1e-3)))
    model.save_checkpoint(str(folder), 1, both, {}, keep=2)
    with pytest.raises(UserError, match="has a trained prm, which would be lost"):
        model.load_checkpoint(str(folder), trained)


def test_settings_of_now_hold_after_a_resume(tmp_path, trained):
    folder = tmp_path / "checkpoints"
    model.save_checkpoint(str(folder), 1, trained, {}, keep=2)
    net, _ = trained["model"]
    optimizer = make_optimizer(net, 1e-3, beta2=0.9, weight_decay=0.5)
    model.load_checkpoint(str(folder), dict(model=(net, optimizer)))
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    for settings_of_group in (matrices, vectors):
        assert settings_of_group["lr"] == 1e-3
        assert settings_of_group["betas"] == (0.9, 0.9)
    assert len(optimizer.state) == len(list(net.parameters()))


def test_numbers_that_are_not_finite_are_not_saved(tmp_path, trained, world):
    """Neither in a checkpoint nor as a model; what is there already stays."""
    folder = tmp_path / "checkpoints"
    net, optimizer = trained["model"]
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    saved = (net, tokenizer, str(tmp_path / "out"), torch.bfloat16, str(tmp_path / "m"))
    model.save_checkpoint(str(folder), 1, trained, {}, keep=1)
    model.save_model(*saved)
    before = (tmp_path / "out/model.safetensors").read_bytes()

    # A finite number of 32 bits which is inf in 16.
    weight = net.model.norm.weight.to_local()
    with torch.no_grad():
        weight[0] = 3.4e38
    with pytest.raises(NotFinite, match="out has weights .*model.norm.weight"):
        model.save_model(*saved)
    with torch.no_grad():
        weight[0] = torch.nan
    with pytest.raises(NotFinite, match="model has weights .*model.norm.weight"):
        model.save_checkpoint(str(folder), 2, trained, {}, keep=1)
    with torch.no_grad():
        weight[0] = 1.0
    optimizer.state[net.model.norm.weight]["exp_avg_sq"].to_local()[0] = torch.inf
    with pytest.raises(NotFinite, match="Adam's state of model .*exp_avg_sq"):
        model.save_checkpoint(str(folder), 2, trained, {}, keep=1)
    assert names_in(folder) == ["step_000001"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_not_taken(tmp_path, trained, capsys, monkeypatch):
    """As earlier versions wrote them: the one before it is taken."""
    folder = tmp_path / "checkpoints"
    net, optimizer = trained["model"]
    model.save_checkpoint(str(folder), 1, trained, dict(drawn=1), keep=3)
    want = state_of(net, optimizer)
    with torch.no_grad():
        net.model.norm.weight.to_local()[0] = torch.nan
    monkeypatch.setattr(model, "check_trained", lambda trained: None)
    model.save_checkpoint(str(folder), 2, trained, {}, keep=3)
    monkeypatch.undo()

    assert model.load_checkpoint(str(folder), trained) == (1, dict(drawn=1))
    assert "step_000002: model has weights that are not finite" in capsys.readouterr().out
    for got, expected in zip(state_of(net, optimizer), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run[lr=1e-3]", "*", "a?b c", "[!x]", "løp 実験"])
def test_any_name_of_a_folder(tmp_path, trained, name):
    """What means something in a pattern is part of the name here."""
    folder = tmp_path / name / "checkpoints"
    (tmp_path / "run1/checkpoints/step_000008").mkdir(parents=True)
    (folder / "step_000007.tmp").mkdir(parents=True)
    for step in (1, 2, 3):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    assert names_in(folder) == ["step_000002", "step_000003"]
    assert model.load_checkpoint(str(folder), trained) == (3, {})


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_of_somebody_else_runs_nothing(tmp_path, trained, nested, capsys):
    """Its metadata are a pickle that could call any function."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        model.save_checkpoint(str(folder), step, trained, {}, keep=2)
    file = folder / "step_000002/.metadata"
    content = Touch(tmp_path / "touched")
    if nested:
        metadata = pickle.loads(file.read_bytes())
        metadata.planner_data["model"] = content
        content = metadata
    file.write_bytes(pickle.dumps(content))
    assert model.load_checkpoint(str(folder), trained) == (1, {})
    assert "step_000002 cannot be read" in capsys.readouterr().out
    assert not (tmp_path / "touched").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "touched").exists()


def test_values_beside_the_tensors_run_nothing(tmp_path, trained, capsys):
    """Such as the state of the data. torch itself unpickles it as it is."""
    folder = tmp_path / "checkpoints"
    model.save_checkpoint(str(folder), 1, trained, {}, keep=2)
    state = model.training_state(trained)
    state["extra"] = Touch(tmp_path / "touched")
    model.dcp.save(state, checkpoint_id=str(folder / "step_000002"))
    assert model.load_checkpoint(str(folder), trained) == (1, {})
    assert not (tmp_path / "touched").exists()

    state["extra"] = ""
    model.dcp.load(state, checkpoint_id=str(folder / "step_000002"))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load"])
def test_names_that_no_metadata_need(name):
    module, _, function = name.rpartition(".")
    for named in ((module, function), ("torch", f"Size.{function}"), ("torch", function)):
        with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
            MetadataUnpickler(io.BytesIO()).find_class(*named)
