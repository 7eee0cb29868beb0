"""vLLM for real (its CPU build is enough): sampling, weight sync of tied and untied models, log-probabilities against
transformers, two ranks with an engine each, prime.py, generate.py and evaluate.py from end to end. tests/run.sh gives it an environment."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from conftest import read_jsonl, run, torchrun

# One engine a process is what vLLM supports, so each check is a process of its own.
CHECK = '''
import os, sys, json, torch
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
sys.path.insert(0, ".")
import generate, sft, prime
folder, tokenizer_folder = sys.argv[1:3]
cpu = torch.device("cpu")
sft.setup_distributed(cpu)
tok = generate.load_tokenizer(tokenizer_folder)
net = sft.load_model(folder, cpu, torch.float32)
engine = generate.make_engine("vllm", folder, tok, cpu, torch.float32, 128, colocated=True)
prompts = [generate.render_prompt(tok, [dict(role="user", content=t)]) for t in ("10?", "123+45?", "7?")]

def differences(temperature):
    found = dict(engine.sample([(p, s, dict(temperature=temperature, max_tokens=24)) for p in prompts for s in range(4)]))
    out = []
    for i, answer in found.items():
        p = prompts[i // 4]
        with torch.no_grad():
            mine, = net(**sft.pack([(p + answer.tokens, [0] * len(p) + [1] * len(answer.tokens))], cpu), temperature=temperature)
        out.append((mine - torch.tensor(answer.logprobs)).abs().max().item())
    return max(out), {i: a.tokens for i, a in found.items()}

report = {}
for temperature in (1.0, 0.7):
    report[f"before {temperature}"] = differences(temperature)[0]
with torch.no_grad():
    for p in net.parameters():
        p.add_(0.02 * torch.randn_like(p))
net.reshard()
report["other weights"] = differences(1.0)[0]
prime.put_to_sleep(engine)
prime.hand_over(net, engine)
report["after"], first = differences(0.7)
report["same seeds, same samples"] = differences(0.7)[1] == first
asked = [(p, 0, dict(temperature=0.0, max_tokens=24)) for p in prompts]
greedy = dict(engine.sample(asked))
sft.save_model(net, tok, sys.argv[3], torch.float32, folder)
hf = generate.make_engine("hf", sys.argv[3], tok, cpu, torch.float32, 128)
report["greedy as transformers"] = all(a.tokens == greedy[i].tokens and a.finish_reason == greedy[i].finish_reason
                                       for i, a in hf.sample(asked))
print("REPORT " + json.dumps(report), flush=True)
engine.close()
'''


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_and_weight_sync(tmp_path, guesser, tied):
    """Engine and trainer agree to 1e-4 a token at temperature 1 and 0.7, before and after new weights; stale weights show."""
    folder = guesser
    if not tied:
        torch.manual_seed(1)
        folder, tok = tmp_path / "untied", AutoTokenizer.from_pretrained(guesser)
        config = Qwen2Config(vocab_size=len(tok), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    (tmp_path / "check.py").write_text(CHECK)
    out = run(tmp_path / "check.py", folder, guesser, tmp_path / "saved", timeout=280).stdout
    report = json.loads(next(line for line in out.splitlines() if line.startswith("REPORT "))[7:])
    assert max(report["before 1.0"], report["before 0.7"], report["after"]) < 1e-4
    assert report["other weights"] > 1e-2
    assert report["same seeds, same samples"] and report["greedy as transformers"]


@pytest.mark.parametrize("processes", [1, 2])
def test_prime_with_vllm(tmp_path, guesser, guess_data, processes):
    """prime.py as under torchrun on GPUs: an engine a rank, new weights in it before the next rollout."""
    torchrun(processes, "prime.py", f"--data={guess_data[1]}", f"--model={guesser}", "--engine=vllm", "--device=cpu", "--prompts_per_step=6",
             "--max_prompt_tokens=40", "--max_tokens=12", "--batch_rows=12", "--prm_batch_rows=12", "--max_steps=3", "--beta=1",
             "--learning_rate=1e-3", "--prm_learning_rate=1e-3", "--save_interval=0", "--grade_workers=1", f"--out_dir={tmp_path}", timeout=400)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(rows) == 3 and all(r["mismatch"] < 1e-4 for r in rows)
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


def test_generate_with_vllm(tmp_path, guesser, guess_data):
    run("generate.py", f"--model={guesser}", f"--data={guess_data[1]}", f"--out_dir={tmp_path}", "--system_prompt=", "--sft_system_prompt=",
        "--engine=vllm", "--temperature=1.0", "--max_tokens=24", "--max_prompt_tokens=600", "--grade_workers=1", timeout=400)   # has 512 positions
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len({(r["problem_id"], r["sample"]) for r in rows}) == len(rows) == 80
    assert 0 < sum(r["correct"] for r in rows) < 80


def test_evaluate_with_vllm(tmp_path, guesser, guess_data):
    """Two processes, two models one after the other, and the greedy answers of transformers; some end at a stop string."""
    args = [f'--benchmarks=["{guess_data[1]}"]', "--max_tokens=12", "--max_prompt_tokens=40", "--device=cpu", "--grade_workers=1",
            "--benchmark_stop={'problems': '77\\\\boxed'}"]
    two = f'--models=["{guesser}", "{guesser}/../model"]'
    torchrun(2, "evaluate.py", two, *args, "--engine=vllm", "--samples=1", f"--out_dir={tmp_path}/vllm", timeout=400)
    run("evaluate.py", f'--models=["{guesser}"]', *args, "--engine=hf", f"--out_dir={tmp_path}/hf")
    answers = {}
    for file in tmp_path.glob("*/*.responses.jsonl"):
        rows = read_jsonl(file)
        assert len(rows) == (40 if "hf" in file.parts else 80)
        answers[file] = {r["problem_id"]: (r["response"], r["finish_reason"]) for r in rows if r["mode"] == "greedy"}
        assert all(r["finish_reason"] == "stop" for r in rows if r["response"].endswith("77\\boxed"))
        assert 0 < sum(r["response"].endswith("77\\boxed") for r in rows) < len(rows)
        assert not any("77\\boxed" in r["response"][:-8] for r in rows)
    assert len(answers) == 3 and len(set(map(str, (sorted(a.items()) for a in answers.values())))) == 1


TOOL = '''
import sys, torch
sys.path.insert(0, ".")
import generate
tok, cpu = generate.load_tokenizer(sys.argv[1]), torch.device("cpu")
asked = [(generate.render_prompt(tok, [dict(role="user", content=f"{k}?")]), k, dict(temperature=0.0, max_tokens=100, rounds=3))
         for k in range(10, 30)]
found = []
for kind in ("hf", "vllm"):
    engine = generate.make_engine(kind, sys.argv[1], tok, cpu, torch.float32, 256)
    for live in (4096, 3):                  # 3 at a time: second rounds run beside first ones
        found.append(dict(generate.sample(engine, tok, asked, live)))
hf, *others = found
for other in others:
    assert all(hf[i].tokens == other[i].tokens and hf[i].mask == other[i].mask and hf[i].finish_reason == other[i].finish_reason for i in hf)
    assert max(abs(a - b) for i in hf for a, b in zip(hf[i].logprobs, other[i].logprobs)) < 1e-3
print("CALLS", sum("```output" in tok.decode(a.tokens) for a in hf.values()), flush=True)
engine.close()
'''


def test_the_tool_with_vllm(tmp_path, caller):
    """The same conversations as with transformers' engine: where it stops, what the tool said, what came after."""
    (tmp_path / "tool.py").write_text(TOOL)
    assert int(run(tmp_path / "tool.py", caller, timeout=280).stdout.split("CALLS ")[1].split()[0]) >= 15
