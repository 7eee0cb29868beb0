"""The answers to one prompt share it in the passes of model.py: the same numbers as without."""

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import attention_by_hand, small_model
from torch.testing._internal.distributed.fake_pg import FakeStore

import model
from lib.answers import Answer
from lib.packing import rows_by_prompt
from lib.rollouts import Group, make_batch
from lib.run import setup_distributed
from model import load_model, pack, token_logprobs

CPU = torch.device("cpu")

# Three answers to one prompt, a single one, and two with a tool's words, whose mask is 0.
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7], [30, 31, 32, 33]]
ANSWERS = [
    [([10, 3], None), ([11, 12, 13, 14, 3], None), ([15], None)],
    [([16, 17, 18], None)],
    [([19, 20, 21, 22], [1, 0, 0, 1]), ([23, 24, 25], [1, 1, 0])],
]


def example_batch():
    groups = []
    for index, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS)):
        written = []
        for tokens, mask in answers:
            written.append(Answer(tokens, [-1.0] * len(tokens), "stop", mask))
        groups.append(Group(index, prompt, written))
    return make_batch(groups, CPU)


@pytest.fixture
def net(tmp_path):
    small_model(tmp_path / "m")
    setup_distributed(CPU)
    yield load_model(str(tmp_path / "m"), CPU, torch.float32)
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# batches


def test_pack_example():
    """The second example of its docstring."""
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([5, 6, 9], [0, 0, 1])]
    batch = pack(rows, CPU, prompts=[2, 2])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["predict"].tolist() == [1, 2, 1]
    assert batch["targets"].tolist() == [7, 8, 9]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7]
    assert batch["max_length_q"] == 4
    assert batch["whole"].tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert batch["own"].tolist() == [0, 1, 2, 3, 6]


@pytest.mark.parametrize(
    "rows, prompts",
    [
        # Other words, another length, the same words with another row between them.
        ([[5, 6, 7], [5, 8, 7]], [2, 2]),
        ([[5, 6, 7], [5, 6, 7]], [2, 1]),
        ([[5, 6, 7], [9, 9, 9], [5, 6, 8]], [2, 2, 2]),
    ],
)
def test_prompts_that_differ_are_not_shared(rows, prompts):
    pairs = [(tokens, [0] * n + [1] * (len(tokens) - n)) for tokens, n in zip(rows, prompts)]
    with_prompts = pack(pairs, CPU, prompts)
    without = pack(pairs, CPU)
    assert with_prompts.keys() == without.keys()
    assert with_prompts["input_ids"].tolist() == without["input_ids"].tolist()


def test_rows_of_several_groups_in_any_order(net):
    """Of the six rows of three prompts, those next to their like share it: the same numbers."""
    batch = example_batch()
    for order in ([0, 1, 2, 3, 4, 5], [2, 0, 3, 5, 4, 1], [4, 5, 1], [0], [1, 2]):
        pairs = [(batch.tokens[row], batch.scored[row]) for row in order]
        prompts = [batch.prompt_lengths[row] for row in order]
        got = token_logprobs(net, pack(pairs, CPU, prompts))
        want = token_logprobs(net, pack(pairs, CPU))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# micro-batches


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_by_prompt(data):
    """Each row once, no two prompts in a group, and none too long unless it is a single row."""
    prompts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30))
    length_of = data.draw(st.lists(st.integers(1, 30), min_size=5, max_size=5))
    prompt_lengths = [length_of[prompt] for prompt in prompts]
    lengths = [n + data.draw(st.integers(1, 30)) for n in prompt_lengths]
    budget = data.draw(st.integers(1, 200))
    world_size = data.draw(st.sampled_from([1, 2, 4]))
    rows = data.draw(st.permutations(range(len(prompts))))

    groups, tokens = rows_by_prompt(rows, prompts, prompt_lengths, lengths, budget, world_size)

    seen = []
    for group, total in zip(groups, tokens, strict=True):
        seen += group
        assert len({prompts[row] for row in group}) == 1
        answers = sum(lengths[row] - prompt_lengths[row] for row in group)
        assert total == prompt_lengths[group[0]] + answers
        assert len(group) == 1 or total <= budget
    assert sorted(seen) == list(range(len(prompts)))


def test_a_prompt_is_computed_once():
    """8 answers of 2 tokens to a prompt of 10: 26 tokens in place of 96, as the batch is dealt."""
    answers = [Answer([20 + k, 3], [-1.0, -1.0], "stop") for k in range(8)]
    batch = make_batch([Group(0, list(range(5, 15)), answers)], CPU)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    (rows,), idle = model.my_shared_batches(batch, budget=50)
    dist.destroy_process_group()
    assert idle == 0
    pairs = [(batch.tokens[row], batch.scored[row]) for row in rows]
    assert pack(pairs, CPU, [10] * 8)["input_ids"].shape == (1, 26)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_each_process_gets_something_to_do(world_size):
    """One prompt with eight answers is split where there are more processes than prompts."""
    answers = [Answer([20 + k, 3], [-1.0, -1.0], "stop") for k in range(8)]
    batch = make_batch([Group(0, [5, 6], answers)], CPU)
    seen = []
    passes = set()
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        batches, idle = model.my_shared_batches(batch, budget=1000)
        dist.destroy_process_group()
        assert batches
        passes.add(len(batches) + idle)
        for rows in batches:
            seen += rows
    assert sorted(seen) == list(range(8))
    assert len(passes) == 1


# --------------------------------------------------------------------------------------------------
# attention


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 20), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_attention_and_its_gradients(groups, random):
    """Groups (tokens of a prompt, tokens of its answers) against attention row by row."""
    rows = []
    prompts = []
    for number, (prompt, answers) in enumerate(groups):
        for answer in answers:
            words = [random.randrange(100) for _ in range(answer)]
            rows.append(([1000 + number] * prompt + words, [0] * prompt + [1] * answer))
            prompts.append(prompt)
    batch = pack(rows, CPU, prompts)
    T = batch["input_ids"].numel()
    torch.manual_seed(0)
    tensors = []
    for heads in (4, 2, 2):
        shape = (1, heads, T, 8)
        tensors.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))

    names = ("cu_seq_lens_q", "max_length_q", "whole", "own")
    about_rows = {name: batch.get(name) for name in names}
    out, _ = model.packed_attention(None, *tensors, None, scaling=0.3, **about_rows)
    got = [out[0], *torch.autograd.grad(out.sin().sum(), tensors)]

    # Each row whole, with copies of its prompt; of each token the output in the row that has it.
    place = batch.get("whole", torch.arange(T))
    whole = [x[0].transpose(0, 1)[place] for x in tensors]
    lengths = [len(tokens) for tokens, _ in rows]
    expected = attention_by_hand(*whole, lengths, 0.3)
    first = [place.tolist().index(token) for token in range(T)]
    expected = expected[first]
    want = [expected, *torch.autograd.grad(expected.sin().sum(), tensors)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# training

THREE_UPDATES = """
import os, sys
import torch
from lib.run import all_sum, leave_distributed, setup_distributed
from model import (
    full_tensors, idle_passes, load_model, make_optimizer, my_micro_batches, my_shared_batches,
    optimizer_step, pack, row_logprobs, score, token_logprobs, unpack,
)
from test_shared_prompt import CPU, example_batch

folder, path, *cases = sys.argv[1:]
rank, world_size = setup_distributed(CPU)
batch = example_batch()


def logprobs_alone(net, rows):
    pairs = [(batch.tokens[i], batch.scored[i]) for i in rows]
    return unpack(token_logprobs(net, pack(pairs, CPU)), batch.mask[rows])


def result_of(way, budget, checkpointing):
    net = load_model(folder, CPU, torch.float32, checkpointing=checkpointing)
    optimizer = make_optimizer(net, 1e-3)
    norms = []
    for _ in range(3):
        loss = 0.0
        if way == "shared":
            mine, idle = my_shared_batches(batch, budget)
        else:
            mine, idle = my_micro_batches(batch.lengths, budget)
        for rows in mine:
            if way == "shared":
                logprobs, _ = row_logprobs(net, batch, rows)
            else:
                logprobs = logprobs_alone(net, rows)
            means = logprobs.sum(-1) / batch.mask[rows].sum(-1)
            part = -means.sum() / len(batch.lengths)
            loss += part.item()
            (part * world_size).backward()
        idle_passes(net, idle, CPU)
        norms.append(optimizer_step(net, optimizer, 1e-3, 1.0))
    result = dict(full_tensors(net), norms=torch.tensor(norms))
    result["loss"] = torch.tensor(all_sum(loss, CPU))
    result["score"], result["entropy"] = score(net, batch, budget, 0.7, entropy=True)
    return result


results = {}
for case in cases:
    way, budget, *rest = case.split()
    results[case] = result_of(way, int(budget), bool(rest))
if rank == 0:
    torch.save(results, path)
leave_distributed()
os._exit(0)  # see configurator.run()
"""


@pytest.mark.slow
def test_three_updates_on_any_number_of_processes(tmp_path):
    """Weights, norms and scores are those of rows that each have their prompt, within 1e-5."""
    small_model(tmp_path / "m")
    script = tmp_path / "script.py"
    script.write_text(THREE_UPDATES)
    path = tmp_path / "result.pt"
    environment = dict(PYTHONPATH=f"{ROOT}:{ROOT}/tests")

    def results(processes, *cases):
        torchrun(processes, script, tmp_path / "m", path, *cases, env=environment)
        return torch.load(path)

    # One row per pass; then batches of all, of a few with recomputation, and of one row again.
    found = results(1, "alone 1", "shared 1000", "shared 12 checkpointing", "shared 1")
    want = found.pop("alone 1")
    for processes in (2, 4):
        for case, result in results(processes, "shared 1000", "shared 12").items():
            found[f"{case}, {processes} processes"] = result
    assert len(found) == 7
    for case, result in found.items():
        assert result.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(result[name], want[name], atol=1e-5, rtol=1e-4, msg=case)
