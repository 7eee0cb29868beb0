"""engine.py without vLLM: what transformers' engine samples; a third engine is one class."""

import importlib.util

import pytest
import torch
from conftest import call, message, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM

import engine as engines
import generate
from configurator import UserError
from engine import Engine, choose, make_engine
from lib.answers import Answer, Request
from lib.pretrained import load_tokenizer, render_prompt
from lib.tools import Tool, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(guesser):
    return load_tokenizer(str(guesser))


@pytest.fixture(scope="module")
def engine(guesser, tok):
    return make_engine("hf", str(guesser), tok, CPU, torch.float32, 128)


@pytest.fixture(scope="module")
def model(guesser):
    return AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32).requires_grad_(False)


def prompts(tok, *texts):
    return [render_prompt(tok, [message("user", text)]) for text in texts]


def answers(engine, requests):
    """In the order of the requests; an engine yields them as they finish."""
    found = dict(engine.sample(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[number] for number in range(len(requests))]


def model_logprobs(model, prompt, tokens, temperature=1.0):
    """Log-probabilities of an answer's tokens, by one pass over the whole."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------
# transformers' engine


def test_greedy_equals_transformers_generate(engine, model, tok):
    ids = prompts(tok, "10?", "12345?", "7?", "44?")
    requests = [Request(prompt, 0, temperature=0.0, max_tokens=24) for prompt in ids]
    for prompt, answer in zip(ids, answers(engine, requests)):
        whole = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=tok.pad_token_id,
        )
        assert answer.tokens == whole[0, len(prompt) :].tolist()
        ended = answer.tokens[-1] == tok.eos_token_id
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.mask == [1] * len(answer.tokens)


def test_logprobs_are_those_of_the_model(engine, model, tok):
    ids = prompts(tok, "10?", "12345?", "33?")
    requests = [Request(prompt, i, 0.7, max_tokens=24) for i, prompt in enumerate(ids)]
    for prompt, answer in zip(ids, answers(engine, requests)):
        want = model_logprobs(model, prompt, answer.tokens, temperature=0.7)
        torch.testing.assert_close(torch.tensor(answer.logprobs), want, atol=1e-4, rtol=0)


def test_samples_follow_the_model(engine, model, tok):
    """First tokens of 4,000 samples against the model's probabilities, by a chi-square test."""
    n = 4000
    prompt = prompts(tok, "10?")[0]
    p = (model(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).double()
    requests = [Request(prompt, seed, 2.0, max_tokens=1) for seed in range(n)]
    first = torch.tensor([answer.tokens[0] for answer in answers(engine, requests)])
    count = torch.bincount(first, minlength=len(p)).double()

    # Tokens that are expected less than five times count as one.
    common = p * n >= 5
    observed = torch.cat([count[common], count[~common].sum()[None]])
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()

    # Five standard deviations.
    freedom = int(common.sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_top_p_samples_from_the_nucleus(engine, model, tok):
    prompt = prompts(tok, "10?")[0]
    p = (model(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).double()
    sorted_p, order = p.sort(descending=True)
    size = int((sorted_p.cumsum(0) < 0.8).sum()) + 1
    nucleus = set(order[:size].tolist())

    requests = [Request(prompt, seed, 2.0, top_p=0.8, max_tokens=1) for seed in range(500)]
    first = {answer.tokens[0] for answer in answers(engine, requests)}
    assert first <= nucleus and len(first) > 1


@pytest.mark.parametrize("number, token", [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2)])
def test_a_number_falls_into_a_tokens_part_of_the_distribution(number, token):
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    tokens, logprobs = choose(logits, torch.tensor([number]).double(), 1.0, 1.0)
    assert tokens.tolist() == [token]
    assert logprobs[0] == pytest.approx(logits[0, token])


def test_a_sample_depends_on_its_seed_alone(engine, tok):
    ids = prompts(tok, *(f"{k}?" for k in range(10, 26)))
    requests = [Request(prompt, 100 + i, max_tokens=16) for i, prompt in enumerate(ids)]
    together = answers(engine, requests)
    alone = [answers(engine, [request])[0] for request in requests]
    assert [a.tokens for a in together] == [a.tokens for a in alone]

    seeds = [Request(ids[0], seed, max_tokens=16) for seed in range(30)]
    assert len({tuple(answer.tokens) for answer in answers(engine, seeds)}) > 2


def test_requests_of_all_kinds_in_several_windows(engine, tok, monkeypatch):
    """Each gets the answer that it gets alone."""
    monkeypatch.setattr(engines, "WINDOW", 5)
    requests = []
    for i, prompt in enumerate(prompts(tok, *(f"{k}?" for k in range(10, 22)))):
        requests.append(Request(prompt, i, temperature=float(i % 3), max_tokens=4 + i))
        requests.append(Request(prompt, i, top_p=0.9, max_tokens=24, stop="7\\boxed"))
    for request, answer in zip(requests, answers(engine, requests)):
        alone = answers(engine, [request])[0]
        assert (answer.tokens, answer.finish_reason) == (alone.tokens, alone.finish_reason)
    assert list(engine.sample([])) == []


def test_limits(engine, tok, monkeypatch):
    prompt = prompts(tok, "10?")[0]
    cut = answers(engine, [Request(prompt, 3, max_tokens=2)])[0]
    assert len(cut.tokens) == 2 and cut.finish_reason == "length"

    monkeypatch.setattr(engine, "max_model_len", len(prompt) + 3)
    cut = answers(engine, [Request(prompt, 3, temperature=2.0, max_tokens=50)])[0]
    assert len(cut.tokens) <= 3


def test_a_stop_string_that_begins_in_the_prompt_is_none(caller, tok):
    """What the model writes after the first half of the string is no call, and nothing is cut."""
    engine = make_engine("hf", str(caller), tok, CPU, torch.float32, 256)
    prompt = prompts(tok, "12?")[0]
    whole = answers(engine, [Request(prompt, 0, 0.0, max_tokens=60)])[0]
    stop = tok.decode(whole.tokens[3:7])
    assert stop in tok.decode(whole.tokens[:7]) and stop not in tok.decode(whole.tokens[5:])

    after_half = prompt + whole.tokens[:5]
    found = answers(
        engine,
        [
            Request(prompt, 0, 0.0, max_tokens=60, stop=stop),
            Request(after_half, 0, 0.0, max_tokens=55, stop=stop),
        ],
    )
    assert found[0].tokens == whole.tokens[:7] and found[0].finish_reason == "string"
    assert found[1].tokens == whole.tokens[5:]
    assert found[1].finish_reason == whole.finish_reason


def test_new_weights_and_the_old_ones_back(guesser, tok, model):
    engine = make_engine("hf", str(guesser), tok, CPU, torch.float32, 128)
    requests = [Request(prompt, 7, max_tokens=24) for prompt in prompts(tok, "10?", "31?")]
    before = answers(engine, requests)

    old = dict(model.named_parameters())
    engine.sleep()
    engine.wake_up((name, 0.5 * tensor) for name, tensor in old.items())
    assert answers(engine, requests) != before
    engine.sleep()
    engine.wake_up(iter(old.items()))
    assert answers(engine, requests) == before
    engine.close()


def test_no_vllm_is_said(guesser, tok):
    path = str(guesser)
    if importlib.util.find_spec("vllm"):
        assert make_engine("auto", path, tok, CPU, torch.float32, 64).name == "vllm"
        return
    with pytest.raises(UserError, match="requirements-gpu.txt"):
        make_engine("vllm", path, tok, CPU, torch.float32, 64)
    with pytest.raises(UserError, match="engine='sglang'"):
        make_engine("sglang", path, tok, CPU, torch.float32, 64)
    assert make_engine("auto", path, tok, CPU, torch.float32, 64).name == "hf"


# ----------------------------------------------------------------------------------------------
# a third engine


class TableEngine(Engine):
    """Looks answers up: {what stands in the prompt: the answer}; later entries go first."""

    def __init__(self, tokenizer, table):
        super().__init__("table", 4096, [tokenizer.eos_token_id])
        self.tokenizer = tokenizer
        self.table = table

    def sample(self, requests):
        for number, request in enumerate(requests):
            text = self.lookup(self.tokenizer.decode(request.prompt))
            tokens = self.tokenizer(text, add_special_tokens=False).input_ids
            if request.stop is not None and text.endswith(request.stop):
                yield number, Answer(tokens, [0.0] * len(tokens), "string")
            else:
                tokens = tokens + self.stop
                yield number, Answer(tokens, [0.0] * len(tokens), "stop")

    def lookup(self, prompt):
        found = [answer for question, answer in self.table.items() if question in prompt]
        return found[-1]

    def wake_up(self, weights):
        self.taken = dict(weights)


def test_a_third_engine(tok):
    engine = TableEngine(tok, {"1+1?": "\\boxed{2}", "2+2?": "\\boxed{4}"})
    requests = [Request(prompt, 0) for prompt in prompts(tok, "2+2?", "1+1?")]
    texts = {number: answer.text for number, answer in sample(engine, tok, requests)}
    assert texts == {0: "\\boxed{4}", 1: "\\boxed{2}"}

    engine.sleep()
    engine.wake_up(iter([("weight", torch.ones(2))]))
    assert list(engine.taken) == ["weight"]
    engine.close()


def test_a_third_engine_with_the_tool(tok):
    program = "```python\nprint(6 * 7)\n```\n```output\n"
    engine = TableEngine(tok, {"6*7?": program, "42\n```": "\\boxed{42}"})
    requests = [Request(prompt, 0) for prompt in prompts(tok, "6*7?")]
    ((_, answer),) = sample(engine, tok, requests, Tool(rounds=2))
    assert answer.text == program + "42\n```\\boxed{42}" and answer.finish_reason == "stop"


def test_a_third_engine_in_generate(tmp_path, tok, guesser, monkeypatch):
    table = {f"{k}?": f"\\boxed{{{k % 2}}}" for k in range(10, 20)}

    def make(kind, path, tokenizer, *_):
        return TableEngine(tokenizer, table)

    monkeypatch.setattr(generate, "make_engine", make)
    problems = [dict(problem=f"{k}?", ground_truth="1", problem_id=k) for k in range(10, 20)]
    call(
        generate,
        f"--data={write_jsonl(tmp_path / 'problems.jsonl', problems)}",
        f"--model={guesser}",
        f"--out_dir={tmp_path}",
        "--system_prompt=",
        "--samples_per_problem=1",
        "--grade_workers=1",
    )
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert {row["problem_id"]: row["correct"] for row in rows} == {
        k: k % 2 == 1 for k in range(10, 20)
    }
    assert len(read_jsonl(tmp_path / "sft.jsonl")) == 5
