"""evaluate.py --prm: best-of-k against all subsets, the PRM's log-ratios against transformers."""

import itertools
import json
import random
import statistics

import pytest
import torch
from conftest import call, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import lib.ranking
from configurator import UserError
from lib.prm_folder import write_prm_file
from lib.problems import Problem
from lib.ranking import check_models, find_reference, rank_answers
from lib.scores import best_metrics, best_of_k


@pytest.mark.parametrize("ranks", [[3, 1, 2, 0, 5], [1, 1, 2, 2, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_best_of_k_is_the_mean_over_all_subsets(ranks, k):
    right = [1.0, 0.0, 0.25, 1.0, 0.0]
    expected = []
    for subset in itertools.combinations(range(5), k):
        best = max(ranks[i] for i in subset)
        tied = [right[i] for i in subset if ranks[i] == best]
        expected.append(sum(tied) / len(tied))
    assert best_of_k(ranks, right, k) == pytest.approx(statistics.mean(expected))


def row(value, correct):
    return dict(prm=dict(mean=value, min=-1.0), correct=correct)


def test_metrics_of_ranked_rows():
    answers = [[row(0.1, False), row(0.2, True)], [row(0.5, False), row(None, True)], []]
    metrics = best_metrics(answers)
    assert metrics["bon@1"] == [0.5, 0.5, 0]
    assert metrics["bon@2"] == [1.0, 0.0, 0]  # what has no rank comes last
    assert metrics["bon_min@2"] == [0.5, 0.5, 0]  # a tie is shared
    assert set(metrics) == {"bon@1", "bon@2", "bon_min@1", "bon_min@2"}
    assert best_metrics([[dict(correct=True)]]) == {}


def test_all_samples_compete_whatever_their_number():
    metrics = best_metrics([[row(0.1, False), row(0.2, False), row(0.3, True)]])
    assert metrics["bon@2"] == [pytest.approx(2 / 3)]  # in two of the three pairs
    assert metrics["bon@3"] == [1.0]


# ----------------------------------------------------------------------------------------------
# models


@pytest.fixture(scope="module")
def prm(guesser, tmp_path_factory):
    """A PRM: the small model with other weights. Its reference is the small model."""
    folder = tmp_path_factory.mktemp("ranking") / "prm"
    model = AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(guesser).save_pretrained(folder)
    write_prm_file(folder, str(guesser), 1.0)
    return folder


def problem(text):
    return Problem(id=text, text=text, messages=[dict(role="user", content=text)],
                   ability="math", ground_truth="1")  # fmt: skip


def test_ranks_are_those_of_transformers(guesser, prm, monkeypatch):
    draw = random.Random(0)
    pairs = []
    for number in range(7):
        digits = "".join(draw.choice("0123456789") for _ in range(1 + 3 * number))
        reason = "stop" if number % 2 else "length"
        pairs.append((dict(response=digits, finish_reason=reason, correct=True), problem("1+1?")))
    # Batches of several lengths.
    monkeypatch.setattr(lib.ranking, "PASS_TOKENS", 60)
    cpu = torch.device("cpu")
    rank_answers(pairs, str(prm), str(guesser), cpu, torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(guesser)
    models = [AutoModelForCausalLM.from_pretrained(path).float() for path in (prm, guesser)]
    for stored, asked in pairs:
        prompt = tokenizer.apply_chat_template(
            asked.messages, add_generation_prompt=True, tokenize=False
        )
        end = tokenizer.eos_token if stored["finish_reason"] == "stop" else ""
        start = len(tokenizer(prompt).input_ids)
        tokens = torch.tensor([tokenizer(prompt + stored["response"] + end).input_ids])
        ratios = []
        for model in models:
            logprobs = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
            ratios.append(logprobs.gather(-1, tokens[0, start:, None])[:, 0])
        log_ratio = ratios[0] - ratios[1]
        assert stored["prm"]["mean"] == pytest.approx(log_ratio.mean().item(), abs=1e-5)
        assert stored["prm"]["min"] == pytest.approx(log_ratio.min().item(), abs=1e-5)


def test_answers_are_ranked_once_per_prm(guesser, prm, monkeypatch):
    pairs = [(dict(response="12", finish_reason="stop", correct=True), problem("1+1?"))]
    cpu = torch.device("cpu")
    rank_answers(pairs, str(prm), str(guesser), cpu, torch.float32)
    first = dict(pairs[0][0]["prm"])

    loaded = []
    monkeypatch.setattr(lib.ranking, "answer_logprobs", lambda path, *_: loaded.append(path) or [])
    rank_answers(pairs, str(prm), str(guesser), cpu, torch.float32)
    assert pairs[0][0]["prm"] == first
    assert loaded == []
    monkeypatch.undo()

    # The same two models, exchanged.
    rank_answers(pairs, str(guesser), str(prm), cpu, torch.float32)
    assert pairs[0][0]["prm"]["mean"] == pytest.approx(-first["mean"])


def changed_copy(source, folder, change):
    """A model in `folder`: that of `source` after change(model)."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def test_a_prm_that_was_trained_again_ranks_again(guesser, prm, tmp_path):
    pairs = [(dict(response="12", finish_reason="stop", correct=True), problem("1+1?"))]
    cpu = torch.device("cpu")
    path = changed_copy(prm, tmp_path / "prm", lambda model: None)
    rank_answers(pairs, path, str(guesser), cpu, torch.float32)
    assert pairs[0][0]["prm"]["mean"] != 0

    # Now it is its own reference, under the old name.
    changed_copy(guesser, tmp_path / "prm", lambda model: None)
    rank_answers(pairs, path, str(guesser), cpu, torch.float32)
    assert pairs[0][0]["prm"]["mean"] == 0


def test_a_rank_that_is_not_finite_is_refused(guesser, tmp_path):
    path = changed_copy(
        guesser, tmp_path / "prm", lambda model: model.lm_head.weight.fill_(torch.nan)
    )
    pairs = [(dict(response="12", finish_reason="stop", correct=True), problem("1+1?"))]
    with pytest.raises(UserError, match="not finite"):
        rank_answers(pairs, path, str(guesser), torch.device("cpu"), torch.float32)


def test_models_are_looked_at_before_any_work(guesser, prm, tmp_path):
    check_models(str(prm), str(guesser))
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        check_models(nowhere, str(guesser))
    with pytest.raises(UserError, match="nowhere"):
        check_models(str(prm), nowhere)

    # Tokens that the PRM's tokenizer writes, and that neither model has.
    path = changed_copy(prm, tmp_path / "prm", lambda model: None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<word {number}>" for number in range(1000)])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="has fewer tokens than the tokenizer"):
        check_models(path, str(guesser))


def test_there_must_be_samples_to_rank(guesser, prm, guess_data):
    arguments = [f"--models=['{guesser}']", f"--benchmarks=['{guess_data[1]}']", f"--prm={prm}"]
    with pytest.raises(UserError, match="ranks samples: set --samples"):
        call(evaluate, *arguments)


def test_what_is_too_long_or_empty_has_no_rank(guesser, prm):
    pairs = []
    for response, reason in (("1" * 3000, "length"), ("", "length"), ("1", "stop")):
        answer = dict(response=response, finish_reason=reason, correct=True)
        pairs.append((answer, problem("1+1?")))
    rank_answers(pairs, str(prm), str(guesser), torch.device("cpu"), torch.float32)
    assert [stored["prm"]["mean"] is None for stored, _ in pairs] == [True, True, False]


def test_a_prm_needs_a_reference(guesser, prm):
    assert find_reference(str(prm), None) == str(guesser)
    assert find_reference(str(prm), "other/model") == "other/model"
    assert find_reference(str(guesser), "other/model") == "other/model"
    with pytest.raises(UserError, match=r"has no prm\.json"):
        find_reference(str(guesser), None)


def test_stored_responses_are_ranked_without_an_engine(guesser, prm, guess_data, tmp_path):
    arguments = [
        f"--models=['{guesser}']",
        f"--benchmarks=['{guess_data[1]}']",
        "--max_problems=6",
        "--samples=3",
        "--temperature=1.0",
        "--max_tokens=12",
        "--engine=hf",
        "--device=cpu",
        "--grade_workers=1",
        f"--out_dir={tmp_path}",
    ]
    call(evaluate, *arguments)
    before = json.loads((tmp_path / "results.json").read_text())
    call(evaluate, *arguments, f"--prm={prm}")
    after = json.loads((tmp_path / "results.json").read_text())

    (old,) = next(iter(before["models"].values())).values()
    (new,) = next(iter(after["models"].values())).values()
    added = {"bon@1", "bon@2", "bon@3", "bon_min@1", "bon_min@2", "bon_min@3"}
    assert new["score"].keys() - old["score"].keys() == added
    assert {name: new["score"][name] for name in old["score"]} == old["score"]
    # The best of one is a sample like all others.
    assert new["values"]["bon@1"] == pytest.approx(new["values"]["sampled"])
    report = (tmp_path / "results.md").read_text()
    assert "bon@3, minimum" in report
    assert f"ranked by {prm} against {guesser}" in report
    (path,) = tmp_path.glob("*.responses.jsonl")
    for stored in read_jsonl(path):
        if stored["mode"] == "sampled":
            assert stored["prm"]["prm"] == str(prm)
        else:
            assert "prm" not in stored

    # The ranks stay in the file, but a report without a PRM does not speak of them.
    call(evaluate, *arguments)
    again = json.loads((tmp_path / "results.json").read_text())
    (last,) = next(iter(again["models"].values())).values()
    assert last["score"] == old["score"]
