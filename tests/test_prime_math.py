"""prime.py's formulas against numbers of the reference code, worked examples and brute force."""

import json

import pytest
import torch
from conftest import ROOT

import prime

# Inputs and outputs of the functions of github.com/PRIME-RL/PRIME and of verl's recipe.
REFERENCE = ROOT / "tests/reference/prime_numeric_example.json"
OPTIONS = ["default", "no_norm", "norm_on_2_ranks", "gamma_process_0.9", "granularity_whole"]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def example():
    return json.loads(REFERENCE.read_text())


@pytest.fixture(scope="module")
def inputs(example):
    return {name: torch.tensor(value) for name, value in example["inputs"].items()}


@pytest.fixture(params=OPTIONS)
def case(request, example):
    """One entry of the original's expectations."""
    return example["expected"]["original"][request.param]


def process_of(case, inputs):
    """Process rewards with the options of a case; each rank of the original had its own divisor."""
    options = case["options"]
    normalize = "batch" if options["batch_norm"] else None
    ranks = options["norm_ranks"]
    parts = zip(
        inputs["prm_logprobs"].chunk(ranks),
        inputs["ref_logprobs"].chunk(ranks),
        inputs["response_mask"].chunk(ranks),
    )
    granularity = options["granularity"]
    return torch.cat([prime.process_rewards(*part, granularity, normalize) for part in parts])


def outcome_rewards(inputs):
    """(rewards, mask) of the outcome: on the last token of each row."""
    end = prime.last_token(inputs["response_mask"])
    return torch.where(end, inputs["acc"][:, None], 0.0), end


def assert_close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected), **CLOSE)


# ----------------------------------------------------------------------------------------------
# the reference code's numbers


def test_options_are_all_of_the_reference(example):
    assert sorted(example["expected"]["original"]) == sorted(OPTIONS)


def test_raw_scores_are_the_references(case, inputs):
    raw = prime.process_rewards(
        inputs["prm_logprobs"],
        inputs["ref_logprobs"],
        inputs["response_mask"],
        case["options"]["granularity"],
        normalize=None,
    )
    assert_close(raw, case["raw_scores"])


def test_process_rewards_are_the_references(case, inputs):
    assert_close(process_of(case, inputs), case["process_rewards"])


def test_divisors_are_the_references(case, inputs):
    """One per rank; given to process_rewards they make the same rewards."""
    options = case["options"]
    if not options["batch_norm"]:
        assert torch.equal(process_of(case, inputs), torch.tensor(case["raw_scores"]))
        return
    ranks = options["norm_ranks"]
    divisors = []
    for raw in torch.tensor(case["raw_scores"]).chunk(ranks):
        divisors.append(float(prime.suffix_sum(raw).abs().max() + 1e-6))
    assert divisors == pytest.approx(case["norm_divisor_per_rank"], rel=1e-4)

    parts = zip(
        inputs["prm_logprobs"].chunk(ranks),
        inputs["ref_logprobs"].chunk(ranks),
        inputs["response_mask"].chunk(ranks),
        divisors,
    )
    again = []
    for prm, ref, mask, divisor in parts:
        rewards = prime.process_rewards(prm, ref, mask, options["granularity"], divisor=divisor)
        again.append(rewards)
    torch.testing.assert_close(torch.cat(again), process_of(case, inputs), **CLOSE)


def test_returns_are_the_references(case, inputs, example):
    n = example["config"]["n_samples"]
    mask = inputs["response_mask"]
    process = process_of(case, inputs)
    got = prime.rloo(process, mask, n, case["options"]["gamma_process"])
    assert_close(torch.where(mask.bool(), got, 0.0), case["process_returns"])

    outcome, end = outcome_rewards(inputs)
    got = prime.rloo(outcome, end, n, case["options"]["gamma_outcome"])
    assert_close(torch.where(mask.bool(), got, 0.0), case["outcome_returns"])


def test_leave_one_out_rewards_are_the_references(case, inputs, example):
    """They are the returns at gamma 0."""
    n = example["config"]["n_samples"]
    process = process_of(case, inputs)
    got = prime.rloo(process, inputs["response_mask"], n, 0.0)
    assert_close(got, case["process_leave_one_out"])

    outcome, end = outcome_rewards(inputs)
    assert_close(prime.rloo(outcome, end, n, 0.0), case["outcome_leave_one_out"])


def advantages_of(case, inputs, example, **options):
    return prime.advantages(
        inputs["acc"],
        process_of(case, inputs),
        inputs["response_mask"],
        example["config"]["n_samples"],
        process_gamma=case["options"]["gamma_process"],
        outcome_gamma=case["options"]["gamma_outcome"],
        **options,
    )


def test_advantages_are_the_references(case, inputs, example):
    assert_close(advantages_of(case, inputs, example, whiten=False), case["returns"])
    assert_close(advantages_of(case, inputs, example), case["advantages"])


def test_ppo_loss_and_gradient_are_the_references(case, example, inputs):
    if "ppo" not in case:
        # The reference has no numbers for these: both change what came before the loss alone.
        assert case["options"]["granularity"] == "whole" or case["options"]["gamma_process"] != 1
        return
    want = case["ppo"]["sequence_mean"]
    clip = example["config"]["clip_ratio"]
    A = advantages_of(case, inputs, example)
    new = inputs["new_logprobs"].clone().requires_grad_()
    old = inputs["old_logprobs"]
    mask = inputs["response_mask"]

    loss, stats = prime.ppo_loss(new, old, A, mask, clip)
    loss.backward()
    assert loss.item() == pytest.approx(want["loss"], rel=1e-4)
    assert stats["clipfrac"].item() == pytest.approx(want["clipfrac"], rel=1e-4)
    assert stats["approx_kl"].item() == pytest.approx(want["ppo_kl"], rel=1e-4)
    assert_close(new.grad, want["grad_new_logprobs"])

    rows = []
    for i in range(len(mask)):
        one = slice(i, i + 1)
        loss, _ = prime.ppo_loss(new[one], old[one], A[one], mask[one])
        rows.append(loss.item())
    assert rows == pytest.approx(want["per_response_loss"], rel=1e-4, abs=1e-5)


def test_recipe_numbers(example, inputs):
    """The later recipe: no reward on the last token, beta inside (it cancels), coefficients 5."""
    expected = example["expected"]["recipe"]["default"]
    mask = inputs["response_mask"]
    ref = inputs["ref_logprobs"]
    prm = torch.where(prime.last_token(mask), ref, inputs["prm_logprobs"])
    process = prime.process_rewards(prm, ref, mask)
    # The recipe adds its 1e-6 to a divisor that has beta inside: 1e-6 / beta here.
    close = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(process, torch.tensor(expected["process_rewards"]), **close)
    A = prime.advantages(inputs["acc"], process, mask, 4, 5.0, 5.0)
    torch.testing.assert_close(A, torch.tensor(expected["advantages"]), **close)


def test_prm_numbers(example, inputs):
    want = example["expected"]["prm"]
    prm = inputs["prm_logprobs"].clone().requires_grad_()
    ref = inputs["ref_logprobs"]
    mask = inputs["response_mask"]
    outcomes = inputs["acc"]

    loss = prime.prm_loss(prm, ref, mask, outcomes, example["config"]["beta"])
    loss.backward()
    assert loss.item() == pytest.approx(want["ce_loss"], rel=1e-5)
    assert_close(prm.grad, want["grad_prm_logprobs"])

    scores = prime.process_rewards(prm.detach(), ref, mask, normalize=None).sum(-1)
    assert_close(scores, want["sequence_log_ratio"])
    accuracy = prime.pair_accuracy(scores, outcomes, 4).item()
    assert accuracy == pytest.approx(want["pair_accuracy"], rel=1e-5)


def test_filter_numbers(example):
    given = example["filter"]["inputs"]
    low = given["accuracy_lower_bound"]
    high = given["accuracy_upper_bound"]
    kept = [i for i, outcomes in enumerate(given["acc"]) if prime.keep_group(outcomes, low, high)]
    assert kept == example["filter"]["expected"]["kept_groups_accuracy_only"]


# ----------------------------------------------------------------------------------------------
# by hand and by brute force


def test_the_filter_includes_both_ends():
    """1/5 and 4/5 in float32."""
    assert prime.keep_group([1, 0, 0, 0, 0])
    assert prime.keep_group([1, 1, 1, 1, 0])
    assert not prime.keep_group([1, 1, 1, 1])


@pytest.mark.parametrize("junk", [1e3, float("-inf"), float("nan")])
@pytest.mark.parametrize("estimator", list(prime.ESTIMATORS.values()))
def test_junk_outside_the_mask_does_not_matter(inputs, junk, estimator):
    mask = inputs["response_mask"]

    def everything(filler):
        def fill(x):
            return torch.where(mask.bool(), x, filler)

        prm = fill(inputs["prm_logprobs"]).requires_grad_()
        ref = fill(inputs["ref_logprobs"])
        new = fill(inputs["new_logprobs"]).requires_grad_()
        old = fill(inputs["old_logprobs"])
        process = prime.process_rewards(prm.detach(), ref, mask)
        A = prime.advantages(
            inputs["acc"], fill(process), mask, 4, process_gamma=0.9, estimator=estimator
        )
        loss, stats = prime.ppo_loss(new, old, fill(A), mask)
        cross_entropy = prime.prm_loss(prm, ref, mask, inputs["acc"])
        (loss + cross_entropy).backward()
        return [process, A, loss, *stats.values(), cross_entropy, new.grad, prm.grad]

    for clean, dirty in zip(everything(0.0), everything(junk)):
        torch.testing.assert_close(clean, dirty, rtol=0, atol=0)


def test_rloo_of_outcomes_by_hand():
    got = prime.rloo(torch.tensor([[1.0], [0], [0], [1]]), torch.ones(4, 1), 4)
    torch.testing.assert_close(got.squeeze(-1), torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))


def test_rloo_of_process_rewards_by_hand():
    """Two samples, 2 tokens and 1: the row means are 2 and 5, so rewards become 2 r_t - 7."""
    rewards = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    got = prime.rloo(rewards, mask, 2, gamma=0.5)
    torch.testing.assert_close(got, torch.tensor([[-5 + 0.5 * -1, -1], [3, 0]]))


def test_rloo_is_the_equation_of_its_docstring():
    torch.manual_seed(0)
    K = 3
    rewards = torch.randn(2 * K, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).repeat(2, 1)
    got = prime.rloo(rewards, mask, K, gamma=0.0)
    for i in range(2 * K):
        group = range(i // K * K, i // K * K + K)
        means = {j: rewards[j][mask[j].bool()].mean() for j in group}
        others = sum(means[j] for j in group if j != i) / (K - 1)
        for t in range(int(mask[i].sum())):
            r = rewards[i, t]
            torch.testing.assert_close(got[i, t], (r - others) + (r - means[i]) / (K - 1))


@pytest.mark.parametrize("estimator", list(prime.ESTIMATORS.values()))
def test_what_no_estimator_takes(estimator):
    ones = torch.ones(2, 1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        estimator(ones, ones, 1)
    with pytest.raises(ValueError, match="not a multiple"):
        estimator(torch.ones(3, 1), torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match="no valid token"):
        estimator(torch.ones(2, 2), torch.tensor([[1, 1], [0, 0]]), 2)


def test_unknown_granularity():
    ones = torch.ones(2, 1)
    with pytest.raises(ValueError, match="newline"):
        prime.process_rewards(ones, ones, ones, granularity="newline")


def test_other_estimators_of_outcomes_by_hand():
    """Outcomes 1 0 0 1 and 1 1 1 0: means 1/2 and 3/4, standard deviations 0.577 and 1/2."""
    outcomes = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0])[:, None]
    mask = torch.ones(8, 1)
    centred = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75])[:, None]
    torch.testing.assert_close(prime.dr_grpo(outcomes, mask, 4), centred)

    std = torch.tensor([3**-0.5] * 4 + [0.5] * 4)[:, None]
    expected = centred / std
    torch.testing.assert_close(prime.grpo(outcomes, mask, 4), expected, rtol=1e-4, atol=1e-5)

    whole_batch = outcomes - 5 / 8
    torch.testing.assert_close(prime.reinforce(outcomes, mask, 4), whole_batch)


def test_other_estimators_of_process_rewards_by_hand():
    """Two samples, 2 tokens and 1, rewards 1 3 and 5: the group's mean is 3, its deviation 2."""
    rewards = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    summed = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(prime.dr_grpo(rewards, mask, 2), summed)
    torch.testing.assert_close(prime.reinforce(rewards, mask, 2), summed)
    torch.testing.assert_close(prime.grpo(rewards, mask, 2), summed / 2, rtol=1e-5, atol=1e-5)


def test_advantages_use_the_estimator_and_report_what_it_returned():
    torch.manual_seed(0)
    mask = torch.ones(4, 3)
    process = torch.randn(4, 3)
    outcomes = torch.tensor([1.0, 0, 1, 0])
    stats = {}
    A = prime.advantages(
        outcomes, process, mask, 4, whiten=False, estimator=prime.dr_grpo, stats=stats
    )
    returns = prime.dr_grpo(process, mask, 4)
    torch.testing.assert_close(A, returns + torch.tensor([0.5, -0.5, 0.5, -0.5])[:, None])
    assert stats["outcome_return"] == pytest.approx(0.5)
    assert stats["process_return"] == pytest.approx(returns.abs().mean().item())


def test_no_contrast_and_rows_of_one_token():
    mask = torch.tensor([[1, 0], [1, 1]])
    zero = torch.zeros(2, 2)
    assert torch.equal(prime.process_rewards(zero, zero, mask), zero)  # 0 / 1e-6, not NaN
    assert torch.equal(prime.advantages(torch.ones(2), zero, mask, 2), zero)

    outcome_only = prime.advantages(torch.tensor([1.0, 0.0]), None, mask, 2)
    valid = torch.tensor([1.0, -1.0, -1.0])
    expected = (valid - valid.mean()) / valid.std()
    torch.testing.assert_close(outcome_only[mask.bool()], expected)


def test_coefficients_switch_sources_off():
    torch.manual_seed(0)
    mask = torch.ones(4, 3)
    process = torch.randn(4, 3)
    outcomes = torch.tensor([1.0, 0, 1, 0])

    without_process = prime.advantages(outcomes, process, mask, 4, process_coef=0.0)
    torch.testing.assert_close(without_process, prime.advantages(outcomes, None, mask, 4))
    only_process = prime.advantages(outcomes, process, mask, 4, outcome_coef=0.0, whiten=False)
    torch.testing.assert_close(only_process, prime.rloo(process, mask, 4))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_suffix_sum_is_the_discounted_sum(gamma):
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(5):
        for k in range(t, 5):
            expected[:, t] += gamma ** (k - t) * x[:, k]
    torch.testing.assert_close(prime.suffix_sum(x, gamma), expected)
