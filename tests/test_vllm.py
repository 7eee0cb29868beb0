"""
vLLM for real; its CPU build is enough: sampling, new weights for tied and untied models,
log-probabilities against the trainer's, and the scripts from end to end.

tests/run.sh makes an environment for it.
"""

import json

import pytest
import torch
from conftest import read_jsonl, run, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

pytestmark = pytest.mark.slow

# vLLM supports one engine per process, so each check is a process of its own.
CHECK_ENGINE = '''
import json
import os
import sys

import torch

sys.path.insert(0, ".")
from engine import make_engine
from lib.answers import Request
from lib.pretrained import load_tokenizer, render_prompt
from lib.run import setup_distributed
from model import full_tensors, load_model, pack, save_model, token_logprobs

folder, tokenizer_folder, saved = sys.argv[1:4]
cpu = torch.device("cpu")
setup_distributed(cpu)
tokenizer = load_tokenizer(tokenizer_folder)
model = load_model(folder, cpu, torch.float32)
engine = make_engine("vllm", folder, tokenizer, cpu, torch.float32, 128, colocated=True)
prompts = [
    render_prompt(tokenizer, [dict(role="user", content=text)]) for text in ("10?", "123+45?", "7?")
]


def sampled(temperature):
    """[(request, answer)] for four seeds per prompt."""
    requests = []
    for prompt in prompts:
        for seed in range(4):
            requests.append(Request(prompt, seed, temperature, max_tokens=24))
    found = dict(engine.sample(requests))
    return [(request, found[number]) for number, request in enumerate(requests)]


def largest_difference(pairs):
    """Of the engine's log-probabilities and the trainer's."""
    differences = []
    for request, answer in pairs:
        tokens = request.prompt + answer.tokens
        scored = [0] * len(request.prompt) + [1] * len(answer.tokens)
        with torch.no_grad():
            batch = pack([(tokens, scored)], cpu)
            ours = token_logprobs(model, batch, request.temperature)
        differences.append((ours - torch.tensor(answer.logprobs)).abs().max().item())
    return max(differences)


report = {}
report["before, temperature 1"] = largest_difference(sampled(1.0))
report["before, temperature 0.7"] = largest_difference(sampled(0.7))

# The trainer has other weights now; then the engine gets them.
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
model.reshard()
report["stale weights"] = largest_difference(sampled(1.0))
engine.sleep()
engine.wake_up(full_tensors(model))
first = sampled(0.7)
report["new weights"] = largest_difference(first)
again = sampled(0.7)
report["same seeds, same answers"] = all(
    one.tokens == other.tokens for (_, one), (_, other) in zip(first, again)
)

# More prompt tokens than fit into a pass, each request with a seed.
long_prompts = [Request(prompts[0] * 8, seed, max_tokens=4) for seed in range(100)]
report["prompt tokens"] = sum(len(request.prompt) for request in long_prompts)
found = dict(engine.sample(long_prompts))
((_, alone),) = engine.sample(long_prompts[-1:])
report["long prompts"] = len(found) == 100 and found[99].tokens == alone.tokens

requests = [Request(prompt, 0, temperature=0.0, max_tokens=24) for prompt in prompts]
greedy = dict(engine.sample(requests))
save_model(model, tokenizer, saved, torch.float32, folder)
hf_engine = make_engine("hf", saved, tokenizer, cpu, torch.float32, 128)
report["greedy as transformers"] = all(
    answer.tokens == greedy[number].tokens and answer.finish_reason == greedy[number].finish_reason
    for number, answer in hf_engine.sample(requests)
)
print("REPORT " + json.dumps(report), flush=True)
engine.close()
'''


def untied_model(folder, tokenizer):
    """A small random model whose head is not its embeddings."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_and_weight_sync(tmp_path, guesser, tied):
    """Engine and trainer agree to 1e-4 per token, before and after new weights; stale ones show."""
    folder = guesser
    if not tied:
        folder = tmp_path / "untied"
        untied_model(folder, AutoTokenizer.from_pretrained(guesser))

    script = tmp_path / "check.py"
    script.write_text(CHECK_ENGINE)
    output = run(script, folder, guesser, tmp_path / "saved").stdout
    report = json.loads(output.split("REPORT ")[1].splitlines()[0])
    assert report["before, temperature 1"] < 1e-4
    assert report["before, temperature 0.7"] < 1e-4
    assert report["stale weights"] > 1e-2
    assert report["new weights"] < 1e-4
    assert report["same seeds, same answers"]
    assert report["prompt tokens"] > 5000 and report["long prompts"]
    assert report["greedy as transformers"]


@pytest.mark.parametrize("processes", [1, 2])
def test_prime_with_vllm(tmp_path, guesser, guess_data, processes):
    """As under torchrun on GPUs: an engine per rank, new weights before the next rollout."""
    torchrun(
        processes,
        "prime.py",
        f"--data={guess_data[1]}",
        f"--model={guesser}",
        f"--out_dir={tmp_path}",
        "--engine=vllm",
        "--device=cpu",
        "--prompts_per_step=6",
        "--max_prompt_tokens=40",
        "--max_tokens=12",
        "--batch_rows=12",
        "--prm_batch_rows=12",
        "--max_steps=3",
        "--beta=1",
        "--learning_rate=1e-3",
        "--prm_learning_rate=1e-3",
        "--save_interval=0",
        "--grade_workers=1",
        timeout=400,
    )
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(rows) == 3 and all(row["mismatch"] < 1e-4 for row in rows)
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


def test_generate_with_vllm(tmp_path, guesser, guess_data):
    run(
        "generate.py",
        f"--model={guesser}",
        f"--data={guess_data[1]}",
        f"--out_dir={tmp_path}",
        "--system_prompt=",
        "--sft_system_prompt=",
        "--engine=vllm",
        "--temperature=1.0",
        "--max_tokens=24",
        # More than the model's 512 positions.
        "--max_prompt_tokens=600",
        "--grade_workers=1",
        timeout=400,
    )
    rows = read_jsonl(tmp_path / "samples.jsonl")
    samples = {(row["problem_id"], row["sample"]) for row in rows}
    assert len(samples) == len(rows) == 80
    assert 0 < sum(row["correct"] for row in rows) < 80


STOP = "77\\boxed"


def greedy_answers(path):
    """{problem: (response, how it ended)}"""
    rows = [row for row in read_jsonl(path) if row["mode"] == "greedy"]
    return {row["problem_id"]: (row["response"], row["finish_reason"]) for row in rows}


def check_stop_string(rows):
    """Some answers end at the stop string, and none goes on after it."""
    ended = [row for row in rows if row["response"].endswith(STOP)]
    assert 0 < len(ended) < len(rows)
    assert all(row["finish_reason"] == "stop" for row in ended)
    assert not any(STOP in row["response"][: -len(STOP)] for row in rows)


def test_evaluate_with_vllm(tmp_path, guesser, guess_data):
    """Two processes, two models one after the other; greedy answers are those of transformers."""
    settings = [
        f'--benchmarks=["{guess_data[1]}"]',
        "--max_tokens=12",
        "--max_prompt_tokens=40",
        "--device=cpu",
        "--grade_workers=1",
        "--benchmark_stop={'problems': '77\\\\boxed'}",
    ]
    torchrun(
        2,
        "evaluate.py",
        # The same folder under two names.
        f'--models=["{guesser}", "{guesser}/../model"]',
        *settings,
        "--engine=vllm",
        "--samples=1",
        f"--out_dir={tmp_path}/vllm",
        timeout=400,
    )
    run(
        "evaluate.py",
        f'--models=["{guesser}"]',
        *settings,
        "--engine=hf",
        f"--out_dir={tmp_path}/hf",
    )

    (hf_file,) = (tmp_path / "hf").glob("*.responses.jsonl")
    vllm_files = list((tmp_path / "vllm").glob("*.responses.jsonl"))
    assert len(vllm_files) == 2
    assert len(read_jsonl(hf_file)) == 40
    check_stop_string(read_jsonl(hf_file))
    for file in vllm_files:
        assert len(read_jsonl(file)) == 80
        check_stop_string(read_jsonl(file))
        assert greedy_answers(file) == greedy_answers(hf_file)


CHECK_TOOL = """
import sys

import torch

sys.path.insert(0, ".")
from engine import make_engine
from lib import tools
from lib.answers import Request
from lib.pretrained import load_tokenizer, render_prompt

tokenizer = load_tokenizer(sys.argv[1])
requests = []
for k in range(10, 30):
    prompt = render_prompt(tokenizer, [dict(role="user", content=f"{k}?")])
    requests.append(Request(prompt, k, temperature=0.0, max_tokens=100))


def answers(engine, at_a_time):
    tools.CONVERSATIONS = at_a_time
    return dict(tools.sample(engine, tokenizer, requests, tools.Tool(rounds=3)))


cpu = torch.device("cpu")
hf = answers(make_engine("hf", sys.argv[1], tokenizer, cpu, torch.float32, 256), 4096)
engine = make_engine("vllm", sys.argv[1], tokenizer, cpu, torch.float32, 256)
for at_a_time in (4096, 3):
    for number, answer in answers(engine, at_a_time).items():
        expected = hf[number]
        assert answer.tokens == expected.tokens
        assert answer.mask == expected.mask
        assert answer.finish_reason == expected.finish_reason
        for one, other in zip(answer.logprobs, expected.logprobs):
            assert abs(one - other) < 1e-3
calls = sum("```output" in answer.text for answer in hf.values())
print("CALLS", calls, flush=True)
engine.close()
"""


def test_the_tool_with_vllm(tmp_path, caller):
    """The same conversations as with transformers' engine."""
    script = tmp_path / "tool.py"
    script.write_text(CHECK_TOOL)
    output = run(script, caller).stdout
    assert int(output.split("CALLS ")[1].split()[0]) >= 15


STOPS = """
import sys

import torch

sys.path.insert(0, ".")
from engine import make_engine
from lib.answers import Request
from lib.pretrained import load_tokenizer

tokenizer = load_tokenizer(sys.argv[1])
cpu = torch.device("cpu")
engine = make_engine("vllm", sys.argv[1], tokenizer, cpu, torch.float32, 400)
requests = [Request([5], seed, max_tokens=300, stop="\\n") for seed in range(8)]
for _, answer in engine.sample(requests):
    text = tokenizer.decode(answer.tokens)
    print("ENDED", answer.finish_reason, "\\n" in text, text.endswith("\\n"), flush=True)
engine.close()
"""


def test_stop_strings_of_a_tokenizer_that_opens_as_another(tmp_path, world):
    """As DeepSeekMath's, which vLLM by itself takes for Llama's: then it sees no new line."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(f"{world}/init")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | dict(tokenizer_class="LlamaTokenizerFast")
    path.write_text(json.dumps(settings))

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)

    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    lines = [line.split() for line in run(script, folder).stdout.splitlines() if "ENDED" in line]
    assert len(lines) == 8
    assert ["ENDED", "string", "True", "True"] in lines
    for _, reason, has_new_line, ends_with_it in lines:
        assert (reason == "string") == (has_new_line == "True") == (ends_with_it == "True")
