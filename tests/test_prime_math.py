"""prime.py's formulas against numbers of the reference code, worked examples and brute force."""
import json

import pytest
import torch

import prime

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def example(shared):
    return json.loads((shared / "spec" / "prime_numeric_example.json").read_text())


@pytest.fixture(scope="module")
def inputs(example):
    return {k: torch.tensor(v) for k, v in example["inputs"].items()}


OPTIONS = ["default", "no_norm", "norm_on_2_ranks", "gamma_process_0.9", "granularity_whole"]


def test_options_are_all_of_the_reference(example):
    assert sorted(example["expected"]["original"]) == sorted(OPTIONS)


def by_chunks(function, chunks, *tensors):
    return torch.cat([function(*parts) for parts in zip(*(t.chunk(chunks) for t in tensors))])


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_numbers(example, inputs, name):
    """Every entry of the original's expectations, junk in the padding included in the inputs."""
    expected = example["expected"]["original"][name]
    options, n = expected["options"], example["config"]["n_samples"]
    mask, acc = inputs["response_mask"], inputs["acc"]
    raw = prime.process_rewards(inputs["prm_logprobs"], inputs["ref_logprobs"], mask, options["granularity"], normalize=None)
    torch.testing.assert_close(raw, torch.tensor(expected["raw_scores"]), **CLOSE)

    normalize = "batch" if options["batch_norm"] else None
    process = by_chunks(lambda p, r, m: prime.process_rewards(p, r, m, options["granularity"], normalize),
                        options["norm_ranks"], inputs["prm_logprobs"], inputs["ref_logprobs"], mask)
    torch.testing.assert_close(process, torch.tensor(expected["process_rewards"]), **CLOSE)
    if options["batch_norm"]:
        divisors = [float(prime.suffix_sum(r).abs().max() + 1e-6) for r in raw.chunk(options["norm_ranks"])]
        assert divisors == pytest.approx(expected["norm_divisor_per_rank"], rel=1e-4)
        again = torch.cat([prime.process_rewards(p, r, m, options["granularity"], divisor=d) for p, r, m, d in zip(
            *(x.chunk(options["norm_ranks"]) for x in (inputs["prm_logprobs"], inputs["ref_logprobs"], mask)), divisors)])
        torch.testing.assert_close(again, process, **CLOSE)

    end = prime.last_token(mask)
    outcome = torch.where(end, acc[:, None], 0.0)
    for returns, rewards, where, gamma in (("process_returns", process, mask, options["gamma_process"]),
                                           ("outcome_returns", outcome, end, options["gamma_outcome"])):
        got = prime.rloo(rewards, where, n, gamma)
        torch.testing.assert_close(torch.where(mask.bool(), got, 0.0), torch.tensor(expected[returns]), **CLOSE)
    # the leave-one-out rewards are the returns at gamma 0
    for key, rewards, where in (("process_leave_one_out", process, mask), ("outcome_leave_one_out", outcome, end)):
        torch.testing.assert_close(prime.rloo(rewards, where, n, 0.0), torch.tensor(expected[key]), **CLOSE)
    gammas = dict(process_gamma=options["gamma_process"], outcome_gamma=options["gamma_outcome"])
    returns = prime.advantages(acc, process, mask, n, whiten=False, **gammas)
    torch.testing.assert_close(returns, torch.tensor(expected["returns"]), **CLOSE)
    A = prime.advantages(acc, process, mask, n, **gammas)
    torch.testing.assert_close(A, torch.tensor(expected["advantages"]), **CLOSE)

    if "ppo" in expected:
        want = expected["ppo"]["sequence_mean"]
        new = inputs["new_logprobs"].clone().requires_grad_()
        loss, stats = prime.ppo_loss(new, inputs["old_logprobs"], A, mask, example["config"]["clip_ratio"])
        loss.backward()
        assert loss.item() == pytest.approx(want["loss"], rel=1e-4)
        assert stats["clipfrac"].item() == pytest.approx(want["clipfrac"], rel=1e-4)
        assert stats["approx_kl"].item() == pytest.approx(want["ppo_kl"], rel=1e-4)
        torch.testing.assert_close(new.grad, torch.tensor(want["grad_new_logprobs"]), **CLOSE)
        rows = [prime.ppo_loss(*(x[i:i + 1] for x in (inputs["new_logprobs"], inputs["old_logprobs"], A, mask)))[0].item()
                for i in range(len(acc))]
        assert rows == pytest.approx(want["per_response_loss"], rel=1e-4, abs=1e-5)


def test_recipe_numbers(example, inputs):
    """The later recipe: no reward on the last token, beta inside (it cancels), coefficients 5 and 5."""
    expected, mask = example["expected"]["recipe"]["default"], inputs["response_mask"]
    prm = torch.where(prime.last_token(mask), inputs["ref_logprobs"], inputs["prm_logprobs"])
    process = prime.process_rewards(prm, inputs["ref_logprobs"], mask)
    torch.testing.assert_close(process, torch.tensor(expected["process_rewards"]), rtol=1e-3, atol=1e-4)  # 1e-6 / beta in the divisor
    A = prime.advantages(inputs["acc"], process, mask, 4, 5.0, 5.0)
    torch.testing.assert_close(A, torch.tensor(expected["advantages"]), rtol=1e-3, atol=1e-4)


def test_prm_numbers(example, inputs):
    want = example["expected"]["prm"]
    prm = inputs["prm_logprobs"].clone().requires_grad_()
    mask, acc = inputs["response_mask"], inputs["acc"]
    loss = prime.prm_loss(prm, inputs["ref_logprobs"], mask, acc, example["config"]["beta"])
    loss.backward()
    assert loss.item() == pytest.approx(want["ce_loss"], rel=1e-5)
    torch.testing.assert_close(prm.grad, torch.tensor(want["grad_prm_logprobs"]), **CLOSE)
    score = prime.process_rewards(inputs["prm_logprobs"], inputs["ref_logprobs"], mask, normalize=None).sum(-1)
    torch.testing.assert_close(score, torch.tensor(want["sequence_log_ratio"]), **CLOSE)
    assert prime.pair_accuracy(score, acc, 4).item() == pytest.approx(want["pair_accuracy"], rel=1e-5)


def test_filter_numbers(example):
    inputs, expected = example["filter"]["inputs"], example["filter"]["expected"]
    low, high = inputs["accuracy_lower_bound"], inputs["accuracy_upper_bound"]
    kept = [i for i, acc in enumerate(inputs["acc"]) if prime.keep_group(acc, low, high)]
    assert kept == expected["kept_groups_accuracy_only"]
    assert prime.keep_group([1, 0, 0, 0, 0]) and prime.keep_group([1, 1, 1, 1, 0])      # 1/5 and 4/5 in float32: inclusive


def test_junk_outside_the_mask_does_not_matter(inputs):
    mask, n = inputs["response_mask"], 4

    def everything(junk):
        x = {k: torch.where(mask.bool(), v, junk) if k.endswith("logprobs") else v for k, v in inputs.items()}
        process = prime.process_rewards(x["prm_logprobs"], x["ref_logprobs"], mask)
        A = prime.advantages(x["acc"], torch.where(mask.bool(), process, junk), mask, n, process_gamma=0.9)
        new = x["new_logprobs"].clone().requires_grad_()
        prm = x["prm_logprobs"].clone().requires_grad_()
        loss, stats = prime.ppo_loss(new, x["old_logprobs"], torch.where(mask.bool(), A, junk), mask)
        ce = prime.prm_loss(prm, x["ref_logprobs"], mask, x["acc"])
        (loss + ce).backward()
        return [process, A, loss, *stats.values(), ce, new.grad, prm.grad]

    for junk in (1e3, float("-inf"), float("nan")):
        for a, b in zip(everything(0.0), everything(junk)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rloo_by_hand_and_edges():
    ones = torch.ones(4, 1)
    got = prime.rloo(torch.tensor([[1.0], [0], [0], [1]]), ones, 4)
    torch.testing.assert_close(got.squeeze(-1), torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))
    # two samples, lengths 2 and 1: rbar = (2, 5); r - as the code has it: 2 r_t - 7
    got = prime.rloo(torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1, 1], [1, 0]]), 2, gamma=0.5)
    torch.testing.assert_close(got, torch.tensor([[-5 + 0.5 * -1, -1], [3, 0]]))
    with pytest.raises(ValueError):
        prime.rloo(torch.ones(2, 1), torch.ones(2, 1), 1)
    with pytest.raises(ValueError):
        prime.rloo(torch.ones(3, 1), torch.ones(3, 1), 2)
    with pytest.raises(ValueError):
        prime.rloo(torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]]), 2)
    with pytest.raises(ValueError):
        prime.process_rewards(ones, ones, ones, granularity="newline")


def test_no_contrast_and_length_one_rows():
    mask = torch.tensor([[1, 0], [1, 1]])
    zero = torch.zeros(2, 2)
    assert torch.equal(prime.process_rewards(zero, zero, mask), zero)                   # 0 / 1e-6, not NaN
    assert torch.equal(prime.advantages(torch.ones(2), zero, mask, 2), zero)
    A = prime.advantages(torch.tensor([1.0, 0.0]), None, mask, 2)                       # outcome only
    valid = torch.tensor([1.0, -1.0, -1.0])
    expected = (valid - valid.mean()) / valid.std()
    torch.testing.assert_close(A[mask.bool()], expected)


def test_coefficients_switch_sources_off():
    torch.manual_seed(0)
    mask, process, outcomes = torch.ones(4, 3), torch.randn(4, 3), torch.tensor([1.0, 0, 1, 0])
    torch.testing.assert_close(prime.advantages(outcomes, process, mask, 4, process_coef=0.0), prime.advantages(outcomes, None, mask, 4))
    only = prime.advantages(outcomes, process, mask, 4, outcome_coef=0.0, whiten=False)
    torch.testing.assert_close(only, prime.rloo(process, mask, 4))


def test_suffix_sum_is_the_discounted_sum():
    x = torch.randn(3, 5, dtype=torch.float64)
    for gamma in (1.0, 0.9, 0.0):
        brute = torch.stack([sum(gamma ** (k - t) * x[:, k] for k in range(t, 5)) for t in range(5)], 1)
        torch.testing.assert_close(prime.suffix_sum(x, gamma), brute)
